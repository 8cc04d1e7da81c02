"""Ends every process of a deployment when whoever started it is gone: ``python watchdog.py MARK``, without the package.

It waits for a byte on its standard input, or until that is closed, which the system does when a notebook's kernel dies,
however it dies. Then it ends the processes that carry the mark in their environment: those that Flower started, too,
and no others.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import psutil

MARK = "FEDLLM_DEPLOYMENT"
GRACE = 15.0  # seconds for Flower to say goodbye before a process is killed


def marked(mark: str) -> Iterator[psutil.Process]:
    """The living processes that carry a mark, without this one."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # others' processes, and those that end just now
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield from [process] if process.pid != os.getpid() else []


def end(mark: str) -> None:
    """Ask all of them to end, kill those that do not, and return when there are none."""
    asked, start = set(), time.monotonic()
    while found := list(marked(mark)):
        for process in found:
            with contextlib.suppress(psutil.Error):
                if time.monotonic() - start > GRACE:
                    process.kill()
                elif process.pid not in asked:
                    process.terminate()
            asked.add(process.pid)
        time.sleep(0.1)


if __name__ == "__main__":
    sys.stdin.buffer.read(1)
    end(sys.argv[1])
