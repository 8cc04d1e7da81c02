"""How adapters are combined: the weighted mean, the screening before it, and Flower's strategies around it."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import Strategy
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import factors, privacy, rule_checks
from fedllm_helpers.messages import from_record, to_record
from fedllm_helpers.models import Adapter
from fedllm_helpers.nodes import reason

# These need the mean of the replies alone: it is summed up while they come, one in memory. The others compare them all.
AVERAGING = ("FedAvg", "FedAvgM", "FedProx", "FedAdagrad", "FedAdam", "FedYogi")


def weighted_mean(adapters: Iterable[tuple[Adapter, float]]) -> Adapter:
    """Federated averaging: Σ nₖ wₖ / Σ nₖ (McMahan et al. 2017, arXiv:1602.05629). Taught in notebook 03.

    The sum runs in float64, in the order given, and holds one adapter at a time.

    Args:
        adapters: pairs of an adapter and its weight, such as the number of its cards.

    Returns:
        Arrays of the first adapter's keys, shapes and dtypes.

    Raises:
        ValueError: no adapter, keys or shapes that differ, a weight below 0 or not finite, or weights that sum to 0.
    """
    total, sums, dtypes = 0.0, {}, {}
    for adapter, weight in adapters:
        if not sums:
            sums = {key: np.zeros(value.shape) for key, value in adapter.items()}
            dtypes = {key: value.dtype for key, value in adapter.items()}
        reason = difference(adapter, {key: value.shape for key, value in sums.items()})
        if reason:
            raise ValueError(f"adapters cannot be averaged: {reason}")
        factors.shares([weight, 1.0])  # finite, and from 0
        total += weight
        for key, value in adapter.items():
            sums[key] += weight * value.astype(np.float64)
    if not sums or total <= 0:
        raise ValueError("there is nothing to average: no adapter, or weights that sum to 0")
    return {key: (value / total).astype(dtypes[key]) for key, value in sums.items()}


def difference(adapter: Adapter, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """What is wrong with an adapter's keys and shapes, in a few words; None where they are as they should be."""
    if adapter.keys() != shapes.keys():
        odd = sorted(adapter.keys() ^ shapes.keys())
        return f"{len(odd)} keys are missing or unknown, the first is {odd[0]!r}"
    wrong = next((key for key, shape in shapes.items() if adapter[key].shape != shape), None)
    return wrong and f"{wrong!r} has shape {adapter[wrong].shape}, not {shapes[wrong]}"


def fault(reply: Message, adapter: Adapter, silent: bool = False) -> str | None:
    """Why a reply to a training message cannot be used, in one line; None where it can.

    Args:
        reply: of a client.
        adapter: as it was sent out: a reply has its keys, shapes and dtypes.
        silent: hospitals keep their losses to themselves.
    """
    if reply.has_error():
        return f"it failed: {reason(reply).splitlines()[-1]}"
    records = reply.content
    if len(records.array_records) != 1 or len(records.metric_records) != 1:
        return "it does not hold one adapter and one set of numbers"
    metrics, given = next(iter(records.metric_records.values())), next(iter(records.array_records.values()))
    examples = metrics.get("num-examples")
    if not isinstance(examples, (int, float)) or not math.isfinite(examples) or examples <= 0:
        return f"its num-examples is {examples}, not a number above 0"
    loss = 0.0 if silent else metrics.get("loss-before")
    if not isinstance(loss, (int, float)) or not math.isfinite(loss):
        return f"its loss-before is {loss}, not a finite number"
    try:
        sent = from_record(given)
    except ValueError as error:
        return f"its arrays cannot be read: {error}"
    different = difference(sent, {key: value.shape for key, value in adapter.items()})
    if different:
        return different
    for key, value in sent.items():
        if value.dtype != adapter[key].dtype:
            return f"{key!r} is {value.dtype}, not {adapter[key].dtype}"
        if not np.isfinite(value).all():
            return f"{key!r} holds values that are not finite"
    return None


def tidied(reply: Message, adapter: Adapter) -> Message:
    """A usable reply with its arrays in the order of ``adapter`` and the numbers that strategies use, nothing else.

    Some strategies go by place and not by key, and all of them end the run where two clients' numbers have other names.
    """
    metrics, given = next(iter(reply.content.metric_records.values())), next(iter(reply.content.array_records.values()))
    numbers = {name: float(metrics.get(name, 0.0)) for name in ("num-examples", "loss-before")}
    arrays = ArrayRecord({key: given[key] for key in adapter})
    reply.content = RecordDict({"arrays": arrays, "metrics": MetricRecord(numbers)})
    return reply


