"""All arrays of a message as one, on their way between machines.

Flower's servers store, hand over and confirm every array by itself, a few requests each: the 120 arrays of a small
adapter cost more time than its bytes do. In one process nothing is packed.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.serverapp import Grid

from fedllm_helpers.adapters.screening import read_arrays

logger = logging.getLogger(__name__)
SOON, LATE = 0.25, 3.0  # seconds between two looks for replies, at least and at most: a twentieth of the wait so far
PACKED = "packed"  # the record of one array whose bytes are all the others, as Flower serialises them


def packed(messages: Iterable[Message]) -> list[Message]:
    """Pack messages in place; those with the same records share one packed array."""
    made: dict[tuple[int, ...], tuple[dict[str, ArrayRecord], ArrayRecord]] = {}
    messages = list(messages)
    for message in messages:
        records = dict(message.content.array_records)
        if records:
            key = tuple(map(id, records.values()))
            if key not in made:
                whole = recorddict_to_proto(RecordDict(records)).SerializeToString()
                made[key] = records, ArrayRecord({"all": Array(np.frombuffer(whole, np.uint8))})
            for name in records:
                del message.content[name]
            message.content[PACKED] = made[key][1]
    return messages


def unpacked(messages: Iterable[Message]) -> Iterator[Message]:
    """Unpack messages in place, one by one; what cannot be read stays as it came, and is no adapter for anyone."""
    for message in messages:
        if not message.has_error() and PACKED in message.content.array_records:
            try:
                one = RecordDict({PACKED: message.content[PACKED]})
                whole = read_arrays(one, {"all": (np.dtype(np.uint8), (None,))})["all"].tobytes()
                records = recorddict_from_proto(RecordDictProto.FromString(whole)).array_records
            except Exception:  # bytes that another machine made: protobuf and numpy raise a dozen types
                yield message
                continue
            del message.content[PACKED]
            for name, record in records.items():
                message.content[name] = record
        yield message


def client_mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower client mod: unpacks a request, and packs the reply to one that was packed."""
    whole = PACKED in message.content.array_records
    reply = call_next(next(unpacked([message])), context)
    return packed([reply])[0] if whole and not reply.has_error() else reply


def send(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[tuple[int | None, Message]]:
    """Send messages; (node, reply) as they come, the node None where it is no reply to any of them, or a second one.

    A reply belongs to the node that was asked, whatever it says: where that went offline, the server answers in its
    place. A grid that is ``lazy`` takes the messages one by one; Flower's own go through them more than once, and are
    asked for replies more often than they would by themselves.
    """
    sent, waiting, lazy = [], {}, getattr(grid, "lazy", False)

    def noted() -> Iterator[Message]:
        """The messages; of each its metadata is kept, where Flower puts its number when it is sent."""
        for message in messages:
            sent.append(message.metadata)
            yield message

    replies = grid.send_and_receive(noted(), timeout=timeout) if lazy else _pulled(grid, packed(noted()), timeout)
    for reply in replies if lazy else unpacked(replies):
        waiting |= {metadata.message_id: metadata.dst_node_id for metadata in sent}
        sent.clear()
        yield waiting.pop(reply.metadata.reply_to_message_id, None), reply


def _pulled(grid: Grid, messages: list[Message], timeout: float) -> Iterator[Message]:
    """The replies as they come, until all are there or the time is over."""
    numbers, start = list(grid.push_messages(messages)), time.monotonic()
    waiting = {number for number in numbers if number}
    if len(waiting) < len(messages):
        logger.warning("%d of %d messages could not be sent", len(messages) - len(waiting), len(messages))
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply
        waited = time.monotonic() - start
        if waited >= timeout:
            return
        time.sleep(min(timeout - waited, max(SOON, min(LATE, waited / 20))) if waiting else 0)
