"""The ledger of bytes for any Flower app: what really went down to each node and came up from it, round by round."""

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters.records import message_bytes
from fedllm_helpers.adapters.wrapping import Wrapper


class Metered(Wrapper):
    """A strategy whose messages are weighed as Flower serialises them; it stands outermost, and clients need nothing.

    A technique that asks clients between the two, as masks do for their keys, sends those bytes by itself: they are not
    in this ledger. Taught in notebook 07.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self.rows: list[tuple[Any, ...]] = []

    def ledger(self) -> pd.DataFrame:
        """Columns ``round``, ``kind`` (train or evaluate), ``direction``, ``node`` and ``bytes``, a row per message."""
        return pd.DataFrame(self.rows, columns=["round", "kind", "direction", "node", "bytes"])

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages, weighed."""
        return self._down(server_round, "train", super().configure_train(server_round, arrays, config, grid))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages, weighed."""
        return self._down(server_round, "evaluate", super().configure_evaluate(server_round, arrays, config, grid))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Weigh the replies before anyone changes them."""
        return super().aggregate_train(server_round, self._up(server_round, "train", replies))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As :meth:`aggregate_train`."""
        return super().aggregate_evaluate(server_round, self._up(server_round, "evaluate", replies))

    def _down(self, number: int, kind: str, messages: Iterable[Message]) -> list[Message]:
        messages = list(messages)
        self.rows += [(number, kind, "down", m.metadata.dst_node_id, message_bytes(m)) for m in messages]
        return messages

    def _up(self, number: int, kind: str, replies: Iterable[Message]) -> Iterator[Message]:
        for reply in replies:
            self.rows.append((number, kind, "up", reply.metadata.src_node_id, message_bytes(reply)))
            yield reply
