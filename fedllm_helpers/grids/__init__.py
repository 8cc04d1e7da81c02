"""Flower grids on this machine, for any two apps: clients one after the other, side by side, or on Ray.

:mod:`in_process` has one process for everything, :mod:`side_by_side` hands messages to the processes that
:mod:`workers` starts, feeds and replaces, :mod:`sizing` says how many of them a machine holds, and :mod:`on_ray` is
Flower's own simulation. Taught in notebook 03.
"""

from fedllm_helpers.faces import face

NAMES = {
    "InProcessGrid": "in_process",
    "SideBySideGrid": "side_by_side",
    "quiet_flower": "in_process",
    "run_apps": "in_process",
}
__getattr__, __dir__, __all__ = face(__name__, NAMES)
