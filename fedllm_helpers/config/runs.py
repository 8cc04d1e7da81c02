"""The configuration of a Flower run, from its settings."""

import os
import shlex
from functools import lru_cache

from flwr.app import Context
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import config


def settings(context: Context) -> DictConfig:
    """The configuration of a run: its ``config`` (YAML text) where there is one, else its ``preset`` and ``overrides``.

    ``flwr run . -c 'preset="cpu" overrides="federation.num_rounds=2"'`` sets the two; several overrides stand apart by
    spaces. How many hospitals there are, a node knows from its own ``num-partitions``.

    Raises:
        ValueError: as :func:`fedllm_helpers.config.load`.
    """
    given, hospitals = context.run_config, context.node_config.get("num-partitions")
    overrides = (
        f"{given.get('overrides', '')} federation.num_clients={hospitals}" if hospitals else given.get("overrides", "")
    )
    return _settings(str(given.get("config", "")), str(given.get("preset", "cpu")), str(overrides))


@lru_cache(maxsize=8)
def _settings(text: str, preset: str, overrides: str) -> DictConfig:
    return config.load(OmegaConf.create(text) if text else preset, *shlex.split(overrides, posix=os.name != "nt"))
