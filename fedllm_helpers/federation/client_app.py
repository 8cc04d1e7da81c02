"""Flower ClientApp of one hospital: trains on its own cards, sends back an adapter and a few numbers, never a card."""

import logging
import math
import time
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import data, evaluation, models, training  # a small message waits for nothing of what they import
from fedllm_helpers.adapters import packing
from fedllm_helpers.adapters.records import from_record, to_record
from fedllm_helpers.aggregation import edits, rules
from fedllm_helpers.aggregation.loraxs import factors_of
from fedllm_helpers.communication import compression
from fedllm_helpers.config.runs import settings
from fedllm_helpers.evaluation import at_home, told_scores
from fedllm_helpers.federation import node_settings
from fedllm_helpers.privacy import audit_log, guards, masked_clients, noise, policy, promises
from fedllm_helpers.privacy.masked_clients import ATTEMPT

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
TIMES = 8  # a card stands in a batch at most: a hospital with few cards takes part with the batch of the others


def _masks(context: Context) -> dict[str, float]:
    return noise.orders(settings(context))


def _promised(context: Context) -> bool:
    return noise.promised(settings(context))


def _unscored(context: Context) -> bool:
    return noise.unscored(settings(context))


def _own(context: Context) -> tuple["Dataset", "Dataset"]:
    return node_cards(context, int(context.node_config["partition-id"]))


