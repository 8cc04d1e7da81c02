"""Edits of the base model on their way: the server sends a node those that it has not, the node adds them up."""

from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedllm_helpers import factors
from fedllm_helpers.messages import from_record, to_record
from fedllm_helpers.models import Adapter

EDIT, EDIT_ROUND = "base edit", "base edit round"  # in a client's state: ΔW by layer, and up to which round
EDITS = "edits"  # in a message, beside the arrays


@dataclass
class Base:
    """What was added to the base model: factors by round, scale included; and up to which round each node has them.

    All of them stay in the server's memory: a node that was started anew gets them all.
    """

    edits: dict[int, Adapter] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    made: tuple[tuple[int, int], ArrayRecord] | None = None  # the last stack sent, for whoever else needs it

    def whole(self) -> Adapter:
        """Factors of the sum of all edits; {} where there are none."""
        return factors.together(list(self.edits.values()))

    def add(self, number: int, edit: Adapter) -> None:
        """Take what a round adds.

        Raises:
            RuntimeError: its product may not be finite in float32; nothing is added then.
        """
        for first, second in factors.pairs(edit).values():
            largest = np.linalg.norm(first.astype(float)) * np.linalg.norm(second.astype(float))
            if not largest < np.finfo(np.float32).max:
                raise RuntimeError(f"round {number}: finite adapters make an edit of the base model that is not finite")
        self.edits[number] = edit

    def attach(self, content: RecordDict, node: int) -> None:
        """Put into a message the edits that a node has not. Until :meth:`confirm`, it counts as having none."""
        if not self.edits:
            return
        after, until = self.held.pop(node, 0), max(self.edits)
        if self.made is None or self.made[0] != (after, until):
            missing = factors.together([edit for number, edit in self.edits.items() if number > after])
            self.made = (after, until), to_record(missing)
        content[EDITS], self.sent[node] = self.made[1], until
        content["config"] = ConfigRecord({**content["config"], "edits-after": after, "edits-until": until})

    def confirm(self, node: int) -> None:
        """A reply of a node was used: it has the edits that went out with the request."""
        if node in self.sent:
            self.held[node] = self.sent.pop(node)


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
    known = from_record(context.state[EDIT]) if after else {}
    added = factors.product(from_record(message.content[EDITS])) if message.content[EDITS] else {}
    full = {layer: known.get(layer, 0.0) + added.get(layer, 0.0) for layer in {**known, **added}}
    full = {layer: value.astype(np.float32) for layer, value in full.items()}
    context.state[EDIT], context.state[EDIT_ROUND] = to_record(full), MetricRecord({"round": config["edits-until"]})
    return full
