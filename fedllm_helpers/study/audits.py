"""Every attack on every defence: cards with canaries, and the grid of notebooks 05a and 05b."""

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, concatenate_datasets
from omegaconf import DictConfig

from fedllm_helpers import attacks, config, data, evaluation, folders, models
from fedllm_helpers.attacks import audit as epsilon_audit
from fedllm_helpers.attacks.battery import Audit, audit, calibrated
from fedllm_helpers.federation import client_app
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.models.process import base_model, first_adapter
from fedllm_helpers.study.arms import KEPT, keep, kept, key_of, pool, run_all, train_arm, tuning_config
from fedllm_helpers.study.lab import chosen, run_arm, search
from fedllm_helpers.training import guarantees

# Four hospitals of 60 cards each, and as many held out; a smaller rank, because noise grows with every value.
SETTINGS = [
    "dataset.specialties=[cardiovascular system,eye,metabolism/homeostasis,nervous system]",
    "dataset.max_cards_per_specialty=120",
    "train.evaluate_split=0.5",
    "model.lora.peft_lora_r=4",
    "model.lora.peft_lora_alpha=16",
    "federation.num_clients=4",
    "federation.num_rounds=3",
    "federation.training_arguments.max_steps=12",
    "federation.training_arguments.per_device_train_batch_size=4",
    "federation.evaluate_every=0",
]
VICTIM, COPIES = "cardiovascular system", (0, 1, 4, 16)
FEDERATED = "federated/specialty"
# with noise the same cards in fewer, larger batches: the signal grows with a batch, and the noise does not
BATCHES = "federation.training_arguments.max_steps=4 federation.training_arguments.per_device_train_batch_size=12"
RECORD = f"{BATCHES} federation.privacy.record.epsilon="
CLIENT = f"{BATCHES} federation.privacy.client.clipping_norm=2 federation.privacy.client.noise_multiplier="
CORE = "federation.aggregation=LoRA-XS model.lora.peft_lora_r=16 model.lora.peft_lora_alpha=64"
# name: where the search for its learning rate begins, on training cards
TUNED = {"record ε = 8": 2e-2, "record ε = 2": 2e-2, "LoRA-XS, ε = 8": 1e-2, "LoRA-XS, ε = 2": 1e-2}
# name: what is trained, its largest learning rate or the arm of TUNED whose rate it takes, and the settings that differ
PRIVACY = {
    "untuned": ("untuned", 0.0, ""),
    "pooled": ("same examples/pooled", 4e-3, ""),
    "federated": (FEDERATED, 8e-3, ""),
    "large batches": (FEDERATED, 8e-3, BATCHES),  # what they alone change, without noise
    "record ε = 32": (FEDERATED, "record ε = 8", f"{RECORD}32"),
    "record ε = 8": (FEDERATED, "record ε = 8", f"{RECORD}8"),
    "record ε = 2": (FEDERATED, "record ε = 2", f"{RECORD}2"),
    "client z = 0.02": (FEDERATED, 8e-3, f"{CLIENT}0.02"),
    "client z = 1": (FEDERATED, 8e-3, f"{CLIENT}1"),
    "LoRA-XS": (FEDERATED, 8e-3, CORE),
    "LoRA-XS, ε = 8": (FEDERATED, "LoRA-XS, ε = 8", f"{CORE} {RECORD}8"),
    "LoRA-XS, ε = 2": (FEDERATED, "LoRA-XS, ε = 2", f"{CORE} {RECORD}2"),
}
SHADOWS = 4  # models per seed, in pairs of which one trains on what the other does not


def stage(
    cfg: DictConfig, folder: Path, *, copies: Sequence[int] = COPIES, each: int = 1, victim: str = VICTIM
) -> tuple[DictConfig, Dataset, Dataset, list[attacks.Canary]]:
    """Plant canaries in one hospital's cards, and keep as many cards held out as are trained on.

    Args:
        cfg: its split gives the members (trained on) and the others (held out).
        folder: for the file of the planted cards.
        copies, each: of :func:`fedllm_helpers.attacks.canaries`.
        victim: the specialty, and so the hospital, that gets them.

    Returns:
        The configuration of a federation on the planted cards; members and others, without canaries; the canaries.
    """
    members, others = data.load(cfg)
    planted = attacks.canaries(copies, each=each, seed=cfg.seed)
    path = Path(folder) / f"planted-{key_of(cfg, list(copies), each, victim)}.json"
    folders.write(path, json.dumps(attacks.plant(members, planted, victim, cfg.seed).to_list()))
    whole = [*data.WHOLE_FILE, "train.evaluate_split=false"]
    return config.load(cfg, f"dataset.name={path}", *whole), members, others, planted


