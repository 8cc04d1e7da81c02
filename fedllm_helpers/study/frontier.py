"""The grid of quality against bytes: cores of many sizes, LoRA of small ranks, compressed messages. For 04 and 07."""

import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from fedllm_helpers import config, folders
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.study.arms import KEPT, pool, run_all, tuning_config
from fedllm_helpers.study.lab import ROUNDS, SETTINGS, card_rows, chosen, run_arm, search

LORA_RATE, CORE_RATE = 8e-3, 0.128
PARTITIONS = ("specialty", "iid")
SCALE = 4  # α / r, for every rank
ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
CORES, RANKS = (4, 8, 16, 32, 64), (1, 2, 4, 8, 16)


def _rank(size: int) -> str:
    return f"model.lora.peft_lora_r={size} model.lora.peft_lora_alpha={SCALE * size}"


# name: the settings that differ
KINDS: dict[str, str] = {f"LoRA r {r}": _rank(r) for r in RANKS}
KINDS |= {"LoRA r 1, all": f"{_rank(1)} model.lora.target_modules=[{ALL}]"}  # what cores on all layers compete with
KINDS |= {f"LoRA-XS r {r}": f"federation.aggregation=LoRA-XS {_rank(r)}" for r in CORES}
KINDS |= {f"LoRA-XS r {r}, all": f"{KINDS[f'LoRA-XS r {r}']} model.lora.target_modules=[{ALL}]" for r in CORES}
# name: the kind whose rate it takes, and what is changed beside
PACKED = {
    "LoRA r 16, int8": ("LoRA r 16", "federation.compression.up=int8"),
    "LoRA r 16, int4": ("LoRA r 16", "federation.compression.up=int4"),
    "LoRA r 16, top 10 % int4": ("LoRA r 16", "federation.compression.up=int4 federation.compression.keep=0.1"),
    "LoRA r 1, int4": ("LoRA r 1", "federation.compression.up=int4"),
    "LoRA-XS r 16, int4": ("LoRA-XS r 16", "federation.compression.up=int4"),
    "LoRA-XS r 64, int4": ("LoRA-XS r 64", "federation.compression.up=int4"),
}
ARMS = {name: (name, "") for name in KINDS} | PACKED
LONG = ("LoRA r 1", "LoRA r 16", "LoRA-XS r 16", "LoRA-XS r 64")
MANY = "federation.num_rounds=10 federation.evaluate_every=1 federation.evaluate_cards=48"  # by specialty


def guess(kind: str) -> float:
    """The rate with which the search for a kind's begins.

    Those of cores fall with their size, as each number of a larger core moves more; more layers want smaller ones.
    """
    (name, size), more = kind.split(",")[0].split(" r "), kind.endswith(", all")
    return (LORA_RATE if name == "LoRA" else CORE_RATE / int(size)) / (4 if more and name != "LoRA" else 1)


def settings(cfg: DictConfig, arm: str, seed: int = 0, where: str = PARTITIONS[0]) -> DictConfig:
    """The configuration of an arm, in a partition, or by specialty over :data:`MANY` rounds."""
    kind, more = ARMS[arm]
    more += f" {where}" if where == MANY else f" federation.partition={where}"
    return config.load(cfg, f"seed={seed}", *f"{KINDS[kind]} {more}".split())


def tune(cfg: DictConfig, workers: ProcessPoolExecutor) -> pd.DataFrame:
    """Rates of each kind, by held-out training cards of seed 0, by specialty: a table of :func:`lab.search`."""
    tuning = tuning_config(cfg, KEPT)
    return search(
        workers,
        lambda kind, rate: partial(run_arm, settings(tuning, kind), rate),
        {kind: guess(kind) for kind in KINDS},
    )


