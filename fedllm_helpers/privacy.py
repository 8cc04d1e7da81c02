"""Less to be read from what is sent: clipped updates and a noisy average, and settings that go together.

The promises are in :mod:`fedllm_helpers.accounting`, DP-SGD within a hospital in :mod:`fedllm_helpers.dp_sgd`.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from omegaconf import DictConfig

from fedllm_helpers.models import Adapter
from fedllm_helpers.screening import Reply
from fedllm_helpers.training import round_config

logger = logging.getLogger(__name__)


def norm(adapter: Adapter) -> float:
    """Euclidean norm over all values."""
    return math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in adapter.values()))


def clip(update: Adapter, clipping_norm: float) -> Adapter:
    """The update, made shorter where its norm is above ``clipping_norm``. Taught in notebook 05.

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


def bounded(cfg: DictConfig, reply: Reply, adapter: Adapter) -> Reply:
    """A reply whose update is clipped, and whose weight is 1 where hospitals count alike.

    Hospitals clip for themselves where the server cannot see: here it does not rely on them.
    """
    how = cfg.federation.privacy.client
    if how.noise_multiplier is None:
        return reply
    update = clip({key: reply.arrays[key] - adapter[key] for key in adapter}, how.clipping_norm)
    numbers = reply.numbers | ({"num-examples": 1.0} if how.weights == "uniform" else {})
    return replace(reply, arrays={key: adapter[key] + update[key] for key in adapter}, numbers=numbers)


def finish(cfg: DictConfig, number: int) -> Callable[[Adapter, float], Adapter] | None:
    """Adds a round's noise to the mean of bounded replies, given the largest share of one in it; None without noise."""
    how = cfg.federation.privacy.client
    if how.noise_multiplier is None:
        return None
    generator = np.random.default_rng(noise_seed(cfg, 0, number))
    return lambda mean, share: noisy(mean, how.clipping_norm * share, how.noise_multiplier, generator)


def silent(cfg: DictConfig) -> bool:
    """Whether hospitals keep losses and token counts to themselves, because those would leave without protection."""
    how = cfg.federation.privacy
    private = (how.record.epsilon, how.record.noise_multiplier, how.client.noise_multiplier)
    return any(value is not None for value in private) or bool(cfg.federation.secure_aggregation.threshold)


def check(cfg: DictConfig) -> None:
    """Settings of privacy that contradict each other or the rest.

    Raises:
        ValueError: in one line.
    """
    how, secure = cfg.federation.privacy, cfg.federation.secure_aggregation.threshold
    strategy, where = cfg.federation.strategy, "federation.privacy"
    if how.record.epsilon is not None and how.record.noise_multiplier is not None:
        raise ValueError(
            f"{where}.record: epsilon={how.record.epsilon} and noise_multiplier={how.record.noise_multiplier} are both "
            "set; the one follows from the other, so set one"
        )
    if 0 in (how.record.noise_multiplier, how.client.noise_multiplier):
        logger.warning("%s: noise_multiplier=0 clips and adds no noise: ε is infinite", where)
    if silent(cfg) and strategy == "QFedAvg":
        raise ValueError("federation.strategy=QFedAvg: it weights by losses, and with privacy they stay at home")
    if silent(cfg) and cfg.federation.fraction_evaluate:
        raise ValueError(
            f"federation.fraction_evaluate={cfg.federation.fraction_evaluate}: hospitals' losses would leave "
            "unprotected; set it to 0, the server scores its own cards"
        )
    _check_dp_sgd(cfg)
    if secure and not cfg.federation.compression.up == "fp32":
        raise ValueError("federation.compression.up: masked updates have a format of their own; set it to fp32")
    if secure and cfg.federation.compression.keep < 1:
        raise ValueError("federation.compression.keep: the largest values are not the same everywhere; set it to 1")
    clients = max(1, round(cfg.federation.fraction_train * cfg.federation.num_clients))
    if secure and not clients / 2 < secure <= clients:
        raise ValueError(
            f"federation.secure_aggregation.threshold={secure}: a round asks {clients} hospitals; allowed is more than "
            "half of them, up to all"
        )
    if how.client.noise_multiplier is not None and how.client.delta >= 1 / cfg.federation.num_clients:
        said = f"{where}.client.delta={how.client.delta} is not below 1 / {cfg.federation.num_clients} hospitals"
        logger.warning("%s: it promises little", said)


def _check_dp_sgd(cfg: DictConfig) -> None:
    how, given = cfg.federation.privacy.record, round_config(cfg).train.training_arguments
    if how.epsilon is None and how.noise_multiplier is None:
        return
    if not math.isfinite(how.epsilon or how.noise_multiplier or 0.0):
        raise ValueError("federation.privacy.record: allowed are finite numbers; null is without DP-SGD")
    if given.get("max_steps", -1) < 1:
        raise ValueError("federation.training_arguments.max_steps: DP-SGD counts its steps beforehand; set it from 1")
    if given.get("gradient_accumulation_steps", 1) != 1:
        raise ValueError("gradient_accumulation_steps: DP-SGD takes one batch a step; set it to 1")
    if cfg.model.gradient_checkpointing:
        raise ValueError("model.gradient_checkpointing=true: per-card gradients need the activations; set it to false")
    if cfg.federation.strategy == "FedProx":
        raise ValueError("federation.strategy=FedProx: its pull would be added to gradients that are clipped and noisy")


def noise_seed(cfg: DictConfig, purpose: int, *numbers: int) -> np.random.SeedSequence:
    """The seed of some noise: from ``federation.privacy.noise_seed``, or 128 bits of the system's entropy.

    Args:
        cfg: of the federation.
        purpose: 0 for the server's noise, 1 for a hospital's: they never share a stream.
        numbers: such as round and hospital.
    """
    given = cfg.federation.privacy.noise_seed
    return np.random.SeedSequence() if given is None else np.random.SeedSequence([given, purpose, *numbers])
