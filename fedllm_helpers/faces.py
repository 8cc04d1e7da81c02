"""Faces of rooms whose names are imported when they are first used: what travels waits for no pandas and no torch."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def face(room: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A room's ``__getattr__``, ``__dir__`` and ``__all__``, from its public names and the modules that have them."""

    def find(name: str) -> Any:
        """A public name."""
        if name not in names:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(f"{room}.{names[name]}"), name)

    def shown() -> list[str]:
        """What an editor completes."""
        return sorted({*vars(sys.modules[room]), *names})

    return find, shown, list(names)
