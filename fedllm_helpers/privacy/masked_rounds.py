"""Secure aggregation on Flower's messages, at the server: a round in which it learns the sum alone."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedllm_helpers import limits
from fedllm_helpers.adapters.packing import send
from fedllm_helpers.adapters.records import Adapter, message_bytes
from fedllm_helpers.adapters.screening import (
    Reply,
    looked_at,
    read_numbers,
    read_parts,
    read_shares,
)
from fedllm_helpers.privacy import secure_aggregation as secure
from fedllm_helpers.privacy.masked_clients import ATTEMPT, MASKED, SENT, label, spread

logger = logging.getLogger(__name__)

KEYS = ("mask_key", "cipher_key", "commitment")  # of a hospital's public half


@dataclass(frozen=True)
class Masks:
    """How updates are masked: ``threshold`` clients open a sum; values and weights have limits, so that it is exact.

    ``clipping_norm`` of an update, 0 for none; ``uniform`` counts clients alike; ``timeout`` in seconds. With a
    ``noise_multiplier`` every client adds its share of noise before it masks, so much that any ``threshold`` of them
    add all of it, of that many times what one client can move the sum by: nobody sees the sum without. ``noise_seed``
    repeats it, for study.
    """

    threshold: int
    value_range: float = 1.0
    clipping_norm: float = 0.0
    uniform: bool = False
    max_cards: int = 1_000_000
    timeout: float = 3600.0
    noise_multiplier: float = 0.0
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        limits.whole("threshold", self.threshold, 2)
        for name in ("clipping_norm", "noise_multiplier"):
            limits.number(name, getattr(self, name), above=False)
        if self.noise_multiplier and not self.clipping_norm:
            raise ValueError("clipping_norm=0.0: noise protects only what is clipped")
        for name in ("value_range", "max_cards", "timeout"):
            limits.number(name, getattr(self, name))


@dataclass
class Session:
    """The server's side of one masked round: what hospitals published, the running sum, and the bytes it took."""

    grid: Grid
    how: Masks
    number: int
    nodes: dict[int, int]
    attempt: int = 0  # from 0: how often the sum of this round was opened before, or may have been
    public: dict[int, secure.Public] = field(default_factory=dict)
    weights: dict[int, int] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    shares: dict[int, dict[int, bytes]] = field(default_factory=dict)  # by receiver, then by maker
    total: np.ndarray | None = None
    survivors: set[int] = field(default_factory=set)
    bytes_up: int = 0
    bytes_down: int = 0

    def begin(self, asked: list[int]) -> list[int]:
        """Collect keys, then shares.

        Returns:
            The hospitals that take part; none where they are fewer than the threshold.
        """
        moment = {"round": self.number, ATTEMPT: self.attempt}
        told = {k: ConfigRecord({**moment, "hospital": k}) for k in asked}
        for hospital, (public, cards) in self._ask("keys", told):
            self.public[hospital], self.weights[hospital] = public, 1 if self.how.uniform else cards
        self._leave_room()
        if len(self.public) < self.how.threshold:
            return []
        self.places = {hospital: place for place, hospital in enumerate(sorted(self.public), 1)}
        made = dict(self._ask("shares", dict.fromkeys(self.public, self.orders())))
        self.public = {hospital: key for hospital, key in sorted(self.public.items()) if hospital in made}
        for maker, shares in made.items():
            for hospital, share in shares.items():
                self.shares.setdefault(hospital, {})[maker] = share
        return sorted(self.public) if len(self.public) >= self.how.threshold else []

    def _leave_room(self) -> None:
        """Leave out whoever claims the most cards, until the sum of all is exact to 8 bits."""
        while self.public:
            try:
                self._code()
                return
            except ValueError:
                most = max(self.public, key=self.weights.get)
                del self.public[most]
                said = "round %d: hospital %d is left out of the keys: its %d cards leave no bits for the sum"
                logger.warning(said, self.number, most, self.weights[most])

    def orders(self) -> ConfigRecord:
        """What a hospital needs to make shares or to mask: everyone's public keys and weights."""
        keys = [self.public[hospital] for hospital in sorted(self.public)]
        return ConfigRecord(
            {
                "round": self.number,
                ATTEMPT: self.attempt,
                "threshold": self.how.threshold,
                "hospitals": sorted(self.public),
                "weights": [self.weights[hospital] for hospital in sorted(self.public)],
                "mask_keys": [key.mask_key for key in keys],
                "cipher_keys": [key.cipher_key for key in keys],
                "commitments": [key.commitment for key in keys],
                "value-range": self.how.value_range,
                "clipping-norm": self.how.clipping_norm,
                "noise-multiplier": self.how.noise_multiplier,
                "noise-seed": -1 if self.how.noise_seed is None else self.how.noise_seed,
            }
        )

    def add(self, reply: Reply) -> None:
        """Add a masked update to the sum; one is in memory at a time. What is in it, nobody can check."""
        values = reply.arrays[MASKED]
        self.total = values.copy() if self.total is None else self.total + values
        self.survivors.add(reply.sender)

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
            if len(self.survivors) < self.how.threshold:
                raise ValueError(f"{len(self.survivors)} masked updates arrived, {self.how.threshold} are needed")
            asked = {hospital: ConfigRecord({**self.orders(), **more}) for hospital, more in extra.items()}
            opened = dict(self._ask("reveal", asked))
            total = secure.unmask(
                self.total, self.public, self.places, self.survivors, opened, label(self.orders()), self.how.threshold
            )
        except ValueError as error:  # whose share is wrong, the server cannot always tell
            logger.warning("round %d: the sum stays closed: %s", self.number, error)
            return None
        kept = [self.weights[hospital] for hospital in sorted(self.survivors)]
        mean = secure.decode(total, sum(kept), self._code(), adapter)
        return {key: value + mean[key] for key, value in adapter.items()}, max(kept) / sum(kept)

    def _code(self) -> secure.FixedPoint:
        weights = [self.weights[hospital] for hospital in sorted(self.public)]
        return secure.fixed_point(
            weights, self.how.value_range, spread(weights, self.how.clipping_norm, self.how.noise_multiplier)
        )

    def _ask(self, what: str, records: dict[int, ConfigRecord]) -> Iterator[tuple[int, Any]]:
        """(hospital, what it says) of the usable answers to ``query.what``, in order of hospital."""
        requests = [
            Message(RecordDict({SENT: record}), self.nodes[hospital], f"query.{what}")
            for hospital, record in records.items()
        ]
        self.bytes_down += sum(message_bytes(request) for request in requests)
        names, answers = {node: hospital for hospital, node in self.nodes.items()}, {}
        for node, reply in send(self.grid, requests, self.how.timeout):
            self.bytes_up += message_bytes(reply)
            answer, why = looked_at(reply, partial(self._read, what))
            if node is None or why:
                logger.warning(
                    "round %d: hospital %s is left out of the %s: %s", self.number, names.get(node), what, why
                )
            else:
                answers[names[node]] = answer
        return iter(sorted(answers.items()))

    def _read(self, what: str, content: RecordDict) -> Any:
        """An answer to ``query.what``: keys and cards, or bytes by hospital. ValueError where it is none."""
        if what == "keys":
            public = secure.Public(**read_parts(content, SENT, KEYS, 32))
            for key in (public.mask_key, public.cipher_key):  # raises for one on which nobody can agree, such as zeros
                X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
            cards = read_numbers(content, {"num-examples": (1, self.how.max_cards)}, ("num-examples",))
            return public, int(cards["num-examples"])
        name, size = ("shares", secure.SEALED) if what == "shares" else ("opened", secure.SHARE)
        return read_shares(content, SENT, name, sorted(self.public), size)
