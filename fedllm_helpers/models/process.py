"""The base model of this process, loaded once for all who share it, and how many threads compute with it."""

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import lru_cache

import torch
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import config
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.models import exchange, lora

logger = logging.getLogger(__name__)


def base_model(cfg: DictConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """:func:`fedllm_helpers.models.load`, once per process: every client and the server of it share one copy.

    Its adapter is whatever the last user left in it. A deployed client runs each message in a new process and loads
    the model each time.
    """
    return _base_model(_model_settings(cfg))[:2]


def first_adapter(cfg: DictConfig) -> Adapter:
    """The adapter that a federation starts from: A as ``cfg.seed`` draws it, B zero."""
    return {key: value.copy() for key, value in _base_model(_model_settings(cfg))[2].items()}


def _model_settings(cfg: DictConfig) -> str:
    text = {"padding_side": cfg.train.padding_side, "seq_length": cfg.train.seq_length}
    parts = {"seed": cfg.seed, "model": cfg.model, "train": text}
    if cfg.model.lora.core:
        parts["federation"] = {"aggregation": cfg.federation.aggregation}
    return OmegaConf.to_yaml(OmegaConf.create(parts))


@lru_cache(maxsize=1)
def _base_model(text: str) -> tuple[PeftModel, PreTrainedTokenizerBase, Adapter]:
    _base_model.cache_clear()  # the model before goes first: two of 7B do not fit
    model, tokenizer = lora.load(config.load(OmegaConf.create(text)))
    return model, tokenizer, exchange.get_adapter(model)


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