def audit_arm(cfg: DictConfig, arm: str, rate: float, each: int, folder: Path = KEPT) -> Audit:
    """Train an arm on planted cards and attack it; what an earlier call found is read back."""
    staged, members, others, planted = stage(cfg, folder, each=each)
    path = Path(folder) / f"audit-{key_of(cfg, arm, rate, each)}.npz"
    if (found := kept(path)) is None:
        start = time.perf_counter()
        adapter, (model, tokenizer) = train_arm(staged, arm, rate)[0], base_model(staged)
        seconds = time.perf_counter() - start
        models.set_adapter(model, adapter)
        attacked = audit(model, tokenizer, members, others, planted, cfg, seconds=seconds)
        keep(path, **vars(dataclasses.replace(attacked, audited=least_epsilon(staged))))
        found = kept(path)
    return Audit(**found)


def least_epsilon(cfg: DictConfig) -> float:
    """What an audit of hospital 0's training shows of its ε (notebook 05b); NaN where the settings promise none."""
    own = client_app.own_cards(cfg, 0)[0]
    if guarantees.record_privacy(cfg, len(own)) is None:
        return float("nan")
    model, tokenizer = base_model(cfg)
    models.set_adapter(model, first_adapter(cfg))
    return epsilon_audit.audit((model, tokenizer), own, cfg, canaries=1000, seed=cfg.seed).bound


