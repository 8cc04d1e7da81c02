"""Faces of rooms whose names are imported when they are first used: what is small waits for no pandas and no torch."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def face(room: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A room's ``__getattr__``, ``__dir__`` and ``__all__``, from its public names and the modules that have them.

    The room's modules are found, too, as if they had been imported.
    """

    def find(name: str) -> Any:
        """A public name."""
        if name in names:
            return getattr(import_module(f"{room}.{names[name]}"), name)
        if name.startswith("_") or find_spec(f"{room}.{name}") is None:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return import_module(f"{room}.{name}")

    def shown() -> list[str]:
        """What an editor completes."""
        return sorted({*vars(sys.modules[room]), *names})

    return find, shown, list(names)
