"""Python's and glibc's memory around a training: what is loaded is not walked again, what was freed is given back."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

FEW = 10_000  # under Python 3.12, 375 objects were frozen before anyone froze any
_aside = False  # whether that was done here: to count what is set aside takes as long as a step of a thin model


@contextlib.contextmanager
def loaded_set_aside() -> Iterator[None]:
    """Let garbage collections pass over what is there already, and take it up again at the end.

    The libraries alone are 600,000 objects, a third of a second for each collection. Trainer and :func:`release` make
    one for every training, and some of Flower's strategies several for every round. Within another such block, or
    where a program has frozen its objects itself (more than :data:`FEW`), this does nothing.
    """
    global _aside
    ours = not _aside and gc.get_freeze_count() < FEW
    if ours:
        set_aside()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()
            _aside = False


def set_aside() -> None:
    """Let garbage collections pass over what is there already, until the process ends."""
    global _aside
    gc.freeze()
    _aside = True


def release() -> None:
    """Give freed memory back: glibc keeps it, and batches of many shapes leave most of a gigabyte behind."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
