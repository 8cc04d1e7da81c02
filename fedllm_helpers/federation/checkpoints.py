"""Finished rounds on disk, so that a federation that was killed goes on as if it had not been."""

import contextlib
import hashlib
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedllm_helpers import folders
from fedllm_helpers.adapters.records import Adapter

logger = logging.getLogger(__name__)
FREE = ("federation.timeout", "federation.report_to")  # may differ when a run goes on: changes no bit
ROUND = re.compile(r"round-(\d{6})\.safetensors")
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


def save(folder: Path, settings: dict[str, Any], checkpoint: Checkpoint) -> Path:
    """Write a round as one safetensors file, whole or not at all, and drop those older than the newest two.

    What a round adds to the base model is a file of its own, written once; later rounds name it.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written, as on a full disk; nothing half-written stays.
    """
    tensors = {f"adapter/{key}": value for key, value in checkpoint.adapter.items()}
    tensors |= {f"strategy/{key}": value for key, value in checkpoint.strategy_arrays.items()}
    tensors |= {f"state/{node}": value for node, value in checkpoint.states.items()}
    with kept_or_said(folder, f"round {checkpoint.number}"):
        edits = {}
        for number, edit in checkpoint.edits.items():
            path = folder / f"edit-{number:06d}.safetensors"
            before = None if number == checkpoint.number else _known(path)
            edits[number] = before or _write(path, edit, {"number": number, "keys": list(edit)})
        record = {
            "number": checkpoint.number,
            "config": settings,
            "keys": list(checkpoint.adapter),
            "strategy": checkpoint.strategy_kinds,
            "history": checkpoint.history,
            "clients": checkpoint.clients,
            "edits": edits,
        }
        path = folder / f"round-{checkpoint.number:06d}.safetensors"
        _write(path, tensors, record)
    for number, old in rounds(folder):
        if number <= checkpoint.number - KEPT:
            old.unlink()
    return path


def kept_or_said(folder: Path, what: str) -> contextlib.AbstractContextManager:
    """Say in one line what cannot be written, as on a full disk; see :func:`fedllm_helpers.folders.said`."""
    return folders.said(what, folder, "the rounds before are whole: make room, and start the run again to go on")


def latest(folder: Path, settings: dict[str, Any]) -> Checkpoint | None:
    """The newest whole round of a folder; a damaged one is named in the log, renamed and passed over.

    Raises:
        ValueError: the folder is of a run with other settings; the line names the keys that differ. Or it has rounds
            and none is whole; they stay as they are.
        OSError: a file may not be read; nothing is renamed.
    """
    damaged: list[tuple[Path, ValueError]] = []
    for number, path in rounds(folder):
        try:
            record, arrays = _read(path)
            edits = {int(n): _edit(folder, int(n), known) for n, known in record["edits"].items()}
        except ValueError as error:
            damaged.append((path, error))
            continue
        _check_same(path, record["config"], settings)
        for one, why in damaged:
            logger.warning("%s is damaged (%s): going back to the round before, %d", one, why, number)
            folders.aside(one)
        return _checkpoint(record, arrays, edits)
    if damaged:
        path, why = damaged[0]
        raise ValueError(f"no round in {folder} is whole ({path.name}: {why}): move them away to begin anew")
    return None


def _edit(folder: Path, number: int, known: str) -> tuple[dict, Adapter]:
    path = folder / f"edit-{number:06d}.safetensors"
    try:
        record, arrays = _read(path)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{path.name}, which belongs to it: {error}") from None
    if _known(path) != known:
        raise ValueError(f"{path.name}, which belongs to it, is of another run")
    return record, arrays


def _checkpoint(record: dict, arrays: Adapter, edits: dict[int, tuple[dict, Adapter]]) -> Checkpoint:
    adapter, strategy, states = (
        {key.split("/", 1)[1]: value for key, value in arrays.items() if key.startswith(kind)}
        for kind in ("adapter/", "strategy/", "state/")
    )
    return Checkpoint(
        record["number"],
        {key: adapter[key] for key in record["keys"]},
        strategy,
        record["strategy"],
        record["history"],
        [tuple(row) for row in record["clients"]],
        states,
        {number: {key: edit[key] for key in kept["keys"]} for number, (kept, edit) in sorted(edits.items())},
    )


def _write(path: Path, arrays: Adapter, record: dict) -> str:
    """Write arrays with a record as a whole file that knows its own checksum; returns that."""
    text, whole = (
        json.dumps({"name": path.name, **record}),
        {key: np.ascontiguousarray(value) for key, value in arrays.items()},
    )
    known = _checksum(whole, text)
    with folders.replaced(path.parent, path.name) as scratch:
        save_file(whole, scratch / path.name, metadata={"record": text, "sha256": known})
    return known


def _known(path: Path) -> str | None:
    """The checksum that a file says it has; None for a new one, or one that cannot say."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("sha256")
    except (SafetensorError, FileNotFoundError):
        return None


def _read(path: Path) -> tuple[dict, Adapter]:
    """Record and arrays of a file, checked against its checksum and its name.

    Raises:
        ValueError: it is not what was written under that name.
        OSError: it may not be read, or is not there.
        RuntimeError: it is of an earlier version.
    """
    try:
        with open(path, "rb"), safe_open(path, framework="numpy") as file:
            kept, arrays = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        checksum, record = _checksum(arrays, kept["record"]), json.loads(kept["record"])
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror or error}); nothing was changed") from None
    except Exception as error:  # changed bytes raise a dozen types
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if "sha256" not in kept and "name" not in record:
        raise RuntimeError(f"{path} is of an earlier version, without checksum: go on with that, or name a new folder")
    if checksum != kept.get("sha256"):
        raise ValueError("its content is not what was written")
    if record["name"] != path.name:
        raise ValueError(f"it is {record['name']}, renamed")
    return record, arrays


def _checksum(arrays: Adapter, text: str) -> str:
    """SHA-256 of names, types, shapes and bytes of arrays, and of a text."""
    found = hashlib.sha256(text.encode())
    for key in sorted(arrays):
        found.update(f"{key} {arrays[key].dtype} {arrays[key].shape}\n".encode())
        found.update(arrays[key].reshape(-1).view(np.uint8))
    return found.hexdigest()


def rounds(folder: Path) -> list[tuple[int, Path]]:
    """(number, file) of the rounds in a folder, the newest first."""
    names = [one for path in folder.iterdir() if (one := ROUND.fullmatch(path.name))] if folder.is_dir() else []
    return sorted(((int(one[1]), folder / one[0]) for one in names), reverse=True)


def _check_same(path: Path, before: dict, now: dict) -> None:
    differ = differences(before, now)
    if differ:
        raise ValueError(
            f"{path.parent} holds a run with other settings: {differ}; go on with those, or name a new folder"
        )


def differences(before: dict, now: dict) -> str:
    """The settings that differ, other than those that change no bit: "key (value there, value here), …"."""
    there, here = _flat(before), _flat(now)
    keys = [key for key in sorted(there.keys() | here.keys()) if key not in FREE and there.get(key) != here.get(key)]
    return ", ".join(f"{key} ({there.get(key)} there, {here.get(key)} here)" for key in keys)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else name).items()
    }
