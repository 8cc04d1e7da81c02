"""Fine-tune an adapter on flashcards with the Trainer."""

import contextlib
import gc
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fedllm_helpers import folders, limits, models
from fedllm_helpers.config import checked
from fedllm_helpers.training import memory
from fedllm_helpers.training.batches import LengthBatches, check_cards, collate, encode, takes_logits_to_keep
from fedllm_helpers.training.progress import ProgressBar

logger = logging.getLogger(__name__)
HISTORY = ["step", "loss", "learning_rate"]


@dataclass(frozen=True)
class TrainingRecord:
    """What one training did: ``examples`` and ``tokens`` went through the model, and how much of its input was padding.

    ``history`` has a row per logged step: ``step``, ``loss`` (nats per answer token), ``learning_rate``.
    """

    history: pd.DataFrame
    examples: int
    tokens: int
    padding_share: float
    seconds: float


@memory.loaded_set_aside()
def fine_tune(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    cards: Dataset,
    cfg: DictConfig,
    *,
    learning_rate: float | None = None,
    proximal_mu: float = 0.0,
    trainer: Callable[..., "AdapterTrainer"] | None = None,
    description: str | None = "training",
) -> TrainingRecord:
    """Train the adapter in place with ``transformers.Trainer``, on the answers alone. Taught in notebook 02.

    Args:
        model, tokenizer: from :func:`fedllm_helpers.models.load`.
        cards: flashcards of one owner.
        cfg: its ``train.training_arguments`` (:mod:`fedllm_helpers.config.training_arguments`) go to the Trainer.
        learning_rate: in place of the configured one; a federation sets it round by round.
        proximal_mu: μ of FedProx, which adds ½ μ‖w − w₀‖² to the loss, w₀ the adapter as it comes (Li et al. 2020,
            arXiv:1812.06127); the loss reported is without it.
        trainer: makes another Trainer, such as one with DP-SGD (:func:`fedllm_helpers.training.dp_sgd.trainer`).
        description: of the bar with loss and time left; None shows none.

    Returns:
        A record of the loss, the examples and tokens seen, the share of padding, and the seconds.

    Raises:
        ValueError: no cards, or cards that do not fit ``train.seq_length``; a rate or μ out of bounds.
        FloatingPointError: the loss is no longer finite. Whatever ends a training, the adapter is as it was before.
    """
    limits.number("proximal_mu", proximal_mu, above=False)
    limits.number("learning_rate", 1.0 if learning_rate is None else learning_rate)
    rows = _encoded(cards, tokenizer, cfg)
    collator = partial(collate, tokenizer=tokenizer, answer_logits_only=takes_logits_to_keep(model))
    bar = [] if description is None else [ProgressBar(description)]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = _training_arguments(cfg, model.device.type, learning_rate, scratch)
        trainer = (trainer or AdapterTrainer)(model, arguments, collator, rows, bar, proximal_mu)
        seconds = _train(trainer, model)
    gc.collect()  # the Trainer refers to itself; at the end of the outermost block, memory is given back
    history = pd.DataFrame([row for row in trainer.state.log_history if "loss" in row], columns=HISTORY)
    share = 1 - trainer.tokens / max(trainer.cells, 1)
    return TrainingRecord(history, trainer.examples, trainer.tokens, share, seconds)


def _train(trainer: "AdapterTrainer", model: PeftModel) -> float:
    """Train, in so many seconds; whatever ends it early, the model is as it was before, and set to evaluate."""
    before, start = models.get_adapter(model), time.perf_counter()
    try:
        trainer.train()
    except BaseException:
        models.set_adapter(model, before)
        raise
    finally:
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # of accelerate's own settings
        model.eval()
    return time.perf_counter() - start


def _encoded(cards: Dataset, tokenizer: PreTrainedTokenizerBase, cfg: DictConfig) -> list[dict]:
    check_cards(cards, least=1)
    rows = encode(cards, tokenizer, checked(cfg).train.seq_length, cfg.dataset.prompt)
    batch = cfg.train.training_arguments.get("per_device_train_batch_size", 8)
    if batch > len(rows):
        logger.warning("per_device_train_batch_size=%d: there are %d cards, and a step takes all", batch, len(rows))
    return rows


def _training_arguments(cfg: DictConfig, device: str, learning_rate: float | None, scratch: str) -> dict[str, Any]:
    keeps_nothing = cfg.train.training_arguments.get("save_strategy", "steps") == "no"
    ours = {
        "output_dir": scratch if keeps_nothing else "checkpoints",
        "seed": cfg.seed,
        "logging_steps": 1,
        "disable_tqdm": True,  # our own bar writes to stdout: what a notebook keeps of it is its last line
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_nan_inf_filter": False,
        "train_sampling_strategy": "group_by_length",
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device == "cuda",
        "report_to": "none",
    }
    given = {k: v for k, v in OmegaConf.to_container(cfg.train.training_arguments).items() if v is not None}
    return {**ours, **given, **({} if learning_rate is None else {"learning_rate": learning_rate})}


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints are adapter folders: safetensors, nothing pickled."""

    def __init__(
        self, model: PeftModel, arguments: dict, collator: Callable, rows: list[dict], callbacks: list, mu: float = 0.0
    ) -> None:
        given = TrainingArguments(**arguments)
        given._n_gpu = min(given.n_gpu, 1)  # Trainer would split a batch over all GPUs, and `logits_to_keep` with it
        super().__init__(model, given, collator, rows, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.examples, self.tokens, self.cells, self.kept, self.mu = 0, 0, 0, [], mu
        trained = [p for p in model.parameters() if p.requires_grad]
        self.pulled = [(p, p.detach().clone()) for p in trained] if mu else []

    def training_step(self, model: PeftModel, inputs: dict[str, torch.Tensor], *rest: Any, **kw: Any) -> torch.Tensor:
        """A step of the Trainer, with its examples, tokens and cells (tokens and padding) counted."""
        mask = inputs["attention_mask"]
        self.examples, self.tokens = self.examples + len(mask), self.tokens + int(mask.sum())
        self.cells += mask.numel()
        loss = super().training_step(model, inputs, *rest, **kw)
        if not torch.isfinite(loss):
            rate = self.args.learning_rate
            raise FloatingPointError(
                f"the loss is {loss:.0f} after {self.state.global_step} steps: lower the rate, {rate}"
            )
        for weight, start in self.pulled:  # the gradient of ½ μ‖w − w₀‖², spread over the batches of a step
            pull = self.mu / self.args.gradient_accumulation_steps
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - start, alpha=pull)
            elif not torch.equal(weight, start):  # a layer that no card of this batch went through, but others did
                weight.grad = pull * (weight.detach() - start)
        return loss

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager:
        """Half-precision products; the adapter itself stays float32."""
        return models.autocast(self.model)

    def _get_train_sampler(self, train_dataset: list[dict] | None = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        return LengthBatches(lengths, self.args.train_batch_size, self.args.seed)

    def _save_checkpoint(self, model: PeftModel, trial: Any) -> None:
        if not self.kept:
            self.args.output_dir = str(folders.unused(self.args.output_dir, PREFIX_CHECKPOINT_DIR))
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.kept.append(models.save_adapter(self.model, folder))
        while len(self.kept) > (self.args.save_total_limit or len(self.kept)):  # of this training; others' stay
            folders.remove(self.kept.pop(0), *folders.ADAPTER)
