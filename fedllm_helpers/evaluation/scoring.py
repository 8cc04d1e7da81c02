"""How good is a model: answer likelihood and greedy answers, each figure with n and an interval."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from datasets import Dataset
from omegaconf import DictConfig
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import limits
from fedllm_helpers.config import checked
from fedllm_helpers.data.prompts import prompt_ids
from fedllm_helpers.evaluation.intervals import Estimate, bootstrapped
from fedllm_helpers.evaluation.tokens import token_losses
from fedllm_helpers.models import fitting
from fedllm_helpers.training.batches import check_cards, encode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerScores:
    """Per card: the summed negative log-likelihood of its answer in nats, and its tokens; both of shape (cards,)."""

    nll: np.ndarray
    tokens: np.ndarray

    def select(self, mask: np.ndarray) -> "AnswerScores":
        """The scores of some cards; ``mask`` is boolean or positions."""
        return AnswerScores(self.nll[mask], self.tokens[mask])


def score_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    cards: Dataset | list[dict],
    cfg: DictConfig,
    *,
    batch_size: int = 8,
    description: str | None = None,
) -> AnswerScores:
    """Negative log-likelihood of each card's answer, given its question. Taught in notebook 02.

    Args:
        model, tokenizer: from :func:`fedllm_helpers.models.load`.
        cards: rows of ``question`` and ``answer``.
        cfg: its ``dataset.prompt`` and ``train.seq_length``, as in training.
        batch_size: cards at a time; cards of like length share a batch.
        description: of a progress bar; None shows none.

    Returns:
        Sums per card, in the order of ``cards``. A card whose question fills ``seq_length`` cannot be scored: it has 0
        nats over 0 tokens, and a line of the log says which and how many.

    Raises:
        ValueError: no card can be scored.
    """
    check_cards(cards)
    options = {"batch_size": batch_size, "description": description}
    try:
        losses = token_losses(model, tokenizer, cards, cfg, **options)
    except ValueError:
        cards = list(cards)
        fit = _fit(cards, tokenizer, cfg)
        if all(fit) or not any(fit):
            raise
        said = "%d of %d cards cannot be scored, their questions fill train.seq_length=%d: the first is card %d, %r"
        first = fit.index(False)
        logger.warning(
            said, fit.count(False), len(fit), cfg.train.seq_length, first + 1, f"{cards[first]['question']:.60}"
        )
        some = [card for card, one in zip(cards, fit, strict=True) if one]
        found = iter(token_losses(model, tokenizer, some, cfg, **options))
        losses = [next(found) if one else np.zeros(0) for one in fit]
    return AnswerScores(np.array([loss.sum() for loss in losses]), np.array([len(loss) for loss in losses], dtype=int))


def _fit(cards: list[dict], tokenizer: PreTrainedTokenizerBase, cfg: DictConfig) -> list[bool]:
    """Whether each card leaves room for a token of its answer."""
    try:
        encode(cards, tokenizer, cfg.train.seq_length, cfg.dataset.prompt)
    except ValueError:
        if len(cards) == 1:
            return [False]
        half = len(cards) // 2
        return [one for part in (cards[:half], cards[half:]) for one in _fit(part, tokenizer, cfg)]
    return [True] * len(cards)


def mean_nll(scores: AnswerScores, seed: int = 0) -> Estimate:
    """Nats per answer token: summed negative log-likelihood over summed tokens, with a bootstrap over cards.

    Of one card there is the value without an interval, whose ends are NaN.

    Raises:
        ValueError: no card was scored.
    """
    scores = scores.select(scores.tokens > 0)
    if not len(scores.nll):
        raise ValueError("no card was scored: train.evaluate_split holds out a share of the cards, if it is above 0")
    if len(scores.nll) == 1:
        return Estimate(float(scores.nll[0] / scores.tokens[0]), float("nan"), float("nan"), 1)
    return bootstrapped(lambda nll, tokens, axis: nll.sum(axis) / tokens.sum(axis), (scores.nll, scores.tokens), seed)


def perplexity(scores: AnswerScores, seed: int = 0) -> Estimate:
    """exp of :func:`mean_nll`: among how many equally likely tokens the model hesitates."""
    nll = mean_nll(scores, seed)
    return Estimate(*np.exp([nll.value, nll.low, nll.high]).tolist(), nll.n)


def nll_difference(first: AnswerScores, second: AnswerScores, seed: int = 0) -> Estimate:
    """Nats per token of ``first`` minus ``second`` on the same cards; paired bootstrap over cards.

    Raises:
        ValueError: the two were not scored on the same cards.
    """
    if not np.array_equal(first.tokens, second.tokens):
        raise ValueError("a paired difference needs scores of the same cards in the same order")
    scored = first.tokens > 0
    samples = (first.nll[scored], second.nll[scored], first.tokens[scored])
    return bootstrapped(lambda a, b, tokens, axis: (a.sum(axis) - b.sum(axis)) / tokens.sum(axis), samples, seed)


def accuracy(correct: np.ndarray, seed: int = 0) -> Estimate:
    """Share of right picks, with a bootstrap over questions."""
    return bootstrapped(lambda right, axis: right.mean(axis), (np.asarray(correct, dtype=float),), seed)


@torch.no_grad()
def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str] | list[dict],
    cfg: DictConfig,
    *,
    max_new_tokens: int = 40,
) -> list[str]:
    """Greedy answers to questions or cards, each up to an end token of tokenizer or model, or ``max_new_tokens``.

    Raises:
        ValueError: no list of questions, no room for an answer, or a prompt beyond the model's positions.
    """
    listed = isinstance(questions, Iterable) and not isinstance(questions, (str, dict))
    texts = [q.get("question") if isinstance(q, dict) else q for q in questions] if listed else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"questions={questions!r:.60}: expected a list of texts, or of cards with a 'question'")
    limits.whole("max_new_tokens", max_new_tokens)
    ids = [prompt_ids(question, tokenizer, checked(cfg).dataset.prompt) for question in questions]
    length, positions = max(map(len, ids), default=0), fitting.max_positions(model.config)
    if positions is not None and length + max_new_tokens > positions:
        raise ValueError(
            f"the longest prompt has {length} tokens, the answer may have {max_new_tokens}: "
            f"the model has {positions} positions for both"
        )
    sizes = {len(each) for each in ids} if tokenizer.padding_side == "right" else {length}  # no padding on the left
    answers = [""] * len(ids)
    for size in sorted(sizes) if ids else ():
        part = [i for i, each in enumerate(ids) if len(each) == size or len(sizes) == 1]
        for i, text in zip(part, _answers(model, tokenizer, [ids[i] for i in part], max_new_tokens), strict=True):
            answers[i] = text
    return answers


def _answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    """The greedy continuations of prompts in one batch, up to an end token."""
    ends, padding = fitting.end_tokens(model, tokenizer), {"return_tensors": "pt", "padding_side": "left"}
    given = tokenizer.pad({"input_ids": prompts}, **padding)
    tokens = {key: given[key].to(model.device) for key in ("input_ids", "attention_mask")}
    options = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    out = model.generate(**tokens, max_new_tokens=max_new_tokens, **options)[:, tokens["input_ids"].shape[1] :]
    rows = [list(takewhile(lambda token: token not in ends, row)) for row in out.tolist()]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
