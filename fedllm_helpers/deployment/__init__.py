"""A federation of real processes, keys and certificates on this machine. Taught in notebook 06.

:mod:`hosts` starts and ends them, :mod:`runs` hands in and follows runs, :mod:`certificates` makes keys, :mod:`warm`
keeps a hospital's process ready between messages. Nothing is imported before it is used: the watchdog and whoever makes
a certificate wait for no torch.
"""

from fedllm_helpers.faces import face

NAMES = dict.fromkeys(["bring_back", "kill", "start", "start_node", "start_server", "wait_online"], "hosts")
__getattr__, __dir__, __all__ = face(__name__, NAMES)
