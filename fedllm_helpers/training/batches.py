"""From cards to batches: token ids with labels on the answer, padding, and cards of like length together."""

import inspect
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedllm_helpers.data.prompts import card_ids
from fedllm_helpers.models import fitting

logger = logging.getLogger(__name__)
IGNORED = -100  # label of a token that is read, not learned: the loss of PyTorch and transformers passes it over


def check_cards(cards: Any, least: int = 0) -> None:
    """Refuse what is no table of cards, such as the pair that :func:`fedllm_helpers.data.load` returns.

    Raises:
        ValueError: one line with what was given.
    """
    if isinstance(cards, tuple):
        raise ValueError(f"cards: given is a tuple of {len(cards)}; unpack it: train, test = data.load(cfg)")
    if not isinstance(cards, Iterable):
        raise ValueError(f"cards: expected rows with 'question' and 'answer', given is {cards!r:.60}")
    first = next(iter(cards), None)
    if first is None and least:
        raise ValueError("cards: there are none to train on")
    names = list(getattr(first, "keys", list)())
    if first is not None and not {"question", "answer"} <= set(names):
        given = f"the columns {', '.join(map(str, names))}" if names else f"rows of type {type(first).__name__}"
        raise ValueError(f"cards: expected rows with 'question' and 'answer', given are {given}")
    for number, card in enumerate(cards, 1):
        if odd := [name for name in ("question", "answer") if not isinstance(card.get(name), str)]:
            raise ValueError(f"card {number}: its {odd[0]} is {card.get(odd[0])!r:.60}, expected a text")


def encode(
    cards: Dataset | list[dict], tokenizer: PreTrainedTokenizerBase, seq_length: int, prompt: str = "short"
) -> list[dict]:
    """Turn cards into token ids with labels on the answer alone. Taught in notebook 02.

    Args:
        cards: rows of ``question`` and ``answer``.
        tokenizer: of the model.
        seq_length: tokens per card at most; a longer answer loses its end, and the log says how many did.
        prompt: one of :data:`fedllm_helpers.data.PROMPTS`, ``chat``, or a template of one's own with ``{question}``.

    Returns:
        Per card ``input_ids`` and ``labels`` of equal length, the token that ends the answer included.

    Raises:
        ValueError: a question or an answer is no text; or ``seq_length`` leaves no room for any token of an answer, and
            the line says for how many cards.
    """
    check_cards(cards)
    rows, lengths, starts = [], [], []
    for ids, start, end in card_ids(list(cards), tokenizer, prompt):
        labels = [IGNORED] * start + ids[start:end] + [IGNORED] * (len(ids) - end)
        rows.append({"input_ids": ids[:seq_length], "labels": labels[:seq_length]})
        lengths.append(end)
        starts.append(start)
    if not rows:
        return []
    cut, empty = (sum(n > seq_length for n in lengths), sum(n >= seq_length for n in starts))
    said = f"train.seq_length={seq_length} cuts {cut} of {len(rows)} cards (the longest has {max(lengths)} tokens)"
    if empty:
        first = next(number for number, n in enumerate(starts, 1) if n >= seq_length)
        raise ValueError(f"{said} and leaves {empty} of them no token of their answer: the first is card {first}")
    if cut:
        logger.warning(said)
    return rows


def collate(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, answer_logits_only: bool = True
) -> dict[str, torch.Tensor]:
    """Pad rows to the longest of the batch, in steps of 4, and mark where logits are wanted.

    The output layer over the whole vocabulary is a fifth of a small model's work, and prompts need none of it: only
    positions before a labelled token keep their logits.

    Args:
        rows: from :func:`encode`.
        tokenizer: gives the padding token and side.
        answer_logits_only: False for models whose ``forward`` knows no ``logits_to_keep``.

    Returns:
        ``input_ids``, ``attention_mask`` and, padded on the left, ``position_ids`` of shape (batch, length); ``labels``
        and ``shift_labels`` of shape (batch, kept), aligned with the logits; ``logits_to_keep`` of shape (kept,).
    """
    length = (
        math.ceil(max(len(row["input_ids"]) for row in rows) / 4) * 4
    )  # fewer shapes: each costs memory and a start
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels, mask = torch.full((len(rows), length), IGNORED), torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        where = slice(length - n, length) if tokenizer.padding_side == "left" else slice(0, n)
        ids[i, where], labels[i, where], mask[i, where] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), 1
    batch = {"input_ids": ids, "attention_mask": mask, **fitting.positions(mask, tokenizer.padding_side)}
    if not answer_logits_only:
        return {**batch, "labels": labels}
    keep = (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)  # the logit at t predicts token t + 1
    kept = labels[:, keep + 1].contiguous()
    return {**batch, "labels": kept, "shift_labels": kept, "logits_to_keep": keep}


def takes_logits_to_keep(model: PeftModel) -> bool:
    """Whether the model can compute logits at some positions only."""
    return "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters


class LengthBatches(torch.utils.data.Sampler[int]):
    """Random order in which cards of like length stand together, so that batches need little padding.

    Unlike the sampler of transformers it does so for small datasets too, and visits the batches in random order: each
    epoch shuffles all cards, sorts stretches of ``stretch`` batches by length, and shuffles the batches of a stretch.

    Args:
        lengths: tokens per card.
        batch_size: cards per batch.
        seed: of the order; every epoch draws a new one from it.
        stretch: batches that are sorted together; 1 sorts nothing.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int = 0, stretch: int = 32) -> None:
        self.lengths, self.batch_size, self.stretch = np.asarray(lengths), batch_size, stretch
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = self.rng.permutation(len(self.lengths))
        for start in range(0, len(order), self.batch_size * self.stretch):
            part = order[start : start + self.batch_size * self.stretch]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            full = len(part) // self.batch_size * self.batch_size
            batches = self.rng.permutation(part[:full].reshape(-1, self.batch_size))
            yield from np.concatenate([batches.ravel(), part[full:]]).tolist()  # a last, smaller batch stays last
