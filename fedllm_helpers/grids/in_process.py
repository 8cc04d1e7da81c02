"""A Flower grid whose clients run in this process: any two apps, without a network."""

import contextlib
import itertools
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedllm_helpers import limits
from fedllm_helpers.adapters.records import Adapter, from_record
from fedllm_helpers.adapters.updates import PASSING

logger = logging.getLogger(__name__)

SERVER_NODE, FIRST_CLIENT_NODE, CLIENT_RAISED = 1, 2, 2  # the last is Flower's ErrorCode for a ClientApp that raised


def run_apps(
    server: ServerApp,
    client: Callable[[Message, Context], Message],
    num_clients: int,
    run_config: dict[str, Any] | None = None,
) -> Context:
    """Run any two Flower apps in this process: clients one after the other, node k with ``partition-id`` k.

    Flower's log is shown from warnings on; a client that fails is said in one line. Taught in notebook 03.

    Args:
        server: its main function gets a grid of these clients.
        client: a ClientApp, or anything called like one.
        num_clients: nodes.
        run_config: what both find in ``context.run_config``.

    Returns:
        The server's context, with whatever it left in ``context.state``.
    """
    limits.whole("num_clients", num_clients)
    given = dict(run_config or {})
    with quiet_flower(), InProcessGrid(client, num_clients, given) as grid:
        grid.tells = True
        context = Context(grid.run.run_id, SERVER_NODE, {}, RecordDict(), given)
        server(grid, context)
    return context


class InProcessGrid(Grid):
    """A Flower Grid whose clients run here, one after the other, each when its reply is asked for.

    Every message goes through Flower's own serialisation both ways: what a client gets is a copy, as over a network.
    What a client remembers in ``context.state`` lives as long as the grid, and is part of a checkpoint.

    Args:
        app: the ClientApp, or anything called like one.
        num_clients: nodes; node k has ``partition-id`` k.
        run_config: what the clients find in ``context.run_config``.
    """

    tells = False  # whether it says in the log that a client failed; the server app of this package does
    lazy = True  # takes messages one by one, so that there is one of them at a time

    def __init__(
        self, app: Callable[[Message, Context], Message], num_clients: int, run_config: dict[str, Any]
    ) -> None:
        self.app, self.num_clients, self.run_config = app, num_clients, run_config
        self.states: dict[int, RecordDict] = {}  # what clients remember; those that keep nothing take no memory
        self.numbers, self.pending, self._run = itertools.count(1), {}, Run.create_empty(run_id=1)

    def __enter__(self) -> "InProcessGrid":
        self._before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self._run.run_id, SERVER_NODE
        return self

    def __exit__(self, *exception: object) -> None:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = self._before

    @property
    def run(self) -> Run:
        """The run of this grid."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Take another run."""
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message of this run."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes: they are always there."""
        return range(FIRST_CLIENT_NODE, FIRST_CLIENT_NODE + self.num_clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; they are worked on when their replies are pulled."""
        pushed = {message.metadata.message_id: message for message in map(self.numbered, messages)}
        self.pending |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies, one after the other."""
        return (self._deliver(self.pending.pop(number)) for number in message_ids if number in self.pending)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies, each computed when it is asked for; a client here cannot be timed out."""
        return (self._deliver(self.numbered(message)) for message in messages)

    def numbered(self, message: Message) -> Message:
        """The message, with a number of its own."""
        message.metadata.__dict__["_message_id"] = str(next(self.numbers))
        return message

    def names(self, node: int) -> dict[str, int | bool]:
        """The ``node_config`` of a node."""
        return {"partition-id": node - FIRST_CLIENT_NODE, "num-partitions": self.num_clients, "simulated": True}

    def remembered(self) -> dict[str, np.ndarray]:
        """What clients remember, as bytes by node.

        Without what a technique declared as :data:`PASSING`: secrets of a round, and what the server has itself.
        """
        states = {
            node: RecordDict({name: record for name, record in state.items() if not name.startswith(PASSING)})
            for node, state in self.states.items()
        }
        return {str(node): np.frombuffer(state_bytes(state), np.uint8) for node, state in states.items() if state}

    def kept(self, name: str) -> dict[int, Adapter]:
        """Arrays that clients keep under a name, by hospital."""
        found = {node - FIRST_CLIENT_NODE: state.array_records.get(name) for node, state in self.states.items()}
        return {hospital: from_record(record) for hospital, record in sorted(found.items()) if record is not None}

    def remember(self, states: dict[str, np.ndarray]) -> None:
        """The inverse of :meth:`remembered`, for a run that goes on."""
        self.states = {int(node): state_from(state.tobytes()) for node, state in states.items()}

    def _deliver(self, message: Message) -> Message:
        request = message_from(message_bytes(message))
        node = request.metadata.dst_node_id
        state = self.states.get(node, RecordDict())
        context = Context(self._run.run_id, node, self.names(node), state, self.run_config)
        reply, error = answer(self.app, request, context)
        if context.state and error is None:
            self.states[node] = context.state
        if error and self.tells:
            said = (node - FIRST_CLIENT_NODE, type(error).__name__, error)
            logger.warning("client %d failed: %s: %s", *said)
        return message_from(reply)


def answer(
    app: Callable[[Message, Context], Message], request: Message, context: Context
) -> tuple[bytes, Exception | None]:
    """A client's reply, as Flower serialises it; where it raised, that is an error reply, and the error."""
    try:
        return message_bytes(app(request, context)), None
    except Exception as error:  # as on any other grid: a client's failure is a reply, not the end of the run
        said = traceback.format_exc().encode(errors="replace").decode()  # a lone surrogate has no bytes
        return message_bytes(Message(Error(CLIENT_RAISED, said), reply_to=request)), error


def message_bytes(message: Message) -> bytes:
    """A message as Flower sends it."""
    return message_to_proto(message).SerializeToString()


def message_from(raw: bytes) -> Message:
    """The inverse of :func:`message_bytes`."""
    return message_from_proto(MessageProto.FromString(raw))


def state_bytes(state: RecordDict | None) -> bytes:
    """What a client remembers, as Flower would send it; no bytes for nothing."""
    return recorddict_to_proto(state).SerializeToString() if state else b""


def state_from(raw: bytes) -> RecordDict:
    """The inverse of :func:`state_bytes`."""
    return recorddict_from_proto(RecordDictProto.FromString(raw))


@contextlib.contextmanager
def quiet_flower() -> Iterator[None]:
    """Flower's log from warnings on, but for two: that ``run_simulation`` is old, and that clients score nothing."""
    logger = logging.getLogger("flwr")
    before = logger.level

    def wanted(record: logging.LogRecord) -> bool:
        """Everything but those."""
        said = record.getMessage()
        return "DEPRECATED FEATURE" not in said and "Federated evaluation will be skipped" not in said

    logger.setLevel(logging.WARNING)
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeFilter(wanted)


@contextlib.contextmanager
def own_errors_in_a_line() -> Iterator[None]:
    """Flower logs the trace of whatever ends a ServerApp: of what this package says itself, the line is enough."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        last = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
        error.said_in_a_line = last.f_globals["__name__"].startswith("fedllm_helpers.")
        logging.getLogger("flwr").addFilter(_bare)  # once, however often
        raise


def _bare(record: logging.LogRecord) -> bool:
    """Flower's record of such an error, as a line."""
    if record.exc_info and getattr(record.exc_info[1], "said_in_a_line", False):
        record.msg, record.args, record.exc_info = "The run ends: %s", (record.exc_info[1],), None
    return True
