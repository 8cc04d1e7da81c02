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
from fedllm_helpers.study.lab import ROUNDS, SETTINGS, card_rows, run_arm

LORA_RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
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
MANY = "federation.num_rounds=12 federation.evaluate_every=1 federation.evaluate_cards=48"  # by specialty


def rates_of(kind: str) -> tuple[float, ...]:
    """The rates tried for a kind, among which the best is not the least and not the largest.

    Those of cores fall with their size, as each number of a larger core moves more; more layers want smaller ones.
    """
    (name, size), parts = kind.split(",")[0].split(" r "), (0.25, 0.5, 1, 2)
    if kind.endswith(", all"):
        parts = (0.125, *parts)
    return LORA_RATES if name == "LoRA" else tuple(part * 0.128 / int(size) for part in parts)


def settings(cfg: DictConfig, arm: str, seed: int = 0, where: str = PARTITIONS[0]) -> DictConfig:
    """The configuration of an arm, in a partition, or by specialty over :data:`MANY` rounds."""
    kind, more = ARMS[arm]
    more += f" {where}" if where == MANY else f" federation.partition={where}"
    return config.load(cfg, f"seed={seed}", *f"{KINDS[kind]} {more}".split())


def tune(cfg: DictConfig, workers: ProcessPoolExecutor, path: Path) -> dict[str, float]:
    """The best of :func:`rates_of` each kind, by held-out training cards of seed 0, by specialty."""
    tuning = tuning_config(cfg, KEPT)
    keys = [(kind, rate) for kind in KINDS for rate in rates_of(kind)]
    jobs = {(kind, rate): partial(run_arm, settings(tuning, kind), rate) for kind, rate in keys}
    rows = [
        (kind, rate, found["nll"].sum() / found["tokens"].sum(), len(found["nll"]))
        for (kind, rate), found in run_all(workers, jobs, "rates")
    ]
    table = pd.DataFrame(rows, columns=["kind", "learning_rate", "nll", "n"]).sort_values(["kind", "learning_rate"])
    folders.write(path, table.round(4).to_csv(index=False))
    return table.loc[table.groupby("kind")["nll"].idxmin()].set_index("kind")["learning_rate"].to_dict()


def frontier_grid(seeds: list[int], folder: Path, processes: int) -> None:
    """Tune each kind, run :data:`ARMS` over partitions and seeds, and write four tables and their provenance.

    Args:
        seeds: of split, start and order.
        folder: for ``frontier_cards.csv`` (a row per partition, seed and held-out card, summed nats by arm),
            ``frontier_bytes.csv`` (a row per partition, arm, seed and hospital), ``frontier_rounds.csv`` (of the arms
            with many rounds: a row per arm, seed and round, with bytes of all hospitals), ``frontier_rates.csv`` and
            ``frontier.json``.
        processes: that train at the same time.
    """
    cfg, start = config.load("cpu", "federation.threads=1", *SETTINGS), time.perf_counter()
    with pool(processes) as workers:
        rates = tune(cfg, workers, folder / "frontier_rates.csv")
        arms, long = list(itertools.product(ARMS, seeds)), list(itertools.product(LONG, seeds))
        keys = [(*key, PARTITIONS[0]) for key in arms] + [(*key, MANY) for key in long]
        keys += [(*key, PARTITIONS[1]) for key in arms]
        jobs = {key: partial(run_arm, settings(cfg, *key), rates[ARMS[key[0]][0]]) for key in keys}
        found = dict(run_all(workers, jobs, "arms"))
    write(folder, cfg, seeds, found)
    more: dict[str, Any] = {"seeds": seeds, "seconds": round(time.perf_counter() - start), "learning_rates": rates}
    more["arms"] = {arm: f"{KINDS[kind]} {changes}".strip() for arm, (kind, changes) in ARMS.items()}
    more |= {"many_rounds": {"arms": list(LONG), "settings": MANY}, "fingerprint": fingerprint(cfg, seeds=seeds)}
    folders.write(folder / "frontier.json", json.dumps(provenance(cfg, **more), indent=1) + "\n")


def write(folder: Path, cfg: DictConfig, seeds: list[int], found: dict) -> None:
    """The tables of cards, bytes and rounds.

    Args:
        folder: of the results.
        cfg: of the grid.
        seeds: of it.
        found: results of :func:`fedllm_helpers.study.lab.run_arm` by (arm, seed, partition or :data:`MANY`).
    """
    cards = []
    for partition, seed in itertools.product(PARTITIONS, seeds):
        some = {arm: found[arm, seed, partition] for arm in ARMS}
        cards.append(card_rows(config.load(cfg, f"seed={seed}"), some).assign(partition=partition))
    folders.write(folder / "frontier_cards.csv", pd.concat(cards).to_csv(index=False))
    rows = [
        (partition, arm, seed, hospital, int(up), int(down))
        for (arm, seed, partition), one in found.items()
        if partition != MANY
        for hospital, (up, down) in enumerate(zip(one["up"], one["down"], strict=True))
    ]
    table = pd.DataFrame(rows, columns=["partition", "arm", "seed", "hospital", "bytes_up", "bytes_down"])
    folders.write(folder / "frontier_bytes.csv", table.sort_values(list(table)).to_csv(index=False))
    parts = [
        pd.DataFrame(one["rounds"], columns=ROUNDS).assign(arm=arm, seed=seed)
        for (arm, seed, where), one in found.items()
        if where == MANY
    ]
    table = pd.concat(parts).astype({"round": int, "bytes_up": int, "bytes_down": int})
    order = ["arm", "seed", "round", "nll", "bytes_up", "bytes_down"]
    folders.write(folder / "frontier_rounds.csv", table[order].sort_values(order).round(4).to_csv(index=False))
