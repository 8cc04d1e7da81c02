"""A figure with n and an interval: the bootstrap behind every number of this package, and Student's t over seeds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval over ``n`` cards, questions or seeds."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n < 2:
            return f"{self.value:.2f} (n = {self.n}, too few for an interval)"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.n})"

    def apart_from(self, other: "Estimate") -> bool:
        """Whether the two intervals do not overlap: stricter than a paired test of the same cards."""
        return self.high < other.low or other.high < self.low


def bootstrapped(statistic: Callable, samples: tuple[np.ndarray, ...], seed: int) -> Estimate:
    """A statistic of paired samples, with its 95 % percentile interval from 2,000 seeded resamples.

    Raises:
        ValueError: fewer than two samples.
    """
    from scipy.stats import bootstrap  # clients score without intervals, and start the faster

    n = len(samples[0])
    value = float(statistic(*samples, axis=0))
    if n < 2:
        raise ValueError(f"an interval needs at least 2 cards, there are {n}")
    rng = np.random.default_rng(seed)
    interval = bootstrap(
        samples, statistic, paired=True, vectorized=True, method="percentile", n_resamples=2000, rng=rng
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), n)


def over_seeds(values: Iterable[float]) -> Estimate:
    """The mean of one figure per seed, with its 95 % interval by Student's t: the luck of training, not of cards.

    Seeds whose splits share cards depend on each other a little, so that the interval is rather too short.

    Raises:
        ValueError: fewer than two seeds.
    """
    from scipy.stats import t

    found = np.asarray(list(values), dtype=float)
    if len(found) < 2:
        raise ValueError(f"an interval needs at least 2 seeds, there are {len(found)}")
    half = t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / len(found) ** 0.5
    return Estimate(float(found.mean()), float(found.mean() - half), float(found.mean() + half), len(found))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values that reckon with how many questions were asked. Taught in notebook 05a.

    The k-th smallest of m is multiplied by m + 1 − k, and none becomes smaller than one before it. Source: Holm 1979,
    Scandinavian Journal of Statistics 6, 65.

    Raises:
        ValueError: a value that is no probability.
    """
    given = np.asarray(p_values, dtype=float)
    if not ((given >= 0) & (given <= 1)).all():
        raise ValueError(f"p-values {given.tolist()}: allowed are numbers from 0 to 1")
    order = np.argsort(given, kind="stable")
    found = np.empty(len(given))
    found[order] = np.minimum(1, np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1)))
    return found


def p_text(p: float) -> str:
    """A p-value as text: ``p = 0.020``, and ``p < 1e-5`` below that, where digits say nothing more."""
    return "p < 1e-5" if p < 1e-5 else f"p = {p:.3f}" if p >= 1e-3 else f"p = {p:.0e}"
