"""Starts a hospital's SuperNode with a process that is ready for its messages: ``python -P -m …`` with its options.

Flower starts a Python process for each message, and each imports torch. Here the SuperNode runs with Flower's own
``--isolation process``, and beside it :mod:`forking`, which has imported everything and forks a process a message. The
SuperNode is this very process; the other one ends with it, however it ends. Where that cannot be, or when the other one
has died, one line says so and Flower starts processes as it always does.

With ``flower-superlink`` as the first word it is a SuperLink, and the process is ready for its runs.
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
LINK, NODE = "flower-superlink", "flower-supernode"
TASKS = {LINK: "flwr-serverapp", NODE: "flwr-clientapp"}  # what they have done, by Flower's commands of these names
PORTS = {LINK: 8000, NODE: 9094}  # Flower's own
LEFT_TO_FLOWER = ("--isolation", "--superexec-auth-secret-file", "--allow-runtime-dependency-installation")
LEFT_TO_FLOWER += ("--simulation",)
INSTALLS = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"  # unless this is 1, a SuperLink does, for each run;
NOTHING_INSTALLED = "--disable-runtime-dependency-installation"  # or this is said


def command(*options: str) -> list[str]:
    """The command that stands in for ``flower-supernode`` with these options, or for another with all its words."""
    return [sys.executable, "-P", "-m", PROGRAM, *options]


def fits(processes: int) -> bool:
    """Whether this machine's free memory holds so many ready processes."""
    free, wanted = psutil.virtual_memory().available, processes * HOLDS
    if free < wanted:
        said = "%d ready processes want %.1f GB and %.1f are free: each message starts a process of its own"
        logger.warning(said, processes, wanted / 1e9, free / 1e9)
    return free >= wanted


def why_cold(program: str, options: list[str]) -> str:
    """Why the processes of messages are left to Flower, empty where they are not."""
    if sys.platform != "linux":
        return "only on Linux can a process fork that has imported torch"
    if not metadata.version("flwr").startswith(TRIED):
        return f"Flower {metadata.version('flwr')}: this was tried with {TRIED}*"
    if program == LINK and os.environ.get(INSTALLS) != "1" and NOTHING_INSTALLED not in options:
        return f"{INSTALLS} is not 1, and what a run asks for is installed"
    left = (*LEFT_TO_FLOWER, *(["--ssl-certfile"] if program == NODE else []))  # a SuperNode's own, for these messages
    return next((f"{name} is set" for name in left for one in options if one.split("=")[0] == name), "")


def end_with(parent: int) -> None:
    """Let the system kill this process when its parent is gone, also where that was killed. Linux alone has this."""
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(0)


def asked_at(program: str, options: list[str]) -> tuple[str, int, list[str]]:
    """Where a program with these options is asked for messages: host, port, and Flower's words for whom to trust."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=PORTS[program])
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--ssl-ca-certfile")
    given, _ = parser.parse_known_args(options)
    trust = ["--insecure"]  # of the SuperNode on this machine
    if program == LINK and not given.insecure:
        trust = ["--root-certificates", given.ssl_ca_certfile] if given.ssl_ca_certfile else []
    return ELSEWHERE.get(given.host, given.host), given.port, trust


def stand_by(program: str, options: list[str], parent: int) -> NoReturn:
    """Keep the ready process at hand for as long as its parent lives; when it has died, start Flower's own."""
    end_with(parent)
    host, port, trust = asked_at(program, options)
    while not _listens(host, port):  # one that gives up at once has imported nothing
        time.sleep(0.2)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    ready = [sys.executable, "-P", "-m", FORKING, TASKS[program], address, str(parent), str(os.getpid()), *trust]
    code = subprocess.call(ready)
    say(f"the ready {TASKS[program]} has ended ({code}): from now on each message starts one of its own")
    flowers = ["flower-superexec", *trust, "--runtime-api-address", address, "--parent-pid", str(parent)]
    os.execvp(flowers[0], flowers)


def say(line: str) -> None:
    """A line for the log of the SuperNode or SuperLink."""
    print(f"warm: {line}", file=sys.stderr, flush=True)


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def main() -> NoReturn:
    """Become the SuperNode or SuperLink, with a child that has everything ready."""
    program, options, isolation = NODE, sys.argv[1:], []
    if options[:1] == [LINK]:
        program, options = LINK, options[1:]
    path = [os.environ.get("PATH", ""), str(Path(sys.executable).parent)]  # Flower's commands lie beside this Python
    os.environ["PATH"] = os.pathsep.join(filter(None, path))
    if why := why_cold(program, options):
        say(f"each message starts a process of its own ({why})")
    else:
        parent, isolation = os.getpid(), ["--isolation", "process"]
        if os.fork() == 0:
            stand_by(program, options, parent)
    os.execvp(program, [program, *isolation, *options])


if __name__ == "__main__":
    main()
