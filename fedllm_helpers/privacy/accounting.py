"""What differential privacy promises: ε and δ of DP-SGD at a hospital, and of noise on the average.

Limits: the noise comes from numpy's ordinary floating-point generators, which the theory does not cover to the last bit
(Mironov 2012, doi:10.1145/2382196.2382264); how many cards a hospital has, and when it trains, is not hidden; tuning a
learning rate on private cards spends an ε that nobody counts here.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

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
