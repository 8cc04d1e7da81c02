"""How adapters are combined: the weighted mean, and what keeps Flower's strategies from ending or bending a run."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.screening import printable
from fedllm_helpers.adapters.wrapping import COMPARING, Wrapper, as_reply

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


def step(strategy: Strategy, number: int, messages: list[Message]) -> tuple[Adapter | None, str]:
    """What a strategy makes of a round's messages, float32; or None and why. Then it is as it was before the round."""
    name, before = type(strategy).__name__, dict(vars(strategy))
    needed = NEEDED.get(name, lambda _: 1)(strategy)
    if len(messages) < needed:
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


class TooFew(Exception):
    """A round has fewer usable replies than it needs."""


class Enough(Wrapper):
    """A strategy that learns nothing from a round of fewer than ``least`` replies.

    ``closed`` are masked ones; ``setting`` is named where there are too few.
    """

    def __init__(self, strategy: Strategy, least: int, closed: bool = False, setting: str = "") -> None:
        super().__init__(strategy)
        self.least, self.closed, self.setting = least, closed, setting

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the wrapped strategy makes of enough replies; it reads them all before it does anything."""
        try:
            return super().aggregate_train(server_round, self._counted(replies))
        except TooFew as few:
            count = few.args[0]
            kinds = (
                ("masked update arrived", "masked updates arrived")
                if self.closed
                else ("usable reply", "usable replies")
            )
            came = f"not {'opened' if self.closed else 'combined'}: {count} {kinds[count != 1]}"
            needed = f"{came}, {self.least} are needed{self.setting and f' ({self.setting})'}"
            self.why = needed if self.closed or count else ""
            return None, None

    def _counted(self, replies: Iterable[Message]) -> Iterator[Message]:
        count = 0
        for reply in replies:
            yield reply
            count += 1
        if count < self.least:
            raise TooFew(count)


class Careful(Wrapper):
    """One of Flower's strategies, whose failures end no run: it is as it was before a round of which it makes nothing.

    It asks in the order of the grid's nodes. If it averages, it gets the weighted mean as one reply, so that only one
    of them is in memory at a time; else all of them, and never fewer than its promise needs.
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages, in order."""
        return in_order(super().configure_train(server_round, arrays, config, grid), grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As :meth:`configure_train`."""
        return in_order(super().configure_evaluate(server_round, arrays, config, grid), grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One step of the strategy; ``why`` says where there is none."""
        given = ((from_record(reply.content["arrays"]), numbers(reply)) for reply in replies)
        if type(self.strategy).__name__ not in COMPARING:
            first = next(given, None)
            pairs = ((arrays, number["num-examples"]) for arrays, number in itertools.chain([first], given))
            messages = [] if first is None else [self.as_one(weighted_mean(pairs))]
        else:
            messages = [
                as_reply(arrays, self.request, number["num-examples"], number.get("loss-before", 0.0))
                for arrays, number in given
            ]
        if not messages:
            return None, None
        made, self.why = step(self.strategy, server_round, messages)
        return None if made is None else to_record(made), None

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean of ``nll``, weighted by ``num-examples``; None without any."""
        scored = [(number["num-examples"], number["nll"]) for number in map(numbers, replies)]
        total = sum(cards for cards, _ in scored)
        return MetricRecord({"nll": sum(cards * nll for cards, nll in scored) / total}) if total else None


def in_order(messages: Iterable[Message], grid: Grid) -> list[Message]:
    """Messages in the order of a grid's nodes: Flower's strategies draw them by chance."""
    places = {node: place for place, node in enumerate(grid.get_node_ids())}
    return sorted(messages, key=lambda message: places[message.metadata.dst_node_id])


def numbers(reply: Message) -> MetricRecord:
    """The numbers of a reply that was screened."""
    return next(iter(reply.content.metric_records.values()))


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
