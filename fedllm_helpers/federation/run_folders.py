"""The folder of a federation: free for it or its own, held alone, with the cards and the model with which it began."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from flwr.app import Context
from platformdirs import user_data_path

from fedllm_helpers import folders
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.federation import checkpoints

logger = logging.getLogger(__name__)
ORIGIN = "provenance.json"
HELD = 8  # adapters: two rounds, each with two moments of a strategy, the last adapter, and one that is being written
RESULTS = (
    "adapter",
    "history.csv",
    "clients.csv",
    "scores.csv",
    ORIGIN,
)  # what a finished run leaves beside its rounds


def named(folder: str | Path | None) -> str:
    """The path of a folder for a run, whole and checked as :func:`check_folder` does; "" for None."""
    if folder is None:
        return ""
    path = folders.place(folder).resolve()
    check_folder(path)
    return str(path)


def of_context(context: Context) -> Path | None:
    """The folder that a run's settings name: ``"auto"`` is one of its own under the user's data, ``""`` is none."""
    given = str(context.run_config.get("folder", ""))
    if given == "auto":
        return user_data_path("fedllm_helpers", appauthor=False) / "runs" / str(context.run_id)
    return Path(given).expanduser().resolve() if given else None


def check_origin(folder: Path, origin: dict[str, Any]) -> None:
    """See that a run that goes on has the cards and the model with which it began, and say what else is new.

    Args:
        folder: of the run; ``provenance.json`` is written where it has no round.
        origin: from :func:`provenance.provenance`, with ``fingerprint``: texts by name, "" if unknown.

    Raises:
        ValueError: cards or model are others, or ``provenance.json`` is damaged.
    """
    path, rounds = folder / ORIGIN, checkpoints.rounds(folder)
    if not rounds:
        folders.write(path, json.dumps(origin, indent=1))
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        known = {name: text for name, text in before.get("fingerprint", {}).items() if text}
        settings = before.get("config", origin["config"])
        facts = [{**one.get("versions", {}), **one.get("machine", {})} for one in (before, origin)]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): move it away, and nobody checks cards and model") from None
    changed = [name for name, text in origin["fingerprint"].items() if text and known.get(name, text) != text]
    if changed and not checkpoints.differences(settings, origin["config"]):  # that is said by who reads rounds
        what = f"the {' and the '.join(changed)} changed since round {rounds[0][0]}"
        raise ValueError(f"{what} of the run in {folder}: bring them back, or name a new folder")
    other = [
        f"{name} {facts[0][name]} there, {new} here" for name, new in facts[1].items() if facts[0].get(name, new) != new
    ]
    if other or not known:
        said = "; ".join(other) or "it says nothing of its cards and model"
        logger.warning("the run in %s goes on, perhaps with other bits: %s", folder, said)


def check_folder(folder: Path) -> None:
    """See that a folder is free for a run, or has one: what else lies in it is left alone.

    Raises:
        ValueError: a file has that name, or files of a run's names lie there and no round.
    """
    names = [one.name for one in folder.iterdir()] if folders.place(folder).is_dir() else []
    path = folder / ORIGIN
    own = path.is_file() and '"fingerprint"' in path.read_text(encoding="utf-8", errors="replace")
    taken = sorted(set(RESULTS) & set(names) - ({ORIGIN} if own else set()))
    if taken and not checkpoints.rounds(folder):
        raise ValueError(f"{folder} has {', '.join(taken)} of something else, and no round: name another folder")
    folders.for_adapter(folder / RESULTS[0]), folders.place(folder / "adapters")


def check_room(folder: Path, adapter: Adapter) -> None:
    """See, before anyone trains, that the disk holds a run: two rounds with what strategies keep, and the adapters.

    Raises:
        OSError: it does not.
    """
    need, free = HELD * sum(value.nbytes for value in adapter.values()), shutil.disk_usage(folder).free
    if free < need:
        said = f"{free / 1e6:.1f} MB are free, and the adapters of a run take about {need / 1e6:.1f} MB"
        raise OSError(f"{folder}: {said}: make room, or name another folder")


@contextlib.contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Hold the folder of a run, where it has one: two runs in one would write over each other's rounds.

    What runs that were killed have left half-written there is deleted.

    Raises:
        ValueError: as :func:`check_folder`.
        RuntimeError: another run is at work there.
    """
    if folder is None:
        yield
        return
    check_folder(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    with folders.said("a run", folder, "make room, or name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(f"another run is at work in {folder}: end it, or name another folder") from None
    try:
        for part in (folder, folder / "adapter", *folder.glob("adapters"), *folder.glob("adapters/round-*")):
            folders.clear(part, alone=True)
        yield
    finally:
        lock.release()
