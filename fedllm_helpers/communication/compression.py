"""Compression with error feedback, for any Flower app: a strategy that wraps a strategy, and a client mod.

What goes up is the update, the trained adapter minus the one received; what goes down is the adapter. The server orders
in each message what is to be done; the mod knows nothing else. Taught in notebook 07.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.screening import Expected, Shapes, looked_at, read_adapter
from fedllm_helpers.adapters.updates import START, kind_of, update_of
from fedllm_helpers.adapters.wrapping import Wrapper
from fedllm_helpers.communication.codec import BITS, decode, encode, layout

ORDERS = "compression"  # the record of a message that says what the mod is to do
RESIDUAL = "residual"  # what a client has not sent yet, in its own ``context.state``


@dataclass(frozen=True)
class Formats:
    """Number formats of both ways, the share of values that goes up, and whether what an update lost is sent later.

    ``up`` is None where the replies have a format of their own, as under masks.

    Raises:
        ValueError: a format or a share that there is not.
    """

    up: str | None = "fp32"
    down: str = "fp32"
    keep: float = 1.0
    error_feedback: bool = True

    def __post_init__(self) -> None:
        for way, given in (("up", self.up), ("down", self.down)):
            if given not in BITS and not (way == "up" and given is None):
                raise ValueError(f"{way}={given!r}: allowed are {', '.join(BITS)}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep!r}: allowed are shares above 0, to 1")

    @property
    def active(self) -> bool:
        """Whether anything is compressed."""
        return self.up not in ("fp32", None) or self.down != "fp32" or self.keep < 1

    @property
    def packs(self) -> bool:
        """Whether hospitals send updates, encoded, in place of adapters.

        They do wherever anything is compressed: from an adapter that came down rounded, an adapter that goes up would
        carry the rounding back.
        """
        return self.active and self.up is not None

    @property
    def remembers(self) -> bool:
        """Whether clients keep something from one round to the next."""
        return self.packs and self.error_feedback and (self.up != "fp32" or self.keep < 1)


def outgoing(how: Formats, adapter: Adapter) -> dict[str, ArrayRecord | ConfigRecord]:
    """The records of a request: ``arrays`` as they go down, and the orders to the mod."""
    if not how.active:
        return {"arrays": to_record(adapter)}
    orders = {name: value for name, value in asdict(how).items() if value is not None}
    if how.down == "fp32":
        return {"arrays": to_record(adapter), ORDERS: ConfigRecord(orders)}
    shapes = json.dumps({key: value.shape for key, value in adapter.items()})
    orders["shapes"] = zlib.compress(shapes.encode(), 9)
    return {"arrays": to_record(encode(adapter, how.down)), ORDERS: ConfigRecord(orders)}


def restored(how: Formats, encoded: Adapter, adapter: Adapter) -> Adapter:
    """The adapter that an encoded update leads to, from the server's own, which ``down`` did not round.

    Raises:
        ValueError: the update cannot be decoded.
    """
    update = decode(encoded, adapter, how.up, how.keep)
    return {key: value + update[key] for key, value in adapter.items()}


def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower client mod: decodes what comes down and encodes the update that goes up, as the message orders.

    With ``error_feedback`` what an update lost is kept in the client's state and added to its next one (Seide et al.
    2014; Stich et al. 2018, arXiv:1809.07599), so that it is late and not lost. What the server leaves out, because
    the reply was faulty or too late, is lost, as without compression; and so is what is left after the last round.

    Raises:
        ValueError: orders that this version does not know.
    """
    if ORDERS not in message.content.config_records:
        return call_next(message, context)
    how, shapes = _read(message.content[ORDERS])
    del message.content[ORDERS]
    if how.down != "fp32":
        like = {key: np.empty(shape, np.float32) for key, shape in shapes.items()}
        message.content["arrays"] = to_record(decode(from_record(message.content["arrays"]), like, how.down))
    if kind_of(message) != "train" or not how.packs:
        return call_next(message, context)
    received, message.content[START] = from_record(message.content["arrays"]), ConfigRecord()
    reply = call_next(message, context)
    if reply.has_error() or "arrays" not in reply.content.array_records:
        return reply
    update, late = update_of(reply, received), context.state.array_records.get(RESIDUAL) or {}
    if how.remembers:
        update = {key: value + late[key].numpy() if key in late else value for key, value in update.items()}
    encoded = encode(update, how.up, how.keep)
    if how.remembers:
        sent = decode(encoded, update, how.up, how.keep)
        left = to_record({key: value - sent[key] for key, value in update.items()})
        context.state[RESIDUAL] = ArrayRecord({**late, **left})  # of factors that rest in this round, too
    reply.content["arrays"] = to_record(encoded)
    return reply