def make_strategy(cfg: DictConfig) -> Strategy:
    """The strategy named in a configuration, with its arguments. Sampling is the server app's: here it takes all.

    Raises:
        ValueError: an argument that the strategy does not know.
    """
    everyone = {"fraction_train": 1.0, "fraction_evaluate": 1.0}
    fewest = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    name, given = cfg.federation.strategy, OmegaConf.to_container(cfg.federation.strategy_arguments)
    privacy.check(cfg), rule_checks.check(cfg)
    how = cfg.federation
    hidden = how.privacy.client.noise_multiplier is not None or how.secure_aggregation.threshold is not None
    if hidden and name not in AVERAGING:
        raise ValueError(
            f"federation.strategy={name}: it compares replies, and noise or masks need a mean; allowed are "
            f"{', '.join(AVERAGING)}"
        )
    if cfg.federation.compression.keep < 1 and name not in AVERAGING:
        raise ValueError(
            f"federation.compression.keep={cfg.federation.compression.keep} with {name}: it compares replies number by "
            f"number, and few were sent by several; allowed are 1, or one of {', '.join(AVERAGING)}"
        )
    if name == "QFedAvg":  # it weights by the loss of the adapter that was sent out
        given = {"train_loss_key": "loss-before", "client_learning_rate": cfg.train.learning_rate_max} | given
    for key, value in given.items():
        if key in everyone or key in fewest or (key.endswith("_key") and key != "train_loss_key"):
            raise ValueError(f"federation.strategy_arguments.{key}: this is the server app's; leave it out")
        if key != "train_loss_key" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"federation.strategy_arguments.{key}={value}: allowed are numbers")
    try:
        return getattr(strategies, name)(**everyone, **fewest, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"federation.strategy_arguments={given} of {name}: {error}") from None


def combine(
    strategy: Strategy,
    number: int,
    replies: Iterable[Message],
    minimum: int = 1,
    finish: Callable[[Adapter, float], Adapter] | None = None,
) -> Adapter | None:
    """Combine the usable replies of a round, in the order given, as the strategy does.

    Args:
        strategy: whose ``configure_train`` saw this round.
        number: of the round, from 1.
        replies: screened, ordered by hospital. A strategy that averages gets their weighted mean as one reply, so that
            only one of them is in memory at a time.
        minimum: fewer replies than that combine to nothing, and the strategy learns nothing from them.
        finish: makes of the mean, and of the largest share of a reply in it, what the strategy is given, such as the
            mean with noise; for strategies that average.

    Returns:
        The new adapter; None where there were too few replies.
    """
    if type(strategy).__name__ in AVERAGING:
        replies, count = _mean_reply(replies, finish)
    else:
        replies = list(replies)
        count = len(replies)
    if count < minimum or not count:
        return None
    arrays, _ = strategy.aggregate_train(number, replies)
    return None if arrays is None else {key: value.astype(np.float32) for key, value in from_record(arrays).items()}


def _mean_reply(
    replies: Iterable[Message], finish: Callable[[Adapter, float], Adapter] | None
) -> tuple[list[Message], int]:
    shell: list[Message] = []  # the first reply, emptied: the mean goes into it
    weights: list[float] = []

    def pairs() -> Iterator[tuple[Adapter, float]]:
        """Adapters and their numbers of cards, each reply let go before the next."""
        for reply in replies:
            numbers, arrays = next(iter(reply.content.metric_records.values())), reply.content.array_records
            if not shell:
                shell.append(reply)
                reply.content = RecordDict()
            weights.append(float(numbers["num-examples"]))
            yield from_record(next(iter(arrays.values()))), weights[-1]

    rest = pairs()
    first = next(rest, None)
    if first is None:
        return [], 0
    mean = weighted_mean(itertools.chain([first], rest))
    mean = finish(mean, max(weights) / sum(weights)) if finish else mean
    shell[0].content = RecordDict({"arrays": to_record(mean), "metrics": MetricRecord({"num-examples": 1.0})})
    return shell, len(weights)


def strategy_state(strategy: Strategy) -> tuple[dict[str, np.ndarray], dict[str, list]]:
    """What a strategy remembers between rounds, such as the moments of FedAdam.

    Returns:
        Arrays by ``"attribute/key"``; and by attribute ``[kind, keys in order]``, the kind dict, list or record.
    """
    arrays, kinds = {}, {}
    for name, value in vars(strategy).items():
        if isinstance(value, ArrayRecord):
            items, kind = from_record(value), "record"
        elif value and isinstance(value, dict) and all(isinstance(item, np.ndarray) for item in value.values()):
            items, kind = value, "dict"
        elif value and isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value):
            items, kind = {str(place): item for place, item in enumerate(value)}, "list"
        else:
            continue
        arrays |= {f"{name}/{key}": item for key, item in items.items()}
        kinds[name] = [kind, list(items)]
    return arrays, kinds


def restore_strategy(strategy: Strategy, arrays: dict[str, np.ndarray], kinds: dict[str, list]) -> None:
    """Give a fresh strategy what :func:`strategy_state` took from another."""
    made: dict[str, Any] = {"dict": dict, "list": lambda items: list(items.values()), "record": to_record}
    for name, (kind, keys) in kinds.items():
        setattr(strategy, name, made[kind]({key: arrays[f"{name}/{key}"] for key in keys}))
