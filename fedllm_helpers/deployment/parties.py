"""The parties of a deployed federation on this machine: their folders, their processes, and Flower's own commands."""

import contextlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
from dataclasses import dataclass, field
from pathlib import Path

from fedllm_helpers.deployment import watchdog

SERVER, LOOPBACK, CONNECTION = "server", "127.0.0.1", "trial"
COLOURS, TELLING = re.compile(r"\x1b\[[\d;]*m"), re.compile(r"error|refused|invalid|expired|fail|denied", re.IGNORECASE)
REASONS = {  # what Flower does not say
    "code: 2004": "its key is not registered with the server, or another node with this key still counts as online",
    "Connection attempt failed": "no answer: nobody listens there, or only TLS is spoken and this is plain text",
}


@dataclass(frozen=True)
class Deployment:
    """Processes of a federation by name, and where they are; as a context manager it stops them at the end."""

    folder: Path
    hospitals: int
    port: int
    mark: str
    guard: subprocess.Popen
    warm: bool = False
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of the deployment, also those that Flower started; files stay."""
        nodes = [process for name, process in self.processes.items() if name != SERVER]
        for process in nodes:  # before the server, so that they can say goodbye
            process.terminate()
        for process in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        with contextlib.suppress(OSError, ValueError):  # it is gone, or this was called before
            self.guard.stdin.write(b"x")
            self.guard.stdin.close()
        self.guard.wait()
        watchdog.end(self.mark)
        for process in self.processes.values():
            process.wait()


class AlreadyRegistered(RuntimeError):
    """The server knows this public key."""


def environment_of(deployment: Deployment, name: str) -> dict[str, str]:
    """The environment of a party's processes: a home of its own for Flower, no telemetry, and the deployment's mark."""
    scripts = {str(Path(sys.executable).parent), sysconfig.get_path("scripts")}
    forced = ("FORCE_COLOR", "CLICOLOR_FORCE")  # set in notebooks, and no help in JSON
    return {key: value for key, value in os.environ.items() if key not in forced} | {
        "PATH": os.pathsep.join([*sorted(scripts), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(deployment.folder / name / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # nodes run what is installed here, and fetch nothing
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "PYTHONUNBUFFERED": "1",
        watchdog.MARK: deployment.mark,
    }


def launch(deployment: Deployment, name: str, command: list[str]) -> subprocess.Popen:
    """Start a process of a party, in its folder, with its output in ``log.txt`` there."""
    home = deployment.folder / name
    with open(home / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=home,
            env=environment_of(deployment, name),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    threading.Thread(target=process.wait, daemon=True).start()  # Flower's helpers stay while a parent is not reaped
    deployment.processes[name] = process
    return process


def last_words(deployment: Deployment, name: str) -> str:
    """The line of a process' log that says most about its end: why it gave up, or what went wrong last."""
    text = COLOURS.sub("", (deployment.folder / name / "log.txt").read_text(encoding="utf-8", errors="replace"))
    text = text[max(text.rfind("Starting Flower SuperNode"), text.rfind("Starting Flower SuperLink"), 0) :]
    _, gave_up, after = text.rpartition("Exit Code:")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if gave_up:
        lines = [" ".join(line.split()) for line in after.splitlines()[1:4]]
    telling = [line for line in lines if TELLING.search(line)]
    telling = [line for line in telling if "attempt failed" not in line] or telling  # helpers may still try to connect
    said = next(reversed(telling or lines), "its log is empty")
    return said + next((f" ({why})" for sign, why in REASONS.items() if sign in said), "")


def flower(deployment: Deployment, *arguments: str) -> dict:
    """One ``flwr`` command on the server's machine, with ``--format json``; its answer.

    Raises:
        RuntimeError: Flower's own error message, in one line.
    """
    command = ["flwr", *arguments, "--format", "json"]
    environment = environment_of(deployment, SERVER)
    done = subprocess.run(command, cwd=deployment.folder, env=environment, capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {"error-message": done.stderr or done.stdout}
    if not answer.get("success"):
        said = " ".join(str(answer.get("error-message")).split())
        kind = AlreadyRegistered if "already in use" in said else RuntimeError
        raise kind(f"flwr {arguments[0]}: {said.partition(f'({LOOPBACK}:{deployment.port})')[2].strip() or said}")
    return answer


def nodes(deployment: Deployment) -> list[dict[str, str]]:
    """What the server knows of its nodes: ``node-id``, ``status`` (registered, online, offline) and times."""
    return flower(deployment, "supernode", "list", CONNECTION)["nodes"]


def register(deployment: Deployment, public_key: Path) -> None:
    """Tell the server the public key of a hospital; a key that it knows already is no error."""
    with contextlib.suppress(AlreadyRegistered):
        flower(deployment, "supernode", "register", str(public_key), CONNECTION)
