"""What is sent: bytes and seconds on paper, the ledger of a run, and fewer bits. Taught in notebook 07.

:mod:`compression` and :mod:`metered` are pieces for any Flower app; :mod:`codec` has their number formats,
:mod:`estimates` the bytes of models and adapters before anything runs, and :mod:`networks` the seconds that they take.
"""

from fedllm_helpers.faces import face

NAMES = {
    "BITS": "codec",
    "Compressed": "compression",
    "Metered": "metered",
    "architecture": "estimates",
    "estimate": "estimates",
    "known_architectures": "estimates",
    "ledger": "estimates",
    "parameter_counts": "estimates",
    "transfer_bytes": "estimates",
    "weight_bytes": "estimates",
}
__getattr__, __dir__, __all__ = face(__name__, NAMES)
