"""Processes that answer messages for a grid: started, fed as they get free, and started anew where one dies.

A process and a pipe each, by the standard library's ``multiprocessing``: when one process is killed, the executors of
``concurrent.futures`` and of loky (joblib's) give up what all others are at, and the pool of ``multiprocessing``, which
is torch's, too, waits for ever. Pebble goes on, but is one more dependency for what is a page here.

On Linux they are forked from its fork server, which imports libraries once for all (:func:`import_ahead`), holds them
until this process ends, and so starts the workers of the next block at once. Elsewhere, and where there is a GPU, whose
driver does not survive a fork, each is spawned and imports for itself.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from fedllm_helpers.grids.serving import Answer, Task, serve

logger = logging.getLogger(__name__)
PATIENCE = 1.0  # seconds until processes are looked at that say nothing
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of Nvidia's and AMD's GPUs, and of any under Windows
IMPORTER = os.getpid()  # a process that is forked from this one cannot use its fork server
TRIES = 3  # starts in a row that come to nothing, until there is one worker less
SCRIPT = "a script that starts workers does so under `if __name__ == '__main__':`, because each of them imports it"


@dataclass
class Worker:
    """A process and this end of its pipe; whether it can begin, and the number of the task that it is at."""

    process: BaseProcess
    pipe: Connection
    ready: bool = False
    task: int | None = None


class Team:
    """Workers for as long as a ``with`` block lasts; they end with it, and with this process, however that ends.

    Args:
        app: what answers, as ``module:name``; every worker imports it.
        workers: how many.
    """

    def __init__(self, app: str, workers: int) -> None:
        self.app, self.wanted, self.numbers = app, workers, count()
        self.workers: list[Worker] = []
        self.failed = 0  # starts in a row that came to nothing

    def __enter__(self) -> "Team":
        if forks():
            import_ahead()  # a fork waits until that is done; meanwhile there is something else to do
        else:
            self._begin()
        return self

    def _begin(self) -> None:
        try:
            self.workers += [_started(self.app) for _ in range(self.wanted)]
        except BaseException:
            self.end()
            raise

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """End all workers, whatever they are at."""
        for worker in self.workers:
            worker.process.kill()  # whoever leaves the block wants no more answers, and nothing is open but these
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()
        self.workers.clear()

    def work(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Answer]]:
        """Answers as they come, each with the place of its task. A task is taken when a worker is free for it.

        Raises:
            RuntimeError: no worker could be started.
        """
        if not self.workers:
            self._begin()
        left, again, places = enumerate(tasks), [], {}
        while True:
            idle = [worker for worker in self.workers if worker.ready and worker.task is None]
            nothing = False
            for worker in idle:
                taken = again.pop() if again else next(left, None)
                if taken is None:
                    nothing = True
                    break
                number = next(self.numbers)
                if self._gives(worker, number, taken[1]):
                    places[number] = taken[0]
                else:
                    again.append(taken)
            if nothing and not places:
                return
            for number, answer in self._come():
                if number in places:  # no answer to a task that somebody gave up
                    yield places.pop(number), answer

    def _gives(self, worker: Worker, number: int, task: Task) -> bool:
        try:
            worker.pipe.send((number, task))
        except OSError:  # it ended while it had nothing to do
            self._lost(worker)
            return False
        worker.task = number
        return True

    def _come(self) -> list[tuple[int, Answer]]:
        """What workers have said, at once or after :data:`PATIENCE`; those that ended are started anew."""
        came, heard = [], wait([worker.pipe for worker in self.workers], PATIENCE)
        for worker in list(self.workers):
            if worker.pipe in heard or worker.pipe.poll():
                try:
                    number, said = worker.pipe.recv()
                except (EOFError, OSError):
                    came += self._lost(worker)
                    continue
                if number is None:
                    _check_start(said)
                    worker.ready, self.failed = True, 0
                    continue
                for name, level, line in said.log:
                    logging.getLogger(name).log(level, "%s", line)
                worker.task = None
                came.append((number, said))
            elif not worker.process.is_alive():
                came += self._lost(worker)
        return came

    def _lost(self, worker: Worker) -> list[tuple[int, Answer]]:
        """Start another in place of one that ended; the failure of the task that it was at, if it was at one."""
        worker.process.join(PATIENCE)
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        ended = f"the worker process {_how(worker.process.exitcode)}"
        self.failed += not worker.ready
        if worker.ready or self.failed < TRIES:
            self.workers[self.workers.index(worker)] = _started(self.app)
        else:  # the next would end, too
            self.workers.remove(worker)
            if not self.workers:
                raise RuntimeError(f"{ended} before it could begin, and so did all others: {SCRIPT}")
            logger.warning("%s before it could begin: %d are left", ended, len(self.workers))
        return [] if worker.task is None else [(worker.task, Answer(ended=ended))]


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (" (as for want of memory)" if name == "SIGKILL" else "")


def _check_start(said: str) -> None:
    if said:
        error = RuntimeError(f"a worker process cannot begin: {said.strip().splitlines()[-1]}")
        error.add_note(said)
        raise error


def import_ahead(*modules: str) -> None:
    """Begin to import what workers need, in the process that they will be forked from; this returns at once.

    What a library reads from the environment while it is imported stays as it is now.

    Args:
        modules: by name; those of the first call count. One that is not there is left out.
    """
    if forks():
        if modules:
            forkserver.set_forkserver_preload(list(modules))
        with _interrupts_held_back(), _own_path():
            forkserver.ensure_running()


def forks() -> bool:
    """Whether workers are forked here, and not spawned."""
    ours = sys.platform == "linux" and os.getpid() == IMPORTER
    return ours and not any(Path(driver).exists() for driver in DRIVERS)


@contextlib.contextmanager
def _own_path() -> Iterator[None]:
    """Let a Python that is started look for modules where this one does: the fork server of Python 3.11 does not."""
    given = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _started(app: str) -> Worker:
    context: BaseContext = multiprocessing.get_context("forkserver" if forks() else "spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(app, theirs, dict(os.environ)), name="hospitals")
    import_ahead()  # a fork has the mask of what it is forked from, so that this process may be interrupted meanwhile
    try:
        with contextlib.nullcontext() if forks() else _interrupts_held_back():
            process.start()
    except (EOFError, ConnectionError):
        raise RuntimeError("no worker can begin: the process that they are forked from has ended") from None
    theirs.close()
    return Worker(process, ours)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal or kernel: one that is started here inherits that it does not heed it.

    Windows has no such mask; there a worker heeds it until it has begun.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which unblocks them when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
