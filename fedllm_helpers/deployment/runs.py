"""Runs of a deployed federation: hand in the two apps with their settings, follow them, and collect what they made."""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import __version__, folders
from fedllm_helpers.aggregation.edits import Base
from fedllm_helpers.deployment.parties import COLOURS, CONNECTION, SERVER, Deployment, environment_of, flower
from fedllm_helpers.federation import checkpoints
from fedllm_helpers.federation.simulation import FederatedRecord
from fedllm_helpers.federation.tables import Tables

PLAIN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")
TAKEN = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))}  # on Windows
FLOWERS_OWN = re.compile(
    r"$|\s|INFO|ERROR|Successfully|Using|rounds are kept|Traceback|[\w.]+(Error|Exception)\b"
)  # lines
PROJECT = """# What every node gets: the package as it is here, and the settings of one run.
[project]
name = "fedllm-helpers"
version = "VERSION"
description = "One run of a federation"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.43"]

[tool.flwr.app]
publisher = "fedllm-companion"
fab-include = ["fedllm_helpers/**/*.py", "fedllm_helpers/conf/*.yaml"]

[tool.flwr.app.components]
serverapp = "fedllm_helpers.federation.server_app:app"
clientapp = "fedllm_helpers.federation.client_app:app"

[tool.flwr.app.config]
"""


def run(
    running: Deployment, cfg: DictConfig, name: str = "run", *, show: Callable[[str], None] = print
) -> FederatedRecord:
    """Run a federation on a deployment, as :func:`fedllm_helpers.federation.simulation.run` does in one process.

    Args:
        running: from :func:`fedllm_helpers.deployment.start`.
        cfg: of the federation; on CPUs, with the same ``federation.threads``, the adapter is the same to the last bit.
        name: of the run, and of its folders; one that was cut off goes on after its last finished round under its own
            name.
        show: takes the server's lines as they come, one for each round.

    Raises:
        ValueError: ``federation.num_clients`` are not the hospitals of the deployment, or the name is not a plain one.
        RuntimeError: the run failed, with the server's reason; or the server is gone.
    """
    follow(running, submit(running, cfg, name), show)
    return collect(running, cfg, name)


def submit(running: Deployment, cfg: DictConfig, name: str = "run", *, app: Path | None = None) -> int:
    """Hand a run in; the server starts it as soon as it can. Arguments as for :func:`run`.

    Args:
        app: a folder from :func:`bundle`, in place of a new one.

    Returns:
        Flower's number of the run.
    """
    if cfg.federation.num_clients != running.hospitals:
        raise ValueError(
            f"federation.num_clients={cfg.federation.num_clients}: this deployment has {running.hospitals} hospitals"
        )
    run_folder(running, name)  # a bad name is said whoever made the app
    app = app or bundle(running, cfg, name)
    return int(flower(running, "run", str(app), CONNECTION)["run-id"])


def run_folder(running: Deployment, name: str) -> Path:
    """Where the server keeps the rounds, adapters and tables of a run.

    Raises:
        ValueError: the name is none for a folder on every system, or leads elsewhere.
    """
    if not isinstance(name, str) or not PLAIN.fullmatch(name) or name.split(".")[0].upper() in TAKEN:
        raise ValueError(
            f"{str(name)[:40]!r} is no name for a run: up to 64 of A-Z a-z 0-9 . _ -, starting with a letter or digit"
        )
    return running.folder / SERVER / "runs" / name


def bundle(running: Deployment, cfg: DictConfig, name: str) -> Path:
    """Write the app of a run, a folder that ``flwr run`` takes: the package's files and a project with the settings.

    Raises:
        ValueError: as :func:`run_folder`, or there is a folder of that name which this has not made.
    """
    given = {"config": OmegaConf.to_yaml(cfg), "folder": str(run_folder(running, name)), "progress": "lines"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in given.items()]  # JSON's strings are TOML's, too
    app, package = running.folder / SERVER / "apps" / name, Path(__file__).parents[1]
    project = app / "pyproject.toml"
    if os.path.lexists(app):
        begun = project.read_text(encoding="utf-8", errors="replace") if project.is_file() else ""
        if app.is_symlink() or not begun.startswith(PROJECT.splitlines()[0]):
            raise ValueError(f"{app} was not made by bundle: move it away, or name the run otherwise")
        shutil.rmtree(app)
    folders.write(project, PROJECT.replace("VERSION", __version__) + "\n".join(lines) + "\n")
    shutil.copytree(package, app / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    return app


def status(running: Deployment, number: int) -> dict:
    """What Flower says of a run: ``status`` (such as ``finished:completed``), ``status-details``, bytes and times."""
    return flower(running, "list", CONNECTION, "--run-id", str(number))["runs"][0]


def follow(running: Deployment, number: int, show: Callable[[str], None] = print) -> dict:
    """Show what the server says until a run is over. An interruption ends the deployment with everything in it.

    Returns:
        Its status: a command's exit code would be 0 for a run that failed, too.

    Raises:
        RuntimeError: it did not complete, or the server is gone.
    """
    now, seen, before = {}, 0, False
    try:
        while not (before and now["status"].startswith("finished")):
            before = bool(now)  # a stream ends when the run does, or breaks: only one that begins after that is whole
            with _log(running, number) as lines:
                now = _status_or_gone(running, number)  # while the other command starts
                for count, line in enumerate(lines):
                    if count >= seen and (wanted := _telling(line)):  # a stream that broke begins anew
                        show(wanted)
                    seen = max(seen, count + 1)
    except KeyboardInterrupt:
        running.stop()
        raise
    if now["status"] != "finished:completed":
        raise RuntimeError(f"the run ended as {now['status']}: {now['status-details']}")
    return now


@contextlib.contextmanager
def _log(running: Deployment, number: int) -> Iterator[Iterable[str]]:
    """The lines of a run's log from its beginning, as they come."""
    command, given = ["flwr", "log", str(number), CONNECTION, "--stream"], environment_of(running, SERVER)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=given, **pipes) as process:
        try:
            yield process.stdout
        except BaseException:
            process.kill()  # it would wait for a server that is gone
            raise


def collect(running: Deployment, cfg: DictConfig, name: str = "run") -> FederatedRecord:
    """What a run left in its folder on the server.

    Raises:
        RuntimeError: it has not finished all its rounds.
        ValueError: it ran with other settings.
    """
    folder, rounds = run_folder(running, name), cfg.federation.num_rounds
    last = checkpoints.latest(folder, OmegaConf.to_container(cfg)) if folder.is_dir() else None
    if last is None or last.number < rounds:
        raise RuntimeError(
            f"{folder} has {last.number if last else 0} of {rounds} rounds: submit the run again to go on"
        )
    tables, base = Tables(last.history, last.clients), Base(last.edits)
    origin = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    frames = tables.history_frame(), tables.clients_frame()
    return FederatedRecord(last.adapter, *frames, origin, base.whole(), scores=tables.scores_frame())


def _status_or_gone(running: Deployment, number: int) -> dict:
    try:
        return status(running, number)
    except RuntimeError:
        if running.processes[SERVER].poll() is None:
            raise
        said = "the server is gone: start_server brings it back, and the run goes on when it is submitted again"
        raise RuntimeError(said) from None


def _telling(line: str) -> str:
    line = COLOURS.sub("", line).rstrip()
    return "" if FLOWERS_OWN.match(line) else line.removeprefix("WARNING :").strip()
