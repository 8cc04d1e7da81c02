"""Masks for any Flower app: a strategy whose wrapped one gets the mean of the updates and no single one."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters.screening import Expected, Shapes, screen
from fedllm_helpers.adapters.updates import LARGEST_SHARE
from fedllm_helpers.adapters.wrapping import Wrapper
from fedllm_helpers.privacy.masked_clients import ATTEMPT, MASKED, SENT
from fedllm_helpers.privacy.masked_rounds import Masks, Session

logger = logging.getLogger(__name__)


class Masked(Wrapper):
    """A strategy that gets the mean of its clients' updates and no single one; for :func:`masked_clients.mod`.

    Two sums of the same updates, without one client the second time, differ by that client's. So ``attempts``, how
    often masked updates of each round were asked for, is given to ``note`` before they are, which keeps it beyond this
    process (:mod:`fedllm_helpers.federation.resumed`); and a round that is asked for again is another attempt.

    Args:
        strategy: any that averages; each round it gets one reply, the mean.
        threshold, options: as in :class:`Masks`.

    Raises:
        ValueError: as :class:`Masks`.
    """

    reads, averages = "masked updates", True

    def __init__(self, strategy: Strategy, threshold: int, **options: Any) -> None:
        super().__init__(strategy)
        self.how, self.session, self.known = Masks(threshold, **options), None, False
        self.attempts: dict[int, int] = {}
        self.note: Callable[[dict[int, int]], None] | None = None
        norms = {inner.clipping_norm for inner in self.within() if hasattr(inner, "clipping_norm")}
        if norms and self.how.noise_multiplier:
            raise ValueError(
                "noise_multiplier: clients add noise before they mask; Noised within would add its own, too"
            )
        if norms - {self.how.clipping_norm}:
            raise ValueError(
                f"clipping_norm={self.how.clipping_norm}: behind masks only clients can clip, and the noise within is "
                f"for {norms.pop()}; give both the same"
            )

    def form(self, node: int) -> Shapes:
        """All values of an update in a row, masked."""
        size = sum(value.size for value in self.expected(node).values())
        return {MASKED: (np.dtype(np.uint32), (size,))}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the wrapped strategy's clients for keys and shares; those that answer get its message with orders.

        Raises:
            ValueError: fewer clients than the threshold are asked; or their apps lack mod and queries.
        """
        attempt = self.attempts.get(server_round, 0)
        if attempt:
            said = "round %d was asked for before; it is asked for anew, attempt %d, of other updates"
            logger.warning(said, server_round, attempt)
            config = ConfigRecord({**config, ATTEMPT: attempt})
        messages = super().configure_train(server_round, arrays, config, grid)
        nodes = sorted(message.metadata.dst_node_id for message in messages)
        if len(nodes) < self.how.threshold:
            raise ValueError(f"threshold={self.how.threshold}: {len(nodes)} clients are asked in a round")
        places = {self.names.get(node, place): node for place, node in enumerate(nodes)}
        self.session = Session(grid, self.how, server_round, places, attempt)
        present = {places[place] for place in self.session.begin(list(places))}
        if not self.session.public and not self.known:
            raise ValueError("no client sends keys: a ClientApp needs masked_clients.mod among its mods, and register")
        self.known = self.known or bool(self.session.public)
        self.why = "" if present else self._closed()
        self.attempts = {**self.attempts, server_round: attempt + 1}
        if self.note and present:
            self.note(self.attempts)
        messages = [message for message in messages if message.metadata.dst_node_id in present]
        for message in messages:
            message.content = RecordDict({**message.content, SENT: self.session.orders()})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Open the sum, and give the wrapped strategy the mean as one reply; nothing where it stays closed."""
        places = {node: place for place, node in self.session.nodes.items()}
        for reply in replies:
            node = reply.metadata.src_node_id
            place = places.get(node)
            if place not in self.session.public or place in self.session.survivors:
                self.say(server_round, node, "a reply that nobody asked for")
                continue
            looked = screen(reply, place, Expected({}, (), self.form(node)))
            if looked.status == "used":
                self.session.add(looked)
            else:
                self.leave_out(server_round, node, looked.status)
        opened = self.session.end(self.expected(self.request.metadata.dst_node_id)) if self.session.survivors else None
        if opened is None:
            self.why = self._closed()
            return None, None
        mean = self.as_one(opened[0])
        mean.content["metrics"][LARGEST_SHARE] = opened[1]
        return super().aggregate_train(server_round, [mean])

    def _closed(self) -> str:
        arrived = len(self.session.survivors)
        return f"not opened: {arrived} masked updates arrived, {self.how.threshold} are needed"
