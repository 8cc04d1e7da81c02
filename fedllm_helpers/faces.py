"""Faces of rooms whose names are imported when they are first used: what travels waits for no pandas and no torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def face(room: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a room: its public names, each from the module of the room that has it."""

    def find(name: str) -> Any:
        """A public name."""
        if name not in names:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(f"{room}.{names[name]}"), name)

    return find
