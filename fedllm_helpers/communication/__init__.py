"""What is sent: bytes and seconds on paper, the ledger of a run, and fewer bits. Taught in notebook 07."""

from fedllm_helpers.communication.estimates import (
    BITS,
    architecture,
    estimate,
    known_architectures,
    ledger,
    parameter_counts,
    transfer_bytes,
    weight_bytes,
)

__all__ = [
    "BITS",
    "architecture",
    "estimate",
    "known_architectures",
    "ledger",
    "parameter_counts",
    "transfer_bytes",
    "weight_bytes",
]
