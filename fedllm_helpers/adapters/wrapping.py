"""A Flower strategy around another: what a technique does not change goes through as it is."""

import math
from collections.abc import Iterable, Iterator

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters.records import Adapter, from_record, to_record


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

    Args:
        strategy: any of Flower's, or another wrapper.
        reads: the form in which replies come, where it is one of this technique's own; "" where they stay as they are.

    Raises:
        TypeError: it is no strategy.
        ValueError: a wrapped one has a form of its own for the replies, too.
    """

    def __init__(self, strategy: Strategy, reads: str = "") -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"{type(self).__name__} wraps a strategy such as FedAvg(), given is {strategy!r:.60}")
        self.strategy, self.reads = strategy, reads
        for inner in self.within() if reads else ():
            if inner.reads:
                mine, other = type(self).__name__, type(inner).__name__
                raise ValueError(
                    f"{mine} reads {reads}, and {other} within it {inner.reads}: one of them has to leave the replies "
                    "alone, as Compressed(Masked(…), up=None) does"
                )
        self.sent: dict[int, ArrayRecord] = {}

    def within(self) -> Iterator["Wrapper"]:
        """The wrappers within this one, from the next to the innermost."""
        inner = self.strategy
        while isinstance(inner, Wrapper):
            yield inner
            inner = inner.strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of the wrapped strategy; what each node gets is remembered for the round."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self.sent = {message.metadata.dst_node_id: message.content["arrays"] for message in messages}
        return messages

    def asked(self) -> set[int]:
        """The nodes to which a message of this round went."""
        return set(self.sent)

    def expected(self, node: int) -> Adapter:
        """What a reply of a node is like, and from where its update is measured: what was sent to it, or a rule's word.

        Raises:
            ValueError: the node was not asked.
        """
        if isinstance(self.strategy, Wrapper):
            return self.strategy.expected(node)
        if node not in self.sent:
            raise ValueError(f"node {node} was not asked in this round")
        return from_record(self.sent[node])

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
