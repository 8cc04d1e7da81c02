"""Masks for any Flower app: a strategy whose wrapped one gets the mean of the updates and no single one."""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters.screening import Expected, screen, shapes_of
from fedllm_helpers.adapters.updates import LARGEST_SHARE
from fedllm_helpers.adapters.wrapping import Wrapper, as_reply
from fedllm_helpers.privacy.masked_clients import MASKED, SENT
from fedllm_helpers.privacy.masked_rounds import Masks, Session

logger = logging.getLogger(__name__)


class Masked(Wrapper):
    """A strategy that gets the mean of its clients' updates and no single one; for :func:`masked_clients.mod`.

    Args:
        strategy: any that averages; each round it gets one reply, the mean.
        threshold, options: as in :class:`Masks`.

    Raises:
        ValueError: as :class:`Masks`.
    """

    def __init__(self, strategy: Strategy, threshold: int, **options: Any) -> None:
        super().__init__(strategy, "masked updates")
        self.how, self.session, self.request = Masks(threshold, **options), None, None
        noised = [inner for inner in self.within() if hasattr(inner, "behind_masks")]
        norms = {inner.clipping_norm for inner in noised}
        if norms - {self.how.clipping_norm}:
            raise ValueError(
                f"clipping_norm={self.how.clipping_norm}: behind masks only clients can clip, and the noise within is "
                f"for {norms.pop()}; give both the same"
            )
        for inner in noised:
            inner.behind_masks = True

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the wrapped strategy's clients for keys and shares; those that answer get its message with orders.

        Raises:
            ValueError: fewer clients than the threshold are asked; or their apps lack mod and queries.
        """
        messages = sorted(
            super().configure_train(server_round, arrays, config, grid), key=lambda m: m.metadata.dst_node_id
        )
        nodes = {place: message.metadata.dst_node_id for place, message in enumerate(messages)}
        if len(nodes) < self.how.threshold:
            raise ValueError(f"threshold={self.how.threshold}: {len(nodes)} clients are asked in a round")
        self.session = Session(grid, self.how, server_round, nodes)
        present = self.session.begin(list(nodes))
        if not self.session.public:
            raise ValueError("no client sends keys: a ClientApp needs masked_clients.mod among its mods, and register")
        self.request, orders = messages[0], {SENT: self.session.orders()}
        for place in present:
            messages[place].content = RecordDict({**messages[place].content, **orders})
        return [messages[place] for place in present]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Open the sum, and give the wrapped strategy the mean as one reply; nothing where it stays closed."""
        places = {node: place for place, node in self.session.nodes.items()}
        start = self.expected(self.request.metadata.dst_node_id)
        masked = {MASKED: np.zeros(sum(value.size for value in start.values()), np.uint32)}
        for reply in replies:
            place = places.get(reply.metadata.src_node_id, -1)
            looked = screen(reply, place, 0, Expected({}, (), shapes_of(masked)))
            if looked.status == "used" and place in self.session.public:
                self.session.add(looked)
            else:
                logger.warning("round %d: client %d is left out: %s", server_round, place, looked.status)
        opened = self.session.end(start)
        if opened is None:
            return None, None
        mean = as_reply(opened[0], self.request)
        mean.content["metrics"][LARGEST_SHARE] = opened[1]
        return super().aggregate_train(server_round, [mean])
