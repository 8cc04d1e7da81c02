"""The two Flower apps, their rounds, and ways to run them here. Taught in notebook 03.

:mod:`simulation` runs a whole federation on this machine, on a grid of :mod:`fedllm_helpers.grids`; :mod:`client_app`
and :mod:`server_app` are what ``flwr run`` starts, too. :mod:`chain` composes the strategies of a run from its
configuration, :mod:`rounds` is the server's side of one round, and :mod:`resumed` keeps the rounds of any Flower app.
"""

from fedllm_helpers.faces import face

NAMES = {
    "Chain": "chain",
    "FederatedRecord": "simulation",
    "Resumed": "resumed",
    "compose": "chain",
    "run": "simulation",
}
__getattr__, __dir__, __all__ = face(__name__, NAMES)
