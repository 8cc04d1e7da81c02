"""What a hospital has given away so far: a file at the hospital that outlives runs, restarts and servers."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedllm_helpers.privacy import accounting

ROUND, NOISE = "round", "noise"  # kinds of entries: an order to train that was answered; a mechanism of DP-SGD
MECHANISM = ("noise_multiplier", "sample_rate", "steps")


class Ledger:
    """A line of JSON for each round that was answered and for each mechanism that ran, oldest first.

    Args:
        path: of the file; it need not be there yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def entries(self, kind: str = "") -> list[dict[str, Any]]:
        """All entries, or those of a kind.

        Raises:
            ValueError: the file is damaged: what was spent is not known, and nothing more may be.
        """
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            found = [json.loads(line) for line in lines]
            for one in found:
                one["kind"], one["run"], one["time"]
                if one["kind"] == NOISE:
                    [float(one[name]) for name in MECHANISM]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{self.path} is damaged ({type(error).__name__}: {error})") from None
        return [one for one in found if kind in ("", one["kind"])]

    def add(self, kind: str, run: int, **more: Any) -> None:
        """Write an entry, and have it on the disk before anything else happens.

        Raises:
            OSError: it cannot be written.
        """
        entry = {"kind": kind, "run": run, "time": datetime.now(UTC).isoformat(timespec="seconds"), **more}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others out between reading and writing: two runs may ask the same hospital."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
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
