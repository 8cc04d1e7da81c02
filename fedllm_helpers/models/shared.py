"""The base model's weights in memory once, for all processes of a run: each maps the same file."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from fedllm_helpers import folders

NAME = "weights.safetensors"


def own(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The base weights that this process holds in memory of its own.

    Those that are stored as they are used are none of them: ``transformers`` maps them from the model's files, and
    every process that does so sees the same memory. Another number format, or fewer bits, makes a copy; on a GPU each
    process has one anyway.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name and parameter.device.type == "cpu" and parameter.untyped_storage().resizable()
    }


@contextlib.contextmanager
def weights(model: PeftModel) -> Iterator[str]:
    """A folder of the weights that :func:`own` finds, for :func:`take` in other processes; "" where there are none.

    This process takes them, too, and has its own again when the block ends. The folder is deleted then.

    Raises:
        OSError: the system's folder for temporary files has no room; ``TMPDIR`` names another.
    """
    held = own(model)
    if not held:
        yield ""
        return
    with tempfile.TemporaryDirectory(".part", f".weights-{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        with folders.said("the weights for all workers", folder, "set TMPDIR to a folder with more room"):
            save_file({name: parameter.data.contiguous() for name, parameter in held.items()}, Path(folder) / NAME)
        take(model, folder)
        try:
            yield folder
        finally:
            for parameter in held.values():
                _put(parameter, parameter.data.clone())


def take(model: PeftModel, folder: str) -> None:
    """Let a model loaded with the same settings have the weights of a folder of :func:`weights`, and drop its own."""
    if folder:
        parameters = dict(model.named_parameters())
        with safe_open(Path(folder) / NAME, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                _put(parameters[name], file.get_tensor(name))


def _put(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    parameter.data = values
    if getattr(parameter, "CB", None) is not None:  # bitsandbytes keeps 8 bits under two names
        parameter.CB = values
