"""The grid behind notebook 04: every rule of combining adapters, mixed ranks, and robust rules against a poisoner."""

import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from fedllm_helpers import config, data, folders, models
from fedllm_helpers.attacks import poisoning
from fedllm_helpers.config.schema import RULES
from fedllm_helpers.evaluation.scoring import AnswerScores, score_answers
from fedllm_helpers.federation import client_app, simulation
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.models import editing
from fedllm_helpers.models.process import base_model
from fedllm_helpers.study.arms import KEPT, keep, kept, key_of, pool, run_all, tuning_config

# The federation of notebook 03 with half of its steps; everything of it is scored at the end.
SETTINGS = ["federation.training_arguments.max_steps=4", "federation.evaluate_every=0"]
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
MIXED = "federation.ranks=[4,4,8,8,16,16]"
ROBUST = {"FedAvg": "", "FedMedian": "", "FedTrimmedAvg": "beta=0.2", "Krum": "num_malicious_nodes=1"}
ROBUST_ROUNDS = "federation.num_rounds=1"  # enough to see who holds
POISONER = 0
ROUNDS = ["round", "nll", "bytes_up", "bytes_down"]
# name: the settings that differ, the rule whose learning rate it takes, and what the poisoner sends
OF_FACTORS = [rule for rule in RULES if rule != "LoRA-XS"]  # which has a grid of its own: study.frontier
LAB: dict[str, tuple[str, str, str]] = {rule: (f"federation.aggregation={rule}", rule, "") for rule in OF_FACTORS}
LAB |= {"FlexLoRA, mixed ranks": (f"{LAB['FlexLoRA'][0]} {MIXED}", "FlexLoRA", "")}
for _name, _argument in ROBUST.items():
    _how = f"{ROBUST_ROUNDS} federation.strategy={_name}"
    _how += f" federation.strategy_arguments.{_argument}" if _argument else ""
    LAB |= {f"{_name}, {kind or 'honest'}": (_how, "FedIT", kind) for kind in ("", *poisoning.KINDS)}


def run_arm(cfg: DictConfig, rate: float, poison: str = "", folder: Path = KEPT) -> dict[str, np.ndarray]:
    """Train a federation and score it on every held-out card; what an earlier call found is read back.

    Returns:
        ``nll`` and ``tokens`` per held-out card, in their order (with FedSA-LoRA each under the model of the hospital
        that has its specialty); ``up`` and ``down`` bytes in all, by hospital; ``rounds``, the columns of
        :data:`ROUNDS`; ``seconds`` of training.
    """
    path = folder / f"lab-{key_of(cfg, rate, poison, [part.to_list() for part in data.load(cfg)])}.npz"
    found = kept(path)
    if found is None:
        rates = [f"train.learning_rate_max={rate}", f"train.learning_rate_min={rate / 10}"]
        client, start = poisoning.client({POISONER}, poison) if poison else client_app.app, time.perf_counter()
        record = simulation.run(config.load(cfg, *rates), progress=False, client=client)
        seconds, scores = time.perf_counter() - start, score(cfg, record)
        sent = record.clients.groupby("client")[["bytes_up", "bytes_down"]].sum()
        found = {"nll": scores.nll, "tokens": scores.tokens, "up": sent["bytes_up"], "down": sent["bytes_down"]}
        keep(path, **found, rounds=record.history.reindex(columns=ROUNDS).fillna(0.0), seconds=seconds)
    return kept(path)


def score(cfg: DictConfig, record: simulation.FederatedRecord) -> AnswerScores:
    """Nats of every held-out card under what a federation gave, edits of the base model included."""
    model, tokenizer = base_model(cfg)
    test = data.load(cfg)[1]
    if cfg.federation.aggregation != "FedSA-LoRA":
        models.set_adapter(model, record.adapter)
        with editing.edited(model, record.edit):
            return score_answers(model, tokenizer, test, cfg)
    nll, tokens, ids = np.zeros(len(test)), np.zeros(len(test), dtype=int), np.array(test["card_id"])
    for hospital in range(cfg.federation.num_clients):
        models.set_adapter(model, record.personal.get(hospital, record.adapter))
        own = client_app.own_cards(cfg, hospital)[1]
        place, some = np.flatnonzero(np.isin(ids, own["card_id"])), score_answers(model, tokenizer, own, cfg)
        by_id = {card: number for number, card in enumerate(own["card_id"])}
        order = [by_id[card] for card in ids[place]]
        nll[place], tokens[place] = some.nll[order], some.tokens[order]
    return AnswerScores(nll, tokens)


