"""The grids behind ``notebooks/results``: what takes too long for a notebook, with its provenance beside it.

``python -m fedllm_helpers.experiments federated`` compares the arms of notebook 03 over several seeds. Each kind of arm
has its own learning rate, chosen on cards of the training part, never on test cards: one for federations, and in each
comparison one for pooled data and one for a lone hospital. ``… analysis`` takes those rates and scores the arms of
notebook 07: the headline, other partitions and schedules, and compressed messages. ``--quick`` is a small grid of two
minutes. What is done is not done again: each arm leaves its scores in ``build/experiments``, and the tables are
written after each one.
"""

import argparse
import itertools
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from fedllm_helpers import config, data
from fedllm_helpers.arms import KEPT, Result, score_arm
from fedllm_helpers.provenance import provenance

logger = logging.getLogger(__name__)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
HOSPITALS = 6
SPECIALTY = "federated/specialty"
# name: what is trained, and the settings that differ; those of the headline answer multiple-choice questions, too
HEADLINE = {
    "federated": (SPECIALTY, ""),
    "untuned": ("untuned", ""),
    "pooled 100 %": ("same examples/pooled", ""),
    "pooled 10 %": ("same examples/tenth", ""),
    "one hospital, first": ("same examples/one hospital", ""),
    "one hospital, second": ("same examples/one hospital", ""),
}
ANALYSIS = HEADLINE | {
    "int8": (SPECIALTY, "federation.compression.up=int8"),
    "int4": (SPECIALTY, "federation.compression.up=int4"),
    "top 10 % int4": (SPECIALTY, "federation.compression.up=int4 federation.compression.keep=0.1"),
    "top 1 % int8": (SPECIALTY, "federation.compression.up=int8 federation.compression.keep=0.01"),
    "int4, no feedback": (SPECIALTY, "federation.compression.up=int4 federation.compression.error_feedback=false"),
    "top 10 %": (SPECIALTY, "federation.compression.keep=0.1"),
    "top 10 % int4, no feedback": (
        SPECIALTY,
        "federation.compression.up=int4 federation.compression.keep=0.1 federation.compression.error_feedback=false",
    ),
    "int4 up, int8 down": (SPECIALTY, "federation.compression.up=int4 federation.compression.down=int8"),
    "dirichlet": ("federated/dirichlet", ""),
    "8 rounds of 4 steps": (SPECIALTY, "federation.num_rounds=8 federation.training_arguments.max_steps=4"),
    "half of the hospitals": (SPECIALTY, "federation.num_rounds=8 federation.fraction_train=0.5"),
    "fp16": (SPECIALTY, "federation.compression.up=fp16 federation.compression.down=fp16"),
    "iid": ("federated/iid", ""),
}
QUICK = ("federated", "untuned", "pooled 100 %", "pooled 10 %", "one hospital, first", "int4")
SMALL = ["dataset.max_cards_per_specialty=30", "federation.num_rounds=2", "federation.training_arguments.max_steps=2"]
RESULTS = ["arm", "seed", "learning_rate", "nll", "cards", "choice", "bytes_up", "bytes_down", "seconds"]


def arms(hospitals: int = HOSPITALS) -> list[str]:
    """Names of the arms of the federated grid: ``comparison/arm`` or ``comparison/arm/hospital``."""
    alone = [f"same {what}/one hospital/{h}" for what in ("work", "examples") for h in range(hospitals)]
    return ["untuned", SPECIALTY, "federated/iid", "same work/pooled", "same examples/pooled", *alone]


def tuning_config(cfg: DictConfig, folder: Path) -> DictConfig:
    """The same federation on its training cards alone, a tenth of them held out: no test card is in it."""
    path = folder / "training_cards.json"
    path.write_text(json.dumps(data.load(cfg)[0].to_list()), encoding="utf-8")
    whole = ["dataset.specialties=null", "dataset.max_cards_per_specialty=null", "train.evaluate_split=0.1"]
    return config.load(cfg, f"dataset.name={path}", *whole)


