"""An adapter in and out of Flower's records, and what a message weighs."""

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.common.serde import recorddict_to_proto

Adapter = dict[str, np.ndarray]


def to_record(adapter: Adapter) -> ArrayRecord:
    """An adapter as Flower sends it, keys and order kept."""
    return ArrayRecord({key: Array(value) for key, value in adapter.items()})


def from_record(record: ArrayRecord) -> Adapter:
    """The adapter of a record, keys and order kept.

    Raises:
        ValueError: bytes that are no array, whatever else they are.
    """
    adapter = {}
    for key, array in record.items():
        try:
            adapter[key] = array.numpy()
        except Exception as error:  # numpy's reader raises a dozen types on bytes that another machine made
            raise ValueError(f"{key!r} cannot be read: {type(error).__name__}") from None
        if not isinstance(adapter[key], np.ndarray):
            raise ValueError(f"{key!r} cannot be read: it is not one array")
    return adapter


def message_bytes(message: Message) -> int:
    """Bytes of a message's content as Flower serialises it: adapter, settings and numbers, without the envelope.

    The envelope (node numbers, times) adds about a hundred bytes that differ from message to message.
    """
    if message.has_content():
        return recorddict_to_proto(message.content).ByteSize()
    return len(message.error.reason or "") if message.has_error() else 0
