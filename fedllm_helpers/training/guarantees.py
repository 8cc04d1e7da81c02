"""What the settings of a federation promise: (ε, δ) of DP-SGD at each hospital, and of noise on the average."""

import math
from collections.abc import Iterable

import pandas as pd
from omegaconf import DictConfig

from fedllm_helpers.privacy.accounting import RecordPrivacy, epsilon, plan
from fedllm_helpers.training.fine_tuning import round_config


def record_privacy(cfg: DictConfig, cards: int) -> RecordPrivacy | None:
    """The DP-SGD of a hospital that takes part in every round; None where the configuration has none.

    Args:
        cfg: its ``federation.privacy.record`` gives ε, and the noise follows, or the noise, and ε follows.
        cards: that the hospital trains on; how many is not a secret here.

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
    where = "federation.training_arguments"
    if batch > cards:
        raise ValueError(
            f"{where}.per_device_train_batch_size={batch}: a hospital has {cards} cards, allowed are 1 to that"
        )
    if how.delta >= 1 / cards:
        raise ValueError(
            f"federation.privacy.record.delta={how.delta} is not below 1 / {cards} cards of a hospital: it promises "
            "nothing; make it smaller"
        )
    noise, target = how.noise_multiplier, how.epsilon if how.noise_multiplier is None else None
    options = {"delta": how.delta, "noise_multiplier": noise, "target": target, "clipping_norm": how.clipping_norm}
    return plan(cards, batch, steps * cfg.federation.num_rounds, **options)


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
    """A row per hospital: its cards, sample rate, steps, noise multiplier, δ and ε of DP-SGD. Taught in notebook 05."""
    rows = [(number, size, record_privacy(cfg, size)) for number, size in enumerate(cards)]
    names = ["sample_rate", "steps", "noise_multiplier", "delta", "epsilon"]
    found = [(number, size, *(getattr(plan, name) for name in names)) for number, size, plan in rows if plan]
    return pd.DataFrame(found, columns=["hospital", "cards", *names])
