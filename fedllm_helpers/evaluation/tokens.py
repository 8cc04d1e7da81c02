"""What a model makes of each token of an answer: its loss, and how it stands among all others in its place."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from omegaconf import DictConfig
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import limits, models
from fedllm_helpers.config import checked
from fedllm_helpers.training import memory
from fedllm_helpers.training.batches import IGNORED, collate, encode, takes_logits_to_keep

ROWS = 32  # of logits, at a time in float32: over a whole vocabulary they fit a processor's cache


def token_losses(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    cards: Dataset | list[dict],
    cfg: DictConfig,
    *,
    batch_size: int = 8,
    description: str | None = None,
) -> list[np.ndarray]:
    """Nats of each answer token of each card, in the order of ``cards``; arguments of :func:`scoring.score_answers`."""
    return _of_tokens([_losses], model, tokenizer, cards, cfg, batch_size=batch_size, description=description)[0]


def token_scores(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, cards: Dataset | list[dict], cfg: DictConfig, **options: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Nats of each answer token of each card; and its log p, less the vocabulary's mean, in standard deviations.

    Mean and deviation are as the model's own probabilities weigh them (Zhang et al. 2025, arXiv:2404.02936). Arguments
    of :func:`token_losses`.
    """
    return tuple(_of_tokens([_losses, _standard], model, tokenizer, cards, cfg, **options))


Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _of_tokens(
    measures: list[Measure],
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    cards: Dataset | list[dict],
    cfg: DictConfig,
    *,
    batch_size: int = 8,
    description: str | None = None,
) -> list[list[np.ndarray]]:
    limits.whole("batch_size", batch_size)
    memory.freed_used_again()
    model.eval()
    rows = encode(cards, tokenizer, checked(cfg).train.seq_length, cfg.dataset.prompt)
    order = np.argsort([len(row["input_ids"]) for row in rows], kind="stable")
    found, keep = [[np.zeros(0)] * len(rows) for _ in measures], takes_logits_to_keep(model)
    with _bar(len(rows), description) as bar:
        for start in range(0, len(rows), batch_size):
            index = order[start : start + batch_size]
            several, mask = _batch(measures, model, collate([rows[i] for i in index], tokenizer, keep))
            for some, values in zip(found, several, strict=True):
                for i, row, wanted in zip(index, values, mask, strict=True):
                    some[i] = row[wanted]
            bar.update(len(index))
    return found


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _standard(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logs = logits.log_softmax(-1)
    p, own = logs.exp(), logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mean = (p * logs).sum(-1)
    spread = ((p * logs.square()).sum(-1) - mean.square()).clamp(min=1e-12).sqrt()
    return (own - mean) / spread


@torch.no_grad()
def _batch(
    measures: list[Measure], model: PeftModel, batch: dict[str, torch.Tensor]
) -> tuple[list[np.ndarray], np.ndarray]:
    batch = {key: value.to(model.device) for key, value in batch.items()}
    labels = batch.pop("labels")
    if "logits_to_keep" not in batch:
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    batch.pop("shift_labels", None)
    mask = labels != IGNORED
    with models.autocast(model):
        logits = model(**batch, use_cache=False).logits[mask]
    found = []
    for measure in measures:
        values = torch.zeros(labels.shape, device=labels.device)
        some = zip(logits.split(ROWS), labels[mask].split(ROWS), strict=True)
        values[mask] = torch.cat([measure(part.float(), wanted) for part, wanted in some])
        found.append(values.double().cpu().numpy())
    return found, mask.cpu().numpy()


def _bar(total: int, description: str | None) -> tqdm:
    style = {"unit": "card", "file": sys.stdout, "ncols": 100, "mininterval": 0.5}
    return tqdm(total=total, desc=description, disable=description is None, **style)