def shadow(cfg: DictConfig, number: int, rate: float, folder: Path = KEPT) -> dict[str, np.ndarray]:
    """Train a shadow model on half of all cards, pooled; what an earlier call found is read back.

    Args:
        cfg: its split gives members and others; a shadow model does not know which is which.
        number: of the model; 0 and 1, 2 and 3 and so on train on what the other does not.
        rate: largest learning rate.

    Returns:
        ``nll``, summed nats per card, members first; ``inside``, whether the model was trained on it.
    """
    cards = concatenate_datasets([part.select_columns(["card_id", "specialty", "question", "answer"])
                                  for part in data.load(cfg)])  # fmt: skip
    order = np.random.default_rng([cfg.seed, number // 2]).permutation(len(cards))
    inside = np.isin(np.arange(len(cards)), np.array_split(order, 2)[number % 2])
    path = folder / f"shadow-{key_of(cfg, number, rate, cards.to_list())}.npz"
    if (found := kept(path)) is None:
        folders.write(half := path.with_suffix(".json"), json.dumps(cards.select(np.flatnonzero(inside)).to_list()))
        own = config.load(cfg, f"dataset.name={half}", *data.WHOLE_FILE, "train.evaluate_split=false")
        adapter, (model, tokenizer) = train_arm(own, PRIVACY["pooled"][0], rate)[0], base_model(own)
        models.set_adapter(model, adapter)
        keep(path, nll=evaluation.score_answers(model, tokenizer, cards, cfg).nll, inside=inside)
        found = kept(path)
    return found


def privacy_grid(seeds: list[int], folder: Path, processes: int, each: int = 3) -> None:
    """Tune, train and attack :data:`PRIVACY` over seeds; write a row per card and per canary, and where they come from.

    Args:
        seeds: of split, start, order, canaries and noise.
        folder: for ``privacy_cards.csv``, ``privacy_canaries.csv``, ``privacy_rates.csv`` and ``privacy.json``.
        processes: that train at the same time.
        each: canaries per number of copies.
    """
    cfg = config.load("cpu", "federation.threads=1", *SETTINGS)
    with pool(processes) as workers:
        table = tune(cfg, workers)
        folders.write(folder / "privacy_rates.csv", table.to_csv(index=False))
        rates, jobs = chosen(table), {}
        rate_of = {name: rates.get(rate, rate) for name, (_, rate, _) in PRIVACY.items()}
        for seed, (name, (arm, _, changes)) in itertools.product(seeds, PRIVACY.items()):
            seeded = config.load(cfg, f"seed={seed}", f"federation.privacy.noise_seed={seed}", *changes.split())
            jobs[seed, name] = partial(audit_arm, seeded, arm, rate_of[name], each)
        for seed, number in itertools.product(seeds, range(SHADOWS)):
            jobs[seed, number] = partial(shadow, config.load(cfg, f"seed={seed}"), number, rate_of["pooled"])
        found = dict(run_all(workers, jobs, "audits"))
    of_seed = {seed: {name: found[seed, name] for name in PRIVACY} for seed in seeds}
    cards = [_card_rows(config.load(cfg, f"seed={seed}"), some) for seed, some in of_seed.items()]
    outside = [_outside([found[seed, number] for number in range(SHADOWS)]) for seed in seeds]
    cards = [table.assign(shadows=some.round(3)) for table, some in zip(cards, outside, strict=True)]
    folders.write(folder / "privacy_cards.csv", pd.concat(cards).to_csv(index=False))
    leaks = [_canary_rows(seed, each, some) for seed, some in of_seed.items()]
    folders.write(folder / "privacy_canaries.csv", pd.concat(leaks).to_csv(index=False))
    arms = {n: {"trained": arm, "learning_rate": rate_of[n], "settings": s} for n, (arm, _, s) in PRIVACY.items()}
    more = {
        "seeds": seeds,
        "arms": arms,
        "training_seconds": {n: round(float(np.mean([found[seed, n].seconds for seed in seeds]))) for n in PRIVACY},
        "guarantees": (promised := _guarantees(cfg, each)),
        "audited": {n: [round(float(found[s, n].audited), 2) for s in seeds] for n in promised if "ε" in n},
        "fingerprint": fingerprint(cfg, seeds=seeds),
    }
    text = json.dumps(provenance(cfg, **more), indent=1, ensure_ascii=False)
    folders.write(folder / "privacy.json", text + "\n")


def tune(cfg: DictConfig, workers: ProcessPoolExecutor) -> pd.DataFrame:
    """Rates of :data:`TUNED` on a quarter of seed 0's training cards, held out: a table of :func:`lab.search`."""
    tuning = config.load(tuning_config(cfg, KEPT), "train.evaluate_split=0.25", "federation.privacy.noise_seed=0")
    return search(workers, lambda n, rate: partial(run_arm, config.load(tuning, *PRIVACY[n][2].split()), rate), TUNED)


def _card_rows(cfg: DictConfig, found: dict[str, Audit]) -> pd.DataFrame:
    """A row per card, members first: tokens, and of each arm the nats and the Min-K% score."""
    parts = data.load(cfg)
    table = pd.concat([part.select_columns(["card_id"]).to_pandas() for part in parts])
    member = np.repeat([1, 0], [len(part) for part in parts])
    table = table.assign(seed=cfg.seed, member=member, tokens=next(iter(found.values())).tokens)
    table = table.assign(**{name: one.nll.round(3) for name, one in found.items()})
    return table.assign(**{f"min-k: {name}": one.min_k.round(3) for name, one in found.items()})


def _outside(shadows: list[dict[str, np.ndarray]]) -> np.ndarray:
    """Summed nats of each card under the shadow models that were not trained on it, on average over probabilities."""
    nll, inside = (np.array([one[key] for one in shadows]) for key in ("nll", "inside"))
    return -attacks.outside(-nll, inside)


def _canary_rows(seed: int, each: int, found: dict[str, Audit]) -> pd.DataFrame:
    """A row per arm and canary: how often it was planted, its exposure in bits, whether it could be read out."""
    planted = attacks.canaries(COPIES, each=each, seed=seed)
    copies = [canary.copies for canary in planted]
    rows = [
        {"arm": name, "seed": seed, "copies": copies, "exposure": one.exposure.round(2), "extracted": one.extracted * 1}
        | ({} if name == "untuned" else {"calibrated": calibrated(one, found["untuned"], planted).round(2)})
        for name, one in found.items()
    ]
    return pd.concat([pd.DataFrame(row) for row in rows])


def _guarantees(cfg: DictConfig, each: int) -> dict[str, list[float]]:
    """ε by arm: of every hospital's records, the victim's first; or of a hospital."""
    sizes = [60 + each * sum(COPIES), 60, 60, 60]
    found = {}
    for name, (_, _, changes) in PRIVACY.items():
        changed = config.load(cfg, *changes.split())
        if changed.federation.privacy.record.epsilon is not None:
            found[name] = guarantees.per_hospital(changed, sizes)["epsilon"].round(3).tolist()
        elif changed.federation.privacy.client.noise_multiplier is not None:
            found[name] = [round(guarantees.client_epsilon(changed), 1)]
    return found
