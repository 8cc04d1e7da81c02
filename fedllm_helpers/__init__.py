"""Helpers for federated fine-tuning of language models with private data: one module per step of the way."""

import logging

__version__ = "0.1.0"

# Without the optional package `kernels`, bitsandbytes says once per process that 4-bit inference could be faster.
# Training does not use that kernel, and the line reads like a failure: drop it, and it alone.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)
