"""Less to be read from what is sent: clipped updates and a noisy average.

The promises are in :mod:`accounting`, DP-SGD within a hospital in :mod:`dp_sgd`.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from fedllm_helpers.adapters.records import Adapter

if TYPE_CHECKING:
    from omegaconf import DictConfig


def norm(adapter: Adapter) -> float:
    """Euclidean norm over all values."""
    return math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in adapter.values()))


def clip(update: Adapter, clipping_norm: float) -> Adapter:
    """The update, made shorter where its norm is above ``clipping_norm``. Taught in notebook 05b.

    Source: McMahan et al. 2018, arXiv:1710.06963.
    """
    size = norm(update)
    if size <= clipping_norm:
        return update
    factor = clipping_norm / size * (1 - 1e-6)  # rounding to float32 must not exceed it
    return {key: (value * factor).astype(value.dtype) for key, value in update.items()}


def noisy(mean: Adapter, sensitivity: float, noise_multiplier: float, generator: np.random.Generator) -> Adapter:
    """A mean of clipped updates plus normal noise of ``noise_multiplier`` · ``sensitivity`` per value.

    Args:
        mean: Σ pₖ uₖ with Σ pₖ = 1.
        sensitivity: by how much one hospital can move it: clipping norm · largest pₖ, so C / n for equal weights.
        noise_multiplier: in units of it.
        generator: of the noise; keep its seed secret where the result is published.
    """
    scale = noise_multiplier * sensitivity
    return {key: (value + generator.normal(0.0, scale, value.shape)).astype(value.dtype) for key, value in mean.items()}


def whole_share(spread: float, shares: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """One of ``shares`` parts of noise in whole numbers, the sum of which has the standard deviation ``spread``.

    Skellam numbers, the differences of two Poisson ones: their sums are Skellam numbers again, so that no party ever
    adds or sees the whole noise. Above a spread of some thousands they protect as a normal distribution of that spread
    does, to less than a thousandth of ε. Source: Agarwal, Kairouz & Liu 2021, arXiv:2110.04995.

    Returns:
        int64, shape (size,).
    """
    rate = spread**2 / (2 * shares)
    return generator.poisson(rate, size) - generator.poisson(rate, size)


def silent(cfg: "DictConfig") -> bool:
    """Whether hospitals keep losses and token counts to themselves, because those would leave without protection."""
    how = cfg.federation.privacy
    private = (how.record.epsilon, how.record.noise_multiplier, how.client.noise_multiplier)
    return any(value is not None for value in private) or bool(cfg.federation.secure_aggregation.threshold)


def promised(cfg: "DictConfig") -> bool:
    """Whether anything is promised: for what is trained, or for scores."""
    return silent(cfg) or cfg.federation.privacy.scores.epsilon is not None


def unscored(cfg: "DictConfig") -> bool:
    """Whether no score may leave: where losses do not, and no noise is promised for scores."""
    return silent(cfg) and cfg.federation.privacy.scores.epsilon is None


def orders(cfg: "DictConfig") -> dict[str, float]:
    """What the orders of a masked round have to say by a configuration; nothing where it has no masks."""
    how, private, seed = (
        cfg.federation.secure_aggregation,
        cfg.federation.privacy.client,
        cfg.federation.privacy.noise_seed,
    )
    if not how.threshold:
        return {}
    noisy = private.noise_multiplier is not None
    found = {
        "threshold": how.threshold,
        "value-range": how.value_range,
        "noise-seed": seed if noisy and seed is not None else -1,
    }
    return found | {"clipping-norm": private.clipping_norm * noisy, "noise-multiplier": private.noise_multiplier or 0.0}


def noise_seed(cfg: "DictConfig", purpose: int, *numbers: int) -> np.random.SeedSequence:
    """The seed of some noise: from ``federation.privacy.noise_seed``, or 128 bits of the system's entropy.

    Args:
        cfg: of the federation.
        purpose: 0 for the server's noise, 1 for a hospital's, 2 for its share of a sum's, 3 for its scores: they never
            share a stream.
        numbers: such as round and hospital.
    """
    given = cfg.federation.privacy.noise_seed
    return np.random.SeedSequence() if given is None else np.random.SeedSequence([given, purpose, *numbers])
