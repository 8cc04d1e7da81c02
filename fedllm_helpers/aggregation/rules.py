"""What all rules of federated LoRA share, and their one client mod, for any Flower app. Taught in notebook 04.

What of an adapter moves, crosses the network, is drawn from a seed or stays at the client, the server orders in each
message, by a strategy of :mod:`ruled`; :func:`mod` does it and knows no rule. The app reads two things:
:func:`trained`, what a round leaves at rest, and :func:`fedllm_helpers.aggregation.edits.edit_of`, what belongs to the
base model.

Clients of smaller rank hold the model's adapter with zeros in the ranks that they have not, which training leaves at
zero; only their own ranks are sent. All share one scale α/r, whatever their rank.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message

from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.updates import START, kind_of
from fedllm_helpers.aggregation import edits

RULE, FOLLOWED = "rule", "rule-followed"  # the record of orders in a message; in a reply, of which round they were
PERSONAL = "personal factors"  # in a client's state: what never leaves it
FACTORS, STACKS = "factors", "stacks"  # in orders, of LoRA-XS: its factors in short; that arrays cross as one
KEYS = {"A": factors.A, "B": factors.B}
KNOWN = {
    "name",
    "trains",
    "sends",
    "draws",
    "seed",
    "draw",
    "shapes",
    "keeps",
    "rank",
    "full",
    FACTORS,
    STACKS,
    *edits.ORDERS,
}


def chosen(adapter: Adapter, which: str) -> Adapter:
    """The factors named by letters, ``"AB"``, ``"A"``, ``"B"`` or ``""``; all arrays with the first."""
    return adapter if which == "AB" else {k: v for k, v in adapter.items() if any(KEYS[one] in k for one in which)}


def fresh(seed: int, draw: int, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """An adapter as PEFT draws one, A uniform in ±1/√inputs and B zero, from a seed and the number of the draw alone.

    PEFT's own draw depends on the number format in which a machine holds the base model: server and clients would have
    different ones.
    """
    rng, made = np.random.default_rng([seed, 4, draw]), {}
    for key in sorted(shapes):
        bound = shapes[key][1] ** -0.5  # kaiming_uniform with a = √5
        drawn = rng.uniform(-bound, bound, shapes[key]) if factors.A in key else np.zeros(shapes[key])
        made[key] = drawn.astype(np.float32)
    return {key: made[key] for key in shapes}


def shapes_of(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's arrays, by key."""
    return {key: value.shape for key, value in adapter.items()}


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """Factors of so many times the product, float32."""
    return {key: (value * scale).astype(np.float32) if factors.B in key else value for key, value in adapter.items()}


def stacked(adapter: Adapter) -> Adapter:
    """Arrays with as many columns as one, below each other: a name and a header cost more than a small core."""
    made: dict[str, list[np.ndarray]] = {}
    for value in adapter.values():
        made.setdefault(_stack(value.shape[1]), []).append(value)
    return {name: np.concatenate(values) for name, values in made.items()}


def _stack(width: int) -> str:
    return f"{width} columns, stacked: rules.mod takes them apart"


