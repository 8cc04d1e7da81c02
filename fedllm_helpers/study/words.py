"""Which words of its cards a hospital's update gives away, and what stops it: steps, ranks, optimisers and defences."""

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import config, data, folders, models, training
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.attacks import words
from fedllm_helpers.federation import client_app
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.models.process import base_model, cpu_threads, first_adapter
from fedllm_helpers.study.arms import KEPT, key_of, pool, run_all
from fedllm_helpers.study.audits import PRIVACY, SETTINGS, TUNED
from fedllm_helpers.study.views import first_update, masked_view
from fedllm_helpers.training import guarantees

logger = logging.getLogger(__name__)
GROUPS, APART, COUNT = 8, 12, 30  # groups of cards attacked per seed, cards between them; words read per hospital
ADAM_RATE, SGD_RATE = 8e-3, 0.1
RECORD = PRIVACY["record ε = 8"][2]
BEGINNINGS = (
    "A", "An abnormality of the", "A disease of the", "Inflammation of the", "The presence of a", "An increased",
    "A reduced", "A lack of", "Abnormal", "Damage to the", "A defect of the", "A type of", "A condition in which the",
    "Pain in the", "A malformation of the", "An abnormal increase in the",
)  # fmt: skip
PROMPTS = tuple(f"{data.format_prompt('What is an abnormal finding?')} {text}" for text in BEGINNINGS)


@dataclass(frozen=True)
class Step:
    """How an attacked update came to be: one step of SGD on one card, unless it says otherwise."""

    cards: int = 1
    steps: int = 1
    rank: int = 16
    optim: str = "sgd"
    rate: float = SGD_RATE
    view: str = "open"  # or masked, or noisy: DP-SGD with the noise of ε = 8


EXACT = {
    "one card": Step(),
    **{f"{n} cards": Step(cards=n) for n in (2, 4, 8)},
    **{f"{n} steps": Step(cards=n, steps=n) for n in (2, 4, 12)},
    **{f"rank {r}": Step(rank=r) for r in (8, 4, 1)},
    "small rate": Step(rate=ADAM_RATE),
    "Adam": Step(optim="adamw_torch", rate=ADAM_RATE),
    "Adam, 12 steps of 4": Step(cards=48, steps=12, optim="adamw_torch", rate=ADAM_RATE),
    "record ε = 8": Step(view="noisy"),
    "masked": Step(view="masked"),
}
# name: largest learning rate, and the settings that differ; all take the federation's own steps
RANK = "model.lora.peft_lora_r={0} model.lora.peft_lora_alpha={1}"
GAINED = {
    "open": (ADAM_RATE, ""),
    "one step": (ADAM_RATE, "federation.training_arguments.max_steps=1"),
    "rank 16": (ADAM_RATE, RANK.format(16, 64)),
    "rank 1": (ADAM_RATE, RANK.format(1, 4)),
    "LoRA-XS, rank 16": (ADAM_RATE, f"federation.aggregation=LoRA-XS {RANK.format(16, 64)}"),
    "record ε = 8": (TUNED["record ε = 8"], RECORD),
}


def card_shares(tokenizer: PreTrainedTokenizerBase, cards: Iterable[dict]) -> np.ndarray:
    """The share of cards in whose question or answer a token occurs, shape (vocabulary,); the prompt is left out.

    Raises:
        ValueError: no cards.
    """
    written = [f" {card['question']} {card['answer']}" for card in cards]
    if not written:
        raise ValueError("cards: there are none to look into")
    found = np.zeros(len(tokenizer))
    for row in tokenizer(written, add_special_tokens=False)["input_ids"]:
        found[list(set(row))] += 1
    return found / len(written)


def special(shares: np.ndarray, times: float = 3.0, least: float = 0.03) -> np.ndarray:
    """Which tokens are a hospital's own: in some of its cards, and clearly more rarely in those of the others.

    Args:
        shares: of :func:`card_shares`, a row for each of two hospitals or more, shape (hospitals, vocabulary).
        times: its share of cards with the token is at least so many times the mean share of the others.
        least: its share of cards with the token.

    Returns:
        Booleans of the same shape.
    """
    others = (shares.sum(0) - shares) / (len(shares) - 1)
    return (shares >= least) & (shares >= times * others)


