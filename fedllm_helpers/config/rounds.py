"""What a configuration says of a round: how many hospitals it asks, how many it needs, and how they train."""

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf


def asked(cfg: DictConfig) -> int:
    """How many hospitals a round asks."""
    return max(1, round(cfg.federation.fraction_train * cfg.federation.num_clients))


def needed(cfg: DictConfig, of: int | None = None) -> int:
    """How many usable replies, ``of`` so many hospitals (those that a round asks), change the adapter."""
    share = cfg.federation.min_share * (of or asked(cfg))
    return max(cfg.federation.min_replies, math.floor(round(share, 9)) + 1)


def within_a_round(cfg: DictConfig) -> dict[str, Any]:
    """The training arguments of a round: the federation's over those of a single training."""
    return OmegaConf.to_container(OmegaConf.merge(cfg.train.training_arguments, cfg.federation.training_arguments))