def frontier_grid(seeds: list[int], folder: Path, processes: int) -> None:
    """Tune each kind, run :data:`ARMS` over partitions and seeds, and write tables and their provenance.

    It takes hours. Tables are written after each of its four parts, and a part that they hold is not done again.

    Args:
        seeds: of split, start and order.
        folder: for ``frontier_rates.csv``, ``frontier_cards.csv`` (a row per partition, seed and held-out card, summed
            nats by arm), ``frontier_bytes.csv`` (a row per partition, arm, seed and hospital), ``frontier_rounds.csv``
            (of the arms with many rounds: a row per arm, seed and round, with bytes of all hospitals) and
            ``frontier.json``.
        processes: that train at the same time.

    Raises:
        ValueError: tables there are of other cards, seeds or another model.
    """
    cfg = config.load("cpu", "federation.threads=1", *SETTINGS)
    done = _done(folder, fingerprint(cfg, seeds=seeds))
    with pool(processes) as workers:
        for part in ("rates", PARTITIONS[0], MANY, PARTITIONS[1]):
            start = time.perf_counter()
            if part in done:
                continue
            if part == "rates":
                folders.write(folder / "frontier_rates.csv", tune(cfg, workers).to_csv(index=False))
            rates = chosen(pd.read_csv(folder / "frontier_rates.csv"))
            if part != "rates":
                arms = itertools.product(LONG if part == MANY else ARMS, seeds)
                jobs = {key: partial(run_arm, settings(cfg, *key, part), rates[ARMS[key[0]][0]]) for key in arms}
                write(folder, cfg, part, dict(run_all(workers, jobs, part.split()[0])))
            done[part] = round(time.perf_counter() - start)
            more: dict[str, Any] = {"seeds": seeds, "seconds": done, "learning_rates": rates}
            more["arms"] = {arm: f"{KINDS[kind]} {changes}".strip() for arm, (kind, changes) in ARMS.items()}
            more["many_rounds"] = {"arms": list(LONG), "settings": MANY}
            more["fingerprint"] = fingerprint(cfg, seeds=seeds)
            folders.write(folder / "frontier.json", json.dumps(provenance(cfg, **more), indent=1) + "\n")


def _done(folder: Path, here: dict[str, str]) -> dict[str, int]:
    path = folder / "frontier.json"
    if not path.is_file():
        return {}
    origin = json.loads(path.read_text(encoding="utf-8"))
    if origin["fingerprint"] != here:
        raise ValueError(f"{path}: it is of other cards, seeds or another model; take another --folder")
    return origin["seconds"]


def write(folder: Path, cfg: DictConfig, part: str, found: dict) -> None:
    """Add a partition to the tables of cards and bytes, or write the table of rounds.

    Args:
        folder: of the results.
        cfg: of the grid.
        part: the partition, or :data:`MANY`.
        found: results of :func:`fedllm_helpers.study.lab.run_arm` by (arm, seed).
    """
    if part == MANY:
        tables = [
            pd.DataFrame(one["rounds"], columns=ROUNDS).assign(arm=arm, seed=seed) for (arm, seed), one in found.items()
        ]
        table = pd.concat(tables).astype({"round": int, "bytes_up": int, "bytes_down": int})
        order = ["arm", "seed", "round", "nll", "bytes_up", "bytes_down"]
        folders.write(folder / "frontier_rounds.csv", table[order].sort_values(order).round(4).to_csv(index=False))
        return
    cards = []
    for seed in sorted({seed for _, seed in found}):
        some = {arm: found[arm, seed] for arm in ARMS}
        cards.append(card_rows(config.load(cfg, f"seed={seed}"), some).assign(partition=part))
    _add(folder / "frontier_cards.csv", pd.concat(cards))
    rows = [
        (part, arm, seed, hospital, int(up), int(down))
        for (arm, seed), one in found.items()
        for hospital, (up, down) in enumerate(zip(one["up"], one["down"], strict=True))
    ]
    table = pd.DataFrame(rows, columns=["partition", "arm", "seed", "hospital", "bytes_up", "bytes_down"])
    _add(folder / "frontier_bytes.csv", table.sort_values(list(table)))


def _add(path: Path, table: pd.DataFrame) -> None:
    before = pd.read_csv(path) if path.is_file() else table
    others = before[~before["partition"].isin(table["partition"])]
    folders.write(path, pd.concat([others, table]).to_csv(index=False))
