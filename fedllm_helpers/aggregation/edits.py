"""Edits of the base model on their way: the server sends a node those that it has not, the node adds them up."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import Adapter, from_record, to_record

EDIT, EDIT_ROUND = "base edit", "base edit round"  # in a client's state: ΔW by layer, and up to which round
EDITS = "edits"  # in a message, beside the arrays: "edits 3" are those of round 3


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
        """Take what a round adds.

        Raises:
            RuntimeError: its product may not be finite in float32; nothing is added then.
        """
        for first, second in factors.pairs(edit).values():
            largest = np.linalg.norm(first.astype(float)) * np.linalg.norm(second.astype(float))
            if not largest < np.finfo(np.float32).max:
                raise RuntimeError(f"round {number}: finite adapters make an edit of the base model that is not finite")
        self.edits[number] = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in edit.items()}

    def attach(self, content: RecordDict, node: int) -> None:
        """Put into a message the edits that a node has not. Until :meth:`confirm`, it counts as having none."""
        if not self.edits:
            return
        after, until = self.held.pop(node, 0), max(self.edits)
        for number in (number for number in self.edits if number > after):
            self.made[number] = self.made.get(number) or to_record(self.edits[number])
            content[f"{EDITS} {number}"] = self.made[number]
        self.sent[node] = until
        content["config"] = ConfigRecord({**content["config"], "edits-after": after, "edits-until": until})

    def confirm(self, node: int) -> None:
        """A reply of a node was used: it has the edits that went out with the request."""
        if node in self.sent:
            self.held[node] = self.sent.pop(node)


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


def held(message: Message, context: Context) -> dict[str, np.ndarray]:
    """What a client has to add to its base model, ΔW by layer; it is kept in the client's state for the next time.

    Raises:
        ValueError: the client has not the edits on which those in the message stand. The server then sends all.
    """
    config = message.content["config"]
    if "edits-until" not in config:
        return {}
    after = int(config["edits-after"])
    here = int(context.state[EDIT_ROUND]["round"]) if EDIT_ROUND in context.state.metric_records else 0
    if after and here != after:
        raise ValueError(f"edits up to round {after} are expected here, there are those up to round {here}")
    numbers = sorted(int(name.rpartition(" ")[2]) for name in message.content if name.startswith(f"{EDITS} "))
    edits = (from_record(message.content[f"{EDITS} {number}"]) for number in numbers)
    full = added(from_record(context.state[EDIT]) if after else {}, edits)
    context.state[EDIT], context.state[EDIT_ROUND] = to_record(full), MetricRecord({"round": config["edits-until"]})
    return full
