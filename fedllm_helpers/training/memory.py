"""Python's and glibc's memory around a training: what is loaded is not walked again, what is freed is used again."""

import contextlib
import ctypes
import functools
import gc
import sys
from collections.abc import Iterator

FEW = 10_000  # under Python 3.12, 375 objects were frozen before anyone froze any
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST, KEPT = 1 << 26, 1 << 28  # bytes of a block that is used again, and of what stays free at the end
_aside = False  # whether that was done here: to count what is set aside takes as long as a step of a thin model


@contextlib.contextmanager
def loaded_set_aside() -> Iterator[None]:
    """Let garbage collections pass over what is there already, and take it up again at the end.

    The libraries alone are 600,000 objects, a third of a second for each collection. Trainer and ``fine_tune`` make
    one for every training, and some of Flower's strategies several for every round. Within another such block this
    does nothing, and where a program has frozen its objects itself (more than :data:`FEW`) they stay so. The outermost
    block also gives back, at its end, the memory that was freed within it and used again (:func:`freed_used_again`).
    """
    global _aside
    freed_used_again()
    outermost = not _aside
    ours = outermost and gc.get_freeze_count() < FEW
    if ours:
        set_aside()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()
            _aside = False
        if outermost:
            _give_back()


def set_aside() -> None:
    """Let garbage collections pass over what is there already, until the process ends."""
    global _aside
    gc.freeze()
    _aside = True


@functools.cache
def freed_used_again() -> None:
    """Let glibc keep what is freed for the next use, in this process, until it is given back.

    As it comes, it takes each large block from the system and returns it at once. The system clears every page of it:
    a tenth of a step, for the logits over a whole vocabulary are such blocks. The first ones may lie side by side,
    until :data:`KEPT` bytes are free.
    """
    if sys.platform == "linux" and (choose := getattr(ctypes.CDLL(None), "mallopt", None)):
        choose(MMAP_THRESHOLD, LARGEST)
        choose(TRIM_THRESHOLD, KEPT)


def release() -> None:
    """Collect garbage, and give freed memory back to the system."""
    gc.collect()
    _give_back()


def _give_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
