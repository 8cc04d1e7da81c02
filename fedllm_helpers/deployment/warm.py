"""Starts a hospital's SuperNode with a process that is ready for its messages: ``python -P -m …`` with its options.

Flower starts a Python process for each message, and each imports torch. Here the SuperNode runs with Flower's own
``--isolation process``, and beside it :mod:`forking`, which has imported everything and forks a process a message. The
SuperNode is this very process; the other one ends with it, however it ends. Where that cannot be, or when the other one
has died, one line says so and Flower starts processes as it always does.
"""

import argparse
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import psutil

logger = logging.getLogger(__name__)
TRIED = "1.42."  # of Flower; what asks the SuperNode for messages is not the same in others
PROGRAM, FORKING = "fedllm_helpers.deployment.warm", "fedllm_helpers.deployment.forking"
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
HOLDS = 1_000_000_000  # bytes of memory, with the embedded model
ELSEWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # what listens everywhere is asked here
LEFT_TO_FLOWER = ("--isolation", "--ssl-certfile", "--superexec-auth-secret-file")
LEFT_TO_FLOWER += ("--allow-runtime-dependency-installation",)


def command(*options: str) -> list[str]:
    """The command that stands in for ``flower-supernode`` with these options."""
    return [sys.executable, "-P", "-m", PROGRAM, *options]


def fits(hospitals: int) -> bool:
    """Whether this machine's free memory holds a ready process for each of so many hospitals."""
    free, wanted = psutil.virtual_memory().available, hospitals * HOLDS
    if free < wanted:
        said = "%d ready processes want %.1f GB and %.1f are free: each message starts a process of its own"
        logger.warning(said, hospitals, wanted / 1e9, free / 1e9)
    return free >= wanted


def why_cold(options: list[str]) -> str:
    """Why the processes of messages are left to Flower, empty where they are not."""
    if sys.platform != "linux":
        return "only on Linux can a process fork that has imported torch"
    if not metadata.version("flwr").startswith(TRIED):
        return f"Flower {metadata.version('flwr')}: this was tried with {TRIED}*"
    return next((f"{name} is set" for name in LEFT_TO_FLOWER for one in options if one.split("=")[0] == name), "")


def end_with(parent: int) -> None:
    """Let the system kill this process when its parent is gone, also where that was killed. Linux alone has this."""
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(0)


def address_of(options: list[str]) -> tuple[str, int]:
    """Where a SuperNode with these options is asked for messages: host and port."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9094)
    given, _ = parser.parse_known_args(options)
    return ELSEWHERE.get(given.host, given.host), given.port


def stand_by(host: str, port: int, node: int) -> NoReturn:
    """Keep the ready process at hand for as long as a SuperNode lives; when it has died, start Flower's own."""
    end_with(node)
    while not _listens(host, port):  # a node that gives up at once has imported nothing
        time.sleep(0.2)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    ready = [sys.executable, "-P", "-m", FORKING, address, str(node), str(os.getpid())]
    code = subprocess.call(ready)
    say(f"the ready ClientApp process has ended ({code}): from now on each message starts one of its own")
    flowers = ["flower-superexec", "--insecure", "--runtime-api-address", address, "--parent-pid", str(node)]
    os.execvp(flowers[0], flowers)


def say(line: str) -> None:
    """A line for the SuperNode's log."""
    print(f"warm: {line}", file=sys.stderr, flush=True)


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def main() -> NoReturn:
    """Become the SuperNode, with a child that has everything ready."""
    options, isolation = sys.argv[1:], []
    path = [os.environ.get("PATH", ""), str(Path(sys.executable).parent)]  # Flower's commands lie beside this Python
    os.environ["PATH"] = os.pathsep.join(filter(None, path))
    if why := why_cold(options):
        say(f"each message starts a process of its own ({why})")
    else:
        host, port = address_of(options)
        node, isolation = os.getpid(), ["--isolation", "process"]
        if os.fork() == 0:
            stand_by(host, port, node)
    os.execvp("flower-supernode", ["flower-supernode", *isolation, *options])


if __name__ == "__main__":
    main()
