"""The schedule over the rounds of a federation: rates, hospitals, and the settings of a training within one."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers.config.rounds import asked


@dataclass(frozen=True)
class Round:
    """One planned round of a federation: learning rate, number of hospitals that train, whether the adapter is kept."""

    number: int
    learning_rate: float
    clients: int
    saved: bool


def rounds(cfg: DictConfig) -> list[Round]:
    """The plan of a federation: a learning rate per round along a cosine, the hospitals asked, the adapters kept.

    Round t of T has lr_min + ½ (lr_max − lr_min)(1 + cos(π t / T)), with t from 0: SGDR's schedule without restarts
    (Loshchilov & Hutter 2017, arXiv:1608.03983). Taught in notebook 02.
    """
    low, high, total = cfg.train.learning_rate_min, cfg.train.learning_rate_max, cfg.federation.num_rounds
    clients, plan = asked(cfg), []
    for number in range(1, total + 1):
        rate = low + 0.5 * (high - low) * (1 + math.cos(math.pi * (number - 1) / total))
        plan.append(Round(number, rate, clients, number % cfg.train.save_every_round == 0 or number == total))
    return plan


def round_config(cfg: DictConfig, *seeds: int, **arguments: Any) -> DictConfig:
    """The configuration of a hospital's training within a round: ``federation.training_arguments`` over its own.

    Args:
        cfg: of the federation.
        seeds: such as round and hospital, mixed into ``cfg.seed``; none leaves it as it is.
        arguments: further training arguments, last.
    """
    given = {"save_strategy": "no", **cfg.federation.training_arguments, **arguments}  # the server keeps adapters
    changes = {"train": {"training_arguments": given}}
    if seeds:
        changes["seed"] = int(np.random.SeedSequence([cfg.seed, *seeds]).generate_state(1)[0])
    return OmegaConf.merge(cfg, changes)
