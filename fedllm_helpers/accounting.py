"""What differential privacy promises: ε and δ of DP-SGD at a hospital, and of noise on the average.

Limits: the noise comes from numpy's ordinary floating-point generators, which the theory does not cover to the last bit
(Mironov 2012, doi:10.1145/2382196.2382264); how many cards a hospital has, and when it trains, is not hidden; tuning a
learning rate on private cards spends an ε that nobody counts here.
"""

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from fedllm_helpers.training import round_config

# orders of Rényi divergence: near 1 for a large ε, whole and far apart for a small one; broken ones take long
ORDERS = [1 + x for x in (*np.logspace(-4, -0.7, 16), *np.arange(0.25, 10, 0.25), *range(10, 64), *range(64, 1024, 32))]


@dataclass(frozen=True)
class RecordPrivacy:
    """What DP-SGD promises about any one card of a hospital, over all rounds: (ε, δ), and what it takes.

    Neighbouring: a set of cards, and the same with one card that gives no gradient (how many there are is not hidden).
    Each of ``steps`` steps takes each card with
    probability ``sample_rate``; the gradient of each is clipped to ``clipping_norm``, and their sum gets normal noise
    of ``noise_multiplier`` · ``clipping_norm`` per value.
    """

    noise_multiplier: float
    clipping_norm: float
    sample_rate: float
    steps: int
    delta: float
    epsilon: float
    examples: int = 0  # expected over all steps; how many were drawn is part of the secret


@lru_cache(maxsize=256)
def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """ε of the Poisson-sampled Gaussian mechanism after so many steps, by Rényi accounting; ∞ without noise.

    Taught in notebook 05. Source: Mironov, Talwar & Zhang 2019, arXiv:1908.10530, as Opacus computes it.

    Args:
        noise_multiplier: standard deviation of the noise, in units of the sensitivity.
        sample_rate: probability that a step takes a given record; 1 takes all.
        steps: of the mechanism.
        delta: probability with which the promise may fail; well below 1 / records.
    """
    if noise_multiplier == 0:
        return math.inf
    from opacus.accountants import RDPAccountant  # half a second that clients without privacy need not wait

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with _quiet_orders():
        return max(0.0, float(accountant.get_epsilon(delta, alphas=ORDERS)))


@lru_cache(maxsize=256)
def noise_for(target: float, sample_rate: float, steps: int, delta: float) -> float:
    """The noise multiplier with which :func:`epsilon` is just below ``target``.

    Raises:
        ValueError: no noise reaches it in so many steps.
    """
    from opacus.accountants.utils import get_noise_multiplier

    arguments = {"target_epsilon": target, "target_delta": delta, "sample_rate": sample_rate, "steps": steps}
    try:
        with _quiet_orders():
            found = get_noise_multiplier(**arguments, accountant="rdp", epsilon_tolerance=1e-3 * target, alphas=ORDERS)
    except ValueError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(
            f"no noise reaches ε = {target} at δ = {delta} in {steps} steps: allow a larger ε, or take fewer steps"
        )
    return float(found)


@contextlib.contextmanager
def _quiet_orders() -> Iterator[None]:
    """Without Opacus' remark that a larger order might give a smaller ε: where noise is large, it always might."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield


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
    rate, total = batch / cards, steps * cfg.federation.num_rounds
    if how.delta >= 1 / cards:
        raise ValueError(
            f"federation.privacy.record.delta={how.delta} is not below 1 / {cards} cards of a hospital: it promises "
            "nothing; make it smaller"
        )
    noise = noise_for(how.epsilon, rate, total, how.delta) if how.noise_multiplier is None else how.noise_multiplier
    return RecordPrivacy(
        noise, how.clipping_norm, rate, total, how.delta, epsilon(noise, rate, total, how.delta), batch * total
    )


def client_epsilon(cfg: DictConfig) -> float:
    """ε of a hospital that takes part in every round, for all its cards at once; ∞ without noise.

    Neighbouring: a hospital's update, or zeros in its place. Which hospitals a round asks is drawn with a fixed number
    of them, and not by one coin for each: the amplification that a Poisson sample earns is not claimed.
    """
    how = cfg.federation.privacy.client
    if not how.noise_multiplier:
        return math.inf
    return epsilon(how.noise_multiplier, 1.0, cfg.federation.num_rounds, how.delta)


def guarantees(cfg: DictConfig, cards: Iterable[int]) -> pd.DataFrame:
    """A row per hospital: its cards, sample rate, steps, noise multiplier, δ and ε of DP-SGD. Taught in notebook 05."""
    rows = [(number, size, record_privacy(cfg, size)) for number, size in enumerate(cards)]
    names = ["sample_rate", "steps", "noise_multiplier", "delta", "epsilon"]
    found = [(number, size, *(getattr(plan, name) for name in names)) for number, size, plan in rows if plan]
    return pd.DataFrame(found, columns=["hospital", "cards", *names])
