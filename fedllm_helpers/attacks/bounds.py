"""Lower bounds on ε from guesses about canaries, each of which is in the data or not by a fair coin.

Three bounds, from the one that assumes least to the one that finds most:

- :func:`lower_bound` holds for any mechanism (Steinke, Nasr & Jagielski 2023, arXiv:2305.08846). It allows that with
  probability δ all is given away, and so stays near 3 at δ = 10⁻³, whatever is guessed.
- :func:`one_run_bound` holds δ(ε) of DP-SGD at every ε against the guesses (Mahloujifar, Melis & Chaudhuri 2024,
  arXiv:2410.22235). That a promise is broken needs no more; the ε takes for granted that the mechanism has the curve of
  DP-SGD with some noise.
- :func:`rates_bound` takes for granted besides that canaries do not depend on each other, as with noise and draws of
  their own (Nasr et al. 2023, arXiv:2302.07956; Andrew et al. 2024, arXiv:2302.03098).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import beta, binom

from fedllm_helpers import limits
from fedllm_helpers.privacy.accounting import epsilon

LEAST_NOISE, MOST_NOISE = 0.05, 50.0  # multipliers among which a bound is looked for
LOSSES = np.concatenate([np.linspace(-2, 12, 281), np.linspace(12.5, 40, 56)])  # ε at which δ(ε) is computed


@dataclass(frozen=True)
class Mechanism:
    """DP-SGD or noise on the average, but for its noise: sample rate (1 takes all), steps, and the δ of the promise."""

    sample_rate: float
    steps: int
    delta: float

    def epsilon(self, noise_multiplier: float) -> float:
        """ε at δ by the package's accountant."""
        return epsilon(noise_multiplier, self.sample_rate, self.steps, self.delta)


def p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Largest probability of so many right guesses, or more, under any (ε, δ)-private mechanism.

    With W ~ Binomial(guesses, e^ε / (1 + e^ε)) it is P[W ≥ v] + 2 m δ · maxᵢ P[v > W ≥ v − i] / i, v the right ones of
    m canaries. Source: Steinke, Nasr & Jagielski 2023, arXiv:2305.08846, theorem 5.2 and appendix D.

    Raises:
        ValueError: more right than guesses, or more guesses than canaries.
    """
    _check(right, guesses, canaries)
    by_chance = expit(epsilon)
    tail = binom.sf(right - 1, guesses, by_chance)
    fewer = np.arange(1, right + 1)
    between = binom.sf(right - fewer - 1, guesses, by_chance) - tail
    return float(min(1.0, tail + 2 * canaries * delta * np.max(between / fewer, initial=0.0)))


def lower_bound(right: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """The ε above which any mechanism lies, from right guesses in one run; 0 where nothing can be said.

    Args:
        right: of the guesses; which canaries are guessed may depend on all that was seen.
        guesses: how many of the canaries are guessed at, the auditor abstains from the others.
        canaries: each included by a fair coin of its own.
        delta: at which ε is bounded.
        confidence: with which the bound holds.

    Raises:
        ValueError: numbers that do not fit together, or a confidence outside (0, 1).
    """
    _check_confidence(confidence)

    def excess(value: float) -> float:
        """Below 0 where the guesses refute an ε."""
        return p_value(right, guesses, canaries, value, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-9))


def one_run_bound(
    right: int, guesses: int, canaries: int, mechanism: Mechanism, confidence: float = 0.95
) -> tuple[float, float]:
    """(Noise multiplier, ε): any larger noise of DP-SGD, that is any smaller ε, is refuted by the right guesses.

    Args:
        right: guesses "included" that are right.
        guesses: "included" for so many canaries, a number fixed in advance.
        canaries: each included by a fair coin of its own; they may depend on each other.
        mechanism: whose noise is in question.
        confidence: with which the bound holds.

    Raises:
        ValueError: numbers that do not fit together, or a confidence outside (0, 1).
    """
    _check(right, guesses, canaries)
    _check_confidence(confidence)

    def refuted(noise: float) -> bool:
        """Whether so much noise contradicts what was guessed."""
        return _refuted_in_one_run(right, guesses, canaries, profile(noise, mechanism), 1 - confidence)

    return _strongest(refuted, mechanism)


def rates_bound(
    caught: tuple[int, int], alarms: tuple[int, int], mechanism: Mechanism, confidence: float = 0.95
) -> tuple[float, float]:
    """(Noise multiplier, ε): any larger noise of DP-SGD, that is any smaller ε, is refuted by two error rates.

    A true positive rate t and a false positive rate f contradict δ(ε) where t > e^ε f + δ(ε) for some ε; t and f are
    the ends of their Clopper-Pearson intervals. Taught in notebook 05b.

    Args:
        caught: canaries that were included and guessed "included", and all that were included.
        alarms: canaries that were left out and guessed "included", and all that were left out.
        mechanism: whose noise is in question.
        confidence: with which the bound holds where canaries do not depend on each other.

    Raises:
        ValueError: more guesses than canaries, or a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    (hits, inside), (false, outside) = caught, alarms
    if not (0 <= hits <= inside and 0 <= false <= outside):
        raise ValueError(f"caught={caught}, alarms={alarms}: expected (some, of all), from 0 to all")
    half = (1 - confidence) / 2
    least = beta.ppf(half, hits, inside - hits + 1) if hits else 0.0
    most = beta.ppf(1 - half, false + 1, outside - false) if false < outside else 1.0

    def refuted(noise: float) -> bool:
        """Whether so much noise contradicts what was guessed."""
        return bool(np.any(least > np.exp(LOSSES) * most + profile(noise, mechanism)))

    return _strongest(refuted, mechanism)