def tune(cfg: DictConfig, pool: ProcessPoolExecutor, path: Path) -> dict[str, float]:
    """The best of :data:`RATES` for each kind of arm, by held-out training cards of one seed."""
    kinds = ["federated/specialty", "same work/pooled", "same examples/pooled"]
    kinds += ["same work/one hospital/0", "same work/one hospital/3", "same examples/one hospital/0"]  # for all six
    KEPT.mkdir(parents=True, exist_ok=True)
    tuning = tuning_config(cfg, KEPT)
    jobs = {(arm, rate): partial(score_arm, tuning, arm, rate) for arm, rate in itertools.product(kinds, RATES)}
    rows = [
        {
            "arm": _kind(arm),
            "learning_rate": rate,
            "nll": result.scores.nll.sum() / result.scores.tokens.sum(),
            "n": len(result.scores.nll),
        }
        for (arm, rate), result in _run(pool, jobs, "tuning")
    ]
    table = pd.DataFrame(rows).groupby(["arm", "learning_rate"], as_index=False).mean()
    table.round(4).to_csv(path, index=False)
    best = table.loc[table.groupby("arm")["nll"].idxmin()].set_index("arm")["learning_rate"].to_dict()
    for arm, rate in best.items():
        if rate in (min(RATES), max(RATES)):
            print(f"{arm}: the best rate, {rate}, is at the edge of those tried")
    return best