def search(
    workers: ProcessPoolExecutor, job: Callable[[str, float], Callable], guesses: dict[str, float]
) -> pd.DataFrame:
    """Try rates for each kind, a half, the whole and twice of a guess, until the best lies between worse ones.

    Args:
        workers: that train at the same time.
        job: of a kind and a rate; what it gives back has ``nll`` and ``tokens``, as that of :func:`run_arm`.
        guesses: where the search for a kind's rate begins.

    Returns:
        ``kind``, ``learning_rate``, ``nll`` per token and ``n`` cards: a row for each rate tried, each twice the last.
    """
    rows, wanted = [], {(kind, guess * part) for kind, guess in guesses.items() for part in (0.5, 1, 2)}
    while wanted:
        for (kind, rate), found in run_all(workers, {key: job(*key) for key in sorted(wanted)}, "rates"):
            rows.append((kind, rate, found["nll"].sum() / found["tokens"].sum(), len(found["nll"])))
        table = pd.DataFrame(rows, columns=["kind", "learning_rate", "nll", "n"])
        wanted = {further for kind, tried in table.groupby("kind") if (further := _further(kind, tried))}
    return table.sort_values(["kind", "learning_rate"]).round({"nll": 4})


def _further(kind: str, tried: pd.DataFrame) -> tuple[str, float] | None:
    best, rates = tried.loc[tried["nll"].idxmin(), "learning_rate"], tried["learning_rate"]
    if best == rates.max():
        return kind, 2 * best
    return (kind, best / 2) if best == rates.min() else None


def chosen(table: pd.DataFrame) -> dict[str, float]:
    """The best rate of each kind of :func:`search`."""
    return table.loc[table.groupby("kind")["nll"].idxmin()].set_index("kind")["learning_rate"].to_dict()


def tune(cfg: DictConfig, workers: ProcessPoolExecutor, path: Path) -> dict[str, float]:
    """The best of :data:`RATES` for each rule, by held-out training cards of seed 0."""
    tuning = tuning_config(cfg, KEPT)
    jobs = {
        (rule, rate): partial(run_arm, config.load(tuning, LAB[rule][0]), rate)
        for rule, rate in itertools.product(OF_FACTORS, RATES)
    }
    rows = [
        {"rule": rule, "learning_rate": rate, "nll": found["nll"].sum() / found["tokens"].sum(), "n": len(found["nll"])}
        for (rule, rate), found in run_all(workers, jobs, "rates")
    ]
    table = pd.DataFrame(rows).sort_values(["rule", "learning_rate"])
    folders.write(path, table.round(4).to_csv(index=False))
    return table.loc[table.groupby("rule")["nll"].idxmin()].set_index("rule")["learning_rate"].to_dict()


def lab_grid(seeds: list[int], folder: Path, processes: int) -> None:
    """Tune each rule, run :data:`LAB` over seeds, and write three tables and their provenance.

    Args:
        seeds: of split, start and order.
        folder: for ``aggregation_cards.csv`` (a row per seed and card, summed nats by arm), ``aggregation_bytes.csv``
            (a row per arm, seed and hospital), ``aggregation_rates.csv`` and ``aggregation.json``.
        processes: that train at the same time.
    """
    cfg, start = config.load("cpu", "federation.threads=1", *SETTINGS), time.perf_counter()
    with pool(processes) as workers:
        rates = tune(cfg, workers, folder / "aggregation_rates.csv")
        jobs = {
            (seed, name): partial(run_arm, config.load(cfg, f"seed={seed}", *changes.split()), rates[rule], poison)
            for (name, (changes, rule, poison)), seed in itertools.product(LAB.items(), seeds)
        }
        found = dict(run_all(workers, jobs, "arms"))
    cards = [card_rows(config.load(cfg, f"seed={seed}"), {name: found[seed, name] for name in LAB}) for seed in seeds]
    folders.write(folder / "aggregation_cards.csv", pd.concat(cards).to_csv(index=False))
    rows = [
        (name, seed, hospital, int(up), int(down))
        for name, seed in itertools.product(LAB, seeds)
        for hospital, (up, down) in enumerate(zip(found[seed, name]["up"], found[seed, name]["down"], strict=True))
    ]
    table = pd.DataFrame(rows, columns=["arm", "seed", "hospital", "bytes_up", "bytes_down"])
    folders.write(folder / "aggregation_bytes.csv", table.to_csv(index=False))
    more: dict[str, Any] = {"seeds": seeds, "seconds": round(time.perf_counter() - start), "learning_rates": rates}
    names = ("settings", "rate_of", "poison")
    more["arms"] = {name: dict(zip(names, arm, strict=True)) for name, arm in LAB.items()}
    more["fingerprint"] = fingerprint(cfg, seeds=seeds)
    folders.write(folder / "aggregation.json", json.dumps(provenance(cfg, **more), indent=1) + "\n")


def card_rows(cfg: DictConfig, found: dict[str, dict[str, np.ndarray]]) -> pd.DataFrame:
    """A row for each held-out card of a configuration, with the summed nats of each arm of :func:`run_arm`."""
    table = data.load(cfg)[1].select_columns(["card_id", "specialty"]).to_pandas()
    table = table.assign(seed=cfg.seed, tokens=next(iter(found.values()))["tokens"])
    return table.assign(**{name: one["nll"].round(3) for name, one in found.items()})
