"""What a hospital tells of an adapter on its own held-out cards: a mean, with noise where that was promised."""

import logging
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ConfigRecord
from omegaconf import DictConfig

from fedllm_helpers import evaluation, training  # a small message waits for nothing of what they import
from fedllm_helpers.privacy import promises

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from fedllm_helpers.evaluation import AnswerScores
    from fedllm_helpers.privacy.accounting import RecordPrivacy

logger = logging.getLogger(__name__)


def told(
    model: "PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    cards: "Dataset",
    cfg: DictConfig,
    seed: np.random.SeedSequence,
) -> tuple[dict[str, float], dict[str, ConfigRecord]]:
    """The numbers of a reply, and what is promised of them, for the hospital's policy.

    Args:
        model, tokenizer: with the adapter that is scored.
        cards: held out.
        cfg: its ``federation.privacy.scores`` says whether there is noise.
        seed: of the noise.

    Returns:
        ``num-examples`` and ``nll``. Without noise that is nats per answer token; with it the mean over cards of each
        card's nats per token (:func:`protected`), so that no card counts for more than another.

    Raises:
        ValueError: the settings promise nothing for so many cards; without noise, no card can be scored.
    """
    some, plan = promised(cfg, cards)
    if plan is None:
        scores = evaluation.score_answers(model, tokenizer, cards, cfg)
        return {"num-examples": len(cards), "nll": float(scores.nll.sum() / scores.tokens.sum())}, {}
    try:
        scores = evaluation.score_answers(model, tokenizer, some, cfg)
    except ValueError as error:  # that none fits would be an exact answer: it stays in the node's own log
        logger.error("%s", error)
        scores = evaluation.AnswerScores(np.zeros(len(some)), np.zeros(len(some), dtype=int))
    how, size = cfg.federation.privacy, training.guarantees.score_noise(cfg, len(some))
    nll = protected(scores, how.scores.largest_nll, size, np.random.default_rng(seed))
    promise = promises.promise(plan, 1, seeded=how.noise_seed is not None)
    return {"num-examples": len(some), "nll": nll}, promise


def promised(cfg: DictConfig, cards: "Dataset") -> tuple["Dataset", "RecordPrivacy | None"]:
    """The held-out cards that are scored, and what is promised of them; all of them, and None, where nothing is.

    Raises:
        ValueError: the settings promise nothing for so many cards, or cards do not say whose they are.
    """
    if cfg.federation.privacy.scores.epsilon is None or not len(cards):
        return cards, None
    some, owners = training.guarantees.owned(cfg, cards)
    return some, training.guarantees.score_privacy(cfg, len(some) if owners is None else int(owners.max()) + 1)


def protected(scores: "AnswerScores", largest: float, noise: float, generator: np.random.Generator) -> float:
    """A mean of nats per token over cards, in which one card can be hidden.

    Each card counts with its nats per token, or ``largest`` where it has more; one that could not be scored, or whose
    score is no number, with half of it. What noise moved outside 0 to ``largest`` is moved back, which tells nothing.

    Args:
        scores: per card.
        largest: nats per token.
        noise: standard deviation of the normal noise on the mean, in nats per token.
        generator: of it.
    """
    rates = np.divide(scores.nll, scores.tokens, out=np.full(len(scores.nll), largest / 2), where=scores.tokens > 0)
    rates = np.where(np.isnan(rates), largest / 2, rates)  # which the sender of an adapter can make of one card
    mean = np.clip(rates, 0.0, largest).mean() + noise * generator.normal()
    return float(np.clip(mean, 0.0, largest))
