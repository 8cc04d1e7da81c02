"""The grids behind ``notebooks/results``: what takes too long for a notebook, with its provenance beside it.

``python -m fedllm_helpers.experiments federated`` compares the arms of notebook 03 over several seeds. Each kind of arm
has its own learning rate, chosen on cards of the training part, never on test cards: one for federations, and in each
comparison one for pooled data and one for a lone hospital. What is done is not done again: each job leaves its scores
in ``build/experiments``.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from fedllm_helpers import client_app, config, data, models, simulation, training
from fedllm_helpers.evaluation import AnswerScores, score_answers
from fedllm_helpers.messages import base_model, first_adapter
from fedllm_helpers.provenance import provenance

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
HOSPITALS = 6


def arms(hospitals: int = HOSPITALS) -> list[str]:
    """Names of the arms: ``comparison/arm`` or ``comparison/arm/hospital``."""
    alone = [f"same {what}/one hospital/{h}" for what in ("work", "examples") for h in range(hospitals)]
    return ["untuned", "federated/specialty", "federated/iid", "same work/pooled", "same examples/pooled", *alone]


def train_arm(cfg: DictConfig, arm: str, rate: float) -> models.Adapter:
    """The adapter of an arm.

    *Same work per hospital*: an arm takes as many steps, of the same batch, as each hospital does in the federation.
    *Same examples in all*: it sees as many cards as all hospitals together, in batches twice as large.

    Args:
        cfg: of the federation.
        arm: one of :func:`arms`.
        rate: largest learning rate; it falls along a cosine, in a federation over the rounds.
    """
    kind, *rest = arm.split("/")
    adapter = first_adapter(cfg)
    if kind == "federated":
        rates = [f"train.learning_rate_max={rate}", f"train.learning_rate_min={rate / 10}"]
        federated = config.load(cfg, f"federation.partition={rest[0]}", "federation.evaluate_every=0", *rates)
        return simulation.run(federated, progress=False).adapter
    if kind != "untuned":
        how = cfg.federation
        steps, batch = (
            how.training_arguments.max_steps * how.num_rounds,
            how.training_arguments.per_device_train_batch_size,
        )
        if kind == "same examples":
            steps, batch = steps * how.num_clients // 2, batch * 2
        local = training.round_config(
            cfg, max_steps=steps, per_device_train_batch_size=batch, lr_scheduler_type="cosine"
        )
        cards = client_app.own_cards(cfg, int(rest[1]))[0] if rest[0] == "one hospital" else data.load(cfg)[0]
        model, tokenizer = base_model(cfg)
        models.set_adapter(model, adapter)
        training.fine_tune(model, tokenizer, cards, local, learning_rate=rate, progress=False)
        adapter = models.get_adapter(model)
    return adapter


def score_arm(cfg: DictConfig, arm: str, rate: float) -> AnswerScores:
    """Train an arm and score it on the held-out cards of its configuration; scores of an earlier call are read back."""
    cards = [part.to_list() for part in data.load(cfg)]
    key = json.dumps([OmegaConf.to_yaml(cfg), arm, rate, cards, provenance(cfg)["versions"]])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = Path("build") / "experiments" / f"{name}.npz"
    if path.is_file():
        kept = np.load(path, allow_pickle=False)
        return AnswerScores(kept["nll"], kept["tokens"])
    adapter, (model, tokenizer) = train_arm(cfg, arm, rate), base_model(cfg)
    models.set_adapter(model, adapter)
    test, limits = data.load(cfg)[1], {"prompt": cfg.dataset.prompt, "seq_length": cfg.train.seq_length}
    scores = score_answers(model, tokenizer, test, **limits)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".part.npz"), nll=scores.nll, tokens=scores.tokens)
    path.with_suffix(".part.npz").replace(path)
    return scores


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
    folder = Path("build") / "experiments"
    folder.mkdir(parents=True, exist_ok=True)
    tuning = tuning_config(cfg, folder)
    jobs = {(arm, rate): partial(score_arm, tuning, arm, rate) for arm, rate in itertools.product(kinds, RATES)}
    rows = [
        {
            "arm": _kind(arm),
            "learning_rate": rate,
            "nll": scores.nll.sum() / scores.tokens.sum(),
            "n": len(scores.nll),
        }
        for (arm, rate), scores in _run(pool, jobs, "tuning")
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
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rates = tune(cfg, pool, rates_path)
        rates["federated/iid"], rates["untuned"] = rates["federated/specialty"], 0.0
        seeded = {seed: config.load(cfg, f"seed={seed}") for seed in seeds}
        jobs = {
            (seed, arm): partial(score_arm, seeded[seed], arm, rates[_kind(arm)])
            for seed, arm in itertools.product(seeds, arms())
        }
        scores = dict(_run(pool, jobs, "arms"))
    tables = []
    for seed, settings in seeded.items():
        test = data.load(settings)[1].select_columns(["card_id", "specialty"]).to_pandas()
        table = test.assign(seed=seed, tokens=scores[seed, "untuned"].tokens)
        tables.append(table.assign(**{arm: scores[seed, arm].nll.round(3) for arm in arms()}))
    pd.concat(tables).to_csv(cards_path, index=False)
    origin = provenance(cfg, seeds=seeds, seconds=round(time.perf_counter() - start), learning_rates=rates)
    (folder / "federated.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _kind(arm: str) -> str:
    return "/".join(arm.split("/")[:2])


def _run(pool: ProcessPoolExecutor, jobs: dict, description: str) -> list[tuple]:
    waiting = {pool.submit(job): name for name, job in jobs.items()}
    done = {}
    for future in tqdm(as_completed(waiting), total=len(jobs), desc=description, file=sys.stdout):
        done[waiting[future]] = future.result()
    return [(name, done[name]) for name in jobs]


def main() -> None:
    """Command line of the grids."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("grid", choices=["federated"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("notebooks/results"))
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    federated(arguments.seeds, arguments.folder, arguments.processes)


if __name__ == "__main__":
    main()
