"""Who was in the training? Scores of membership, areas and rates with intervals, and what the text alone tells."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from datasets import Dataset
from scipy.special import logsumexp
from scipy.stats import bootstrap, mannwhitneyu
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from fedllm_helpers.evaluation.scoring import Estimate

LEVELS = (0.001, 0.01, 0.05)  # false positive rates at which the true positive rate is given


@dataclass(frozen=True)
class Roc:
    """A membership attack: its curve, the area under it, and its true positive rate at small false positive rates."""

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    auc: Estimate
    at_tenth_percent: Estimate
    at_1_percent: Estimate
    at_5_percent: Estimate


def scores(
    losses: list[np.ndarray], reference: list[np.ndarray] | None = None, *, attack: str = "loss", share: float = 0.2
) -> np.ndarray:
    """Membership scores of cards from their token losses: the higher, the more a card looks like one trained on.

    Args:
        losses: from :func:`fedllm_helpers.evaluation.token_losses`, of the attacked model.
        reference: of a model that saw none of the cards, such as the untuned one.
        attack: ``"loss"``, of the mean (Yeom et al. 2018, arXiv:1709.01604); ``"difference"``, by how much less the
            summed loss is than that of the reference, the logarithm of a likelihood ratio (as in Carlini et al. 2021,
            arXiv:2012.07805, and Mireshghallah et al. 2022, arXiv:2203.03929); ``"ratio"``, mean loss over that of the
            reference, the course's normalised perplexity in logarithms; ``"min-k"``, the mean of the ``share`` of
            tokens with the largest loss (Shi et al. 2024, arXiv:2310.16789).
        share: of Min-K%.

    Raises:
        ValueError: an unknown attack, or a difference or a ratio without its reference.
    """
    if attack == "loss":
        return -np.array([loss.mean() for loss in losses])
    if attack == "difference" and reference is not None:
        return np.array([other.sum() - loss.sum() for loss, other in zip(losses, reference, strict=True)])
    if attack == "ratio" and reference is not None:
        return -np.array([loss.mean() / max(other.mean(), 1e-6) for loss, other in zip(losses, reference, strict=True)])
    if attack == "min-k":
        return smallest([-loss for loss in losses], share)
    raise ValueError(f"attack {attack!r}: known are loss, min-k, and difference and ratio with a reference")


def smallest(values: list[np.ndarray], share: float = 0.2) -> np.ndarray:
    """The mean of the ``share`` smallest values of each card.

    Of log-probabilities of tokens it is Min-K%; of the standardised ones of
    :func:`fedllm_helpers.evaluation.token_scores`, which compare a token with all others in its place, Min-K%++ (Zhang
    et al. 2025, arXiv:2404.02936).
    """
    return np.array([np.sort(some)[: max(1, round(share * len(some)))].mean() for some in values])


def relative(attacked: np.ndarray, shadows: np.ndarray, inside: np.ndarray, population: np.ndarray) -> np.ndarray:
    """Offline RMIA: in how many of a population's cards a card gained less than in this one (Zarifzadeh et al. 2024).

    The gain of a card is its log-likelihood under the attacked model beyond that under shadow models that did not have
    it, on average over their probabilities. Source: arXiv:2312.03262, with γ = 1 and a = 1, as probabilities of whole
    answers are far below one.

    Args:
        attacked: log-likelihood of each card under the attacked model, of shape (cards,).
        shadows: under each shadow model, of shape (models, cards).
        inside: whether that model was trained on the card, of the same shape.
        population: positions of cards that were in no training of the attacked model, as the attacker knows.

    Raises:
        ValueError: a card that every shadow model was trained on.
    """
    gain = attacked - outside(shadows, inside)
    known = np.sort(gain[population])
    return np.searchsorted(known, gain, side="right") / len(known)


def outside(shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Log-likelihood of each card under the shadow models without it, on average over their probabilities, (cards,).

    Args:
        shadows, inside: of :func:`relative`, of shape (models, cards).

    Raises:
        ValueError: a card that every shadow model was trained on.
    """
    if inside.all(axis=0).any():
        raise ValueError(f"card {int(np.argmax(inside.all(axis=0)))} was in the training of every shadow model")
    return logsumexp(np.where(inside, -np.inf, shadows), axis=0) - np.log((~inside).sum(axis=0))


def membership(members: np.ndarray, others: np.ndarray, seed: int = 0) -> Roc:
    """How well scores tell members from others, with bootstrap intervals over both. Taught in notebook 05a.

    Args:
        members, others: scores of cards trained on, and of cards held out by the same random split.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two of either.
    """
    if min(len(members), len(others)) < 2:
        raise ValueError(f"{len(members)} members and {len(others)} others: an interval needs two of each")
    truth, given = np.repeat([1, 0], [len(members), len(others)]), np.concatenate([members, others])
    false_positive, true_positive, _ = roc_curve(truth, given)
    areas = [_interval(_area, members, others, seed)]
    areas += [_interval(partial(_rate, level=level), members, others, seed) for level in LEVELS]
    return Roc(false_positive, true_positive, *areas)


def text_baseline(members: Dataset, others: Dataset, seed: int = 0) -> Roc:
    """The membership attack of someone who has no model: a classifier of the texts alone, cross-validated.

    A fair comparison gives it nothing to find: its area is about 0.5. Logistic regression on words and pairs of words.
    """
    texts = [f"{card['question']} {card['answer']}" for part in (members, others) for card in part]
    truth = np.repeat([1, 0], [len(members), len(others)])
    reader = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]"), LogisticRegression(C=10))
    folds = StratifiedKFold(10, shuffle=True, random_state=seed)
    given = cross_val_predict(reader, texts, truth, cv=folds, method="decision_function")
    return membership(given[truth == 1], given[truth == 0], seed)


def _area(members: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
    """Share of pairs in which the member scores higher, ties half: the area under the curve."""
    pairs = members.shape[axis] * others.shape[axis]
    return mannwhitneyu(members, others, axis=axis, method="asymptotic").statistic / pairs


def _rate(members: np.ndarray, others: np.ndarray, level: float, axis: int = -1) -> np.ndarray:
    """Share of members above the score that so few of the others exceed."""
    return (members > np.quantile(others, 1 - level, method="higher", axis=axis, keepdims=True)).mean(axis)


def _interval(statistic: Callable, members: np.ndarray, others: np.ndarray, seed: int) -> Estimate:
    rng = np.random.default_rng(seed)
    interval = bootstrap(
        (members, others), statistic, paired=False, vectorized=True, method="percentile", n_resamples=500, rng=rng
    ).confidence_interval
    return Estimate(
        float(statistic(members, others)), float(interval.low), float(interval.high), len(members) + len(others)
    )
