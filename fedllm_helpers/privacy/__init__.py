"""What others learn from what is sent, and less of it: accounting, noise, masks. Taught in notebook 05b.

:mod:`noised` and :mod:`masked` are pieces for any Flower app, :mod:`masked_clients` is the client's side of masks, and
:mod:`policy` what a client allows whatever it is asked, with a :mod:`ledger`; :mod:`guards` hold it to what it was told
of a run. :mod:`accounting` counts ε, :mod:`secure_aggregation` is the algebra of masks, :mod:`masked_rounds` its
messages at the server, and :mod:`noise` clips and blurs.
"""

from fedllm_helpers.faces import face

NAMES = {"Masked": "masked", "Noised": "noised", "clip": "noise", "noise_seed": "noise"}
__getattr__, __dir__, __all__ = face(__name__, NAMES)
