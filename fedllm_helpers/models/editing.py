"""The base model with something added to its weights, for a while; and an adapter of which some factors stay."""

import contextlib
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.numpy import save_file

from fedllm_helpers import folders
from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import Adapter


def scaling(lora: DictConfig) -> float:
    """By what an adapter's B·A is multiplied: α / r, or α / √r with rsLoRA."""
    return lora.peft_lora_alpha / (lora.peft_lora_r**0.5 if lora.use_rslora else lora.peft_lora_r)


@contextlib.contextmanager
def edited(model: PeftModel, edit: Adapter) -> Iterator[None]:
    """Add an update to the base model's weights, W + ΔW, and put the very same weights back afterwards.

    The sum is formed in float32 from the unedited weights and then rounded to their format, once: with float32 weights
    it is exact to 1e-7 of W, with bfloat16 to 0.4 % of W, whatever the number of rounds.

    Args:
        model: its layers with an adapter can be edited.
        edit: factors in PEFT's key names, their scale included; or by layer ΔW itself, shape (outputs, inputs).

    Raises:
        ValueError: a layer that the model has not, another shape, or a base model held in whole steps (4 or 8 bits).
    """
    full = factors.product(edit) if any(factors.A in key for key in edit) else edit
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    kept: dict[str, torch.Tensor] = {}
    try:
        for name, update in full.items():
            if name not in layers:
                raise ValueError(f"the edit is of another model: it has no layer {name!r}")
            kept[name] = _add(name, layers[name], update)
        yield
    finally:
        for name, before in kept.items():
            layers[name].get_base_layer().weight.data = before


def _add(name: str, layer: LoraLayer, update: np.ndarray) -> torch.Tensor:
    weight = layer.get_base_layer().weight
    if getattr(weight, "quant_state", None) is not None or not weight.is_floating_point():
        raise ValueError(f"{name!r} is held in 4 or 8 bits, and those steps are too coarse for an edit")
    turned = update.T if layer.fan_in_fan_out else update  # a Conv1D holds (inputs, outputs)
    if tuple(turned.shape) != tuple(weight.shape):
        raise ValueError(f"the edit of {name!r} has shape {update.shape}, the weight {tuple(weight.shape)}")
    before = weight.data
    addend = torch.from_numpy(np.ascontiguousarray(turned, dtype=np.float32)).to(before.device)
    weight.data = (before.float() + addend).to(before.dtype)
    return before


@contextlib.contextmanager
def only_trained(model: PeftModel, parts: tuple[str, ...] | None) -> Iterator[None]:
    """Let training move some factors alone: those whose names hold one of ``parts``; None lets it move all."""
    frozen = [p for n, p in model.named_parameters() if p.requires_grad and parts and not any(k in n for k in parts)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def save_update(model: PeftModel, update: Adapter, folder: str | Path) -> Path:
    """Write factors of any rank, scale included, as a folder that ``PeftModel.from_pretrained`` opens; whole or not.

    Args:
        model: of which the update is; its own adapter is left alone.
        update: factors in PEFT's key names.
        folder: as for :func:`fedllm_helpers.models.save_adapter`, which says what is refused.
    """
    folder, size = folders.for_adapter(folder), factors.rank(update)
    settings: Mapping = {"r": size, "lora_alpha": size, "use_rslora": False, "inference_mode": True}
    config = copy(model.peft_config["default"])
    for key, value in settings.items():
        setattr(config, key, value)
    whole = {key: np.ascontiguousarray(value) for key, value in update.items()}
    with folders.said("the update", folder), folders.replaced(folder, *folders.ADAPTER) as scratch:
        config.save_pretrained(str(scratch))
        save_file(whole, scratch / folders.ADAPTER[-1], metadata={"format": "pt"})
    return folder