PROMISED, CLOSED = guards.promised(_masks, _unscored), guards.closed(_promised)
OUTSIDE = [packing.client_mod, audit_log.mod, policy.mod, PROMISED, compression.mod, masked_clients.mod]
MODS = [*OUTSIDE, rules.mod, CLOSED, at_home.mod_for(settings, _own)]
app = ClientApp(mods=MODS)
masked_clients.register(app, lambda context: len(_own(context)[0]))


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Say which hospital this is: the server samples hospitals, not Flower's random node numbers."""
    hospital, hospitals = context.node_config.get("partition-id"), settings(context).federation.num_clients
    if not isinstance(hospital, int) or not 0 <= hospital < hospitals:
        raise ValueError(f"partition-id={hospital}: num-partitions={hospitals} has hospitals 0 to {hospitals - 1}")
    if not node_settings.simulated(context):  # a folder that is not there is said before anyone trains
        told_scores.promised(settings(context), node_cards(context, hospital)[1])
    numbers = {"partition-id": hospital, "num-partitions": hospitals}
    return Message(RecordDict({"metrics": MetricRecord(numbers)}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take the average adapter, train it on the hospital's own cards, and send it back with its numbers.

    Losses are nats per answer token on the first batch of the round, before and after training on it and the others.
    """
    cfg, hospital, start = settings(context), int(context.node_config["partition-id"]), time.perf_counter()
    orders, mine = message.content["config"], node_cards(context, hospital)[0]
    attempt = int(orders.get(ATTEMPT, 0))  # of a masked round; another one trains on other cards, with other noise
    work = _work(cfg, mine, int(orders["server-round"]), hospital, *([attempt] if attempt else []))
    how = {"learning_rate": float(orders["lr"]), "proximal_mu": float(orders.get("proximal-mu", 0.0))}
    model, tokenizer = _given(cfg, message)
    with models.process.cpu_threads(cfg), models.editing.edited(model, edits.edit_of(message)):
        before = _loss(cfg, work.probe)
        with models.editing.only_trained(model, rules.trained(message)):
            record = training.fine_tune(
                model, tokenizer, work.cards, work.settings, **how, trainer=work.trainer, description=None
            )
        after = _loss(cfg, work.probe)
    told = {"partition-id": hospital, "num-examples": len(mine), "examples": work.examples or record.examples}
    if len(work.probe):
        told |= {"tokens": record.tokens, "loss-before": before, "loss-after": after}
        told |= {"train-seconds": record.seconds, "seconds": time.perf_counter() - start}
    content = {"arrays": to_record(models.get_adapter(model)), "metrics": MetricRecord(told), **work.promise}
    return Message(RecordDict(content), reply_to=message)


def _given(cfg: DictConfig, message: Message) -> tuple["PeftModel", "PreTrainedTokenizerBase"]:
    """The model with the adapter that came down, and its tokenizer."""
    model, tokenizer = models.process.base_model(cfg)
    models.cores.check(model, factors_of(message))
    models.set_adapter(model, from_record(message.content["arrays"]))
    return model, tokenizer


@dataclass(frozen=True)
class Work:
    """What a hospital does in a round: its cards, the training's settings, and the cards on which it measures losses.

    Where privacy is promised, there are none of these, and neither losses nor tokens nor seconds leave the hospital;
    with DP-SGD there is a trainer for it, ``examples`` is what its plan expects to draw, not what it drew, and
    ``promise`` tells a hospital's own policy of it.
    """

    cards: "Dataset"
    settings: DictConfig
    probe: "Dataset"
    trainer: partial | None = None
    examples: int = 0
    promise: dict[str, ConfigRecord] = field(default_factory=dict)


def _work(cfg: DictConfig, mine: "Dataset", *seeds: int) -> Work:
    local, (plan, some, owners) = training.round_config(cfg, *seeds), training.guarantees.planned(cfg, mine)
    if plan is None:
        cards = cards_of_round(mine, cfg, *seeds)
        return Work(cards, local, cards.select([]) if noise.silent(cfg) else _first_batch(cards, local))
    trainer = training.dp_sgd.trainer(plan, noise.noise_seed(cfg, 1, *seeds), owners)  # it draws from all cards
    rounds, seeded = cfg.federation.num_rounds, cfg.federation.privacy.noise_seed is not None
    said = promises.promise(plan, plan.steps // rounds, seeded=seeded)
    return Work(some, local, mine.select([]), trainer, round(plan.examples / rounds), said)


def _first_batch(cards: "Dataset", local: DictConfig) -> "Dataset":
    batch = local.train.training_arguments.get("per_device_train_batch_size", 8)
    return cards.select(range(min(len(cards), batch)))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the average adapter on the hospital's own held-out cards: nats per answer token, and how many cards."""
    cfg, hospital = settings(context), int(context.node_config["partition-id"])
    cards, number = node_cards(context, hospital)[1], int(message.content["config"]["server-round"])
    told, promise = {"num-examples": 0, "nll": 0.0}, {}
    if len(cards):
        given = _given(cfg, message)
        with models.process.cpu_threads(cfg), models.editing.edited(given[0], edits.edit_of(message)):
            told, promise = told_scores.told(*given, cards, cfg, noise.noise_seed(cfg, 3, number, hospital))
    metrics = MetricRecord({"partition-id": hospital, **told})
    return Message(RecordDict({"metrics": metrics, **promise}), reply_to=message)


def _loss(cfg: DictConfig, cards: "Dataset") -> float:
    if not len(cards):
        return math.nan
    scores = evaluation.score_answers(*models.process.base_model(cfg), cards, cfg)
    return float(scores.nll.sum() / scores.tokens.sum())


def node_cards(context: Context, hospital: int) -> tuple["Dataset", "Dataset"]:
    """(train, test) cards of this node: those of the folder that its own ``--node-config`` names as ``data``.

    The folder holds ``train.*`` and, to be scored, ``test.*``, of any kind that :func:`fedllm_helpers.data.load_parts`
    reads, with well-known names of columns; nothing that the server sends can point elsewhere, to another column
    neither. A node that is only simulated takes its share of the configured dataset.

    Raises:
        FileNotFoundError: there is no such folder or no such file. The path is written to the node's own log only: what
            an exception says is sent to the server.
        ValueError: a file cannot be read as flashcards; no folder is named, or the node has a setting that is unknown.
    """
    node_settings.check(context)
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


def own_cards(cfg: DictConfig, hospital: int) -> tuple["Dataset", "Dataset"]:
    """(train, test) cards of one hospital, from 0.

    Raises:
        ValueError: the cards cannot be divided as configured.
    """
    train_parts, test_parts = _all_cards(OmegaConf.to_yaml(cfg))
    return train_parts[hospital], test_parts[hospital]


@lru_cache(maxsize=2)
def _all_cards(text: str) -> tuple[list["Dataset"], list["Dataset"]]:
    cfg = OmegaConf.create(text)
    train_cards, test_cards = data.load(cfg)
    how = cfg.federation
    parts = data.partitions.partition(
        train_cards, how.num_clients, how.partition, alpha=how.dirichlet_alpha, seed=cfg.seed
    )
    return parts, data.partitions.partition_like(test_cards, parts)


def check_cards(cfg: DictConfig) -> None:
    """Raise ValueError, in one line and before anyone trains, for hospitals whose cards the settings do not fit."""
    for hospital in range(cfg.federation.num_clients):
        cards, test = own_cards(cfg, hospital)
        told_scores.promised(cfg, test)
        if training.guarantees.planned(cfg, cards)[0] is None:
            batch = len(_first_batch(cards_of_round(cards, cfg, 1, hospital), training.round_config(cfg)))
            if batch > len(cards):
                logger.warning("hospital %d: a batch of %d repeats some of its cards (%d)", hospital, batch, len(cards))


def cards_of_round(cards: "Dataset", cfg: DictConfig, number: int, hospital: int = 0, *more: int) -> "Dataset":
    """The cards that a round trains on: fresh ones while there are any, then the next shuffle, from the seed alone.

    Nothing has to be remembered between rounds, so a run that was killed goes on with the very same cards.

    Args:
        cards: all of the hospital.
        cfg: of the federation; with ``max_steps`` of −1 a round takes all cards.
        number: of the round, from 1.
        hospital, more: mixed into the seed.

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
        [np.random.default_rng([cfg.seed, hospital, epoch, *more]).permutation(len(cards)) for epoch in epochs]
    )
    skipped = first - epochs[0] * len(cards)
    return cards.select(order[skipped : skipped + wanted])
