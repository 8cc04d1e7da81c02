"""The grids behind ``notebooks/results``: what takes too long for a notebook, with its provenance beside it.

``python -m fedllm_helpers.experiments federated`` compares the arms of notebook 03 over several seeds. Each kind of arm
has its own learning rate, chosen on training cards of seed 0 (some are test cards of other seeds): one for federations,
and in each comparison one for pooled data, one for a lone hospital and one for a tenth of the cards. ``… analysis``
takes those rates and scores the arms of notebook 07: the headline, other partitions and schedules, and compressed
messages. ``… aggregation`` runs the rules of notebook 04, ``… frontier`` cores and small ranks beside compressed
messages, ``… privacy`` attacks the arms of notebooks 05a and 05b, ``… views`` single updates, ``… words`` reads words
out of them, and ``… crowd`` puts noise on the mean of up to 128 hospitals. ``--quick`` is a small grid of two minutes.

What is done is not done again: each arm leaves its scores in ``build/experiments``, and tables are written there after
each one. Those scores are read back for the same settings, cards and versions of packages: after a change of code,
empty that folder.
"""

import argparse
import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from fedllm_helpers import config, data, folders
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.study.arms import KEPT, finished, pool, run_all, score_arm, tuning_config
from fedllm_helpers.study.audits import privacy_grid
from fedllm_helpers.study.control import control_grid
from fedllm_helpers.study.crowd import crowd_grid
from fedllm_helpers.study.frontier import frontier_grid
from fedllm_helpers.study.lab import lab_grid
from fedllm_helpers.study.results import origin_of, publish, same_origin, write
from fedllm_helpers.study.views import views_grid
from fedllm_helpers.study.words import words_grid

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
FEW_RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)  # where few cards are seen often
FEW = ("same examples/one hospital/0", "same examples/tenth")
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
    "int4 up, int8 down": (SPECIALTY, "federation.compression.up=int4 federation.compression.down=int8"),
    "8 rounds of 4 steps": (SPECIALTY, "federation.num_rounds=8 federation.training_arguments.max_steps=4"),
    "half of the hospitals": (SPECIALTY, "federation.num_rounds=8 federation.fraction_train=0.5"),
    "dirichlet": ("federated/dirichlet", ""),
    "top 10 % int4, no feedback": (
        SPECIALTY,
        "federation.compression.up=int4 federation.compression.keep=0.1 federation.compression.error_feedback=false",
    ),
    "top 10 %": (SPECIALTY, "federation.compression.keep=0.1"),
    "fp16": (SPECIALTY, "federation.compression.up=fp16 federation.compression.down=fp16"),
    "iid": ("federated/iid", ""),
}
QUICK = ("federated", "untuned", "pooled 100 %", "pooled 10 %", "one hospital, first", "int4")
SMALL = ["dataset.max_cards_per_specialty=30", "federation.num_rounds=2", "federation.training_arguments.max_steps=2"]


def arms(hospitals: int = HOSPITALS) -> list[str]:
    """Names of the arms of the federated grid: ``comparison/arm`` or ``comparison/arm/hospital``."""
    alone = [f"same {what}/one hospital/{h}" for what in ("work", "examples") for h in range(hospitals)]
    return ["untuned", SPECIALTY, "federated/iid", "same work/pooled", "same examples/pooled", *alone]


def tune(cfg: DictConfig, workers: ProcessPoolExecutor, path: Path) -> dict[str, float]:
    """The best of :data:`RATES` for each kind of arm, by held-out training cards of one seed."""
    kinds = ["federated/specialty", "same work/pooled", "same examples/pooled"]
    kinds += ["same work/one hospital/0", "same work/one hospital/3"]  # for all six
    tuning, tried = tuning_config(cfg, KEPT), [*itertools.product(kinds, RATES), *itertools.product(FEW, FEW_RATES)]
    jobs = {(arm, rate): partial(score_arm, tuning, arm, rate) for arm, rate in tried}
    rows = [
        {
            "arm": _kind(arm),
            "learning_rate": rate,
            "nll": result.scores.nll.sum() / result.scores.tokens.sum(),
            "n": len(result.scores.nll),
        }
        for (arm, rate), result in run_all(workers, jobs, "tuning")
    ]
    table = pd.DataFrame(rows).groupby(["arm", "learning_rate"], as_index=False).mean()
    folders.write(path, table.round(4).to_csv(index=False))
    best = table.loc[table.groupby("arm")["nll"].idxmin()].set_index("arm")["learning_rate"].to_dict()
    for arm, rate in best.items():
        if rate in (min(FEW_RATES if f"{arm}/0" in FEW or arm in FEW else RATES), max(RATES)):
            print(f"{arm}: the best rate, {rate}, is at the edge of those tried")
    return best


