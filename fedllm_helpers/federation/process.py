"""What a federation does to its process: how many threads compute, and what of Flower's log is shown."""

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import lru_cache

import torch
from omegaconf import DictConfig

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def cpu_threads(cfg: DictConfig) -> Iterator[None]:
    """Compute with ``federation.threads`` threads, and afterwards with as many as before.

    The sums of a matrix product depend on how many threads share it, and a Ray actor has other defaults than a
    notebook: only a number set here makes their adapters agree to the last bit. Without one torch's own number stays:
    all cores, or what ``OMP_NUM_THREADS`` says.
    More than there are cores would stand in each other's way, and thousands never end: the log says what was taken.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(_at_most_the_cores(cfg.federation.threads or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=8)
def _at_most_the_cores(threads: int) -> int:
    cores = os.cpu_count() or 1
    if threads > cores:
        logger.warning("federation.threads=%d: there are %d cores, so many it is", threads, cores)
    return min(threads, cores)


@contextlib.contextmanager
def quiet_flower() -> Iterator[None]:
    """Flower's log from warnings on; without the one about ``run_simulation``, whose successor is a command."""
    logger = logging.getLogger("flwr")
    before = logger.level

    def wanted(record: logging.LogRecord) -> bool:
        """Everything but that one."""
        return "DEPRECATED FEATURE" not in record.getMessage()

    logger.setLevel(logging.WARNING)
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeFilter(wanted)
