"""What the settings of a federation promise: (ε, δ) of DP-SGD at each hospital, and of noise on the average."""

import logging
import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from datasets import Dataset
from omegaconf import DictConfig

from fedllm_helpers.privacy.accounting import RecordPrivacy, epsilon, plan
from fedllm_helpers.training.schedule import round_config

logger = logging.getLogger(__name__)


def owned(cfg: DictConfig, cards: Dataset) -> tuple[Dataset, np.ndarray | None]:
    """The cards that a promise may be about, and whose each is.

    Of a patient with more than ``federation.privacy.record.cards_per_patient`` so many are chosen, by the seed; a card
    without ``patient_id`` is a patient of its own. The promise is about a hospital's own patients: one who is also at
    another hospital is protected by neither ε alone.

    Raises:
        ValueError: the cards do not say whose they are.
    """
    most = cfg.federation.privacy.record.cards_per_patient
    if most is None:
        return cards, None
    if "patient_id" not in cards.column_names:
        said = f"federation.privacy.record.cards_per_patient={most}: the cards have no column patient_id"
        raise ValueError(f"{said}; dataset.columns.patient_id=… names one, null protects single cards")
    names = [text or f"card {number}" for number, text in enumerate(cards["patient_id"])]
    order = pd.Series(names).iloc[np.random.default_rng([cfg.seed, 8]).permutation(len(cards))]
    kept = np.sort(order.index[order.groupby(order).cumcount() < most])
    if len(kept) < len(cards):
        said = "federation.privacy.record.cards_per_patient=%d: %d of %d cards are left out"
        logger.warning(said, most, len(cards) - len(kept), len(cards))
    return cards.select(kept), pd.factorize(pd.Series(names).iloc[kept])[0]


def planned(cfg: DictConfig, cards: Dataset) -> tuple[RecordPrivacy | None, Dataset, np.ndarray | None]:
    """The DP-SGD of a hospital with these cards (:func:`record_privacy`), the cards that it may use, and their owners.

    Owners are numbers of patients, one for each card; None where each card stands for itself.

    Raises:
        ValueError: settings that no DP-SGD can follow, or cards that do not say whose they are.
    """
    some, owners = owned(cfg, cards)
    return record_privacy(cfg, len(some) if owners is None else int(owners.max()) + 1), some, owners


def record_privacy(cfg: DictConfig, cards: int) -> RecordPrivacy | None:
    """The DP-SGD of a hospital that takes part in every round; None where the configuration has none.

    Args:
        cfg: its ``federation.privacy.record`` gives ε, and the noise follows, or the noise, and ε follows.
        cards: that the hospital trains on, or its patients, where these are protected; how many is not a secret here.

    A run that is killed in the middle of a round and goes on sends that round twice: it is paid for twice, and counted
    once.

    Raises:
        ValueError: settings that no DP-SGD can follow, in one line.
    """
    how = cfg.federation.privacy.record
    if how.epsilon is None and how.noise_multiplier is None:
        return None
    given = round_config(cfg).train.training_arguments
    batch, steps = given.get("per_device_train_batch_size", 8), given.get("max_steps", -1)
    where, what = "federation.training_arguments", "cards" if how.cards_per_patient is None else "patients"
    if batch > cards:
        raise ValueError(
            f"{where}.per_device_train_batch_size={batch}: a hospital has {cards} {what}, allowed are 1 to that"
        )
    if how.delta >= 1 / cards:
        raise ValueError(
            f"federation.privacy.record.delta={how.delta} is not below 1 / {cards} {what} of a hospital: it promises "
            "nothing; make it smaller"
        )
    noise, target = how.noise_multiplier, how.epsilon if how.noise_multiplier is None else None
    options = {"delta": how.delta, "noise_multiplier": noise, "target": target, "clipping_norm": how.clipping_norm}
    return plan(cards, batch, steps * cfg.federation.num_rounds, **options)


def score_privacy(cfg: DictConfig, cards: int) -> RecordPrivacy | None:
    """What is promised of a hospital's held-out cards if every round asks for its score; None where nothing is.

    A score is a mean over cards, each counted with 0 to ``largest_nll`` nats per token. Measured from the middle of
    these, one card moves the sum by half of ``largest_nll``: that is ``clipping_norm``, times
    ``record.cards_per_patient`` where that is set. Neighbouring: a card, or one that is just in the middle. A
    round that is sent again is paid for again, and not counted here.

    Args:
        cfg: its ``federation.privacy.scores`` gives ε, and the noise follows.
        cards: that are scored, or patients; how many is not a secret here.

    Raises:
        ValueError: settings that promise nothing for so many cards.
    """
    how, most = cfg.federation.privacy.scores, cfg.federation.privacy.record.cards_per_patient or 1
    if how.epsilon is None:
        return None
    if how.delta >= 1 / cards:
        raise ValueError(
            f"federation.privacy.scores.delta={how.delta} is not below 1 / {cards} held-out cards: it promises "
            "nothing; make it smaller"
        )
    options = {"delta": how.delta, "target": how.epsilon, "clipping_norm": most * how.largest_nll / 2}
    return plan(cards, cards, cfg.federation.num_rounds, **options)


def score_noise(cfg: DictConfig, cards: int) -> float:
    """Standard deviation of the noise on a score of so many cards, in nats per token; 0 where none is promised."""
    found = score_privacy(cfg, 1)
    return found.noise_multiplier * found.clipping_norm / cards if found else 0.0


def client_epsilon(cfg: DictConfig) -> float:
    """ε of a hospital that takes part in every round, for all its cards at once; ∞ without noise.

    Neighbouring: a hospital's update, or zeros in its place. Which hospitals a round asks is drawn with a fixed number
    of them, and not by one coin for each: the amplification that a Poisson sample earns is not claimed.
    """
    how = cfg.federation.privacy.client
    if not how.noise_multiplier:
        return math.inf
    return epsilon(how.noise_multiplier, 1.0, cfg.federation.num_rounds, how.delta)


def per_hospital(cfg: DictConfig, cards: Iterable[int]) -> pd.DataFrame:
    """A row per hospital: its cards, sample rate, steps, noise multiplier, δ and ε of DP-SGD. In notebook 05b."""
    rows = [(number, size, record_privacy(cfg, size)) for number, size in enumerate(cards)]
    names = ["sample_rate", "steps", "noise_multiplier", "delta", "epsilon"]
    found = [(number, size, *(getattr(plan, name) for name in names)) for number, size, plan in rows if plan]
    return pd.DataFrame(found, columns=["hospital", "cards", *names])
