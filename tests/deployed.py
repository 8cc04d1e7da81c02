"""Two hospitals and a server on real processes, for tests, patience with what they do, and what they were told."""

import contextlib
import os
import time

import numpy as np
import psutil
import pytest

from fedllm_helpers import deployment
from fedllm_helpers.deployment import watchdog

SMALL = (
    "federation.num_clients=2 federation.num_rounds=2 federation.training_arguments.max_steps=1 federation.threads=1 "
    "federation.training_arguments.per_device_train_batch_size=2 dataset.max_cards_per_specialty=6 "
    "train.evaluate_split=0.34 federation.evaluate_every=0 federation.fraction_evaluate=1 federation.timeout=600"
)


def until(condition, seconds=240):
    """Wait for something; not for ever."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@contextlib.contextmanager
def started(cfg, temporary, hook="", **options):
    """A deployment in which each process of Python begins with ``hook``; afterwards none is left."""
    folder = temporary.mktemp("hook")
    (folder / "sitecustomize.py").write_text(hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        with deployment.start(cfg, temporary.mktemp("deployment"), **options) as running:
            yield running
    assert not list(watchdog.marked(running.mark))


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def log(running, name):
    return (running.folder / name / "log.txt").read_text()


def told_to(mark):
    """Command line and environment of the processes with a mark, by number."""
    found = {}
    for process in watchdog.marked(mark):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found[process.pid] = " ".join([*process.cmdline(), *process.environ().values()])
    return found


def running_server_apps(mark):
    """Processes of runs, by number: Flower's own, or forks of the one that is ready for them."""
    said = {pid: words for pid, words in told_to(mark).items() if "flwr-serverapp" in words}
    found = []
    for pid, words in said.items():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "deployment.forking" not in words or psutil.Process(pid).ppid() in said:
                found.append(pid)
    return found
