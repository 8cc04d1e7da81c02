"""The base model of this process, loaded once for all who share it, and how many threads compute with it."""

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import config
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.models import embedded, exchange, lora

logger = logging.getLogger(__name__)
_HELD: dict[str, tuple[PeftModel, PreTrainedTokenizerBase, Adapter]] = {}  # one at most, by its settings


def base_model(cfg: DictConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """:func:`fedllm_helpers.models.load`, once per process: every client and the server of it share one copy.

    Its adapter is whatever the last user left in it. A deployed client runs each message in a new process, and loads
    the model each time unless the process was forked from one that has it.
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


def _base_model(text: str) -> tuple[PeftModel, PreTrainedTokenizerBase, Adapter]:
    if text not in _HELD:
        let_go()  # the model before goes first: two of 7B do not fit
        model, tokenizer = lora.load(config.load(OmegaConf.create(text)))
        _HELD[text] = model, tokenizer, exchange.get_adapter(model)
    return _HELD[text]


def held() -> tuple[str, str]:
    """The settings of the model that this process holds, as text, and its device; two empty ones where there is none.

    The text is for :func:`hold` and :func:`files`, in another process.
    """
    return next(((text, model.device.type) for text, (model, *_) in _HELD.items()), ("", ""))


def hold(text: str) -> None:
    """Load a model by its settings, as :func:`base_model` does when it is first asked."""
    _base_model(text)


def let_go() -> None:
    """Hold no model any longer."""
    _HELD.clear()


def files(text: str) -> list[Path]:
    """The files on this machine that a model with these settings is loaded from; none where they are not here yet."""
    folder = embedded.folder_of(OmegaConf.create(text).model.name)
    own = {embedded.MANIFEST}  # written anew when a file was copied, with nothing changed in it
    return [path for path in folder.rglob("*") if path.is_file() and path.name not in own] if folder else []


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
