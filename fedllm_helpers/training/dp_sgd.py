"""DP-SGD for adapters: a Trainer whose steps clip the gradient of every card and add noise."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from transformers import Trainer

from fedllm_helpers.privacy.accounting import RecordPrivacy
from fedllm_helpers.privacy.promises import promise
from fedllm_helpers.training.batches import IGNORED
from fedllm_helpers.training.fine_tuning import AdapterTrainer


def trainer(
    plan: RecordPrivacy | None, seed: np.random.SeedSequence, owners: np.ndarray | None = None
) -> partial | None:
    """What :func:`fedllm_helpers.training.fine_tune` takes as ``trainer``: DP-SGD by a plan; None without one.

    Args:
        plan: from :func:`fedllm_helpers.privacy.guarantees.record_privacy`.
        seed: of the sampling and the noise; whoever knows it can take the noise off. Generators of torch keep 32 bits
            of theirs, which can be tried out one by one: numpy's keep all.
        owners: whose each card is, numbers from 0, where whole patients are protected
            (:func:`fedllm_helpers.training.guarantees.planned`).
    """
    return None if plan is None else partial(PrivateTrainer, plan=plan, seed=seed, owners=owners)


def _refusal(name: str, cards: int) -> str:
    layer = name.removeprefix("base_model.model.").split(".lora_")[0]
    return (
        f"DP-SGD: layer {layer} does not give one gradient for each of {cards} cards, and would break the promised ε: "
        "leave it out of model.lora.target_modules"
    )


EXAMPLES, OWNERS = "examples of a batch", "owners of a batch"  # beside the collator's own entries
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


def private(kind: type[Trainer], losses: Callable[[torch.nn.Module, dict[str, Any]], torch.Tensor]) -> type[Trainer]:
    """Make any Trainer private: a class like ``kind`` that also takes ``plan`` and ``seed``, and trains by DP-SGD.

    Its collator stays; ``compute_loss`` becomes the sum of ``losses``.

    Args:
        kind: ``transformers.Trainer``, or a subclass of it.
        losses: (model, inputs) to one loss for each example, shape (examples,), none of which depends on another.

    Raises:
        TypeError: ``kind`` is no Trainer.
    """
    if not (isinstance(kind, type) and issubclass(kind, Trainer)):
        raise TypeError(f"expected transformers.Trainer or a subclass of it, given is {kind!r:.60}")
    return type(f"Private{kind.__name__}", (Private, kind), {"example_losses": staticmethod(losses)})


class Private:
    """What makes a Trainer private (Abadi et al. 2016, arXiv:1607.00133): Poisson batches, clipped gradients, noise.

    Examples' losses are summed: with a mean over the tokens of a batch, one example would change the gradients of the
    others, and clipping would no longer bound what it does. Where ``owners`` say whose each example is, a step draws
    owners with all of their examples, and what is clipped is the mean gradient of one owner's.
    """

    def __init__(
        self,
        *args: Any,
        plan: RecordPrivacy,
        seed: np.random.SeedSequence,
        owners: np.ndarray | None = None,
        **kw: Any,
    ) -> None:
        super().__init__(*args, **kw)
        if owners is not None and len(owners) != len(self.train_dataset):
            raise ValueError(f"owners: {len(owners)} numbers for {len(self.train_dataset)} examples")
        self.owners = owners
        if getattr(self, "mu", 0) or self.args.gradient_accumulation_steps != 1:
            raise ValueError("DP-SGD goes with neither FedProx nor gradient_accumulation_steps above 1")
        if self.args.max_steps < 1:
            raise ValueError(f"max_steps={self.args.max_steps}: DP-SGD counts steps, and takes a whole number from 1")
        if any(getattr(layer, "gradient_checkpointing", False) for layer in self.model.modules()):
            raise ValueError("DP-SGD goes without gradient_checkpointing, which computes layers twice; set it to false")
        self.plan, (self.sampling, self.noise) = plan, map(np.random.default_rng, seed.spawn(2))
        self.args.max_grad_norm = 0.0  # each card's gradient is clipped instead
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.cards = 0
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if p.requires_grad and name not in self.trained:  # one layer in two places, which Opacus counts twice
                raise ValueError(_refusal(name, len(self.train_dataset)))

    def promise(self, *, seeded: bool) -> dict[str, ConfigRecord]:
        """The record for a reply that says by which plan this was trained; see :mod:`promises`.

        Args:
            seeded: whether somebody else knows the seed.

        Raises:
            ValueError: nothing was trained yet, or not to its end.
        """
        if self.state.global_step < self.args.max_steps:
            raise ValueError(f"{self.state.global_step} of {self.args.max_steps} steps are trained: nothing to promise")
        return promise(self.plan, self.args.max_steps, seeded=seeded)

    def train(self, *args: Any, **kw: Any) -> Any:
        """Train with per-card gradients, and leave the model without hooks."""
        hooks = GradSampleHooks(self.model, loss_reduction="sum", strict=False)
        watched = [
            layer.register_forward_pre_hook(partial(self._check_rows, name))
            for name, layer in self.model.named_modules()
            if any(p.requires_grad for p in layer.parameters(recurse=False))
        ]
        try:
            with warnings.catch_warnings():  # the first layer has no input with a gradient, and needs none
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                return super().train(*args, **kw)
        finally:
            hooks.remove_hooks()
            for hook in watched:
                hook.remove()
            for part in (
                *self.model.modules(),
                *self.trained.values(),
            ):  # nothing of Opacus stays, also after an interruption
                for name in LEFT_BEHIND & vars(part).keys():
                    delattr(part, name)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Each step takes each card with the same small probability, so that a batch may be large, small or empty."""
        rows, collate, owners = self.train_dataset, self.data_collator, self.owners
        mine = np.arange(len(rows)) if owners is None else owners
        draws = (self.sampling.random(mine.max(initial=-1) + 1) for _ in range(self.args.max_steps))
        batches = [np.flatnonzero(draw[mine] < self.plan.sample_rate).tolist() for draw in draws]

        def counted(numbers: list[int]) -> dict[str, Any]:
            """The batch, with the number of its examples, and whose they are."""
            whose = {} if owners is None else {OWNERS: mine[numbers].tolist()}
            return {**collate([rows[n] for n in numbers]), EXAMPLES: len(numbers), **whose} if numbers else {}

        return torch.utils.data.DataLoader(range(len(rows)), batch_sampler=batches, collate_fn=counted)

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
        self.cards, whose = inputs.pop(EXAMPLES, 0), inputs.pop(OWNERS, None)
        loss = torch.zeros((), device=self.model.device)
        if inputs:
            loss = super().training_step(model, inputs, *rest, **kw) / self.cards
        for name, p in self.trained.items():  # in float32, so that the norm to which it is clipped is exact
            idle = p.grad_sample is None and (p.grad is None or not p.grad.any())  # a tower of a model for images
            if not idle and (not torch.is_tensor(p.grad_sample) or len(p.grad_sample) != self.cards):
                raise ValueError(_refusal(name, self.cards))
            grads = p.new_zeros((self.cards, *p.shape)) if idle else p.grad_sample.float()
            p.grad_sample = grads if whose is None else _by_owner(grads, whose)
        return loss

    def _check_rows(self, name: str, layer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        """Opacus takes the first axis for the cards: where tokens were made rows of, it would clip tokens."""
        values = given[0] if given else torch.empty(0)
        if len(values) != self.cards or values.ndim < (3 if values.is_floating_point() else 2):
            raise ValueError(_refusal(name, self.cards))

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *rest: Any, **kw: Any
    ) -> torch.Tensor:
        """The sum over examples of their losses.

        Raises:
            ValueError: there is not one loss for each example.
        """
        losses = self.example_losses(model, inputs)
        if losses.shape != (self.cards,):
            raise ValueError(f"DP-SGD: losses have the shape {tuple(losses.shape)}, expected is ({self.cards},)")
        return losses.sum()


def _by_owner(grads: torch.Tensor, whose: list[int]) -> torch.Tensor:
    """The mean gradient of each owner's examples: (examples, …) to (owners, …)."""
    _, place, counts = np.unique(whose, return_inverse=True, return_counts=True)
    sums = grads.new_zeros((len(counts), *grads.shape[1:])).index_add_(
        0, torch.from_numpy(place).to(grads.device), grads
    )
    return sums / torch.from_numpy(counts).to(sums).view(-1, *[1] * (grads.ndim - 1))


class PrivateTrainer(Private, AdapterTrainer):
    """The package's own Trainer with DP-SGD; a card's loss is the mean over its own answer tokens."""

    @staticmethod
    def example_losses(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean over a card's answer tokens, in nats, for each card."""
        labels = inputs.pop("labels")
        if "logits_to_keep" not in inputs:
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        inputs.pop("shift_labels", None)
        logits = model(**inputs, use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return losses.sum(1) / (labels != IGNORED).sum(1)
