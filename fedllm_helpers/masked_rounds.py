"""Secure aggregation on Flower's messages, at the server: a round in which it learns the sum alone."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from omegaconf import DictConfig

from fedllm_helpers import secure_aggregation as secure
from fedllm_helpers.masked_clients import MASKED, SENT
from fedllm_helpers.messages import from_record, message_bytes
from fedllm_helpers.models import Adapter
from fedllm_helpers.nodes import reason, send, sender

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """The server's side of one masked round: what hospitals published, the running sum, and the bytes it took."""

    grid: Grid
    cfg: DictConfig
    number: int
    nodes: dict[int, int]
    public: dict[int, secure.Public] = field(default_factory=dict)
    weights: dict[int, int] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    shares: dict[int, dict[int, bytes]] = field(default_factory=dict)  # by receiver, then by maker
    total: np.ndarray | None = None
    survivors: set[int] = field(default_factory=set)
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def threshold(self) -> int:
        """How many hospitals open a sum."""
        return self.cfg.federation.secure_aggregation.threshold

    def begin(self, asked: list[int]) -> list[int]:
        """Collect keys, then shares.

        Returns:
            The hospitals that take part; none where they are fewer than the threshold.
        """
        cards = self.cfg.federation.privacy.client
        equal = cards.noise_multiplier is not None and cards.weights == "uniform"
        for hospital, content in self._ask("keys", {k: ConfigRecord({"round": self.number}) for k in asked}):
            given = content[SENT]
            self.public[hospital] = secure.Public(given["mask_key"], given["cipher_key"], given["commitment"])
            self.weights[hospital] = 1 if equal else int(content["metrics"]["num-examples"])
        if len(self.public) < self.threshold:
            return []
        self.places = {hospital: place for place, hospital in enumerate(sorted(self.public), 1)}
        made = {
            hospital: content[SENT]
            for hospital, content in self._ask("shares", dict.fromkeys(self.public, self.orders()))
        }
        self.public = {hospital: key for hospital, key in sorted(self.public.items()) if hospital in made}
        for maker, given in made.items():
            for hospital, share in zip(given["hospitals"], given["shares"], strict=True):
                self.shares.setdefault(hospital, {})[maker] = share
        return sorted(self.public) if len(self.public) >= self.threshold else []

    def orders(self) -> ConfigRecord:
        """What a hospital needs to make shares or to mask: everyone's public keys and weights."""
        privacy, keys = self.cfg.federation.privacy.client, [self.public[hospital] for hospital in sorted(self.public)]
        return ConfigRecord(
            {
                "round": self.number,
                "threshold": self.threshold,
                "hospitals": sorted(self.public),
                "weights": [self.weights[hospital] for hospital in sorted(self.public)],
                "mask_keys": [key.mask_key for key in keys],
                "cipher_keys": [key.cipher_key for key in keys],
                "commitments": [key.commitment for key in keys],
                "value-range": self.cfg.federation.secure_aggregation.value_range,
                "clipping-norm": privacy.clipping_norm if privacy.noise_multiplier is not None else 0.0,
            }
        )

    def fault(self, reply: Message, size: int) -> str | None:
        """Why a masked reply cannot be used; None where it can. What is in it, nobody can check."""
        if reply.has_error():
            return f"it failed: {reason(reply).splitlines()[-1]}"
        try:
            (arrays,) = reply.content.array_records.values()
            values = from_record(arrays)[MASKED]
        except (KeyError, ValueError) as error:
            return f"it does not hold one masked update: {error}"
        if values.dtype != np.uint32 or values.shape != (size,):
            return f"its masked update is {values.dtype} of shape {values.shape}, not uint32 of ({size},)"
        return None

    def add(self, hospital: int, reply: Message) -> None:
        """Add a masked update to the sum; one is in memory at a time."""
        values = from_record(next(iter(reply.content.array_records.values())))[MASKED]
        self.total = values.copy() if self.total is None else self.total + values
        self.survivors.add(hospital)

    def end(self, adapter: Adapter) -> tuple[Adapter, float] | None:
        """Open the sum.

        Returns:
            The adapter plus the weighted mean of the survivors' updates, and the largest share of a weight in it; None,
            with a line in the log, where too few hospitals are left.
        """
        makers = {hospital: self.shares[hospital] for hospital in sorted(self.survivors)}
        extra = {
            hospital: {"survivors": sorted(self.survivors), "makers": list(some), "shares": list(some.values())}
            for hospital, some in makers.items()
        }
        try:
            if len(self.survivors) < self.threshold:
                raise ValueError(f"{len(self.survivors)} masked updates arrived, {self.threshold} are needed")
            asked = {hospital: ConfigRecord({**self.orders(), **more}) for hospital, more in extra.items()}
            opened = {
                hospital: dict(zip(content[SENT]["hospitals"], content[SENT]["opened"], strict=True))
                for hospital, content in self._ask("reveal", asked)
            }
            total = secure.unmask(
                self.total, self.public, self.places, self.survivors, opened, self.number, self.threshold
            )
        except ValueError as error:  # whose share is wrong, the server cannot always tell
            logger.warning("round %d: the sum stays closed: %s", self.number, error)
            return None
        kept, code = self._weights()
        mean = secure.decode(total, sum(kept), code, adapter)
        return {key: value + mean[key] for key, value in adapter.items()}, max(kept) / sum(kept)

    def _weights(self) -> tuple[list[int], secure.FixedPoint]:
        everyone = [self.weights[hospital] for hospital in sorted(self.public)]
        code = secure.fixed_point(everyone, self.cfg.federation.secure_aggregation.value_range)
        return [self.weights[hospital] for hospital in sorted(self.survivors)], code

    def _ask(self, what: str, records: dict[int, ConfigRecord]) -> Iterator[tuple[int, RecordDict]]:
        """(hospital, content) of the usable answers to ``query.what``, in order of hospital."""
        requests = [
            Message(RecordDict({SENT: record}), self.nodes[hospital], f"query.{what}")
            for hospital, record in records.items()
        ]
        self.bytes_down += sum(message_bytes(request) for request in requests)
        replies, sent = send(self.grid, requests, self.cfg.federation.timeout)
        names, answers = {node: hospital for hospital, node in self.nodes.items()}, {}
        for reply in replies:
            hospital = names.get(sender(reply, sent))
            self.bytes_up += message_bytes(reply)
            why = reason(reply).splitlines()[-1] if reply.has_error() else self._odd(what, reply.content)
            if hospital is None or why:
                logger.warning("round %d: hospital %s is left out of the %s: %s", self.number, hospital, what, why)
            else:
                answers[hospital] = reply.content
        return iter(sorted(answers.items()))

    def _odd(self, what: str, content: RecordDict) -> str | None:
        """What is wrong with an answer to ``query.what``; None where nothing is, as far as the server can see."""
        try:
            given = content[SENT]
            if what == "keys":
                keys, cards = secure.Public(**given), content["metrics"]["num-examples"]
                right = all(isinstance(key, bytes) and len(key) == 32 for key in vars(keys).values())
                right = right and int(cards) == cards >= 1
            else:
                names, parts = given["hospitals"], given["shares" if what == "shares" else "opened"]
                size = secure.SHARE if what == "reveal" else secure.SEALED
                right = sorted(names) == sorted(self.public) and len(names) == len(parts)
                right = right and all(isinstance(part, bytes) and len(part) == size for part in parts)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            return f"its answer cannot be read: {type(error).__name__} {error}"
        return None if right else "its answer is not what the protocol asks for"


def as_reply(mean: Adapter, like: Message) -> Message:
    """A mean as one client's reply, for strategies that take replies."""
    reply = Message(RecordDict(), reply_to=like)
    arrays = ArrayRecord({key: Array(value) for key, value in mean.items()})
    reply.content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1.0, "loss-before": 0.0})})
    return reply
