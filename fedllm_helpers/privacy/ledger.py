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
# kinds of entries: the first; an order to train that was answered; a mechanism of DP-SGD, or noise on a score
BEGUN, ROUND, NOISE = "begun", "round", "noise"
BEGIN = "`python -m fedllm_helpers.policy --begin POLICY` begins one"
MECHANISM = ("noise_multiplier", "sample_rate", "steps")


class Ledger:
    """A line of JSON for each round that was answered and for each mechanism that ran, oldest first.

    It is begun once, by a person. One that is gone is not taken for a new one: nobody knows what was spent.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def begin(self) -> None:
        """Make the file, before the first round.

        Raises:
            FileExistsError: there is one, which stays as it is.
            OSError: it cannot be made: its folder is not there, or nobody may write into it.
        """
        with open(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(_line({"kind": BEGUN, "run": 0}))
            file.flush()
            os.fsync(file.fileno())

    def entries(self, kind: str = "") -> list[dict[str, Any]]:
        """All entries, or those of a kind.

        A last line that was cut off in the middle, as by a power failure, is passed over: it belongs to an answer that
        never left.

        Raises:
            ValueError: the file is missing or damaged: what was spent is not known, and nothing more may be.
        """
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
            if not _whole(lines[-1]):
                logger.warning("%s: its last line was cut off, and is passed over", self.path)
                lines.pop()
            found = [json.loads(line) for line in lines if line]
            for one in found:
                one["kind"], one["run"], one["time"]
                if one["kind"] == NOISE:
                    _check(*(one[name] for name in MECHANISM))
            if not found or found[0]["kind"] != BEGUN:
                raise ValueError("its first line is not there")
        except FileNotFoundError:
            raise ValueError(f"{self.path} is missing: put it back; before the first round, {BEGIN}") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{self.path} is damaged ({type(error).__name__}: {error})") from None
        return [one for one in found if kind in ("", one["kind"])]

    def add(self, *entries: dict[str, Any]) -> None:
        """Write entries, each with its ``kind`` and ``run``, and have them on the disk before anything else happens.

        Raises:
            OSError: they cannot be written; the file is as it was.
        """
        text = "".join(map(_line, entries))
        with open(self.path, "r+b") as file:
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


def _line(entry: dict[str, Any]) -> str:
    return json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry}) + "\n"


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