def profile(noise_multiplier: float, mechanism: Mechanism) -> np.ndarray:
    """δ(ε) at every ε of :data:`LOSSES`: an upper estimate, so that what contradicts it contradicts the true one.

    From the distribution of the privacy loss (Doroshenko et al. 2022, arXiv:2207.04380), for one record more or less.
    """
    return _profile(noise_multiplier, mechanism.sample_rate, mechanism.steps)


@lru_cache(maxsize=256)
def _profile(noise: float, rate: float, steps: int) -> np.ndarray:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    interval = (1 / (2 * noise**2) + 5 / noise) * math.sqrt(steps) / 2000  # of a few thousand points in all
    once = from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=interval)
    return np.asarray(once.self_compose(steps).get_delta_for_epsilon(LOSSES))


def _refuted_in_one_run(right: int, guesses: int, canaries: int, deltas: np.ndarray, level: float) -> bool:
    """Algorithm 3 of arXiv:2410.22235 for guesses "included" alone, whose δ counts by half.

    Let r and h be the expected shares of canaries guessed rightly and wrongly in runs with i right guesses or more. A
    canary that is turned round makes of i right guesses i − 1, so that r(i) ≤ e^ε h(i − 1) + δ(ε) / 2 for all ε. From
    runs with as many right guesses as were seen, of probability ``level``, it follows downwards how probable the
    others are at least; more than 1 in all is the contradiction.
    """
    shrink, r, h = np.exp(-LOSSES), level * right / canaries, level * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        wrong = max(h, float(np.max((r - deltas / 2) * shrink)))
        r, h = r + i / (guesses - i) * (wrong - h), wrong
        if r + h > guesses / canaries:
            return True
    return False


def _strongest(refuted: Callable[[float], bool], mechanism: Mechanism) -> tuple[float, float]:
    """The noise from which on all is refuted, by bisection to 0.5 %, and its ε; (∞, 0) where nothing is refuted."""
    low, high = LEAST_NOISE, MOST_NOISE
    if not refuted(high):
        return math.inf, 0.0
    while high > 1.005 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high, mechanism.epsilon(high)


def _check(right: int, guesses: int, canaries: int) -> None:
    for name, value, least in (("canaries", canaries, 1), ("guesses", guesses, 0), ("right", right, 0)):
        limits.whole(name, value, least)
    if not right <= guesses <= canaries:
        raise ValueError(f"{right} right of {guesses} guesses at {canaries} canaries: expected no more than the next")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: allowed is between 0 and 1")
