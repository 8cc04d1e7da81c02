"""An audit log at each party: which run asked for what, and a hash of everything that came in and went out.

A party appends a line of JSON for each message. Each line has the hash of the line before it, so that one that was
changed or taken out later shows: :func:`check`. Whoever may write the file can still write all of it anew; keep the
last line's hash elsewhere from time to time. A client needs :func:`mod` and the node setting ``audit=FILE``, a server
:class:`Audited`; the hashes of one message are the same at both.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters.updates import kind_of
from fedllm_helpers.adapters.wrapping import Wrapper
from fedllm_helpers.privacy import policy
from fedllm_helpers.privacy.ledger import NOISE, Ledger

logger = logging.getLogger(__name__)
FILE = "audit.jsonl"
LONGEST = 1 << 16  # bytes from the end in which the last line is looked for; none is near as long


def digest(content: RecordDict) -> str:
    """sha256 of all arrays of a message, by name; "" where there are none."""
    found, records = hashlib.sha256(), content.array_records
    for name in sorted(records):
        for key in sorted(records[name]):
            found.update(f"{name}/{key}\n".encode())
            found.update(records[name][key].data)
    return found.hexdigest() if records else ""


def settings_digest(given: Any) -> str:
    """sha256 of a run's settings, as every party gets them."""
    return hashlib.sha256(json.dumps(dict(given), sort_keys=True, default=str).encode()).hexdigest()


def append(path: str | Path, entry: dict[str, Any]) -> None:
    """Write a line, and have it on the disk before anything else happens; no line is ever changed.

    Raises:
        OSError: it cannot be written.
        filelock.Timeout: another process holds the file for more than a minute.
    """
    path = Path(path).expanduser()
    with FileLock(f"{path}.lock", timeout=60), open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST))
        before = file.read()
        torn = b"\n" if before and not before.endswith(b"\n") else b""  # by a power failure: it stays as it is
        last = hashlib.sha256(before.rstrip(b"\n").rpartition(b"\n")[2]).hexdigest() if before else ""
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(torn + json.dumps({"time": moment, **entry, "before": last}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def check(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a log, oldest first, each held against the hash in the next.

    A line that was cut off by a power failure counts as ``{"torn": True}``.

    Raises:
        ValueError: a line was changed, or lines before it are missing.
        OSError: the file cannot be read.
    """
    found, last = [], ""
    for number, line in enumerate(Path(path).expanduser().read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            before = entry["before"]
        except (ValueError, KeyError, TypeError):
            entry, before = {"torn": True}, last
        if before != last:
            raise ValueError(f"{path}, line {number}: the line before it was changed, or lines are missing")
        found.append(entry)
        last = hashlib.sha256(line).hexdigest()
    return found


def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower client mod: nothing leaves a node with ``audit=FILE`` before it is written down there.

    Raises:
        RuntimeError: it cannot be written. Why is in the node's own log alone.
    """
    path = context.node_config.get("audit")
    if path is None:
        return call_next(message, context)
    config = message.content.config_records.get("config", {})
    entry = {"run": str(context.run_id), "kind": kind_of(message), "round": int(config.get("server-round", 0))}
    entry |= {"settings": settings_digest(context.run_config), "received": digest(message.content)}
    try:
        reply = call_next(message, context)
    except Exception as error:
        _write(str(path), entry | {"refused": type(error).__name__})
        raise
    content = reply.content if reply.has_content() else RecordDict()
    told = sorted({name for record in content.metric_records.values() for name in record})
    spent = _spent(context) if entry["kind"] in ("train", "evaluate") else {}
    _write(str(path), entry | {"sent": digest(content), "told": told, **spent})
    return reply


def _write(path: str, entry: dict[str, Any]) -> None:
    try:
        append(path, entry)
    except (OSError, Timeout) as error:
        logger.error("%s: %s", path, error)
        raise RuntimeError(
            "this hospital's audit log cannot be written, and so nothing leaves; see its own log"
        ) from None


def _spent(context: Context) -> dict[str, float]:
    """ε of any one card so far, where the node has a policy and noise was added."""
    found = policy.of(context)
    ledger = Ledger(found.ledger) if found else None
    return {"epsilon": round(ledger.epsilon(found.delta), 4)} if ledger and ledger.entries(NOISE) else {}


class Audited(Wrapper):
    """A strategy that writes down, for each training, what went out and what came back.

    It stands outermost, or within ``Metered``: hashes are of what crosses. Nothing is written before :meth:`begin`.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self.path: Path | None = None
        self.run = self.settings = ""

    def begin(self, path: Path, run: str, settings: str) -> None:
        """Write to a file from now on: with the number of the run, and what :func:`settings_digest` gave."""
        self.path, self.run, self.settings = path, run, settings

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages, written down."""
        for message in super().configure_train(server_round, arrays, config, grid):
            self._note(server_round, message.metadata.dst_node_id, "sent", message)
            yield message

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Write down the replies before anyone changes them."""

        def noted() -> Iterator[Message]:
            """The replies."""
            for reply in replies:
                self._note(server_round, reply.metadata.src_node_id, "received", reply)
                yield reply

        return super().aggregate_train(server_round, noted())

    def _note(self, number: int, node: int, way: str, message: Message) -> None:
        if self.path is None:
            return
        entry = {"run": self.run, "kind": "train", "round": number, "settings": self.settings, "node": str(node)}
        entry |= {"hospital": self.names.get(node), way: digest(message.content) if message.has_content() else ""}
        append(self.path, entry)
