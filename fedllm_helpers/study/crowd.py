"""How many hospitals does noise on the average need? One round of a crowd, and what clip and noise leave of its mean.

Each hospital trains once, from the start, on cards of its own. What the first 4, 16, 64 and 128 of them would have made
together follows from their updates, for any clipping norm and any noise.
"""

import itertools
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from flwr.app import ConfigRecord, Message, RecordDict
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import config, data, folders, models
from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.screening import complaint
from fedllm_helpers.evaluation import score_answers
from fedllm_helpers.federation import client_app
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.grids import in_process
from fedllm_helpers.models.process import base_model, first_adapter
from fedllm_helpers.privacy import accounting, noise
from fedllm_helpers.study.arms import KEPT, keep, kept, key_of, pool, run_all
from fedllm_helpers.study.frontier import KINDS

# 24 cards for each of 128 hospitals, alike in kind, and one round of six steps
SETTINGS = [
    "dataset.max_cards_per_specialty=700",
    "train.evaluate_split=0.05",
    "federation.partition=iid",
    "federation.num_clients=128",
    "federation.num_rounds=1",
    "federation.training_arguments.max_steps=6",
    "federation.training_arguments.per_device_train_batch_size=4",
]
RATES = {"LoRA r 16": 8e-3, "LoRA-XS r 16": 8e-3, "LoRA-XS r 4": 3.2e-2}  # of KINDS: those that study.frontier found
SIZES = (4, 16, 64, 128)
PARTS = (0.1, 0.3, 1.0)  # clipping norms, in parts of the median norm of the updates
EPSILON, DELTA = 8.0, 1e-3  # of one hospital's update, below 1 / 128


def multiplier() -> float:
    """The noise multiplier with which one round, in which all take part, has :data:`EPSILON` at :data:`DELTA`."""
    return accounting.noise_for(EPSILON, 1.0, 1, DELTA)


def columns() -> list[tuple[int, float, bool]]:
    """(hospitals, part of the median norm or 0 for no clip, whether with noise) of each mean that is scored."""
    return [(n, 0.0, False) for n in SIZES] + [(n, part, True) for n, part in itertools.product(SIZES, PARTS)]


def name_of(size: int, part: float, noisy: bool) -> str:
    """How the table calls a mean."""
    return f"{size} hospitals, clip {part:g} and noise" if noisy else f"{size} hospitals"


def updates(cfg: DictConfig, rate: float) -> list[Adapter]:
    """What each hospital sends in round 1, less what it got.

    Raises:
        RuntimeError: the training of one failed.
    """
    start, given, found = first_adapter(cfg), {"config": OmegaConf.to_yaml(cfg)}, []
    content = RecordDict({"arrays": to_record(start), "config": ConfigRecord({"server-round": 1, "lr": rate})})
    with in_process.InProcessGrid(client_app.app, cfg.federation.num_clients, given) as grid:
        for reply in grid.send_and_receive(Message(content, node, "train") for node in grid.get_node_ids()):
            if reply.has_error():
                raise RuntimeError(f"a hospital failed: {complaint(reply)}")
            sent = from_record(reply.content["arrays"])
            found.append({key: sent[key] - start[key] for key in start})
    return found


def averaged(some: list[Adapter], clipping_norm: float | None, generator: np.random.Generator | None) -> Adapter:
    """The mean of clipped updates, with noise at :func:`multiplier` where there is a generator."""
    clipped = some if clipping_norm is None else [noise.clip(update, clipping_norm) for update in some]
    mean = {key: np.mean([update[key] for update in clipped], axis=0, dtype=np.float64) for key in some[0]}
    if generator is not None:
        mean = noise.noisy(mean, clipping_norm / len(some), multiplier(), generator)
    return {key: value.astype(np.float32) for key, value in mean.items()}


def run_kind(cfg: DictConfig, kind: str, folder: Path = KEPT) -> dict[str, np.ndarray]:
    """Train a crowd and score its means; what an earlier call found is read back.

    Returns:
        ``nll``, an array of means (the untuned adapter first, then :func:`columns`) × cards; ``tokens`` per card;
        ``norms`` of the updates; ``values`` of one; ``seconds`` of training.
    """
    cfg = config.load(cfg, *KINDS[kind].split())
    cards = [part.to_list() for part in data.load(cfg)]
    path = folder / f"crowd-{key_of(cfg, RATES[kind], SIZES, PARTS, EPSILON, DELTA, cards)}.npz"
    if (found := kept(path)) is None:
        begin = time.perf_counter()
        some, start, (model, tokenizer) = updates(cfg, RATES[kind]), first_adapter(cfg), base_model(cfg)
        seconds, norms = time.perf_counter() - begin, np.array([noise.norm(update) for update in some])
        scored = []
        for size, part, noisy in [(0, 0.0, False), *columns()]:
            generator = np.random.default_rng([cfg.seed, size, int(100 * part)]) if noisy else None
            mean = averaged(some[:size], np.median(norms) * part if noisy else None, generator) if size else {}
            models.set_adapter(model, {key: value + mean.get(key, 0) for key, value in start.items()})
            scored.append(score_answers(model, tokenizer, data.load(cfg)[1], cfg))
        nll, tokens = np.array([score.nll for score in scored]), scored[0].tokens
        values = sum(value.size for value in start.values())
        keep(path, nll=nll, tokens=tokens, norms=norms, values=values, seconds=seconds)
        found = kept(path)
    return found


def crowd_grid(seeds: list[int], folder: Path, processes: int) -> None:
    """Run the crowd of each kind over seeds; write its scores, and where they come from.

    Args:
        seeds: of split, start, order and noise.
        folder: for ``crowd_cards.csv`` (a row per kind, seed and held-out card, summed nats by mean) and
            ``crowd.json``.
        processes: that train at the same time.
    """
    cfg, start = config.load("cpu", "federation.threads=1", *SETTINGS), time.perf_counter()
    keys = list(itertools.product(RATES, seeds))
    jobs = {(kind, seed): partial(run_kind, config.load(cfg, f"seed={seed}"), kind) for kind, seed in keys}
    with pool(processes) as workers:
        found = dict(run_all(workers, jobs, "crowds"))
    names, tables = ["untuned", *(name_of(*column) for column in columns())], []
    for kind, seed in keys:
        one = found[kind, seed]
        table = data.load(config.load(cfg, f"seed={seed}"))[1].select_columns(["card_id"]).to_pandas()
        table = table.assign(kind=kind, seed=seed, tokens=one["tokens"])
        tables.append(table.assign(**dict(zip(names, one["nll"].round(3), strict=True))))
    folders.write(folder / "crowd_cards.csv", pd.concat(tables).to_csv(index=False))
    more: dict[str, Any] = {"seeds": seeds, "seconds": round(time.perf_counter() - start), "learning_rates": RATES}
    more |= {"epsilon": EPSILON, "delta": DELTA, "noise_multiplier": round(multiplier(), 4), "clips": PARTS}
    more["kinds"] = {
        kind: {"values": int(found[kind, seeds[0]]["values"])}
        | {"median_norms": [round(float(np.median(found[kind, seed]["norms"])), 3) for seed in seeds]}
        for kind in RATES
    }
    more["fingerprint"] = fingerprint(cfg, seeds=seeds)
    text = json.dumps(provenance(cfg, **more), indent=1, ensure_ascii=False)
    folders.write(folder / "crowd.json", text + "\n")
