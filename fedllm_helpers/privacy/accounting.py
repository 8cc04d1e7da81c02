"""What differential privacy promises: ε and δ of DP-SGD at a hospital, and of noise on the average.

Limits: the noise comes from numpy's ordinary floating-point generators, which the theory does not cover to the last bit
(Mironov 2012, doi:10.1145/2382196.2382264); how many cards a hospital has, and when it trains, is not hidden; tuning a
learning rate on private cards spends an ε that nobody counts here.

Neighbouring: a set of records, and the same with one that gives no gradient; its ε is that of adding or removing one.

ε is the smallest of three upper bounds, and so never below the true one:

- by the distribution of the privacy loss: on a grid, rounded so that ε can only grow (Doroshenko et al. 2022,
  arXiv:2207.04380), and composed by fast Fourier transform (Koskela, Jälkö & Honkela 2020, arXiv:1906.03049). It is
  almost always the smallest, and within a thousandth of the true ε for usual settings;
- without the sampling, which only helps privacy (Balle & Wang 2018, arXiv:1805.06530); exact for a sample rate of 1;
- by Rényi divergence (Mironov, Talwar & Zhang 2019, arXiv:1908.10530), for a δ that is too small for the grid.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from fedllm_helpers import limits

if TYPE_CHECKING:
    from dp_accounting import DpEvent

ORDERS = [*range(2, 17), 20, 24, 32, 48, 64, 96, 128, 256]  # of Rényi divergence; whole ones are quick
LEAST_NOISE, MOST_NOISE = 1e-9, 1e6  # as the configuration allows; less counts as none
COARSEST = 700.0  # grid of losses: exp of it must be a number

Mechanism = tuple[float, float, int]  # noise multiplier, sample rate, steps


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
    """ε of the Poisson-sampled Gaussian mechanism after so many steps; ∞ without noise. See :func:`composed`.

    Taught in notebook 05b.

    Args:
        noise_multiplier: standard deviation of the noise, in units of the sensitivity.
        sample_rate: probability that a step takes a given record; 1 takes all.
        steps: of the mechanism.
        delta: probability with which the promise may fail; well below 1 / records.
    """
    return composed([(noise_multiplier, sample_rate, steps)], delta)


def composed(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """ε of several Poisson-sampled Gaussian mechanisms, one after the other; a record may be in all of them.

    Args:
        mechanisms: (noise multiplier, sample rate, steps) of each; none gives 0, one without noise ∞.
        delta: probability with which the promise may fail.

    Raises:
        ValueError: a mechanism that cannot be.
    """
    total: Counter[tuple[float, float]] = Counter()
    for noise, rate, steps in mechanisms:
        if not (noise >= 0 and 0 <= rate <= 1 and steps >= 0):
            raise ValueError(f"{noise=}, {rate=}, {steps=}: allowed are from 0, from 0 to 1, and from 0")
        if rate > 0 and steps > 0:
            total[noise, rate] += steps
    if not total:
        return 0.0
    if delta <= 0 or min(total)[0] < LEAST_NOISE:
        return math.inf
    return _composed(tuple(sorted((*kind, steps) for kind, steps in total.items())), delta)


@lru_cache(maxsize=1024)
def _composed(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """:func:`composed` of mechanisms that differ and all have noise, rate and steps."""
    from dp_accounting.rdp import RdpAccountant  # a second that clients without privacy need not wait

    skipped = sum(steps * (math.log1p(-rate) if rate < 1 else -math.inf) for _, rate, steps in mechanisms)
    if -math.expm1(skipped) <= delta:  # the probability that any step takes the record at all
        return 0.0
    unsampled = _unsampled(mechanisms, delta)
    if unsampled == 0 or all(rate == 1 for _, rate, _ in mechanisms):
        return unsampled
    renyi = float(RdpAccountant(ORDERS).compose(_event(mechanisms)).get_epsilon(delta))
    found = min(unsampled, renyi or math.inf)  # a 0 may be what rounding left of it
    expected, before = min(unsampled, renyi), math.inf
    for _ in range(3):  # the grid is to be as fine as the result asks for, which is not known before
        interval = _interval(mechanisms, expected)
        if interval > min(before / 2, COARSEST):
            break
        expected, before = _by_loss(mechanisms, delta, interval), interval
        found = min(found, expected)
    return found


def _unsampled(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """ε of the mechanisms if each took all records: together they are one Gaussian mechanism, of known ε."""
    from dp_accounting import get_epsilon_gaussian

    means = math.hypot(*(math.sqrt(steps) / noise for noise, _, steps in mechanisms))
    if means > 1e4 and delta < 1:
        # ε of 10⁷ and more, where rounding spoils the exact one: the loss that is exceeded with probability δ
        return means * (means / 2 - NormalDist().inv_cdf(delta))
    with np.errstate(all="ignore"):  # the library takes the logarithm of a δ of 0
        return float(get_epsilon_gaussian(1 / means, delta))


def _interval(mechanisms: tuple[Mechanism, ...], expected: float) -> float:
    """Between points of the grid of losses: a thousandth of the expected ε, less for many steps.

    One step gets 100,000 points at most. Its loss is log(1 - q + q·exp(l)), where l is that of the Gaussian mechanism,
    below (1/2 + 10·noise) / noise² but for ten standard deviations; its least is log(1 - q).
    """
    fine = max(expected, 1e-3) / max(1000, 200 * math.sqrt(sum(steps for *_, steps in mechanisms)))
    sampled = [(noise, q) for noise, q, _ in mechanisms if q < 1]
    spans = [np.logaddexp(0, math.log(q / (1 - q)) + (0.5 + 10 * noise) / noise**2) for noise, q in sampled]
    return float(max(fine, max(spans) / 1e5))


def _by_loss(mechanisms: tuple[Mechanism, ...], delta: float, interval: float) -> float:
    """The pessimistic ε from the distribution of the privacy loss on a grid; ∞ where δ is below its cut tails."""
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=interval)
    with np.errstate(all="ignore"):  # exp(-ε) is 0 from ε = 745, where the library takes the next loss on the grid
        return float(accountant.compose(_event(mechanisms)).get_epsilon(delta))


def _event(mechanisms: tuple[Mechanism, ...]) -> "DpEvent":
    """Mechanisms in the words of the library."""
    from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    once = [(GaussianDpEvent(noise), rate, steps) for noise, rate, steps in mechanisms]
    sampled = [(one if rate == 1 else PoissonSampledDpEvent(rate, one), steps) for one, rate, steps in once]
    return ComposedDpEvent([SelfComposedDpEvent(one, steps) for one, steps in sampled])


@lru_cache(maxsize=256)
def noise_for(target: float, sample_rate: float, steps: int, delta: float) -> float:
    """The noise multiplier with which :func:`epsilon` is ``target``, or up to 0.1 % below it; found by bisection.

    Where δ alone allows all, the smallest noise there is.

    Raises:
        ValueError: no noise reaches it in so many steps.
    """

    def enough(noise: float) -> bool:
        """Whether so much noise keeps the promise."""
        return epsilon(noise, sample_rate, steps, delta) <= target

    high = 1.0
    while not enough(high) and high < MOST_NOISE:
        high *= 2
    if not (0 < target < math.inf and enough(high)):
        raise ValueError(
            f"no noise reaches ε = {target} at δ = {delta} in {steps} steps: allow a larger ε, or take fewer steps"
        )
    while enough(high / 2):
        high /= 2
    low = high / 2
    while high > 1.0001 * low and epsilon(high, sample_rate, steps, delta) < 0.999 * target:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


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
