"""Screening for any Flower app: a strategy whose wrapped one gets only replies of which every value was checked."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters.records import to_record
from fedllm_helpers.adapters.screening import Expected, Reply, screen
from fedllm_helpers.adapters.wrapping import Wrapper

Limits = Mapping[str, tuple[float, float]]  # lowest and highest value by name, both allowed


class Screened(Wrapper):
    """A strategy for which no reply of a stranger ends or bends a round; clients need nothing. In notebook 03.

    A reply has the keys, shapes and dtypes of what was asked for, finite values, and numbers within limits; any other
    is left out with one line in the log, and the others' round goes on. Numbers not named here stay behind. It may
    stand anywhere in a chain: around compression or masks, it looks at replies in their form. ``seen`` has the records
    of a round's replies, by node.

    Args:
        strategy: the one that goes on with what can be used.
        numbers: limits of each number that a reply must have, beside ``num-examples``.
        optional: limits of numbers that it may have; NaN where they are not there.
        scores: limits of the numbers of an evaluation, beside ``num-examples``.
        most_examples: the largest weight of a client.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        numbers: Limits | None = None,
        optional: Limits | None = None,
        scores: Limits | None = None,
        most_examples: float = 1_000_000,
    ) -> None:
        super().__init__(strategy)
        wanted = {name: limit for inner in self.within() for name, limit in inner.numbers.items()}
        self.required = {"num-examples": (1, most_examples), **(numbers or {}), **wanted}
        self.limits = {**self.required, **(optional or {})}
        self.scores = {"num-examples": (0, most_examples), **(scores or {})}
        self.seen: dict[int, Reply] = {}
        self.scoring: set[int] = set()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages; who gets them is remembered."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        self.scoring = {message.metadata.dst_node_id for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the wrapped strategy makes of the usable replies, in the order in which they came."""
        given = self.limits, tuple(self.required)
        usable = self._usable(server_round, replies, self.asked(), lambda node: (*given, self.form(node)))
        return super().aggregate_train(server_round, usable)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As :meth:`aggregate_train`; there are no arrays."""
        usable = self._usable(server_round, replies, self.scoring, lambda _: (self.scores, tuple(self.scores), {}))
        return super().aggregate_evaluate(server_round, usable)

    def _usable(
        self, number: int, replies: Iterable[Message], asked: set[int], expected: Callable[[int], tuple]
    ) -> Iterator[Message]:
        self.seen = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in asked or node in self.seen:
                self.say(number, node, "a second reply" if node in self.seen else "a reply that nobody asked for")
                continue
            found = self.seen[node] = screen(reply, node, Expected(*expected(node)))
            if found.status != "used":
                self.leave_out(number, node, found.status)
                continue
            arrays = {"arrays": to_record(found.arrays)} if found.arrays else {}
            reply.content = RecordDict({**arrays, "metrics": MetricRecord(found.numbers)})
            yield reply
