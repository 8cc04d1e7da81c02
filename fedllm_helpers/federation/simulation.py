"""The two Flower apps without a network: all in this process (default), or on Ray."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import limits
from fedllm_helpers.adapters.records import Adapter, from_record
from fedllm_helpers.aggregation import rules
from fedllm_helpers.config import checked
from fedllm_helpers.federation import client_app, run_folders, server_app
from fedllm_helpers.federation.in_process import SERVER_NODE, InProcessGrid, quiet_flower
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.federation.tables import Tables
from fedllm_helpers.models.lora import device_and_dtype

BACKENDS = ("in-process", "ray")


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
