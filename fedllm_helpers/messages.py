"""What both Flower apps share: settings from a run, the base model of this process, adapters in and out of records."""

import contextlib
import logging
import os
import shlex
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.common.serde import recorddict_to_proto
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import config, models

logger = logging.getLogger(__name__)


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


def base_model(cfg: DictConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """:func:`fedllm_helpers.models.load`, once per process: every client and the server of it share one copy.

    Its adapter is whatever the last user left in it. A deployed client runs each message in a new process and loads
    the model each time.
    """
    return _base_model(_model_settings(cfg))[:2]


def first_adapter(cfg: DictConfig) -> models.Adapter:
    """The adapter that a federation starts from: A as ``cfg.seed`` draws it, B zero."""
    return {key: value.copy() for key, value in _base_model(_model_settings(cfg))[2].items()}


def _model_settings(cfg: DictConfig) -> str:
    parts = {"seed": cfg.seed, "model": cfg.model, "train": {"padding_side": cfg.train.padding_side}}
    return OmegaConf.to_yaml(OmegaConf.create(parts))


@lru_cache(maxsize=1)
def _base_model(text: str) -> tuple[PeftModel, PreTrainedTokenizerBase, models.Adapter]:
    _base_model.cache_clear()  # the model before goes first: two of 7B do not fit
    model, tokenizer = models.load(config.load(OmegaConf.create(text)))
    return model, tokenizer, models.get_adapter(model)


def to_record(adapter: models.Adapter) -> ArrayRecord:
    """An adapter as Flower sends it, keys and order kept."""
    return ArrayRecord({key: Array(value) for key, value in adapter.items()})


def from_record(record: ArrayRecord) -> models.Adapter:
    """The adapter of a record, keys and order kept.

    Raises:
        ValueError: bytes that are no array, whatever else they are.
    """
    adapter = {}
    for key, array in record.items():
        try:
            adapter[key] = array.numpy()
        except Exception as error:  # numpy's reader raises a dozen types on bytes that another machine made
            raise ValueError(f"{key!r} cannot be read: {type(error).__name__}") from None
        if not isinstance(adapter[key], np.ndarray):
            raise ValueError(f"{key!r} cannot be read: it is not one array")
    return adapter


def message_bytes(message: Message) -> int:
    """Bytes of a message's content as Flower serialises it: adapter, settings and numbers, without the envelope.

    The envelope (node numbers, times) adds about a hundred bytes that differ from message to message.
    """
    if message.has_content():
        return recorddict_to_proto(message.content).ByteSize()
    return len(message.error.reason or "") if message.has_error() else 0


@contextlib.contextmanager
def cpu_threads(cfg: DictConfig) -> Iterator[None]:
    """Compute with ``federation.threads`` threads, and afterwards with as many as before.

    The sums of a matrix product depend on how many threads share it, and a Ray actor has other defaults than a
    notebook: only a number set here makes their adapters agree to the last bit. Without one torch's own number stays:
    all cores, or what ``OMP_NUM_THREADS`` says.
    More than there are cores would stand in each other's way, and thousands never end: the log says what was taken.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(_at_most_the_cores(cfg.federation.threads or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=8)
def _at_most_the_cores(threads: int) -> int:
    cores = os.cpu_count() or 1
    if threads > cores:
        logger.warning("federation.threads=%d: there are %d cores, so many it is", threads, cores)
    return min(threads, cores)


@contextlib.contextmanager
def quiet_flower() -> Iterator[None]:
    """Flower's log from warnings on; without the one about ``run_simulation``, whose successor is a command."""
    logger = logging.getLogger("flwr")
    before = logger.level

    def wanted(record: logging.LogRecord) -> bool:
        """Everything but that one."""
        return "DEPRECATED FEATURE" not in record.getMessage()

    logger.setLevel(logging.WARNING)
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeFilter(wanted)
