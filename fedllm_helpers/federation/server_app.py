"""Flower ServerApp: asks hospitals, screens and combines their adapters, and keeps every finished round."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import data, evaluation, folders, models, training
from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import Adapter, to_record
from fedllm_helpers.aggregation.ruled import Rule
from fedllm_helpers.aggregation.rules import scaled
from fedllm_helpers.config.runs import settings
from fedllm_helpers.config.training_arguments import trackers
from fedllm_helpers.evaluation import tracking
from fedllm_helpers.federation import checkpoints, resumed, run_folders
from fedllm_helpers.federation.chain import Chain, compose
from fedllm_helpers.federation.nodes import Answers, hospitals, join
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.federation.rounds import Federation, run_round
from fedllm_helpers.federation.tables import Tables, bar, numbers, report
from fedllm_helpers.grids.in_process import own_errors_in_a_line, quiet_flower
from fedllm_helpers.privacy import audit_log, noise
from fedllm_helpers.training import memory

logger = logging.getLogger(__name__)
app = ServerApp()


@dataclass(frozen=True)
class Options:
    """What is scored, kept and shown between the rounds of a federation.

    ``evaluate`` scores an adapter on the server, in nats per answer token; ``keep`` saves one under a name, after every
    ``train.save_every_round`` rounds; ``folder`` is that of the checkpoints, one after every round; ``progress`` is
    ``"bar"`` over rounds and clients, ``"lines"``, one for each round, or nothing; ``track`` takes a round's numbers.
    """

    evaluate: Callable[[Adapter], float] | None = None
    keep: Callable[[Adapter, str], None] | None = None
    folder: Path | None = None
    progress: str = ""
    track: tracking.Log | None = None


@app.main()
@own_errors_in_a_line()
def main(grid: Grid, context: Context) -> None:
    """Run a federation from a run's settings; the result goes into ``context.state`` and, with a folder, to disk.

    ``folder`` of the run config: where rounds, adapters and tables are kept; ``"auto"`` is a folder of its own under
    the user's data, ``""`` keeps nothing. A folder with rounds of the same settings is gone on with.
    """
    given, cfg, folder = context.run_config, settings(context), run_folders.of_context(context)
    progress = str(given.get("progress", ""))
    if folder and progress == "lines":
        print(f"rounds are kept in {folder}: a run with this folder in its settings goes on from there", flush=True)
    apart = not getattr(grid, "lazy", False)  # in one process all is known anyway
    if apart and cfg.federation.privacy.noise_seed is not None:
        logger.warning("federation.privacy.noise_seed is set: whoever knows it can take the noise off; for study only")
    names, shown = trackers(cfg.federation.report_to), {"config": OmegaConf.to_yaml(cfg)}
    with quiet_flower(), run_folders.alone_in(folder), tracking.tracked(names, folder, shown) as track:
        first = _first_adapter(cfg, apart)
        cfg, answers = join(grid, cfg)
        chain, start = compose(cfg), first()
        if folder and apart:
            chain.audited.begin(folder / audit_log.FILE, str(context.run_id), audit_log.settings_digest(given))
        if cfg.model.lora.core:
            chain.rule.factors = models.cores.sketch(models.process.base_model(cfg)[0])
        origin = _origin(cfg, given)
        keep = partial(_keep, cfg, chain.rule, folder) if folder else None
        options = Options(_evaluation(cfg, chain.rule), keep, folder, progress, track)
        if folder:
            run_folders.check_room(folder, start)
            run_folders.check_origin(folder, origin)
        adapter, tables = federate(grid, cfg, start, options, chain=chain, answers=answers)
        rows = {"history": json.dumps(tables.history), "clients": json.dumps(tables.clients)}
        context.state["adapter"], context.state["tables"] = to_record(adapter), ConfigRecord(rows)
        context.state["edit"] = to_record(chain.rule.base.whole())
        if folder:
            with checkpoints.kept_or_said(folder, "the last adapter with its tables"):
                keep(adapter, "adapter")
                _write(folder, tables, origin)


def _first_adapter(cfg: DictConfig, apart: bool) -> Callable[[], Adapter]:
    """What gives the adapter to start from: where nodes are waited for, its model is loaded meanwhile."""
    if not apart:
        return lambda: models.process.first_adapter(cfg)
    pool = ThreadPoolExecutor(1, "model")
    loading = pool.submit(lambda: models.process.first_adapter(cfg))
    pool.shutdown(wait=False)
    return loading.result


def _origin(cfg: DictConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run comes from; who started it may know its cards."""
    seen = fingerprint(cfg, cards="cards" not in given and bool(cfg.federation.evaluate_every))
    return provenance(cfg, fingerprint={**seen, "cards": str(given.get("cards", seen["cards"]))})


def _write(folder: Path, tables: Tables, origin: dict[str, Any]) -> None:
    folders.write(folder / "history.csv", tables.history_frame().to_csv(index=False))
    folders.write(folder / "clients.csv", tables.clients_frame().to_csv(index=False))
    if len(scores := tables.scores_frame()):
        folders.write(folder / "scores.csv", scores.to_csv(index=False))
    folders.write(folder / run_folders.ORIGIN, json.dumps(origin, indent=1))