def federated(seeds: list[int], folder: Path, processes: int) -> None:
    """Tune, train and score every arm; write one row per seed and test card, a column per arm (summed nats)."""
    cfg, start = config.load("cpu", "federation.threads=1"), time.perf_counter()
    rates_path, cards_path = folder / "federated_rates.csv", folder / "federated_cards.csv"
    with _pool(processes) as pool:
        rates = tune(cfg, pool, rates_path)
        rates["federated/iid"], rates["untuned"] = rates["federated/specialty"], 0.0
        seeded = {seed: config.load(cfg, f"seed={seed}") for seed in seeds}
        jobs = {
            (seed, arm): partial(score_arm, seeded[seed], arm, rates[_kind(arm)])
            for seed, arm in itertools.product(seeds, arms())
        }
        results = dict(_run(pool, jobs, "arms"))
    tables = []
    for seed, settings in seeded.items():
        test = data.load(settings)[1].select_columns(["card_id", "specialty"]).to_pandas()
        table = test.assign(seed=seed, tokens=results[seed, "untuned"].scores.tokens)
        tables.append(table.assign(**{arm: results[seed, arm].scores.nll.round(3) for arm in arms()}))
    pd.concat(tables).to_csv(cards_path, index=False)
    origin = provenance(cfg, seeds=seeds, seconds=round(time.perf_counter() - start), learning_rates=rates)
    (folder / "federated.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _kind(arm: str) -> str:
    return "/".join(arm.split("/")[:2])


def analysis(seeds: list[int], folder: Path, processes: int, quick: bool = False) -> None:
    """Score the arms of notebook 07; after each, write one row per arm and seed, and one per seed and test card.

    The rates are those that the federated grid chose. A tenth of the pooled cards takes the rate of a lone hospital:
    about as many cards, seen about as often. The two lone hospitals of a seed are others in each of three seeds.
    """
    start, chosen = time.perf_counter(), json.loads((folder / "federated.json").read_text(encoding="utf-8"))
    cfg, rates = config.load("cpu", "federation.threads=1", *(SMALL if quick else [])), chosen["learning_rates"]
    rates["same examples/tenth"], rates["federated/dirichlet"] = rates["same examples/one hospital"], rates[SPECIALTY]
    jobs, used = {}, {}
    for (name, (arm, changes)), seed in itertools.product(ANALYSIS.items(), seeds):
        if quick and name not in QUICK:
            continue
        used[name, seed] = rates[_kind(arm)]
        if arm.endswith("one hospital"):
            arm += f"/{(2 * seed + name.endswith('second')) % HOSPITALS}"
        settings = config.load(cfg, f"seed={seed}", *changes.split())
        jobs[name, seed] = partial(score_arm, settings, arm, used[name, seed], name in HEADLINE)
    stem, done = KEPT / "quick" if quick else folder / "analysis", {}
    with _pool(processes) as pool:
        for (name, seed), result in _run(pool, jobs, "arms"):
            done[name, seed] = result
            seconds = round(time.perf_counter() - start)
            _write(stem, cfg, [key for key in jobs if key in done], done, used, seeds=seeds, seconds=seconds)


def _write(stem: Path, cfg: DictConfig, keys: list, done: dict[tuple, Result], rates: dict, **more: Any) -> None:
    rows, cards = [], []
    for name, seed in keys:
        result = done[name, seed]
        nll = result.scores.nll.sum() / result.scores.tokens.sum()
        choice = round(float(result.right.mean()), 4) if len(result.right) else float("nan")
        row = (name, seed, rates[name, seed], round(float(nll), 4), len(result.scores.nll), choice)
        rows.append((*row, result.bytes_up, result.bytes_down, round(result.seconds, 1)))
    for seed in sorted({seed for _, seed in keys}):
        of_seed = {name: done[name, other] for name, other in keys if other == seed}
        test = data.load(config.load(cfg, f"seed={seed}"))[1].select_columns(["card_id", "specialty"]).to_pandas()
        test = test.assign(seed=seed, tokens=next(iter(of_seed.values())).scores.tokens)
        test = test.assign(**{name: result.scores.nll.round(3) for name, result in of_seed.items()})
        asked = {f"right: {name}": result.right.astype(int) for name, result in of_seed.items() if len(result.right)}
        cards.append(test.assign(**asked))
    _put(stem.with_suffix(".csv"), pd.DataFrame(rows, columns=RESULTS).to_csv(index=False))
    _put(stem.with_name(f"{stem.name}_cards.csv"), pd.concat(cards).to_csv(index=False))
    _put(stem.with_suffix(".json"), json.dumps(provenance(cfg, **more), indent=1) + "\n")


def _put(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read_results(path: Path, columns: Iterable[str] = RESULTS) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A stored table and its provenance, the ``.json`` of the same stem.

    Args:
        path: of the ``.csv``.
        columns: that it must have; ``choice`` alone may have gaps.

    Raises:
        FileNotFoundError: there is no such table, or no provenance.
        ValueError: a column is missing, or a value is.
    """
    beside = path.with_name(path.stem.removesuffix("_cards") + ".json")
    for file in (path, beside):
        if not file.is_file():
            raise FileNotFoundError(f"no results at {file}: make them with python -m fedllm_helpers.experiments")
    table, origin = pd.read_csv(path), json.loads(beside.read_text(encoding="utf-8"))
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}: make it again with this version of the package")
    gaps = table[list(columns)].drop(columns="choice", errors="ignore").isna()
    if gaps.any(axis=None):
        column = gaps.any().idxmax()
        line = gaps[column].idxmax() + 2
        raise ValueError(f"{path}, line {line}: {column!r} has no value; the grid goes on where it was interrupted")
    here = provenance(config.load("cpu"))["versions"]
    other = [
        f"{name} {there} there, {here.get(name)} here"
        for name, there in origin["versions"].items()
        if there != here.get(name)
    ]
    if other:
        logger.warning("%s was made with other versions: %s", path, "; ".join(other))
    return table, origin


def _pool(processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,))


def _kind(arm: str) -> str:
    return "/".join(arm.split("/")[:2])


def _run(pool: ProcessPoolExecutor, jobs: dict, description: str) -> Iterator[tuple[tuple, Result]]:
    """(name, result) of the jobs as they finish."""
    waiting = {pool.submit(job): name for name, job in jobs.items()}
    try:
        for future in tqdm(as_completed(waiting), total=len(jobs), desc=description, file=sys.stdout):
            yield waiting[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def main() -> None:
    """Command line of the grids."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("grid", choices=["federated", "analysis"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("notebooks/results"))
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument("--quick", action="store_true", help="analysis only: few cards, one seed, two minutes, into build")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.grid == "analysis":
        seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
        analysis(seeds, arguments.folder, arguments.processes, arguments.quick)
    else:
        federated(arguments.seeds, arguments.folder, arguments.processes)


if __name__ == "__main__":
    main()
