"""Single weights of a model as its files have them, whatever the format in which a machine holds the model."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedllm_helpers import hub


def reader(where: str) -> Callable[[str], torch.Tensor]:
    """A function from a linear layer's name in the model to its stored weight, shape (outputs, inputs).

    Weights are read one by one from safetensors files. Where these have other names than the model's layers, or there
    are none, the whole model is read once more, in float32.

    Args:
        where: folder, or hub id of a model that lies in this machine's cache.

    Raises:
        FileNotFoundError, ConnectionError: as :func:`fedllm_helpers.hub.from_pretrained`.
    """
    folder = Path(where) if Path(where).is_dir() else Path(snapshot_download(where, local_files_only=True))
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as content:
            files |= dict.fromkeys(content.keys(), path)

    with torch.device("meta"):
        layers = dict(AutoModelForCausalLM.from_config(hub.from_pretrained(AutoConfig, where)).named_modules())

    @lru_cache(maxsize=1)
    def whole() -> dict[str, torch.nn.Module]:
        """The layers of a second copy."""
        return dict(hub.from_pretrained(AutoModelForCausalLM, where, dtype=torch.float32).named_modules())

    def read(name: str) -> torch.Tensor:
        """The stored weight of a layer."""
        names = (f"{name}.weight", f"{name.partition('.')[2]}.weight")  # files of the inner model lack the outer name
        key = next((key for key in names if key in files), None)
        if key is None:
            return turned(layers[name], whole()[name].weight.detach())
        with safe_open(files[key], "pt") as content:
            return turned(layers[name], content.get_tensor(key))

    return read


def turned(layer: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight with shape (outputs, inputs): GPT-2's layers hold it the other way round, unless they are quantised."""
    return weight.T if isinstance(layer, Conv1D) else weight