def federated(seeds: list[int], folder: Path, processes: int) -> None:
    """Tune, train and score every arm; write one row per seed and test card, a column per arm (summed nats)."""
    cfg, start = config.load("cpu", "federation.threads=1"), time.perf_counter()
    rates_path, cards_path = folder / "federated_rates.csv", folder / "federated_cards.csv"
    with pool(processes) as workers:
        rates = tune(cfg, workers, rates_path)
        rates["federated/iid"], rates["untuned"] = rates["federated/specialty"], 0.0
        seeded = {seed: config.load(cfg, f"seed={seed}") for seed in seeds}
        jobs = {
            (seed, arm): partial(score_arm, seeded[seed], arm, rates[_kind(arm)])
            for seed, arm in itertools.product(seeds, arms())
        }
        results = dict(run_all(workers, jobs, "arms"))
    tables = []
    for seed, settings in seeded.items():
        test = data.load(settings)[1].select_columns(["card_id", "specialty"]).to_pandas()
        table = test.assign(seed=seed, tokens=results[seed, "untuned"].scores.tokens)
        tables.append(table.assign(**{arm: results[seed, arm].scores.nll.round(3) for arm in arms()}))
    folders.write(cards_path, pd.concat(tables).to_csv(index=False))
    more = {"seeds": seeds, "seconds": round(time.perf_counter() - start), "learning_rates": rates}
    origin = provenance(cfg, **more, fingerprint=fingerprint(cfg, seeds=seeds))
    folders.write(folder / "federated.json", json.dumps(origin, indent=1) + "\n")


def analysis(seeds: list[int], folder: Path, processes: int, names: list[str], quick: bool = False) -> None:
    """Score the arms of notebook 07; after each, write the tables into ``build/experiments``, and all at the end.

    The rates are those that the federated grid chose. The two lone hospitals are others in each of three seeds.

    Args:
        seeds: of split, start and order.
        folder: of the results; it holds ``federated.json``. Its tables are replaced by tables with no row less.
        processes: that train at the same time.
        names: of :data:`ANALYSIS`, those to run; finished ones of the others are in the tables, too.
        quick: few cards and rounds; the tables stay in ``build/experiments``.
    """
    start, chosen = time.perf_counter(), origin_of(folder / "federated.json")
    same_origin(folder / "federated.json", chosen)
    cfg, rates = config.load("cpu", "federation.threads=1", *(SMALL if quick else [])), chosen["learning_rates"]
    rates["federated/dirichlet"] = rates[SPECIALTY]
    jobs, done, used, order = {}, {}, {}, list(itertools.product(ANALYSIS, seeds))
    for name, seed in order:
        arm, changes = ANALYSIS[name]
        used[name, seed] = rates[_kind(arm)]
        if arm.endswith("one hospital"):
            arm += f"/{(2 * seed + name.endswith('second')) % HOSPITALS}"
        given = (config.load(cfg, f"seed={seed}", *changes.split()), arm, used[name, seed], name in HEADLINE)
        before = finished(*given)
        if before:
            done[name, seed] = before
        elif name in names:
            jobs[name, seed] = partial(score_arm, *given)
    stem = KEPT / ("quick" if quick else "analysis")
    with pool(processes) as workers:
        for key, result in itertools.chain(list(done.items())[:1], run_all(workers, jobs, "arms")):
            done[key] = result
            seconds = round(time.perf_counter() - start)
            write(stem, cfg, [key for key in order if key in done], done, used, seeds=seeds, seconds=seconds)
    if not quick:
        publish(stem, folder / stem.name)


GRIDS = {
    "federated": federated,
    "aggregation": lab_grid,
    "frontier": frontier_grid,
    "privacy": privacy_grid,
    "views": views_grid,
    "words": words_grid,
    "crowd": crowd_grid,
    "control": control_grid,
}


def _named(arms: dict) -> str:
    return ", ".join(arms).replace("%", "%%")  # which argparse reads as a place for a value


def _kind(arm: str) -> str:
    return "/".join(arm.split("/")[:2])


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    unknown = sorted(set(arguments.arms or ()) - set(ANALYSIS))
    if unknown:
        parser.error(f"unknown arm {unknown[0]!r}: known are {', '.join(ANALYSIS)}")
    if arguments.processes < 1:
        parser.error(f"--processes {arguments.processes}: allowed are whole numbers from 1")
    if min(arguments.seeds) < 0 or len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error(f"--seeds {' '.join(map(str, arguments.seeds))}: allowed are different whole numbers from 0")
    if arguments.grid != "analysis" and (arguments.arms or arguments.quick):
        parser.error(f"--arms and --quick belong to analysis, and {arguments.grid} runs all of its arms")
    if arguments.folder.is_file():
        parser.error(f"--folder {arguments.folder}: it is a file; expected a folder")
    if arguments.grid == "analysis" and not (arguments.folder / "federated.json").is_file():
        parser.error(f"--folder {arguments.folder}: it has no federated.json; the grid 'federated' makes it")


def main() -> None:
    """Command line of the grids."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("grid", choices=["analysis", *GRIDS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("notebooks/results"))
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"of analysis: {_named(ANALYSIS)}")
    parser.add_argument(
        "--quick", action="store_true", help="analysis only: few cards, one seed, two minutes, into build"
    )
    arguments = parser.parse_args()
    _check(parser, arguments)
    try:
        _run(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _run(arguments: argparse.Namespace) -> None:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.grid == "analysis":
        seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
        names = arguments.arms or list(QUICK if arguments.quick else ANALYSIS)
        analysis(seeds, arguments.folder, arguments.processes, names, arguments.quick)
    else:
        GRIDS[arguments.grid](arguments.seeds, arguments.folder, arguments.processes)


if __name__ == "__main__":
    main()
