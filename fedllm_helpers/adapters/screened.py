"""Screening for any Flower app: a strategy whose wrapped one gets only replies of which every value was checked."""

import logging
from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters.records import message_bytes, to_record
from fedllm_helpers.adapters.screening import Expected, screen, shapes_of
from fedllm_helpers.adapters.wrapping import Wrapper

logger = logging.getLogger(__name__)


class Screened(Wrapper):
    """A strategy for which no reply of a stranger ends or bends a round; clients need nothing. In notebook 03.

    A reply has the keys, shapes and dtypes of what was sent to the client, finite values, and numbers within limits;
    any other is left out with one line in the log, and the others' round goes on. Numbers not named here stay behind.

    Args:
        strategy: the one that averages; other wrappers, which turn replies into adapters, stand around this one.
        numbers: lowest and highest value of each number that a reply must have, beside ``num-examples``.
        most_examples: the largest weight of a client.

    Raises:
        ValueError: a wrapper within has a form of its own for the replies.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        numbers: Mapping[str, tuple[float, float]] | None = None,
        most_examples: float = 1_000_000,
    ) -> None:
        super().__init__(strategy, "adapters")
        self.reads = ""  # so that others may stand around it
        self.numbers = {"num-examples": (1, most_examples), **(numbers or {})}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the wrapped strategy makes of the usable replies, in the order in which they came."""
        return super().aggregate_train(server_round, self._usable(server_round, replies))

    def _usable(self, server_round: int, replies: Iterable[Message]) -> list[Message]:
        usable = []
        for reply in replies:
            node = reply.metadata.src_node_id
            why = "a reply that nobody asked for"
            if node in self.asked():
                expected = Expected(self.numbers, tuple(self.numbers), shapes_of(self.expected(node)))
                found = screen(reply, node, message_bytes(reply), expected)
                why = "" if found.status == "used" else found.status
            if why:
                logger.warning("round %d: node %d is left out: %s", server_round, node, why)
                continue
            reply.content = RecordDict({"arrays": to_record(found.arrays), "metrics": MetricRecord(found.numbers)})
            usable.append(reply)
        return usable
