"""DP-SGD for adapters: a Trainer whose steps clip the gradient of every card and add noise."""

import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer

from fedllm_helpers.accounting import RecordPrivacy
from fedllm_helpers.batches import IGNORED
from fedllm_helpers.training import AdapterTrainer


def trainer(plan: RecordPrivacy | None, seed: np.random.SeedSequence) -> partial | None:
    """What :func:`fedllm_helpers.training.fine_tune` takes as ``trainer``: DP-SGD by a plan; None without one.

    Args:
        plan: from :func:`fedllm_helpers.accounting.record_privacy`.
        seed: of the sampling and the noise; whoever knows it can take the noise off. Generators of torch keep 32 bits
            of theirs, which can be tried out one by one: numpy's keep all.
    """
    return None if plan is None else partial(PrivateTrainer, plan=plan, seed=seed)


LEFT_BEHIND = {"activations", "max_batch_len", "grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample"}


class _NoisyOptimizer(DPOptimizer):
    """Opacus' optimiser with noise from a numpy generator."""

    noise: np.random.Generator

    def add_noise(self) -> None:
        """Put the noisy sum of clipped gradients where the optimiser looks for a gradient."""
        scale = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            noise = torch.as_tensor(self.noise.normal(0.0, scale, p.shape), dtype=p.dtype, device=p.device)
            p.grad = (p.summed_grad + noise).view_as(p)


class PrivateTrainer(AdapterTrainer):
    """The Trainer with DP-SGD (Abadi et al. 2016, arXiv:1607.00133): Poisson batches, clipped gradients, noise.

    A card's loss is the mean over its own answer tokens, and cards are summed: with the usual mean over the tokens of
    a batch, one card would change the gradients of the others, and clipping would no longer bound what it does.
    """

    def __init__(self, *args: Any, plan: RecordPrivacy, seed: np.random.SeedSequence, **kw: Any) -> None:
        super().__init__(*args, **kw)
        if self.mu or self.args.gradient_accumulation_steps != 1:
            raise ValueError("DP-SGD goes with neither FedProx nor gradient_accumulation_steps above 1")
        if self.args.fp16:
            raise ValueError(
                "DP-SGD goes without fp16, which scales gradients before they are clipped: set model.dtype"
            )
        self.plan, (self.sampling, self.noise) = plan, map(np.random.default_rng, seed.spawn(2))
        self.args.max_grad_norm = 0.0  # each card's gradient is clipped instead
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def train(self, *args: Any, **kw: Any) -> Any:
        """Train with per-card gradients, and leave the model without hooks."""
        hooks = GradSampleHooks(self.model, loss_reduction="sum", strict=False)
        try:
            with warnings.catch_warnings():  # the first layer has no input with a gradient, and needs none
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                return super().train(*args, **kw)
        finally:
            hooks.remove_hooks()
            for part in (*self.model.modules(), *self.trained):  # nothing of Opacus stays, also after an interruption
                for name in LEFT_BEHIND & vars(part).keys():
                    delattr(part, name)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Each step takes each card with the same small probability, so that a batch may be large, small or empty."""
        draws = (self.sampling.random(len(self.train_dataset)) for _ in range(self.args.max_steps))
        batches = [np.flatnonzero(draw < self.plan.sample_rate).tolist() for draw in draws]
        collate = self.data_collator
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=batches, collate_fn=lambda rows: collate(rows) if rows else {}
        )

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The configured optimiser, fed with the noisy sum of clipped gradients over the expected batch."""
        self.optimizer = _NoisyOptimizer(
            super().create_optimizer(*args),
            noise_multiplier=self.plan.noise_multiplier,
            max_grad_norm=self.plan.clipping_norm,
            expected_batch_size=self.args.train_batch_size,
            loss_reduction="mean",
        )
        self.optimizer.noise = self.noise
        return self.optimizer

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *rest: Any, **kw: Any
    ) -> torch.Tensor:
        """A step whose loss is the mean over its cards; an empty batch steps too, by noise alone."""
        self.optimizer.zero_grad()
        if inputs:
            loss = super().training_step(model, inputs, *rest, **kw) / len(inputs["input_ids"])
        else:
            loss = torch.zeros((), device=self.model.device)
        for p in self.trained:  # in float32, so that the norm to which it is clipped is exact
            p.grad_sample = p.grad_sample.float() if inputs else p.new_zeros((0, *p.shape))
        return loss

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *rest: Any, **kw: Any
    ) -> torch.Tensor:
        """The sum over cards of the mean over a card's answer tokens, in nats."""
        labels = inputs.pop("labels")
        if "logits_to_keep" not in inputs:
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        inputs.pop("shift_labels", None)
        logits = model(**inputs, use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return (losses.sum(1) / (labels != IGNORED).sum(1)).sum()
