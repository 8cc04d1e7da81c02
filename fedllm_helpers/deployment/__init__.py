"""A federation of real processes, keys and certificates on this machine. Taught in notebook 06.

:mod:`hosts` starts and ends them, :mod:`runs` hands in and follows runs, :mod:`certificates` makes keys. Nothing is
imported before it is used: the watchdog and whoever makes a certificate wait for no torch.
"""

from importlib import import_module
from typing import Any

__all__ = ["bring_back", "kill", "start", "start_node", "start_server", "wait_online"]


def __getattr__(name: str) -> Any:
    """The names of this face, from :mod:`hosts`."""
    if name in __all__:
        return getattr(import_module("fedllm_helpers.deployment.hosts"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