def _read(orders: ConfigRecord) -> tuple[Formats, dict[str, list[int]]]:
    given = {name: value for name, value in orders.items() if name != "shapes"}
    if unknown := sorted(set(given) - {"up", "down", "keep", "error_feedback"}):
        raise ValueError(f"compression: the server orders {unknown[0]!r}, which this client's mod does not know")
    shapes = json.loads(zlib.decompress(orders["shapes"])) if "shapes" in orders else {}
    return Formats(**{"up": None, **given}), shapes


class Compressed(Wrapper):
    """A strategy whose adapters go down in few bits, and whose updates come up in few bits, by :func:`mod`.

    Args:
        strategy: any that sends and averages ``arrays``.
        up, down, keep, error_feedback: as in :class:`Formats`.

    Raises:
        ValueError: a format or a share that there is not.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        up: str | None = "fp32",
        down: str = "fp32",
        keep: float = 1.0,
        error_feedback: bool = True,
    ) -> None:
        self.how = Formats(up, down, keep, error_feedback)
        self.reads = "updates in few bits" if self.how.packs else ""
        self.remembers = "what updates lost" if self.how.remembers else ""
        super().__init__(strategy)

    def form(self, node: int) -> Shapes:
        """Of an update in few bits."""
        return layout(self.how.up, self.how.keep) if self.how.packs else super().form(node)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages, their arrays encoded, with orders to the mod."""
        return self._encoded(super().configure_train(server_round, arrays, config, grid), self.how)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As :meth:`configure_train`; what comes back has no arrays."""
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        return self._encoded(messages, replace(self.how, up=None))

    def _encoded(self, messages: Iterable[Message], how: Formats) -> list[Message]:
        made: dict[int, dict[str, ArrayRecord | ConfigRecord]] = {}  # most messages share their arrays
        messages = list(messages)
        for message in messages:
            record = message.content["arrays"]
            if id(record) not in made:
                made[id(record)] = outgoing(how, from_record(record))
            message.content = RecordDict({**message.content, **made[id(record)]})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Give the wrapped strategy the replies with adapters in place of updates; a faulty one is left out.

        Raises:
            ValueError: the clients' apps lack :func:`mod`: no reply is compressed.
        """
        replies = self._decoded(server_round, replies) if self.how.packs else replies
        return super().aggregate_train(server_round, replies)

    def _decoded(self, number: int, replies: Iterable[Message]) -> Iterator[Message]:
        plain, decoded = None, 0
        for reply in replies:
            node = reply.metadata.src_node_id
            arrays, why = looked_at(reply, lambda content, node=node: self._adapter(content, node))
            if why:
                if reply.has_content() and set(reply.content.get("arrays", ())) - set(self.form(node)):
                    plain = node
                self.leave_out(number, node, why)
                continue
            decoded += 1
            reply.content["arrays"] = to_record(arrays)
            yield reply
        if plain is not None and not decoded:
            raise ValueError(f"node {plain} sends no compressed update: ClientApp(mods=[…]) needs compression.mod")

    def _adapter(self, content: RecordDict, node: int) -> Adapter:
        like = self.expected(node)
        how = Expected({}, (), self.form(node), lambda sent: restored(self.how, sent, like))
        return read_adapter(content, how)