def _evaluation(cfg: DictConfig, rule: Rule) -> Callable[[Adapter], float] | None:
    """Nats per answer token on the server's held-out cards; None where it has none, or none are wanted.

    With FedSA-LoRA there is nothing to score: the server has no B. ``federation.fraction_evaluate`` asks hospitals.
    """
    test = data.load(cfg)[1] if cfg.federation.evaluate_every else []
    if rule.keeps:
        said = "the server has no B, so that it scores and saves no model; federation.fraction_evaluate asks hospitals"
        logger.warning("%s: %s, and their adapters stay in their state for the time of the run", rule.name, said)
        return None
    if not len(test):
        return None
    shown = test.select(range(min(len(test), cfg.federation.evaluate_cards or len(test))))

    def evaluate(adapter: Adapter) -> float:
        """Score an adapter."""
        model, tokenizer = models.process.base_model(cfg)
        models.set_adapter(model, adapter)
        with models.process.cpu_threads(cfg), models.editing.edited(model, rule.base.summed()):
            scores = evaluation.score_answers(model, tokenizer, shown, cfg)
        return float(scores.nll.sum() / scores.tokens.sum())

    return evaluate


def _keep(cfg: DictConfig, rule: Rule, folder: Path, adapter: Adapter, name: str) -> None:
    if rule.keeps:  # without what hospitals keep it would open as the untuned model
        return
    model, _ = models.process.base_model(cfg)
    if rule.base.edits:  # PEFT opens adapters, not edits: everything that was learned, as one adapter of a larger rank
        models.editing.save_update(model, learned(cfg, adapter, rule), folder / name)
        return
    models.set_adapter(model, adapter)
    models.save_adapter(model, folder / name)


def learned(cfg: DictConfig, adapter: Adapter, rule: Rule) -> Adapter:
    """Factors of everything that was learned, scale included: the adapter's product and all edits."""
    return factors.together([scaled(adapter, models.editing.scaling(cfg.model.lora)), *rule.base.edits.values()])


@memory.loaded_set_aside()
def federate(
    grid: Grid,
    cfg: DictConfig,
    adapter: Adapter,
    options: Options = Options(),
    *,
    chain: Chain | None = None,
    answers: Answers | None = None,
) -> tuple[Adapter, Tables]:
    """All rounds of a federation, from the first or from where an earlier process was ended.

    Args:
        grid: Flower's, or the one in this process.
        cfg: its ``federation`` and ``train`` sections are used.
        adapter: to start from.
        options: what is scored, kept and shown on the way.
        chain: of strategies; made from the configuration where there is none.
        answers: of nodes that have said which hospital they are, from :func:`fedllm_helpers.federation.nodes.join`.

    Returns:
        The last adapter, and the tables of rounds and of clients.

    Raises:
        TimeoutError: fewer than ``federation.num_clients`` hospitals connect.
        RuntimeError: no hospital sent a usable adapter, in the first round or in two running, or the strategy made
            nothing of them in two; the end of the first one's traceback is its note.
        ValueError: the folder holds a run with other settings, or ``federation.min_replies`` is more than are asked.
    """
    chain, plan = chain or compose(cfg), training.rounds(cfg)
    adapter, tables, done = _begin(grid, cfg, adapter, options, chain, len(plan))
    with bar(plan[done:], options.progress == "bar") as shown:
        run, seats = Federation(grid, cfg, chain, tables, shown), {}
        if done and "seconds" not in tables.history[-1]:
            _finish(run, options, plan[done - 1], adapter, time.perf_counter())
        for step in plan[done:]:
            names, answers, start = hospitals(grid, cfg, seats, answers), None, time.perf_counter()
            adapter, row = run_round(run, step, adapter, names)
            tables.history.append(row)
            _finish(run, options, step, adapter, start)
    return adapter, tables


def _finish(run: Federation, options: Options, step: training.Round, adapter: Adapter, start: float) -> None:
    """Score a round and keep it; before it is scored, too: what was opened need not be asked for again."""
    last, every = step.number == run.cfg.federation.num_rounds, run.cfg.federation.evaluate_every
    row = run.tables.history[-1]
    if options.evaluate and (last or step.number % every == 0):
        _save(run, options, step.number, adapter)
        row["nll"] = options.evaluate(adapter)
    row["seconds"] = time.perf_counter() - start
    if options.track:
        options.track(numbers(run.tables), step.number)
    if options.progress == "lines":
        print(report(row, run.cfg.federation.num_rounds), flush=True)
    if options.keep and step.saved:
        with checkpoints.kept_or_said(options.folder, f"the adapter of round {step.number}"):
            options.keep(adapter, f"adapters/round-{step.number:06d}")
    _save(run, options, step.number, adapter)


def _begin(
    grid: Grid, cfg: DictConfig, adapter: Adapter, options: Options, chain: Chain, total: int
) -> tuple[Adapter, Tables, int]:
    """The adapter to start from, the tables so far, and how many rounds are done."""
    chain.rule.begin(1, adapter)  # arrays that do not fit the rule are said before anyone is asked
    before = checkpoints.latest(options.folder, OmegaConf.to_container(cfg)) if options.folder else None
    if options.folder:
        resumed.note_attempts(options.folder, chain.top)
    if before is None:
        first = [{"round": 0, "nll": options.evaluate(adapter)}] if options.evaluate else []
        return adapter, Tables(first), 0
    resumed.given_back(before, chain.top, grid)
    if noise.promised(cfg):
        logger.warning("a round that was cut off is sent again: its privacy is paid for twice, and counted once")
    if options.progress:
        print(f"going on after round {before.number} of {total} from {options.folder}", flush=True)
    return before.adapter, Tables(before.history, before.clients), before.number


def _save(run: Federation, options: Options, number: int, adapter: Adapter) -> None:
    if options.folder:
        rows = (run.tables.history, run.tables.clients)
        kept = resumed.taken(number, adapter, run.chain.top, run.grid, rows)
        checkpoints.save(options.folder, OmegaConf.to_container(run.cfg), kept)
