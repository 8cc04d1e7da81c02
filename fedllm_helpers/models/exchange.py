"""An adapter in and out of its model: as arrays, and as a folder."""

from pathlib import Path

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedllm_helpers import folders
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.models import cores, fitting


def get_adapter(model: PeftModel) -> Adapter:
    """Copy the adapter out.

    Returns:
        PEFT's own key names to float32 arrays: ``lora_A`` of shape (r, inputs), ``lora_B`` of shape (outputs, r). With
        cores, these alone: ``lora_B.core`` of shape (r, r).
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
        lora = all(".lora_" in key for key in given)
        if lora and any(".core." in key for key in own) != any(".core." in key for key in given):
            here, there = ("cores", "LoRA factors")[:: 1 if cores.tensors(model) else -1]
            raise ValueError(
                f"this model trains {here}, the adapter has {there}: LoRA-XS is for all nodes, or for none"
            )
        raise ValueError(
            f"the adapter is of another model or other layers: {len(odd)} keys differ, the first is {odd[0]!r}"
        )
    for key, shape in own.items():
        if given[key] != shape:
            raise ValueError(
                f"the adapter is of another size or rank: {key!r} has shape {given[key]}, this model's is {shape}"
            )
    arrays = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in adapter.items()}
    if found := cores.tensors(model):
        for key, core in found.items():
            core.data.copy_(arrays[key])
        return
    set_peft_model_state_dict(model, arrays)


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
    try:
        saved = PeftConfig.from_pretrained(folder)
    except Exception as error:  # absent, no JSON, no settings of PEFT
        raise ValueError(f"{folder}: its adapter_config.json cannot be read: {' '.join(str(error).split())}") from None
    fitting.check_adapter(folder, saved, own)
    try:
        adapter = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    set_adapter(model, cores.solved(model, adapter) if cores.tensors(model) else adapter)


def _adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    if found := cores.tensors(model):
        return found
    return get_peft_model_state_dict(model, save_embedding_layers=False)  # True or "auto" would ask the hub
