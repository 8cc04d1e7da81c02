"""A figure with n and an interval: the bootstrap behind every number of this package."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval from a bootstrap over ``n`` cards or questions."""

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
