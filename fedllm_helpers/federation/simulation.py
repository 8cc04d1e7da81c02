"""The two Flower apps without a network: all in this process (default), side by side in several, or on Ray."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from flwr.app import Context, Message, RecordDict
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import config, grids, limits, models
from fedllm_helpers.adapters.records import Adapter, from_record
from fedllm_helpers.aggregation import rules
from fedllm_helpers.config import checked
from fedllm_helpers.federation import client_app, run_folders, server_app
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.federation.tables import Tables
from fedllm_helpers.grids import on_ray, serving
from fedllm_helpers.grids import workers as team
from fedllm_helpers.grids.in_process import SERVER_NODE, InProcessGrid, quiet_flower
from fedllm_helpers.grids.side_by_side import SideBySideGrid
from fedllm_helpers.training import memory

logger = logging.getLogger(__name__)
BACKENDS = ("in-process", "side-by-side", "ray")
LIBRARIES = ("fedllm_helpers", "flwr_datasets", "peft", "transformers.trainer")  # what a client takes seconds to import
App = Callable[[Message, Context], Message]


@dataclass(frozen=True)
class FederatedRecord:
    """What a federation gave: adapter, a table of rounds, a table of rounds × clients, and where it comes from.

    The columns are those of :class:`tables.Tables`. ``scores`` has, with ``federation.fraction_evaluate``, what the
    average reached on each hospital's own held-out cards. ``edit`` has factors of what was added to the base
    model, for :func:`editing.edited`; {} with the rules that leave it alone. ``personal`` has, with
    FedSA-LoRA and in process, the adapter of each hospital that trained.
    """

    adapter: Adapter
    history: pd.DataFrame
    clients: pd.DataFrame
    provenance: dict[str, Any]
    edit: Adapter = field(default_factory=dict)
    personal: dict[int, Adapter] = field(default_factory=dict)
    scores: pd.DataFrame = field(default_factory=lambda: Tables().scores_frame())


def run(
    cfg: DictConfig,
    backend: str = "in-process",
    *,
    folder: str | Path | None = None,
    progress: bool = True,
    actors: int = 2,
    workers: int | None = None,
    client: App = client_app.app,
) -> FederatedRecord:
    """Run a federation on this machine. Taught in notebook 03.

    Args:
        cfg: from :func:`fedllm_helpers.config.load`.
        backend: ``"in-process"``: clients one after the other, one copy of the model. ``"side-by-side"``: several at a
            time, in worker processes that share one copy of the model's weights; what they take to start pays off in
            runs of a minute. On Linux a process that has imported what they need stays until this one ends, with
            0.4 GB, and the next run begins seconds sooner. Where ``federation.threads`` is not set, it is 1 there. A
            script calls this under ``if __name__ == "__main__":``. ``"ray"``: in several processes of Flower's (extra
            ``sim``), each with its copy of the model. On CPUs, with the same ``federation.threads``, the adapters are
            the same to the last bit.
        folder: where every finished round is kept; one with rounds of the same settings is gone on with, and files of
            others stay. None keeps nothing. What hospitals remember is kept, too; on Ray it ends with the run.
        progress: whether to show a bar over rounds and clients, and to say how many workers were chosen.
        actors: processes of Ray that train at the same time; ``federation.threads`` times ``actors`` should be the
            cores, or they stand in each other's way.
        workers: processes side by side. None chooses: one on a GPU, else what cores and free memory allow.
        client: another ClientApp in place of the package's, such as one with a hospital that cheats: any in process;
            side by side one that stands under a name in a module, which workers import; none on Ray.

    Returns:
        Adapter, tables and provenance.

    Raises:
        ValueError: an unknown backend, cards that cannot be divided or that the settings do not fit, a folder with
            another run or something else, more workers than memory holds, or a client that they cannot import.
        RuntimeError: no hospital of a round sent a usable adapter; with the first one's traceback. Or no worker starts.
        ModuleNotFoundError: Ray is not installed.
    """
    _check(backend, workers, actors, client)
    if backend == "side-by-side":
        team.import_ahead(*LIBRARIES)  # while this process imports and loads
    with quiet_flower():
        if backend == "ray":
            given, gpu = _given(cfg, folder, progress), models.device_and_dtype(cfg.model.device)[0].type == "cuda"
            context = on_ray.run_apps(server_app.app, _own_client, cfg.federation.num_clients, given, actors, gpu)
            return _record(context, provenance(cfg, backend=backend), {})
        facts: dict[str, Any] = {"backend": backend}
        if backend == "side-by-side":
            cfg, facts["workers"] = _workers(cfg, workers, progress)
        with _grid(checked(cfg), client, facts.get("workers")) as grid:
            grid.run_config = given = _given(cfg, folder, progress)
            with _begun(cfg, grid):
                context = Context(grid.run.run_id, SERVER_NODE, {}, RecordDict(), given)
                server_app.app(grid, context)
            return _record(context, provenance(cfg, **facts), grid.kept(rules.PERSONAL))


def _check(backend: str, workers: int | None, actors: int, client: App) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: known are {', '.join(BACKENDS)}")
    if backend == "ray" and client is not client_app.app:
        raise ValueError("client: not on Ray, where the package's own runs; in process or side by side")
    if workers is not None and backend != "side-by-side":
        raise ValueError(f"workers={workers!r:.60}: they are of backend='side-by-side', and this is {backend!r}")
    limits.whole("actors", actors)
    if backend == "side-by-side":
        serving.named(client)


def _given(cfg: DictConfig, folder: str | Path | None, progress: bool) -> dict[str, Any]:
    """What both apps find in ``context.run_config``.

    Raises:
        ValueError: cards that the settings do not fit: said before a model is loaded.
    """
    client_app.check_cards(checked(cfg))
    return {
        "config": OmegaConf.to_yaml(cfg),
        "folder": run_folders.named(folder),
        "cards": fingerprint(cfg)["cards"],
        "progress": "bar" if progress else "",
    }


def _workers(cfg: DictConfig, asked: int | None, progress: bool) -> tuple[DictConfig, int]:
    """The settings with ``federation.threads``, and the number of workers, which is said."""
    if checked(cfg).federation.threads is None and models.device_and_dtype(cfg.model.device)[0].type == "cpu":
        cfg = config.load(cfg, "federation.threads=1")
    number, why = grids.sizing.workers(cfg, asked)
    threads, cores = cfg.federation.threads or 1, grids.sizing.cores()
    if progress and why:
        print(f"side by side: workers={number} ({why})", flush=True)
    if threads * number > cores:
        said = "federation.threads=%d times workers=%d is more than %d cores: they stand in each other's way"
        logger.warning(said, threads, number, cores)
    return cfg, number


def _grid(cfg: DictConfig, client: App, workers: int | None) -> InProcessGrid:
    number = cfg.federation.num_clients
    return SideBySideGrid(client, number, {}, workers) if workers else InProcessGrid(client, number, {})


@contextlib.contextmanager
def _begun(cfg: DictConfig, grid: InProcessGrid) -> Iterator[None]:
    """Let the workers of a grid have this process's base model."""
    if not isinstance(grid, SideBySideGrid):
        yield
        return
    import torch  # now at the latest

    with models.shared.weights(models.process.base_model(cfg)[0]) as grid.scratch:
        grid.begin = partial(_begin, OmegaConf.to_yaml(cfg), grid.scratch, torch.get_num_threads())
        try:
            yield
        finally:
            grid.team.end()  # Windows deletes no file that somebody has mapped


def _begin(settings: str, scratch: str, threads: int) -> None:
    """In a worker: load cards and base model as the server did, and let go of what is not its own."""
    import torch

    torch.set_num_threads(threads)
    cfg = OmegaConf.create(settings)
    client_app.own_cards(cfg, 0)
    models.shared.take(models.process.base_model(cfg)[0], scratch)
    memory.release()
    memory.set_aside()  # as the server does for its clients in one process


def _record(context: Context, origin: dict[str, Any], personal: dict[int, Adapter]) -> FederatedRecord:
    rows = {name: json.loads(context.state["tables"][name]) for name in ("history", "clients")}
    tables = Tables(rows["history"], [tuple(row) for row in rows["clients"]])
    adapter, edit = (from_record(context.state[name]) for name in ("adapter", "edit"))
    whole = {hospital: {**adapter, **own} for hospital, own in personal.items()}
    frames = tables.history_frame(), tables.clients_frame()
    return FederatedRecord(adapter, *frames, origin, edit, whole, tables.scores_frame())


def _own_client(message: Message, context: Context) -> Message:
    return client_app.app(message, context)
