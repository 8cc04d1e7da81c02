"""What a hospital has given away so far: a file at the hospital that outlives runs, restarts and servers."""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedllm_helpers import limits
from fedllm_helpers.privacy import accounting

logger = logging.getLogger(__name__)
ROUND, NOISE = "round", "noise"  # kinds of entries: an order to train that was answered; a mechanism of DP-SGD
MECHANISM = ("noise_multiplier", "sample_rate", "steps")


class Ledger:
    """A line of JSON for each round that was answered and for each mechanism that ran, oldest first.

    Args:
        path: of the file; it need not be there yet, its folder has to be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def entries(self, kind: str = "") -> list[dict[str, Any]]:
        """All entries, or those of a kind.

        A last line that was cut off in the middle, as by a power failure, is passed over: it belongs to an answer that
        never left.

        Raises:
            ValueError: the file is damaged: what was spent is not known, and nothing more may be.
        """
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            lines = text.split("\n")
            if not _whole(lines[-1]):
                logger.warning("%s: its last line was cut off, and is passed over", self.path)
                lines.pop()
            found = [json.loads(line) for line in lines if line]
            for one in found:
                one["kind"], one["run"], one["time"]
                if one["kind"] == NOISE:
                    _check(*(one[name] for name in MECHANISM))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{self.path} is damaged ({type(error).__name__}: {error})") from None
        return [one for one in found if kind in ("", one["kind"])]

    def add(self, *entries: dict[str, Any]) -> None:
        """Write entries, each with its ``kind`` and ``run``, and have them on the disk before anything else happens.

        Raises:
            OSError: they cannot be written; the file is as it was.
        """
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        text = "".join(json.dumps({"time": moment, **entry}) + "\n" for entry in entries)
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            before = file.read()
            tail = before.rpartition(b"\n")[2]
            end = len(before) if _whole(tail.decode("utf-8", "replace")) else len(before) - len(tail)
            file.seek(end)
            file.truncate()
            try:
                file.write((b"\n" if tail and end == len(before) else b"") + text.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, end)
                raise

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others out between reading and writing: two runs may ask the same hospital."""
        with FileLock(f"{self.path}.lock", timeout=60):
            yield

    def epsilon(self, delta: float, more: Iterable[tuple[float, float, int]] = ()) -> float:
        """ε of any one card after all that was answered, and after ``more`` of (noise multiplier, sample rate, steps).

        A card is taken to be in every run.
        """
        total: dict[tuple[float, float], int] = {}
        before = (tuple(one[name] for name in MECHANISM) for one in self.entries(NOISE))
        for noise_multiplier, sample_rate, steps in [*before, *more]:
            total[noise_multiplier, sample_rate] = total.get((noise_multiplier, sample_rate), 0) + steps
        return accounting.composed([(*mechanism, steps) for mechanism, steps in total.items()], delta)


def _whole(line: str) -> bool:
    try:
        return not line or isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _check(noise_multiplier: float, sample_rate: float, steps: int) -> None:
    limits.number("noise_multiplier", noise_multiplier)
    limits.number("sample_rate", sample_rate)
    limits.whole("steps", steps)
    if sample_rate > 1:
        raise ValueError(f"sample_rate={sample_rate}: allowed are numbers up to 1")
