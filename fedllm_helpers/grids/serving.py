"""Inside a worker process: it answers the messages that it is handed, until whoever started it wants no more."""

import contextlib
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np
import psutil
from flwr.app import Context, Message
from flwr.supercore.task_identity import TaskIdentity
from tqdm import tqdm

from fedllm_helpers.grids import in_process


@dataclass(frozen=True)
class Task:
    """A message to a client as Flower's bytes, what the client remembers, and the rest of its context.

    Before its first task a worker calls ``begin``; and it deletes the folder ``scratch`` if its parent is killed.
    """

    request: bytes
    state: bytes
    run_id: int
    node: int
    node_config: dict[str, Any]
    run_config: dict[str, Any]
    begin: Callable[[], None] | None = None
    scratch: str = ""


@dataclass(frozen=True)
class Answer:
    """The reply to a task as bytes; None where its process ended, and ``ended`` says how.

    ``state`` is what the client remembers now, None for what it did before; ``raised`` whether it raised, and ``log``
    has what it wrote there, as (logger, level, line).
    """

    reply: bytes | None = None
    state: bytes | None = None
    raised: bool = False
    log: list[tuple[str, int, str]] = field(default_factory=list)
    ended: str = ""


class _Kept(logging.Handler):
    """Log records from warnings on, as (logger, level, line)."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.lines.append((record.name, record.levelno, record.getMessage()))


def serve(app: str, pipe: Connection, environment: dict[str, str]) -> None:
    """What a worker does: answer tasks until the other end is closed.

    Args:
        app: what answers, from :func:`named`.
        pipe: to and from the one who started it. The first that goes up is (None, "") when it can begin, or (None, why
            not); then a (number, :class:`Answer`) for each (number, :class:`Task`) that comes.
        environment: of the one who started it.
    """
    _as_a_new_process(environment)
    scratch: list[str] = []
    end_with_parent(scratch)
    kept, begun = _Kept(), False
    logging.getLogger().addHandler(kept)
    try:
        client = found(app)
    except Exception:
        pipe.send((None, traceback.format_exc()))
        return

    def whole(message: Message, context: Context) -> Message:
        """Begin, where that is still to be done, and answer: an error of either is the reply."""
        nonlocal begun
        if task.begin and not begun:
            task.begin()
        begun = True
        return client(message, context)

    with contextlib.suppress(EOFError, OSError), in_process.quiet_flower():
        pipe.send((None, ""))
        while True:
            number, task = pipe.recv()
            scratch[:] = [task.scratch] if task.scratch else []
            pipe.send((number, _answered(whole, task, kept)))
    _end(scratch)


def _as_a_new_process(environment: dict[str, str]) -> None:
    """Undo what a fork has that a process of its own has not, and leave its end to whoever started it."""
    gc.freeze()  # a collection would write on every page that is shared with the process this was forked from
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # of the system: no two workers throw the same dice
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind


def _answered(app: Callable[[Message, Context], Message], task: Task, kept: _Kept) -> Answer:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, task.run_id, in_process.SERVER_NODE
    state = in_process.state_from(task.state)
    context = Context(task.run_id, task.node, task.node_config, state, task.run_config)
    reply, error = in_process.answer(app, in_process.message_from(task.request), context)
    after = in_process.state_bytes(context.state)
    lines, kept.lines = kept.lines, []
    return Answer(reply, None if after == task.state else after, error is not None, lines)


def end_with_parent(scratch: Sequence[str] = ()) -> None:
    """End this process when the one that started it has ended, however it did; a killed one cannot tell its workers.

    Args:
        scratch: folders to delete then, as they are named by that time.
    """
    parent = multiprocessing.parent_process()

    def follow() -> None:
        """Wait for it."""
        parent.join()
        _end(scratch)

    threading.Thread(target=follow, daemon=True).start()


def _end(scratch: Sequence[str]) -> NoReturn:
    for folder in scratch if _gone(multiprocessing.parent_process().pid) else ():  # else it is used by others still
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _gone(process: int) -> bool:
    """Whether a process has ended, at the latest in two seconds; the system closes its files a moment before."""
    for _ in range(20):
        try:
            if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def named(app: Any) -> str:
    """Where workers find an app: ``module:name``.

    Raises:
        ValueError: no module other than the program itself has it under a name.
    """
    for module, content in list(sys.modules.items()):
        if module not in ("__main__", "__mp_main__"):
            for name, value in list(getattr(content, "__dict__", {}).items()):
                if value is app:
                    return f"{module}:{name}"
    why = "side by side each worker imports it from a module, where it must have a name, and this one has none"
    raise ValueError(f"client={app!r:.60}: {why}; in process any works")


def found(app: str) -> Any:
    """The inverse of :func:`named`."""
    module, _, name = app.partition(":")
    return getattr(import_module(module), name)
