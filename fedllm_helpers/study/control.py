"""Form or knowledge: how far a prompt, examples, wrong pairs or other fields bring a model. Taught in notebook 02."""

import itertools
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from omegaconf import DictConfig

from fedllm_helpers import config, data, evaluation, folders, models, training
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.models.process import base_model, first_adapter
from fedllm_helpers.study.arms import KEPT, keep, kept, key_of, pool, run_all, tuning_config

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
UNTUNED = ("untuned", "untuned, chat template", "untuned, three examples")
TUNED = ("shuffled pairs", "other fields", "right pairs")
EXAMPLES = 3


def with_examples(cards: Dataset, examples: Dataset) -> list[dict]:
    """Cards whose question has solved examples above it, for the prompt ``short``.

    Args:
        cards: to be asked, with ``question`` and ``answer``.
        examples: cards whose answers are shown; they should not be among ``cards``.
    """
    above = "".join(f"{card['question']}\nAnswer: {card['answer']}\n\nQuestion: " for card in examples)
    return [{"question": above + card["question"], "answer": card["answer"]} for card in cards]


def shuffled(cards: Dataset, seed: int) -> list[dict]:
    """The same questions and the same answers, each answer beside a question that is not its own.

    Raises:
        ValueError: of one card there is no other answer.
    """
    if len(cards) < 2:
        raise ValueError(f"shuffled: {len(cards)} cards; expected at least 2")
    order = np.random.default_rng(seed).permutation(len(cards))
    given = dict(zip(order, np.roll(order, 1), strict=True))  # a single cycle: no answer stays at home
    questions, answers = cards["question"], cards["answer"]
    return [{"question": questions[place], "answer": answers[given[place]]} for place in range(len(cards))]


def other_fields(cfg: DictConfig, count: int) -> Dataset:
    """Cards of the ontology's other organ systems, as many as there are or ``count``, drawn by the seed."""
    every, ours = data.load_flashcards("hpo"), set(cfg.dataset.specialties)
    rows = np.flatnonzero([specialty not in ours for specialty in every["specialty"]])
    return every.select(np.sort(np.random.default_rng(cfg.seed).permutation(rows)[:count]))


def cards_of(cfg: DictConfig, arm: str) -> Dataset | list[dict]:
    """What an arm of :data:`TUNED` trains on: as many cards as the pool has."""
    train = data.load(cfg)[0]
    if arm == "shuffled pairs":
        return shuffled(train, cfg.seed)
    return other_fields(cfg, len(train)) if arm == "other fields" else train


def losses(cfg: DictConfig, arm: str, rate: float) -> np.ndarray:
    """Nats of the held-out cards, shape (cards, 2): of an answer's words in sum, and of the token that ends it.

    Args:
        cfg: as in notebook 02; its own ``training_arguments`` train.
        arm: of :data:`UNTUNED` or :data:`TUNED`.
        rate: largest learning rate; not used by an untuned arm.
    """
    path = KEPT / f"control-{key_of(cfg, arm, rate, [card['card_id'] for card in data.load(cfg)[1]])}.npz"
    if before := kept(path):
        return before["nll"]
    (train, test), (model, tokenizer) = data.load(cfg), base_model(cfg)
    models.set_adapter(model, first_adapter(cfg))
    asked, how = test, cfg
    if arm == "untuned, chat template":
        how = config.load(cfg, "dataset.prompt=chat")
    elif arm == "untuned, three examples":
        rows = np.random.default_rng(cfg.seed).choice(len(train), EXAMPLES, replace=False)
        asked, how = with_examples(test, train.select(rows)), config.load(cfg, "train.seq_length=512")
    elif arm in TUNED:
        training.fine_tune(model, tokenizer, cards_of(cfg, arm), cfg, learning_rate=rate, description=None)
    found = evaluation.token_losses(model, tokenizer, asked, how)
    nll = np.array([(one[:-1].sum(), one[-1]) for one in found])
    keep(path, nll=nll)
    return nll


def control_grid(seeds: Sequence[int], folder: Path, processes: int) -> None:
    """Tune each trained arm's rate on training cards, score all over seeds; write ``control_*.csv`` and the origin.

    Args:
        seeds: of split, start, order and examples.
        folder: of the results.
        processes: that train at the same time.
    """
    cfg, start = config.load("cpu", "federation.threads=1"), time.perf_counter()
    tuning = config.load(tuning_config(cfg, KEPT), f"dataset.specialties={list(cfg.dataset.specialties)}")
    tried = {key: partial(losses, tuning, *key) for key in itertools.product(TUNED, RATES)}
    with pool(processes) as workers:
        rows = [(*key, nll.sum() / len(nll)) for key, nll in run_all(workers, tried, "tuning")]
        rates = pd.DataFrame(rows, columns=["arm", "learning_rate", "nats_per_card"])
        rates = rates.sort_values(["arm", "learning_rate"])
        best = rates.loc[rates.groupby("arm")["nats_per_card"].idxmin()].set_index("arm")["learning_rate"].to_dict()
        seeded = {seed: config.load(cfg, f"seed={seed}") for seed in seeds}
        keys = list(itertools.product(seeds, (*UNTUNED, *TUNED)))
        jobs = {(seed, arm): partial(losses, seeded[seed], arm, best.get(arm, 0.0)) for seed, arm in keys}
        found = dict(run_all(workers, jobs, "arms"))
    tables = []
    for seed, settings in seeded.items():
        test = data.load(settings)[1]
        tokens = [len(one) for one in _lengths(settings, test)]
        table = test.select_columns(["card_id", "specialty"]).to_pandas().assign(seed=seed, tokens=tokens)
        for arm in (*UNTUNED, *TUNED):
            words, end = found[seed, arm].T.round(3)
            table = table.assign(**{arm: words, f"end: {arm}": end})
        tables.append(table)
    folders.write(folder / "control_rates.csv", rates.round({"nats_per_card": 3}).to_csv(index=False))
    folders.write(folder / "control_cards.csv", pd.concat(tables).to_csv(index=False))
    more = {"seeds": list(seeds), "seconds": round(time.perf_counter() - start), "learning_rates": best}
    origin = provenance(cfg, **more, examples=EXAMPLES, fingerprint=fingerprint(cfg, seeds=seeds))
    folders.write(folder / "control.json", json.dumps(origin, indent=1) + "\n")


def _lengths(cfg: DictConfig, cards: Dataset) -> list[list[int]]:
    """The answer tokens of cards under the plain prompt, without the one that ends an answer."""
    tokenizer = base_model(cfg)[1]
    rows = training.batches.encode(cards, tokenizer, cfg.train.seq_length, cfg.dataset.prompt)
    return [[label for label in row["labels"] if label >= 0][:-1] for row in rows]
