"""Edits of the base model on their way: the server sends a node those that it has not, the node adds them up."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord

from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.updates import PASSING

# in a client's state, not in a checkpoint, as the server has them: ΔW by layer, and up to which round
EDIT, EDIT_ROUND = f"{PASSING}base edit", f"{PASSING}base edit round"
EDITS = "edits"  # in a message, beside the arrays: "edits 3" are those of round 3; "edits" is their sum, for the app
ORDERS = ("edits-after", "edits-until")  # in a rule's orders


@dataclass
class Base:
    """What was added to the base model: factors by round, scale included; and up to which round each node has them.

    All of them stay in the server's memory: a node that was started anew gets them all.
    """

    edits: dict[int, Adapter] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    made: dict[int, ArrayRecord] = field(default_factory=dict)  # as they were sent, for whoever else needs them

    def whole(self) -> Adapter:
        """Factors of the sum of all edits; {} where there are none."""
        return factors.together(list(self.edits.values()))

    def summed(self) -> dict[str, np.ndarray]:
        """ΔW by layer, with the very bits that every node has."""
        return added({}, self.edits.values())

    def add(self, number: int, edit: Adapter) -> None:
        """Take what a round adds, checked by :func:`check`."""
        check(number, edit)
        self.edits[number] = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in edit.items()}

    def lacking(self, node: int) -> tuple[dict[str, ArrayRecord], dict[str, int]]:
        """The edits that a node has not, as records of a message, and the numbers that belong into its orders.

        Until :meth:`confirm` it counts as having none.
        """
        if not self.edits:
            return {}, {}
        after, until = self.held.pop(node, 0), max(self.edits)
        numbers = [number for number in self.edits if number > after]
        self.made |= {number: to_record(self.edits[number]) for number in numbers if number not in self.made}
        self.sent[node] = until
        return {f"{EDITS} {n}": self.made[n] for n in numbers}, dict(zip(ORDERS, (after, until), strict=True))

    def confirm(self, node: int) -> None:
        """A reply of a node was used: it has the edits that went out with the request."""
        if node in self.sent:
            self.held[node] = self.sent.pop(node)


def check(number: int, edit: Adapter) -> None:
    """Raise RuntimeError where the product of an edit may not be finite in float32."""
    for first, second in factors.pairs(edit).values():
        largest = np.linalg.norm(first.astype(float)) * np.linalg.norm(second.astype(float))
        if not largest < np.finfo(np.float32).max:
            raise RuntimeError(f"round {number}: finite adapters make an edit of the base model that is not finite")


def added(known: dict[str, np.ndarray], edits: Iterable[Adapter]) -> dict[str, np.ndarray]:
    """ΔW by layer: what is known, and the products of edits, one round after the other.

    Each sum is rounded to float32, so that its bits do not depend on when a node got which rounds: as they came, after
    some that it missed, or all of them at once.
    """
    full = dict(known)
    for edit in edits:
        for layer, update in factors.product(edit).items():
            full[layer] = (full.get(layer, 0.0) + update).astype(np.float32)
    return full


def receive(message: Message, orders: Mapping[str, Any], context: Context) -> None:
    """Add the edits in a message to those that the client keeps, and leave their sum in the message, for the app.

    Raises:
        ValueError: the client has not the edits on which those in the message stand. The server then sends all.
    """
    if ORDERS[1] not in orders:
        return
    after, until = (int(orders[name]) for name in ORDERS)
    here = int(context.state[EDIT_ROUND]["round"]) if EDIT_ROUND in context.state.metric_records else 0
    if after and here != after:
        raise ValueError(f"edits up to round {after} are expected here, there are those up to round {here}")
    numbers = sorted(int(name.rpartition(" ")[2]) for name in message.content if name.startswith(f"{EDITS} "))
    some = (from_record(message.content[f"{EDITS} {number}"]) for number in numbers)
    full = to_record(added(from_record(context.state[EDIT]) if after else {}, some))
    context.state[EDIT], context.state[EDIT_ROUND] = full, MetricRecord({"round": until})
    message.content[EDITS] = full


def edit_of(message: Message) -> dict[str, np.ndarray]:
    """What a client's app has to add to its base model before it trains or scores: ΔW by layer, {} for nothing."""
    return from_record(message.content.array_records.get(EDITS) or ArrayRecord())
