"""Flower ClientApp of one hospital: trains on its own cards, sends back an adapter and a few numbers, never a card."""

import logging
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import data, models, training
from fedllm_helpers.adapters import packing
from fedllm_helpers.adapters.records import to_record
from fedllm_helpers.adapters.updates import START
from fedllm_helpers.aggregation import edits, rules
from fedllm_helpers.communication import compression
from fedllm_helpers.config.runs import settings
from fedllm_helpers.data import partitions
from fedllm_helpers.evaluation.scoring import score_answers
from fedllm_helpers.federation.process import cpu_threads
from fedllm_helpers.models import editing
from fedllm_helpers.models.process import base_model
from fedllm_helpers.privacy import accounting, masked_clients, noise
from fedllm_helpers.training import guarantees

logger = logging.getLogger(__name__)
TIMES = 8  # a card stands in a batch at most: a hospital with few cards takes part with the batch of the others
app = ClientApp(mods=[packing.client_mod, compression.mod, masked_clients.mod])
masked_clients.register(app, lambda context: len(node_cards(context, int(context.node_config["partition-id"]))[0]))


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Say which hospital this is: the server samples hospitals, not Flower's random node numbers."""
    hospital, hospitals = context.node_config.get("partition-id"), settings(context).federation.num_clients
    if not isinstance(hospital, int) or not 0 <= hospital < hospitals:
        raise ValueError(f"partition-id={hospital}: num-partitions={hospitals} has hospitals 0 to {hospitals - 1}")
    if "data" in context.node_config:  # a folder that is not there is said before anyone trains
        node_cards(context, hospital)
    numbers = {"partition-id": hospital, "num-partitions": hospitals}
    return Message(RecordDict({"metrics": MetricRecord(numbers)}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take the average adapter, train it on the hospital's own cards, and send it back with its numbers.

    Losses are nats per answer token on the first batch of the round, before and after training on it and the others;
    where privacy is promised, neither they nor the tokens, the seconds or the cards drawn leave the hospital.
    """
    cfg, hospital, start = settings(context), int(context.node_config["partition-id"]), time.perf_counter()
    orders, mine = message.content["config"], node_cards(context, hospital)[0]
    number, mu = int(orders["server-round"]), float(orders.get("proximal-mu", 0.0))
    local, plan = training.round_config(cfg, number, hospital), guarantees.record_privacy(cfg, len(mine))
    cards = mine if plan else cards_of_round(mine, cfg, number, hospital)  # DP-SGD draws from all of them
    trainer = _private_trainer(cfg, plan, number, hospital) if plan else None
    losses = [] if noise.silent(cfg) else [_first_batch(cards, local)]
    model, tokenizer = base_model(cfg)
    received = rules.received(cfg, message, context)
    models.set_adapter(model, received)
    with cpu_threads(cfg), editing.edited(model, edits.held(message, context)):
        before = [_loss(cfg, probe) for probe in losses]
        options = {"learning_rate": float(orders["lr"]), "proximal_mu": mu, "trainer": trainer}
        with editing.only_trained(model, rules.trained(cfg, number)):
            record = training.fine_tune(model, tokenizer, cards, local, **options, description=None)
        after, adapter = [_loss(cfg, probe) for probe in losses], models.get_adapter(model)
    rules.keep(cfg, adapter, context)
    metrics = {"partition-id": hospital, "num-examples": len(mine)}
    metrics["examples"] = record.examples if plan is None else round(plan.examples / cfg.federation.num_rounds)
    if losses:
        metrics |= {"tokens": record.tokens, "loss-before": before[0], "loss-after": after[0]}
        metrics |= {"train-seconds": record.seconds, "seconds": time.perf_counter() - start}
    records = {"arrays": to_record(rules.up(cfg, adapter, number, hospital)), "metrics": MetricRecord(metrics)}
    if START in message.content:  # a mod asks from where the update is measured
        records[START] = to_record(rules.up(cfg, received, number, hospital))
    return Message(RecordDict(records), reply_to=message)


def _private_trainer(cfg: DictConfig, plan: accounting.RecordPrivacy, number: int, hospital: int) -> partial:
    from fedllm_helpers.training import (
        dp_sgd,  # Opacus takes a second to import, and a deployed client is a new process each time
    )

    return dp_sgd.trainer(plan, noise.noise_seed(cfg, 1, number, hospital))


def _first_batch(cards: Dataset, local: DictConfig) -> Dataset:
    batch = local.train.training_arguments.get("per_device_train_batch_size", 8)
    return cards.select(range(min(len(cards), batch)))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the average adapter on the hospital's own held-out cards: nats per answer token, and how many cards."""
    cfg, hospital = settings(context), int(context.node_config["partition-id"])
    cards, metrics = node_cards(context, hospital)[1], {"partition-id": hospital, "num-examples": 0, "nll": 0.0}
    edit = edits.held(message, context)  # whatever there is to score: the server counts on it
    if len(cards):
        model, _ = base_model(cfg)
        models.set_adapter(model, rules.received(cfg, message, context))
        with cpu_threads(cfg), editing.edited(model, edit):
            metrics |= {"num-examples": len(cards), "nll": _loss(cfg, cards)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def _loss(cfg: DictConfig, cards: Dataset) -> float:
    scores = score_answers(*base_model(cfg), cards, cfg)
    return float(scores.nll.sum() / scores.tokens.sum())


def node_cards(context: Context, hospital: int) -> tuple[Dataset, Dataset]:
    """(train, test) cards of this node: those of the folder that its own ``--node-config`` names as ``data``.

    The folder holds ``train.*`` and, to be scored, ``test.*``, of any kind that :func:`fedllm_helpers.data.load_parts`
    reads, with well-known names of columns; nothing that the server sends can point elsewhere, to another column
    neither. A node without a folder takes its share of the configured dataset, as in one process.

    Raises:
        FileNotFoundError: there is no such folder or no such file. The path is written to the node's own log only: what
            an exception says is sent to the server.
        ValueError: a file cannot be read as flashcards.
    """
    if "data" not in context.node_config:
        return own_cards(settings(context), hospital)
    try:
        folder = Path(str(context.node_config["data"])).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder at {folder}")
        train, test = data.load_parts(str(folder.absolute()))
        return train, train.select([]) if test is None else test
    except Exception as error:  # of whatever kind: it may quote a card or a path, and would be sent to the server
        logger.error("hospital %d: %s", hospital, error)
        said = f"hospital {hospital}: the cards in its node-config's data folder cannot be read; see the node's own log"
        raise (FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError)(said) from None


def own_cards(cfg: DictConfig, hospital: int) -> tuple[Dataset, Dataset]:
    """(train, test) cards of one hospital, from 0.

    Raises:
        ValueError: the cards cannot be divided as configured.
    """
    train_parts, test_parts = _all_cards(OmegaConf.to_yaml(cfg))
    return train_parts[hospital], test_parts[hospital]


@lru_cache(maxsize=2)
def _all_cards(text: str) -> tuple[list[Dataset], list[Dataset]]:
    cfg = OmegaConf.create(text)
    train_cards, test_cards = data.load(cfg)
    how = cfg.federation
    parts = partitions.partition(train_cards, how.num_clients, how.partition, alpha=how.dirichlet_alpha, seed=cfg.seed)
    return parts, partitions.partition_like(test_cards, parts)


def check_cards(cfg: DictConfig) -> None:
    """Raise ValueError, in one line and before anyone trains, for hospitals whose cards the settings do not fit."""
    for hospital in range(cfg.federation.num_clients):
        cards = own_cards(cfg, hospital)[0]
        if guarantees.record_privacy(cfg, len(cards)) is None:
            batch = len(_first_batch(cards_of_round(cards, cfg, 1, hospital), training.round_config(cfg)))
            if batch > len(cards):
                logger.warning("hospital %d: a batch of %d repeats some of its cards (%d)", hospital, batch, len(cards))


def cards_of_round(cards: Dataset, cfg: DictConfig, number: int, hospital: int = 0) -> Dataset:
    """The cards that a round trains on: fresh ones while there are any, then the next shuffle, from the seed alone.

    Nothing has to be remembered between rounds, so a run that was killed goes on with the very same cards.

    Args:
        cards: all of the hospital.
        cfg: of the federation; with ``max_steps`` of −1 a round takes all cards.
        number: of the round, from 1.
        hospital: mixed into the seed.

    Raises:
        ValueError: a batch is many times larger than the hospital.
    """
    arguments = training.round_config(cfg).train.training_arguments
    steps, batch = arguments.get("max_steps", -1), arguments.get("per_device_train_batch_size", 8)
    if steps < 1:
        return cards
    if batch > TIMES * len(cards):
        raise ValueError(
            f"federation.training_arguments.per_device_train_batch_size={batch}: hospital {hospital} has {len(cards)} "
            f"cards, and each would stand more than {TIMES} times in a batch; allowed are 1 to that"
        )
    wanted = steps * batch * arguments.get("gradient_accumulation_steps", 1)
    first, last = (number - 1) * wanted, number * wanted
    epochs = range(first // len(cards), (last - 1) // len(cards) + 1)
    order = np.concatenate(
        [np.random.default_rng([cfg.seed, hospital, epoch]).permutation(len(cards)) for epoch in epochs]
    )
    skipped = first - epochs[0] * len(cards)
    return cards.select(order[skipped : skipped + wanted])