def unstacked(stacks: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """The inverse of :func:`stacked`.

    Raises:
        ValueError: the stacks are of other shapes.
    """
    made, done = {}, dict.fromkeys(stacks, 0)
    for key, (rows, width) in shapes.items():
        name = _stack(width)
        start = done.get(name, 0)
        made[key] = stacks.get(name, np.zeros((0, width), np.float32))[start : start + rows]
        done[name] = start + rows
    if shapes_of(made) != dict(shapes) or any(len(stacks.get(name, ())) != rows for name, rows in done.items()):
        raise ValueError(f"stacks of shapes {list(shapes_of(stacks).values())} are not those of {len(shapes)} cores")
    return made


def trained(message: Message) -> tuple[str, ...] | None:
    """The factors that a round trains, as they stand in the names of parameters; None for all. For a client's app."""
    orders = message.content.config_records.get(RULE)
    return None if orders is None or orders["trains"] == "AB" else tuple(KEYS[one] for one in orders["trains"])


def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower client mod: makes a whole adapter of what came down, and sends of the trained one what the orders say.

    Within masks and compression: it stands last among the mods.

    Raises:
        ValueError: orders that this version does not know, or a factor that this round leaves at rest was trained.
        FloatingPointError: what the client keeps is no longer finite.
    """
    if RULE not in message.content.config_records:
        return call_next(message, context)
    orders = _read(message.content[RULE])
    whole = _whole(from_record(message.content["arrays"]), orders, context)
    message.content["arrays"] = to_record(whole)
    edits.receive(message, orders, context)
    asked = START in message.content
    if asked:
        del message.content[START]
    number, kind = message.content["config"].get("server-round", 0), kind_of(message)
    reply = call_next(message, context)
    if kind != "train" or reply.has_error() or "arrays" not in reply.content.array_records:
        return reply
    adapter = from_record(reply.content["arrays"])
    _check_rest(adapter, whole, orders)
    _keep(adapter, orders, context)
    reply.content["arrays"] = to_record(_sent(adapter, orders))
    if asked:  # from where a mod around this one measures the update
        reply.content[START] = to_record(_sent(whole, orders))
    for record in reply.content.metric_records.values():
        record[FOLLOWED] = number
    return reply


def _read(record: ConfigRecord) -> dict[str, Any]:
    if unknown := sorted(set(record) - KNOWN):
        raise ValueError(f"rules: the server orders {unknown[0]!r}, which this client's mod does not know")
    orders = dict(record)
    if "shapes" in orders:
        orders["shapes"] = {k: tuple(v) for k, v in json.loads(zlib.decompress(orders["shapes"])).items()}
    return orders


def _whole(received: Adapter, orders: dict[str, Any], context: Context) -> Adapter:
    """The adapter that a client trains: what came down, and what it draws or has kept, in the order of the model's."""
    if "draws" in orders:
        drawn = chosen(fresh(orders["seed"], orders["draw"], orders["shapes"]), orders["draws"])
        received = {**(factors.cut(drawn, orders["rank"]) if "rank" in orders else drawn), **received}
    if "keeps" in orders:
        kept = context.state.array_records.get(PERSONAL)
        zeros = {key: np.zeros(shape, np.float32) for key, shape in orders["shapes"].items()}
        received = {**chosen(zeros if kept is None else from_record(kept), orders["keeps"]), **received}
    if STACKS in orders:
        received = unstacked(received, orders["shapes"])
    whole = {key: received[key] for key in orders.get("shapes", received)}
    return factors.padded(whole, orders["full"]) if "full" in orders else whole


def _sent(adapter: Adapter, orders: dict[str, Any]) -> Adapter:
    part = chosen(adapter, orders["sends"])
    if STACKS in orders:
        if part.keys() != orders["shapes"].keys():
            raise ValueError(f"{orders['name']}: the app sends other arrays than came down, such as {min(part)!r}")
        return stacked({key: part[key] for key in orders["shapes"]})
    return factors.cut(part, orders["rank"]) if "rank" in orders else part


def _check_rest(adapter: Adapter, before: Adapter, orders: dict[str, Any]) -> None:
    rest = chosen(before, "".join(one for one in "AB" if one not in orders["trains"]))
    for key, value in rest.items() if orders["trains"] != "AB" else ():
        if key in adapter and not np.allclose(adapter[key], value, rtol=1e-2, atol=1e-6):
            raise ValueError(f"{orders['name']}: {key!r} rests in this round, and it was trained; see rules.trained")


def _keep(adapter: Adapter, orders: dict[str, Any], context: Context) -> None:
    if "keeps" not in orders:
        return
    own = chosen(adapter, orders["keeps"])
    if not all(np.isfinite(value).all() for value in own.values()):
        raise FloatingPointError(f"{orders['keeps']} is no longer finite after this training: the one before is kept")
    context.state[PERSONAL] = to_record(own)