def after_round(cfg: DictConfig, rate: float = ADAM_RATE) -> Adapter:
    """The average after a first round of all hospitals, weighted by cards: the first adapter whose B is not zero."""
    start, sizes = first_adapter(cfg), [len(cards) for cards in _own(cfg)]
    updates = [first_update(cfg, hospital, rate) for hospital in range(len(sizes))]
    return {key: start[key] + np.average([u[key] for u in updates], axis=0, weights=sizes) for key in start}


def step_update(cfg: DictConfig, start: Adapter, cards: Dataset, how: Step) -> Adapter:
    """What training on cards changes in an adapter, as the server sees it; each card is seen once.

    ``cfg`` has the rank of ``how``, and there are as many cards as it says. With noise, that of a hospital of 60 cards,
    a step takes all cards, which is easier for the attacker than a sample.
    """
    model, tokenizer = base_model(cfg)
    models.set_adapter(model, start)
    changes = {"max_steps": how.steps, "per_device_train_batch_size": how.cards // how.steps, "optim": how.optim}
    with cpu_threads(cfg):
        local, trainer = training.round_config(cfg, **changes), _noisy(cfg) if how.view == "noisy" else None
        training.fine_tune(model, tokenizer, cards, local, learning_rate=how.rate, trainer=trainer, description=None)
    update = {key: value - start[key] for key, value in models.get_adapter(model).items()}
    return masked_view(update, 0, [60] * cfg.federation.num_clients) if how.view == "masked" else update


def _noisy(cfg: DictConfig) -> partial:
    from fedllm_helpers.training import dp_sgd  # Opacus takes a second to import

    plan = guarantees.record_privacy(config.load(cfg, *RECORD.split()), 60)
    return dp_sgd.trainer(dataclasses.replace(plan, sample_rate=1.0), np.random.SeedSequence(cfg.seed))


def _own(cfg: DictConfig) -> list[Dataset]:
    return [client_app.own_cards(cfg, hospital)[0] for hospital in range(cfg.federation.num_clients)]


def read_step(update: Adapter, cfg: DictConfig, cards: Dataset, likely: np.ndarray) -> dict[str, Any]:
    """How many tokens of the cards an update names, among as many guesses as there are distinct ones.

    ``true`` of ``tokens`` with the prompt's, ``words_true`` of ``words`` without them. Beside it what the words that
    are ``common``, by their shares ``likely`` of other cards, are right about, and what blind guesses are (``chance``).
    """
    model, tokenizer = base_model(cfg)
    rows = training.batches.encode(cards, tokenizer, cfg.train.seq_length, cfg.dataset.prompt)
    held = {one for row in rows for one in row["input_ids"]} - set(tokenizer.all_special_ids)
    known = set(tokenizer(data.format_prompt("", cfg.dataset.prompt))["input_ids"])
    beyond = held - known
    ids, _ = words.named(update, model, tokenizer, len(held))
    few, _ = words.named(update, model, tokenizer, len(beyond), known)
    prior = np.argsort(-np.where(np.isin(np.arange(len(likely)), list(known)), -1.0, likely), kind="stable")
    return {
        "true": len(held & set(ids.tolist())),
        "tokens": len(held),
        "words_true": len(beyond & set(few.tolist())),
        "words": len(beyond),
        "common": len(beyond & set(prior[: len(beyond)].tolist())),
        "chance": round(len(beyond) ** 2 / (len(tokenizer) - len(known)), 3),
    }


def attack_steps(cfg: DictConfig, rank: int, groups: int = GROUPS, folder: Path = KEPT) -> list[dict[str, Any]]:
    """A row for each of :data:`EXACT` of one rank and group of cards; what an earlier call found is read back."""
    chosen = {name: how for name, how in EXACT.items() if how.rank == rank}
    path = Path(folder) / f"words-{key_of(cfg, rank, groups, repr(chosen))}.json"
    if (rows := _kept(path)) is not None:
        return rows
    cfg = config.load(cfg, *RANK.format(rank, 4 * rank).split())
    own, start, rows = _own(cfg), after_round(cfg), []
    likely = card_shares(base_model(cfg)[1], data.load(cfg)[1])  # held-out cards: as if public
    for (name, how), group in itertools.product(chosen.items(), range(groups)):
        mine, first = own[group % len(own)], group // len(own) * APART
        cards = mine.select([(first + k) % len(mine) for k in range(how.cards)])
        found = read_step(step_update(cfg, start, cards, how), cfg, cards, likely)
        rows.append({"seed": cfg.seed, "setting": name, "group": group, "cards": how.cards, "rank": rank, **found})
    folders.write(path, json.dumps(rows))
    return rows


def attack_round(cfg: DictConfig, names: Sequence[str] = tuple(GAINED), folder: Path = KEPT) -> list[dict[str, Any]]:
    """A row for each of :data:`GAINED`, and the masked view of the open one, and hospital."""
    path = Path(folder) / f"gained-{key_of(cfg, list(names), PROMPTS, COUNT, repr(GAINED))}.json"
    if (rows := _kept(path)) is not None:
        return rows
    own, rows = _own(cfg), []
    for name in names:
        rate, changes = GAINED[name]
        changed = config.load(cfg, f"federation.privacy.noise_seed={cfg.seed}", *changes.split())
        views = {name: [first_update(changed, hospital, rate) for hospital in range(len(own))]}
        if name == "open":
            sizes = [len(cards) for cards in own]
            views["masked"] = [masked_view(update, k, sizes) for k, update in enumerate(views[name])]
        for view, updates in views.items():
            rows += [{"seed": cfg.seed, "setting": view, **row} for row in read_round(changed, updates, own)]
    folders.write(path, json.dumps(rows))
    return rows


def read_round(cfg: DictConfig, updates: Sequence[Adapter], own: Sequence[Dataset]) -> list[dict[str, Any]]:
    """What the words that updates of the first round gain say of the hospitals' cards.

    Of the ``guesses``, ``occur`` occur in the hospital's cards, ``special`` are its own (:func:`special`); the same
    guesses held against the other hospitals give the two ``elsewhere`` (means), which is what common words give.
    ``chance`` is of blind guesses that occur.
    """
    model, tokenizer = base_model(cfg)
    models.set_adapter(model, first_adapter(cfg))
    shares = np.array([card_shares(tokenizer, cards) for cards in own])
    occur, apart, rows = shares > 0, special(shares), []
    for k, (ids, _) in enumerate(words.gained(model, tokenizer, updates, PROMPTS, COUNT)):
        others = [j for j in range(len(own)) if j != k]
        found = {"hospital": k, "truth": own[k]["specialty"][0], "guesses": len(ids)}
        for name, truth in (("occur", occur), ("special", apart)):
            found[name] = int(truth[k, ids].sum())
            found[f"{name}_elsewhere"] = round(float(np.mean([truth[j, ids].sum() for j in others])), 2)
            found[f"{name}_chance"] = round(float(len(ids) * truth[k].mean()), 2)
        rows.append({**found, "words": " ".join(words.texts(tokenizer, ids))})
    return rows


def _kept(path: Path) -> list[dict[str, Any]] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        logger.warning("%s is damaged (%s) and is made anew", path, error)


def words_grid(seeds: list[int], folder: Path, processes: int) -> None:
    """Attack updates over seeds; write ``privacy_words.csv`` (a row per ``attack``) and ``privacy_words.json``.

    Arguments of :func:`fedllm_helpers.study.audits.privacy_grid`.
    """
    cfg, jobs = config.load("cpu", "federation.threads=1", *SETTINGS), {}
    for seed in seeds:
        seeded = config.load(cfg, f"seed={seed}")
        for rank in sorted({how.rank for how in EXACT.values()}):
            jobs[seed, "row space", rank] = partial(attack_steps, seeded, rank)
        for name in GAINED:
            jobs[seed, "gained", name] = partial(attack_round, seeded, (name,))
    with pool(processes) as workers:
        found = dict(run_all(workers, jobs, "updates"))
    rows = [{"attack": key[1], **row} for key in jobs for row in found[key]]
    folders.write(folder / "privacy_words.csv", pd.DataFrame(rows).to_csv(index=False))
    how = {"row space": {name: dataclasses.asdict(step) for name, step in EXACT.items()}, "gained": GAINED}
    more = {"seeds": seeds, "settings": how, "prompts": PROMPTS, "fingerprint": fingerprint(cfg, seeds=seeds)}
    text = json.dumps(provenance(cfg, **more), indent=1, ensure_ascii=False)
    folders.write(folder / "privacy_words.json", text + "\n")
