"""The base model and its LoRA adapter: loading."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedllm_helpers import hub
from fedllm_helpers.config import checked
from fedllm_helpers.models import cores, embedded, fitting, placement


def load(cfg: DictConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the frozen base model of a configuration and put a fresh adapter on it. Taught in notebook 02.

    Args:
        cfg: from :func:`fedllm_helpers.config.load`; ``cfg.seed`` seeds the adapter's matrix A, B starts at zero.

    Returns:
        (model, tokenizer), the model set to evaluate. The adapter is float32 whatever the base is held in.

    Raises:
        FileNotFoundError: a model folder is absent or without weights.
        ConnectionError: the hub, or the package index for the embedded model, cannot be reached.
        ValueError: a device, a number format or a quantization that this machine does not have; or what
            :mod:`fitting` finds: no causal language model, a tokenizer of another one, weights missing.
    """
    where = locate(checked(cfg).model.name)
    base, tokenizer = _base(cfg, where)
    if not cfg.model.use_fast_tokenizer and tokenizer.is_fast:
        raise ValueError("model.use_fast_tokenizer=false: transformers 5 has no other for this model; set it to true")
    tokenizer.padding_side = cfg.train.padding_side
    if cfg.model.gradient_checkpointing:
        base.config.use_cache = False
        with _quiet():
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = add_adapter(base, cfg.model.lora, cfg.seed, where)
    own, kind = model.peft_config["default"], type(base)
    own.base_model_name_or_path = embedded.HUB_ID if cfg.model.name == embedded.NAME else where
    own.auto_mapping = {
        "base_model_class": kind.__name__,
        "parent_library": kind.__module__,
        **fitting.form(base.config),
    }
    return model.eval(), tokenizer


def _base(cfg: DictConfig, where: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model on its device and its tokenizer, found to fit."""
    name, (device, dtype) = cfg.model.name, device_and_dtype(cfg.model.device, cfg.model.dtype)
    with _quiet():
        shape = hub.from_pretrained(AutoConfig, where)
        fitting.check_configuration(name, shape, cfg.train.seq_length, cfg.model.quantization)
        how = placement.options(cfg.model, device, dtype)
        if getattr(shape, "quantization_config", None):  # stored in few bits
            how["device_map"] = {"": device}
        tokenizer = hub.from_pretrained(AutoTokenizer, where)
        base, report = hub.from_pretrained(AutoModelForCausalLM, where, output_loading_info=True, **how)
    base = placement.never_repacked(base) if getattr(base, "is_quantized", False) else base.to(device)
    fitting.check_weights(name, base, report)
    fitting.check_tokenizer(name, base, tokenizer)
    if name != embedded.NAME:  # its files are known by their checksums
        fitting.check_causal(name, base, tokenizer)
        fitting.check_padding(name, base, tokenizer, cfg.train.padding_side)
    base.generation_config = fitting.greedy(base)
    return base, tokenizer


def add_adapter(base: torch.nn.Module, lora: DictConfig, seed: int = 0, where: str | None = None) -> PeftModel:
    """Freeze a model and add a LoRA adapter: W·x becomes W·x + α/r·B·A·x (Hu et al. 2021, arXiv:2106.09685).

    Args:
        base: any, also one without memory for its weights.
        lora: the adapter's settings, ``cfg.model.lora``.
        seed: of A.
        where: folder or hub id of the base, for :func:`fedllm_helpers.models.cores.put_in`, where cores are asked for.

    Raises:
        ValueError: the layers named are not in the model, or no default is known for its family; or cores do not fit.
    """
    targets = None if lora.target_modules is None else list(lora.target_modules)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.peft_lora_r,
        lora_alpha=lora.peft_lora_alpha,
        use_rslora=lora.use_rslora,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
    )
    named = [f".{name}" for name, _ in base.named_modules()]
    unmatched = [target for target in targets or () if not any(name.endswith(f".{target}") for name in named)]
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        try:
            if unmatched:
                raise ValueError(f"no layer is named {', '.join(unmatched)}")
            model = get_peft_model(base, settings)
        except ValueError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            reason = reason if targets else f"no default is known for {base.config.model_type}, name some"
            last = getattr(base, "get_output_embeddings", lambda: None)()
            layers = [(n, m) for n, m in base.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
            here = sorted({n.split(".")[-1] for n, m in layers if m is not last})
            raise ValueError(f"model.lora.target_modules={targets}: {reason}; layers here: {', '.join(here)}") from None
        if lora.core:
            cores.put_in(model, where)
    return model


def device_and_dtype(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Choose by what the hardware does natively: bfloat16 where it multiplies it itself, else float32.

    Raises:
        ValueError: the device asked for is not there.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if present[name])
    if not present[device]:
        raise ValueError(f"model.device={device}: there is no such device here; set it to auto or cpu")
    native = {
        "cpu": lambda: any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16")),
        "cuda": lambda: torch.cuda.get_device_capability()[0] >= 8,  # a T4 (7.5) only emulates it
        "mps": lambda: False,
    }
    if dtype == "auto":
        dtype = "bfloat16" if native[device]() else "float32"
    return torch.device(device), getattr(torch, dtype)


def autocast(model: PeftModel) -> contextlib.AbstractContextManager:
    """Half-precision products with a float32 adapter where the base is held in half precision; else nothing."""
    dtype = model.get_base_model().dtype
    return torch.autocast(model.device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16))


def locate(name: str) -> str:
    """Where ``transformers`` finds a model: a folder (the embedded one is fetched if need be) or a hub id."""
    if name == embedded.NAME:
        return str(embedded.fetch())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{name} holds an adapter: set model.name to its base model, then models.load_adapter")
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model folder {name} has no config.json")
        if closed := [path for path in folder.iterdir() if not os.access(path, os.R_OK)]:
            raise PermissionError(f"{closed[0]} may not be read: its owner can allow it with chmod a+r")
        return str(folder.resolve())
    if folder.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"no model folder at {name}")
    hub.check(name)
    return name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and reports of what is checked here anyway, and without remarks on what PEFT and transformers do."""
    transformers_logging.disable_progress_bar()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(max(before, transformers_logging.ERROR))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing(_enable)?` is deprecated")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        try:
            yield
        finally:
            transformers_logging.set_verbosity(before)
            transformers_logging.enable_progress_bar()
