"""How adapters are combined: the weighted mean, the screening before it, and Flower's strategies around it."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import Strategy
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.screening import Reply, printable
from fedllm_helpers.adapters.wrapping import as_reply
from fedllm_helpers.config.schema import AVERAGING

# Fewer replies than these, and what the strategy promises against f cheats does not hold, or nobody is cut off.
NEEDED: dict[str, Callable[[Any], int]] = {
    "Krum": lambda krum: 2 * krum.num_malicious_nodes + 3,  # Blanchard et al. 2017, arXiv:1703.02757
    "MultiKrum": lambda krum: max(2 * krum.num_malicious_nodes + 3, krum.num_nodes_to_select),
    "Bulyan": lambda bulyan: 4 * bulyan.num_malicious_nodes + 3,  # El Mhamdi et al. 2018, arXiv:1802.07927
    "FedTrimmedAvg": lambda trimmed: math.ceil(1 / trimmed.beta) if trimmed.beta else 1,
}


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


def make_strategy(cfg: DictConfig) -> Strategy:
    """The strategy named in a configuration, with its arguments. Sampling is the server app's: here it takes all."""
    everyone = {"fraction_train": 1.0, "fraction_evaluate": 1.0}
    fewest = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    name, given = cfg.federation.strategy, OmegaConf.to_container(cfg.federation.strategy_arguments)
    if name == "QFedAvg":  # it weights by the loss of the adapter that was sent out
        given = {"train_loss_key": "loss-before", "client_learning_rate": cfg.train.learning_rate_max} | given
    return getattr(strategies, name)(**everyone, **fewest, **given)


def combine(
    strategy: Strategy,
    number: int,
    replies: Iterable[Reply],
    like: Message,
    minimum: int = 1,
    finish: Callable[[Adapter, float], Adapter] | None = None,
) -> tuple[Adapter | None, str]:
    """Combine the usable replies of a round, in the order given, as the strategy does.

    Args:
        strategy: whose ``configure_train`` saw this round.
        number: of the round, from 1.
        replies: screened, ordered by hospital. A strategy that averages gets their weighted mean as one reply, so that
            only one of them is in memory at a time.
        like: a request of the round, to which the messages that the strategy gets are replies.
        minimum: fewer replies than that combine to nothing, and the strategy learns nothing from them.
        finish: makes of the mean, and of the largest share of a reply in it, what the strategy is given, such as the
            mean with noise; for strategies that average.

    Returns:
        The new adapter and ``""``; None and ``""`` where there were too few replies; None and why, where the strategy
        made nothing of them.
    """
    if type(strategy).__name__ in AVERAGING:
        mean, count = _mean(replies, finish)
        messages = [as_reply(mean, like)]
    else:
        messages = [
            as_reply(one.arrays, like, one.numbers["num-examples"], one.numbers["loss-before"]) for one in replies
        ]
        count = len(messages)
    return step(strategy, number, messages) if count >= minimum and count else (None, "")


def step(strategy: Strategy, number: int, messages: list[Message]) -> tuple[Adapter | None, str]:
    """What a strategy makes of a round's messages, float32; or None and why. Then it is as it was before the round."""
    name, before = type(strategy).__name__, dict(vars(strategy))
    needed = NEEDED.get(name, lambda _: 1)(strategy)
    if name not in AVERAGING and len(messages) < needed:
        return None, f"not combined: {name} needs {needed} replies, {len(messages)} came"

    def aggregate() -> Adapter | None:
        """One call of Flower's."""
        arrays, _ = strategy.aggregate_train(number, messages)
        return None if arrays is None else {k: v.astype(np.float32) for k, v in from_record(arrays).items()}

    made, why = tried(name, aggregate)
    if why:
        vars(strategy).update(before)
    return made, why


def tried(name: str, make: Callable[[], Adapter | None]) -> tuple[Adapter | None, str]:
    """What ``make`` returns, if that is a finite adapter; else None, and why in one line."""
    try:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            made = make()
    except Exception as error:  # Flower's strategies raise what they like, and a round may fail
        return None, printable(f"not combined: {name}: {type(error).__name__}: {error}")
    if made is None:
        return None, f"not combined: {name} makes nothing of these replies"
    if not all(np.isfinite(value).all() for value in made.values()):
        return None, f"not combined: {name} made finite adapters into one that is not"
    return made, ""


def _mean(replies: Iterable[Reply], finish: Callable[[Adapter, float], Adapter] | None) -> tuple[Adapter, int]:
    weights: list[float] = []

    def pairs() -> Iterator[tuple[Adapter, float]]:
        """Adapters and their numbers of cards, each reply let go before the next."""
        for reply in replies:
            weights.append(reply.numbers["num-examples"])
            yield reply.arrays, weights[-1]

    rest = pairs()
    first = next(rest, None)
    if first is None:
        return {}, 0
    mean = weighted_mean(itertools.chain([first], rest))
    return finish(mean, max(weights) / sum(weights)) if finish else mean, len(weights)


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
