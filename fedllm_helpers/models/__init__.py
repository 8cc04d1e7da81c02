"""The base model and its adapter: loaded, checked, read and written. Taught in notebook 02.

:mod:`lora` loads a base and handles its adapter, :mod:`embedded` fetches the model of the package index, :mod:`fitting`
finds what does not go together, :mod:`editing` adds to a base's weights, and :mod:`process` keeps one per process.
"""

from fedllm_helpers.models.lora import (
    add_adapter,
    autocast,
    device_and_dtype,
    get_adapter,
    load,
    load_adapter,
    locate,
    save_adapter,
    set_adapter,
)

__all__ = [
    "add_adapter",
    "autocast",
    "device_and_dtype",
    "get_adapter",
    "load",
    "load_adapter",
    "locate",
    "save_adapter",
    "set_adapter",
]
