"""The two Flower apps without a network: all in this process (default), or on Ray."""

import itertools
import json
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import limits
from fedllm_helpers.adapters.records import Adapter, from_record
from fedllm_helpers.aggregation import edits, rules
from fedllm_helpers.config import checked
from fedllm_helpers.federation import client_app, run_folders, server_app
from fedllm_helpers.federation.process import quiet_flower
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.federation.tables import Tables
from fedllm_helpers.models.lora import device_and_dtype
from fedllm_helpers.privacy import masked_clients

BACKENDS = ("in-process", "ray")
SERVER_NODE, FIRST_CLIENT_NODE, CLIENT_RAISED = 1, 2, 2  # the last is Flower's ErrorCode for a ClientApp that raised


@dataclass(frozen=True)
class FederatedRecord:
    """What a federation gave: adapter, a table of rounds, a table of rounds × clients, and where it comes from.

    The columns are those of :class:`tables.Tables`. ``edit`` has factors of what was added to the base
    model, for :func:`editing.edited`; {} with the rules that leave it alone. ``personal`` has, with
    FedSA-LoRA and in process, the adapter of each hospital that trained.
    """

    adapter: Adapter
    history: pd.DataFrame
    clients: pd.DataFrame
    provenance: dict[str, Any]
    edit: Adapter = field(default_factory=dict)
    personal: dict[int, Adapter] = field(default_factory=dict)


