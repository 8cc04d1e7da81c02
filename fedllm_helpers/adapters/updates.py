"""The update in a reply: what was trained minus what came down, wherever a technique needs it at a client."""

import numpy as np
from flwr.app import Message

from fedllm_helpers.adapters.records import Adapter, from_record

LARGEST_SHARE = "largest-share"  # a number in a reply that is a mean already: of the heaviest client in it
PASSING = "passing "  # how the name of a state begins that a client keeps, and that belongs into no checkpoint
START = "start"  # in a request: an update is asked for; in a reply: from where it is measured. It stays at the client.


def kind_of(message: Message) -> str:
    """``train``, ``evaluate`` or ``query.…``: Flower hands ``train.default`` to the same function as ``train``."""
    kind, _, action = message.metadata.message_type.partition(".")
    return f"{kind}.{action}" if kind == "query" and action else kind


def update_of(reply: Message, received: Adapter) -> Adapter:
    """The update of a client, float arrays by key.

    Args:
        reply: with ``arrays``; its record :data:`START`, if an app or a mod within left one, is taken out.
        received: what came down, from which the update is measured where there is no such record.

    Raises:
        ValueError: arrays that did not come down, of another shape, or that are no floating-point numbers.
    """
    trained, start = from_record(reply.content["arrays"]), received
    if START in reply.content.array_records:
        start = from_record(reply.content[START])
        del reply.content[START]
    for key, value in trained.items():
        if key not in start:
            raise ValueError(f"an update is measured from what came down, and {key!r} did not")
        if value.shape != start[key].shape:
            raise ValueError(f"{key!r} came down with shape {start[key].shape}, and goes up with {value.shape}")
        if not np.issubdtype(value.dtype, np.floating):
            raise ValueError(f"{key!r} is {value.dtype}: an update is of floating-point numbers")
    return {key: value - start[key] for key, value in trained.items()}
