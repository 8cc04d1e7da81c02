"""Every attack on one adapter, and what each of them says of its cards and canaries. Taught in notebook 05a."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from omegaconf import DictConfig
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import evaluation
from fedllm_helpers.attacks.leakage import Canary, candidates, exposure, extracted
from fedllm_helpers.attacks.members import Roc, membership, scores, smallest


@dataclass(frozen=True)
class Audit:
    """What attacks found in one adapter.

    Attributes:
        nll, tokens, min_k, min_k_plus: per card, members first: summed nats, answer tokens, Min-K% and Min-K%++.
        likelihood: log p of each canary's 1000 candidates, of shape (canaries, 1000).
        exposure, extracted: per canary.
        seconds: of training.
        audited: the least ε that an audit of the first hospital's training shows; NaN where no card has a promise.
    """

    nll: np.ndarray
    tokens: np.ndarray
    min_k: np.ndarray
    min_k_plus: np.ndarray
    likelihood: np.ndarray
    exposure: np.ndarray
    extracted: np.ndarray
    seconds: float
    audited: float = float("nan")


def audit(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    members: Dataset,
    others: Dataset,
    planted: Sequence[Canary],
    cfg: DictConfig,
    *,
    seconds: float = 0.0,
) -> Audit:
    """Every attack on the adapter that is in the model. Taught in notebook 05a.

    Args:
        model, tokenizer: attacked; the attacker may ask for the likelihood of any text.
        members, others: cards trained on, and held out by the same split.
        planted: canaries.
        cfg: its ``dataset.prompt`` and ``train.seq_length``, as in training.
        seconds: to be noted.
    """
    cards = [evaluation.token_scores(model, tokenizer, part, cfg) for part in (members, others)]
    losses, standing = ([values for part in parts for values in part] for parts in zip(*cards, strict=True))
    likelihood = [candidates(model, tokenizer, canary, cfg) for canary in planted]
    return Audit(
        np.array([loss.sum() for loss in losses]),
        np.array([len(loss) for loss in losses]),
        scores(losses, attack="min-k"),
        smallest(standing),
        np.array(likelihood, dtype=np.float32),
        np.array([exposure(*given) for given in zip(likelihood, planted, strict=True)]),
        np.array([extracted(model, tokenizer, canary, cfg) for canary in planted]),
        seconds,
    )


def calibrated(found: Audit, reference: Audit, planted: Sequence[Canary]) -> np.ndarray:
    """Exposure of each canary by what its candidates gained beyond the reference, in bits."""
    given = zip(found.likelihood, planted, reference.likelihood, strict=True)
    return np.array([exposure(*one) for one in given])


def areas(found: Audit, reference: Audit, members: int) -> dict[str, Roc]:
    """The membership attacks on an audited adapter, by name.

    Args:
        found: of the adapter.
        reference: of the untuned one.
        members: how many of the cards were trained on; they come first.
    """
    mean, other = found.nll / found.tokens, reference.nll / reference.tokens
    scores = {"loss": -mean, "ratio": -mean / np.maximum(other, 1e-6), "difference": reference.nll - found.nll}
    scores |= {"min-k": found.min_k, "min-k++": found.min_k_plus}
    return {attack: membership(score[:members], score[members:]) for attack, score in scores.items()}
