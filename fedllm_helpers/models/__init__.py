"""The base model and its adapter: loaded, checked, read and written. Taught in notebook 02.

:mod:`lora` loads a base and puts an adapter on it, :mod:`exchange` takes adapters in and out, :mod:`cores` makes r × r
cores of it from what :mod:`stored` reads, :mod:`embedded` fetches the model of the package index, :mod:`fitting` finds
what does not go together, :mod:`editing` adds to a base's weights, and :mod:`process` keeps one per process.
"""

from fedllm_helpers.faces import face

NAMES = {
    "add_adapter": "lora",
    "autocast": "lora",
    "device_and_dtype": "lora",
    "get_adapter": "exchange",
    "load": "lora",
    "load_adapter": "exchange",
    "locate": "lora",
    "save_adapter": "exchange",
    "set_adapter": "exchange",
}
__getattr__, __dir__, __all__ = face(__name__, NAMES)
