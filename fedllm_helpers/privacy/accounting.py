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

from fedllm_helpers import limits

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


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """ε of the Poisson-sampled Gaussian mechanism after so many steps, by Rényi accounting; ∞ without noise.

    Taught in notebook 05. Source: Mironov, Talwar & Zhang 2019, arXiv:1908.10530, as Opacus computes it.

    Args:
        noise_multiplier: standard deviation of the noise, in units of the sensitivity.
        sample_rate: probability that a step takes a given record; 1 takes all.
        steps: of the mechanism.
        delta: probability with which the promise may fail; well below 1 / records.
    """
    return composed([(noise_multiplier, sample_rate, steps)], delta)


def composed(mechanisms: Iterable[tuple[float, float, int]], delta: float) -> float:
    """ε of several such mechanisms, one after the other, on the same records; 0 after none.

    Args:
        mechanisms: (noise multiplier, sample rate, steps) of each.
        delta: as in :func:`epsilon`.
    """
    return _composed(tuple(sorted(mechanisms)), delta)


@lru_cache(maxsize=256)
def _composed(mechanisms: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not mechanisms or min(mechanisms)[0] == 0:
        return math.inf if mechanisms else 0.0
    from opacus.accountants import RDPAccountant  # half a second that clients without privacy need not wait

    accountant = RDPAccountant()
    accountant.history = list(mechanisms)
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


def plan(
    examples: int,
    batch_size: int,
    steps: int,
    *,
    delta: float,
    target: float | None = None,
    noise_multiplier: float | None = None,
    clipping_norm: float = 1.0,
) -> RecordPrivacy:
    """The DP-SGD of one owner of data, over all steps of all rounds: noise from ε, or ε from the noise.

    Args:
        examples: that are trained on; how many is not a secret here.
        batch_size: expected examples of a step, each drawn with probability ``batch_size / examples``.
        steps: of all trainings together.
        delta: below 1 / examples.
        target: ε that is to be kept; or
        noise_multiplier: of the noise, in units of the clipping norm.
        clipping_norm: of the gradient of one example.

    Raises:
        ValueError: a batch above the examples, a δ that promises nothing, or neither or both of ε and noise.
    """
    limits.whole("examples", examples)
    limits.whole("batch_size", batch_size)
    limits.whole("steps", steps)
    limits.number("clipping_norm", clipping_norm)
    if batch_size > examples:
        raise ValueError(f"batch_size={batch_size}: there are {examples} examples, allowed are 1 to that")
    if not 0 < delta < 1 / examples:
        raise ValueError(f"delta={delta}: it promises nothing unless it is between 0 and 1 / {examples} examples")
    if (target is None) == (noise_multiplier is None):
        raise ValueError(f"target={target}, noise_multiplier={noise_multiplier}: give one, and the other follows")
    rate = batch_size / examples
    noise = noise_for(target, rate, steps, delta) if noise_multiplier is None else noise_multiplier
    limits.number("noise_multiplier", noise)
    found = epsilon(noise, rate, steps, delta)
    return RecordPrivacy(noise, clipping_norm, rate, steps, delta, found, batch_size * steps)


@contextlib.contextmanager
def _quiet_orders() -> Iterator[None]:
    """Without Opacus' remark that a larger order might give a smaller ε: where noise is large, it always might."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield
