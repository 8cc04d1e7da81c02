"""The base model of this process, loaded once for all who share it."""

from functools import lru_cache

from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import config
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.models import lora


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
    parts = {"seed": cfg.seed, "model": cfg.model, "train": {"padding_side": cfg.train.padding_side}}
    return OmegaConf.to_yaml(OmegaConf.create(parts))


@lru_cache(maxsize=1)
def _base_model(text: str) -> tuple[PeftModel, PreTrainedTokenizerBase, Adapter]:
    _base_model.cache_clear()  # the model before goes first: two of 7B do not fit
    model, tokenizer = lora.load(config.load(OmegaConf.create(text)))
    return model, tokenizer, lora.get_adapter(model)