def run(
    cfg: DictConfig,
    backend: str = "in-process",
    *,
    folder: str | Path | None = None,
    progress: bool = True,
    actors: int = 2,
    client: Callable[[Message, Context], Message] = client_app.app,
) -> FederatedRecord:
    """Run a federation on this machine. Taught in notebook 03.

    Args:
        cfg: from :func:`fedllm_helpers.config.load`.
        backend: ``"in-process"``: clients one after the other, one copy of the model. ``"ray"``: in several processes
            (extra ``sim``), each with its copy of the model. On CPUs, with the same ``federation.threads``, the
            adapters are the same to the last bit.
        folder: where every finished round is kept; one with rounds of the same settings is gone on with, and files of
            others stay. None keeps nothing. What hospitals remember is kept in process; on Ray it ends with the run.
        progress: whether to show a bar over rounds and clients.
        actors: processes of Ray that train at the same time; ``federation.threads`` times ``actors`` should be the
            cores, or they stand in each other's way.
        client: another ClientApp in place of the package's, in process, such as one with a hospital that cheats.

    Returns:
        Adapter, tables and provenance.

    Raises:
        ValueError: an unknown backend, cards that cannot be divided or that the settings do not fit, or a folder with
            another run or something else.
        RuntimeError: no hospital of a round sent a usable adapter; with the first one's traceback.
        ModuleNotFoundError: Ray is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: known are {', '.join(BACKENDS)}")
    if backend == "ray" and client is not client_app.app:
        raise ValueError("client: only in process; on Ray the package's own runs")
    limits.whole("actors", actors)
    client_app.check_cards(checked(cfg))  # more hospitals than cards, or no such specialty: said before anything starts
    given = {
        "config": OmegaConf.to_yaml(cfg),
        "folder": run_folders.named(folder),
        "cards": fingerprint(cfg)["cards"],
        "progress": "bar" if progress else "",
    }
    with quiet_flower():
        if backend == "ray":
            return _record(_run_on_ray(cfg, given, actors), provenance(cfg, backend=backend), {})
        with InProcessGrid(client, cfg.federation.num_clients, given) as grid:
            context = Context(grid.run.run_id, SERVER_NODE, {}, RecordDict(), given)
            server_app.app(grid, context)
            return _record(context, provenance(cfg, backend=backend), grid.kept(rules.PERSONAL))


def _record(context: Context, origin: dict[str, Any], personal: dict[int, Adapter]) -> FederatedRecord:
    rows = {name: json.loads(context.state["tables"][name]) for name in ("history", "clients")}
    tables = Tables(rows["history"], [tuple(row) for row in rows["clients"]])
    adapter, edit = (from_record(context.state[name]) for name in ("adapter", "edit"))
    whole = {hospital: {**adapter, **own} for hospital, own in personal.items()}
    return FederatedRecord(adapter, tables.history_frame(), tables.clients_frame(), origin, edit, whole)


class InProcessGrid(Grid):
    """A Flower Grid whose clients run here, one after the other, each when its reply is asked for.

    Every message goes through Flower's own serialisation both ways: what a client gets is a copy, as over a network.
    What a client remembers in ``context.state`` lives as long as the grid, and is part of a checkpoint.

    Args:
        app: the ClientApp, or anything called like one.
        num_clients: nodes; node k has ``partition-id`` k.
        run_config: what the clients find in ``context.run_config``.
    """

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
        pushed = {str(next(self.numbers)): message for message in messages}
        self.pending |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies, one after the other."""
        return (self._deliver(self.pending.pop(number)) for number in message_ids if number in self.pending)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies, each computed when it is asked for; a client here cannot be timed out."""
        return (self._deliver(message) for message in messages)

    def remembered(self) -> dict[str, np.ndarray]:
        """What clients remember, as bytes by node.

        Without the secrets of a masked round, which are nobody else's, and edits of the base, which the server has.
        """
        left = (masked_clients.KEPT, edits.EDIT, edits.EDIT_ROUND)
        states = {
            node: RecordDict({name: record for name, record in state.items() if name not in left})
            for node, state in self.states.items()
        }
        whole = {str(node): recorddict_to_proto(state).SerializeToString() for node, state in states.items() if state}
        return {node: np.frombuffer(state, np.uint8) for node, state in whole.items()}

    def kept(self, name: str) -> dict[int, Adapter]:
        """Arrays that clients keep under a name, by hospital."""
        found = {node - FIRST_CLIENT_NODE: state.array_records.get(name) for node, state in self.states.items()}
        return {hospital: from_record(record) for hospital, record in sorted(found.items()) if record is not None}

    def remember(self, states: dict[str, np.ndarray]) -> None:
        """The inverse of :meth:`remembered`, for a run that goes on."""
        read = {int(node): RecordDictProto.FromString(state.tobytes()) for node, state in states.items()}
        self.states = {node: recorddict_from_proto(state) for node, state in read.items()}

    def _deliver(self, message: Message) -> Message:
        message.metadata.__dict__["_message_id"] = str(next(self.numbers))
        request = _over_the_wire(message)
        node = request.metadata.dst_node_id
        names = {"partition-id": node - FIRST_CLIENT_NODE, "num-partitions": self.num_clients}
        context = Context(self._run.run_id, node, names, self.states.get(node, RecordDict()), self.run_config)
        try:
            reply = _over_the_wire(self.app(request, context))
            if context.state:
                self.states[node] = context.state
        except Exception:  # as on any other grid: a client's failure is a reply, not the end of the run
            said = traceback.format_exc().encode(errors="replace").decode()  # a lone surrogate has no bytes
            return _over_the_wire(Message(Error(CLIENT_RAISED, said), reply_to=request))
        return reply


def _over_the_wire(message: Message) -> Message:
    return message_from_proto(MessageProto.FromString(message_to_proto(message).SerializeToString()))


def _run_on_ray(cfg: DictConfig, given: dict[str, Any], actors: int) -> Context:
    if find_spec("ray") is None:
        raise ModuleNotFoundError("backend='ray' needs the extra: pip install 'fedllm-helpers[sim]'")
    from flwr.simulation import run_simulation  # imports much that the other backend does not need

    kept: list[Context] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        """The server app with these settings; what it leaves in its context is kept."""
        context.run_config = given
        server_app.app(grid, context)
        kept.append(context)

    on_gpu = device_and_dtype(cfg.model.device)[0].type == "cuda"
    gpu = int(1e4 / actors) / 1e4 if on_gpu else 0  # Ray rounds to four digits, and a last actor must still fit
    resources = {
        "client_resources": {"num_cpus": 1, "num_gpus": gpu},
        "init_args": {"num_cpus": actors, "include_dashboard": False, "log_to_driver": False},
    }
    run_simulation(server, partial(_with_run_config, given), cfg.federation.num_clients, backend_config=resources)
    return kept[0]


def _with_run_config(given: dict[str, Any], message: Message, context: Context) -> Message:
    app: ClientApp = client_app.app  # Flower refuses a client's context that comes back with other settings
    return app(message, Context(context.run_id, context.node_id, context.node_config, context.state, given))
