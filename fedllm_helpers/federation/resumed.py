"""Rounds that outlive their process, for any Flower app: a strategy that keeps every round on disk and goes on."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm_helpers import folders
from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.wrapping import Wrapper
from fedllm_helpers.aggregation.ruled import Rule
from fedllm_helpers.aggregation.strategies import restore_strategy, strategy_state
from fedllm_helpers.federation import checkpoints
from fedllm_helpers.privacy.masked import Masked

logger = logging.getLogger(__name__)
ATTEMPTS = "attempts.json"  # how often masked updates of a round were asked for, by round


def taken(
    number: int, adapter: Adapter, top: Wrapper, grid: Grid, rows: tuple[list, list] = ([], [])
) -> checkpoints.Checkpoint:
    """The state after a round: of Flower's strategy within ``top``, of its rule, and of clients if the grid knows."""
    arrays, kinds = strategy_state(top.innermost())
    states = grid.remembered() if hasattr(grid, "remembered") else {}
    edits = next((inner.base.edits for inner in top.within() if isinstance(inner, Rule)), {})
    return checkpoints.Checkpoint(number, adapter, arrays, kinds, *rows, states, edits)


def given_back(before: checkpoints.Checkpoint, top: Wrapper, grid: Grid) -> None:
    """Give fresh strategies, and clients, what :func:`taken` took; what cannot be given back is said in the log."""
    remembered = ", ".join(inner.remembers for inner in top.within() if inner.remembers)
    if before.states and hasattr(grid, "remember"):
        grid.remember(before.states)
    elif before.states or remembered:
        logger.warning("what clients keep (%s) is not in the checkpoint: it may be lost", remembered or "more")
    for inner in top.within():
        if isinstance(inner, Rule):
            inner.base.edits |= before.edits
        if hasattr(inner, "rounds"):  # noise was paid for in each of them
            inner.rounds = before.number
    restore_strategy(top.innermost(), before.strategy_arrays, before.strategy_kinds)


def note_attempts(folder: Path, top: Wrapper) -> None:
    """Let masks, if there are any, note in a folder which rounds they ask for, and know what was noted before.

    Raises:
        ValueError: the note is damaged; without it a sum could be asked for twice of the same updates.
    """
    path = folder / ATTEMPTS
    for masked in [inner for inner in top.within() if isinstance(inner, Masked)]:
        try:
            before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            masked.attempts = {int(number): int(times) for number, times in before.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): name a new folder") from None
        masked.note = lambda attempts: folders.write(path, json.dumps(attempts)) and None


class Resumed(Wrapper):
    """A strategy whose ``start`` goes on after the last round that is whole in a folder; it stands outermost.

    Kept are the adapter, what Flower's strategy remembers and what a rule added to the base model; and in one process
    what clients remember. Elsewhere clients keep their state themselves, as long as they run. The end is that of a run
    that was not stopped, but for the order in which Flower asks clients, which is another each time. Clients need
    nothing.

    Args:
        strategy: any.
        folder: of this run alone.
        settings: of the run, for one line where a folder has rounds of other settings.

    Raises:
        ValueError: by ``start``: the folder has rounds of other settings, or none that is whole.
    """

    def __init__(self, strategy: Strategy, folder: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(strategy)
        self.folder, self.settings = Path(folder).expanduser(), dict(settings or {})
        self.done, self.last = 0, ArrayRecord()

    def start(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, **options: Any) -> Result:
        """As Flower's, for the rounds that are left; ``num_rounds`` counts those of before, too."""
        before, self.grid, self.last = checkpoints.latest(self.folder, self.settings), grid, initial_arrays
        note_attempts(self.folder, self)
        if before:
            given_back(before, self, grid)
            self.done, self.last = before.number, to_record(before.adapter)
        if self.done >= num_rounds:
            result = Result()
            result.arrays = self.last
            return result
        return super().start(grid, self.last, num_rounds - self.done, **options)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages; rounds are counted from the first process on."""
        self.last = arrays
        return super().configure_train(server_round + self.done, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the wrapped strategy makes of the replies, kept before it is used."""
        number = server_round + self.done
        arrays, metrics = super().aggregate_train(number, replies)
        adapter = from_record(self.last if arrays is None else arrays)
        kept = taken(number, adapter, self, self.grid)
        checkpoints.save(self.folder, self.settings, kept)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As :meth:`configure_train`."""
        return super().configure_evaluate(server_round + self.done, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As :meth:`aggregate_train`; nothing is kept."""
        return super().aggregate_evaluate(server_round + self.done, replies)
