"""Finished rounds on disk, so that a federation that was killed goes on as if it had not been."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedllm_helpers import folders
from fedllm_helpers.models import Adapter

logger = logging.getLogger(__name__)
FREE = ("federation.timeout",)  # may differ when a run goes on: changes no bit
ROUND = re.compile(r"round-(\d{6})\.safetensors")
RESULTS = ("adapter", "history.csv", "clients.csv", "provenance.json")  # what a finished run leaves beside its rounds
KEPT = 2  # the newest rounds: were one damaged, the one before it is there


@dataclass(frozen=True)
class Checkpoint:
    """State after a round: the adapter, what strategy and clients remember, and the rows of the tables so far.

    ``states`` has the bytes of what each client keeps for itself, by node, where the grid knows it; ``edits`` what was
    added to the base model, by round.
    """

    number: int
    adapter: Adapter
    strategy_arrays: dict[str, np.ndarray]
    strategy_kinds: dict[str, list]
    history: list[dict[str, Any]]
    clients: list[tuple]
    states: dict[str, np.ndarray] = field(default_factory=dict)
    edits: dict[int, Adapter] = field(default_factory=dict)


def check_folder(folder: Path) -> None:
    """See that a folder is free for a run, or has one: what else lies in it is left alone.

    Raises:
        ValueError: a file has that name, or files of a run's names lie there and no round.
    """
    names = [one.name for one in folders.place(folder).iterdir()] if folder.is_dir() else []
    taken = sorted(set(RESULTS) & set(names))
    if taken and not _rounds(folder):
        raise ValueError(f"{folder} has {', '.join(taken)} of something else, and no round: name another folder")
    folders.for_adapter(folder / RESULTS[0]), folders.place(folder / "adapters")


def save(folder: Path, cfg: DictConfig, checkpoint: Checkpoint) -> Path:
    """Write a round as one safetensors file, whole or not at all, and drop those older than the newest two.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written, as on a full disk; nothing half-written stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "number": checkpoint.number,
        "config": OmegaConf.to_container(cfg),
        "keys": list(checkpoint.adapter),
        "strategy": checkpoint.strategy_kinds,
        "history": checkpoint.history,
        "clients": checkpoint.clients,
    }
    tensors = {f"adapter/{key}": value for key, value in checkpoint.adapter.items()}
    tensors |= {f"strategy/{key}": value for key, value in checkpoint.strategy_arrays.items()}
    tensors |= {f"state/{node}": value for node, value in checkpoint.states.items()}
    tensors |= {f"edit/{n}/{key}": value for n, edit in checkpoint.edits.items() for key, value in edit.items()}
    path = _path(folder, checkpoint.number)
    beside = path.with_suffix(".part")
    whole = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    try:
        with kept_or_said(folder, f"round {checkpoint.number}"):
            save_file(whole, beside, metadata={"record": json.dumps(record)})
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    for number, old in _rounds(folder):
        if number <= checkpoint.number - KEPT:
            old.unlink()
    return path


@contextlib.contextmanager
def kept_or_said(folder: Path, what: str) -> Iterator[None]:
    """Say in one line what cannot be written, as on a full disk.

    Raises:
        OSError: instead of whatever the writer raised.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        said = f"{what} cannot be kept in {folder}: {error}; the rounds before are whole"
        raise OSError(f"{said}: make room, and start the run again to go on") from None


def latest(folder: Path, cfg: DictConfig) -> Checkpoint | None:
    """The newest whole round of a folder; a damaged file is named in the log and passed over.

    Raises:
        ValueError: the folder is of another configuration; the line names the keys that differ.
    """
    for _, path in _rounds(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                record = json.loads(file.metadata()["record"])
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): going back to the round before", path, error)
            path.rename(path.with_suffix(".damaged"))
            continue
        _check_same(path, record["config"], OmegaConf.to_container(cfg))
        strategy, states = (
            {key.split("/", 1)[1]: value for key, value in arrays.items() if key.startswith(kind)}
            for kind in ("strategy/", "state/")
        )
        adapter = {key: arrays[f"adapter/{key}"] for key in record["keys"]}
        clients, history = [tuple(row) for row in record["clients"]], record["history"]
        edits: dict[int, Adapter] = {}
        for name in (name for name in arrays if name.startswith("edit/")):
            _, number, key = name.split("/", 2)
            edits.setdefault(int(number), {})[key] = arrays[name]
        edits = {number: {key: edit[key] for key in record["keys"]} for number, edit in sorted(edits.items())}
        return Checkpoint(record["number"], adapter, strategy, record["strategy"], history, clients, states, edits)
    return None


def _rounds(folder: Path) -> list[tuple[int, Path]]:
    """(number, file) of the rounds in a folder, the newest first."""
    names = [one for path in folder.iterdir() if (one := ROUND.fullmatch(path.name))] if folder.is_dir() else []
    return sorted(((int(one[1]), folder / one[0]) for one in names), reverse=True)


def _path(folder: Path, number: int) -> Path:
    return folder / f"round-{number:06d}.safetensors"


def _check_same(path: Path, before: dict, now: dict) -> None:
    there, here = _flat(before), _flat(now)
    differ = [key for key in sorted(there.keys() | here.keys()) if key not in FREE and there.get(key) != here.get(key)]
    if differ:
        changes = ", ".join(f"{key} ({there.get(key)} there, {here.get(key)} here)" for key in differ)
        raise ValueError(
            f"{path.parent} holds a run with other settings: {changes}; go on with those, or name a new folder"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else name).items()
    }
