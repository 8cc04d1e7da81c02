"""A Flower strategy around another: what a technique does not change goes through as it is."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.screening import Expected, Reply, Shapes, screen, shapes_of

logger = logging.getLogger(__name__)
COMPARING = ("FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "QFedAvg")  # Flower's, of single replies


def as_reply(arrays: Adapter, like: Message, cards: float = 1.0, loss: float = 0.0) -> Message:
    """An adapter as one client's reply, for strategies that take replies: the numbers that they use, nothing else.

    Some strategies go by place and not by key, and all of them end the run where two clients' numbers have other names.
    """
    reply = Message(RecordDict(), reply_to=like)
    numbers = {"num-examples": cards, "loss-before": 0.0 if math.isnan(loss) else loss}
    reply.content = RecordDict({"arrays": to_record(arrays), "metrics": MetricRecord(numbers)})
    return reply


class Wrapper(Strategy):
    """The base of this package's techniques at a server; each has a mod, or needs none, at the clients.

    Of itself a technique says: ``reads``, the form in which replies come, where it is one of its own; ``averages``,
    whether it gives the wrapped strategy one reply, the mean; ``single``, why it needs every reply by itself; and
    ``remembers``, what its clients keep from one round to the next. ``numbers`` are those that a reply must have, and
    their limits. Of a round it says ``left``, why by node a reply was left out, and ``why``, why it came to nothing.

    Args:
        strategy: any of Flower's, or another wrapper.

    Raises:
        TypeError: it is no strategy.
        ValueError: a wrapped one has a form of its own for the replies, too, or needs replies where this gives a mean.
    """

    reads, averages, single, remembers = "", False, "", ""
    numbers: Mapping[str, tuple[float, float]] = {}

    def __init__(self, strategy: Strategy) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"{type(self).__name__} wraps a strategy such as FedAvg(), given is {strategy!r:.60}")
        self.strategy, self.averaged = strategy, False
        self.names: dict[int, int] = {}  # of hospitals, by node, for the log
        self.request: Message | None = None  # the first one of the round
        self.sent: dict[int, ArrayRecord] = {}
        self.left: dict[int, str] = {}
        self.why = ""
        self._check_order()

    def _check_order(self) -> None:
        mine, innermost = type(self).__name__, self.strategy
        for inner in self.within():
            other, innermost = type(inner).__name__, inner.strategy
            if self.reads and inner.reads not in ("", "adapters"):
                turn = f"{other} has to stand around it" if self.reads == "adapters" else "one of them has to leave "
                turn += "" if self.reads == "adapters" else "the replies alone, as Compressed(Masked(…), up=None) does"
                raise ValueError(f"{mine} reads {self.reads}, and {other} within it {inner.reads}: {turn}")
            if self.averages and inner.single:
                raise ValueError(f"{mine} gives a mean of replies, and {other} within it needs each: {inner.single}")
            inner.averaged = inner.averaged or self.averages
        if self.averages and type(innermost).__name__ in COMPARING:
            raise ValueError(f"{mine} gives a mean of replies, and {type(innermost).__name__} compares them")

    def within(self) -> Iterator["Wrapper"]:
        """The wrappers within this one, from the next to the innermost."""
        inner = self.strategy
        while isinstance(inner, Wrapper):
            yield inner
            inner = inner.strategy

    def innermost(self) -> Strategy:
        """The strategy that is no wrapper."""
        return [self, *self.within()][-1].strategy

    def asked(self) -> set[int]:
        """The nodes to which a message of this round went."""
        return set(self.sent)

    def expected(self, node: int) -> Adapter:
        """The adapter to which a node's reply leads, before training: from there its update is measured.

        Raises:
            ValueError: the node was not asked.
        """
        if isinstance(self.strategy, Wrapper):
            return self.strategy.expected(node)
        if node not in self.sent:
            raise ValueError("a reply that nobody asked for")
        return from_record(self.sent[node])

    def form(self, node: int) -> Shapes:
        """The arrays of a node's reply, as they come to this strategy."""
        return self.strategy.form(node) if isinstance(self.strategy, Wrapper) else shapes_of(self.expected(node))

    def leave_out(self, number: int, node: int, why: str) -> None:
        """Say of a node's reply why it goes no further; the round notes it."""
        self.left[node] = why
        self.say(number, node, why)

    def say(self, number: int, node: int, why: str) -> None:
        """One line in the log."""
        who = f"hospital {self.names[node]}" if node in self.names else f"node {node}"
        logger.warning("round %d: %s is left out: %s", number, who, why)

    def usable(self, number: int, replies: Iterable[Message]) -> Iterator[Reply]:
        """Records of the replies that are adapters as expected, for a technique that works on them, one by one."""
        weight = {"num-examples": (1, 1e12)}
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                found = screen(reply, node, Expected(weight, tuple(weight), self.form(node)))
            except ValueError as error:
                self.say(number, node, str(error))
                continue
            if found.status == "used":
                yield found
            else:
                self.leave_out(number, node, found.status)

    def as_one(self, adapter: Adapter) -> Message:
        """An adapter as the one reply of a round, for the wrapped strategy."""
        return as_reply(adapter, self.request)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of the wrapped strategy; what each node gets is remembered for the round."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self.sent = {message.metadata.dst_node_id: message.content["arrays"] for message in messages}
        self.left, self.why, self.request = {}, "", next(iter(messages), None)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the wrapped strategy makes of the replies."""
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of the wrapped strategy."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the wrapped strategy makes of the replies."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """That of the wrapped strategy."""
        self.strategy.summary()
