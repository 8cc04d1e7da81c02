"""Secure aggregation on Flower's messages, at a hospital: keys, shares, the mask, and the opening.

A mask hides one update, once. So each step of a round is answered once, and in its order; what the server says of the
others, their keys, their weights and the threshold, has to stay what it was when shares were made; and once a client
has made keys in a run, it trains for no order without masks.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedllm_helpers.adapters.records import Adapter, from_record
from fedllm_helpers.adapters.updates import PASSING, START, kind_of, update_of
from fedllm_helpers.privacy import secure_aggregation as secure
from fedllm_helpers.privacy.noise import clip, whole_share

# a hospital's secrets, which are nobody else's and in no checkpoint; the last round for which it masked an update; the
# server's part of a message; what it gets
KEPT, LATEST, SENT, MASKED = f"{PASSING}secrets", f"{PASSING}masked round", "secure", "masked"

# in orders, and in a message's ``config`` where it is not 0: a client's app takes other examples, or another seed
ATTEMPT = "attempt"


def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower client mod: adds fresh keys to the answer to ``query.keys``, and masks what training returns.

    The secrets of a round live in the client's state, which on a deployed node is in the memory of its SuperNode, until
    it reveals its shares or makes new keys.

    Raises:
        ValueError: an order to train without masks after keys were made, a second one under the same keys, or one whose
            hospitals are others than those that got shares. Nothing is trained.
    """
    kind, given = kind_of(message), message.content.config_records.get(SENT)
    if kind == "query.keys":
        return _publish(message, context, call_next)
    if kind != "train":
        return call_next(message, context)
    if given is None:
        if {KEPT, LATEST} & set(context.state):
            raise ValueError("this run has masks, and this order to train has none: nothing is sent")
        return call_next(message, context)
    _check_orders(given, context, message.content.config_records.get("config", {}))
    del message.content[SENT]
    received, message.content[START] = from_record(message.content["arrays"]), ConfigRecord()
    reply = call_next(message, context)
    if not reply.has_error():
        reply.content["arrays"] = _masked(update_of(reply, received), given, context)
        if len(reply.content.array_records) > 1:
            raise ValueError("a reply to a masked order has arrays beside the update, which nothing would mask")
    return reply


def register(app: ClientApp, examples: Callable[[Context], int]) -> None:
    """Let a ClientApp answer what masks ask for: keys, shares, and the opening.

    Args:
        app: with :func:`mod` among its mods.
        examples: how many examples a client trains on: the weight of its update, in a sum that nobody can take apart.
    """

    @app.query("keys")
    def keys(message: Message, context: Context) -> Message:
        """Say how many examples one trains on; the mod adds the keys."""
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": examples(context)})}), reply_to=message)

    app.query("shares")(shares)
    app.query("reveal")(reveal)


def shares(message: Message, context: Context) -> Message:
    """Answer ``query.shares``: an encrypted share of one's seeds for every hospital of the round; once.

    Raises:
        ValueError: there are no secrets of this round, the threshold is too low, or shares were made before.
    """
    given = message.content[SENT]
    me, own, public = _secrets(given, context)
    kept = context.state[KEPT]
    if "listed" in kept:
        raise ValueError(f"round {given['round']}: shares were made already, and are made once")
    if len(set(public.values())) < len(public):
        raise ValueError(f"round {given['round']}: two hospitals have the same keys")
    if set(given["weights"]) != {1} and given["weights"][given["hospitals"].index(me)] != kept["examples"]:
        raise ValueError(f"round {given['round']}: the weight of this hospital is not what it said")
    made = secure.make_shares(me, own, public, given["threshold"], given["round"])
    kept["listed"], kept["agreed"] = _members(given), _agreed(given)
    answer = ConfigRecord({"hospitals": list(made), "shares": list(made.values())})
    return Message(RecordDict({SENT: answer}), reply_to=message)


def reveal(message: Message, context: Context) -> Message:
    """Answer ``query.reveal``: one's shares of what takes the masks off the sum; once.

    Raises:
        ValueError: as :func:`fedllm_helpers.privacy.secure_aggregation.reveal`, or the secrets are gone, no update was
            masked with them, or the hospitals are others than those among whom it was.
    """
    given = message.content[SENT]
    me, own, public = _secrets(given, context)
    if context.state[KEPT].get("used") != _members(given) or context.state[KEPT]["agreed"] != _agreed(given):
        raise ValueError(f"round {given['round']}: hospitals or threshold are not those of the masked update")
    del context.state[KEPT]  # a second question, with other survivors, is not answered
    held, survivors = dict(zip(given["makers"], given["shares"], strict=True)), set(given["survivors"])
    opened = secure.reveal(me, own, public, held, survivors, given["round"], given["threshold"])
    answer = ConfigRecord({"hospitals": list(opened), "opened": list(opened.values())})
    return Message(RecordDict({SENT: answer}), reply_to=message)


def _publish(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    orders = message.content[SENT]
    moment = [orders["round"], orders.get(ATTEMPT, 0)]
    before = context.state.config_records.get(LATEST, {}).get("moment", [-1, 0])
    if moment <= before:
        raise ValueError(f"round {moment[0]}, attempt {moment[1]}: a masked update of it, or of a later one, has left")
    reply = call_next(message, context)
    if not reply.has_error():
        own, public = secure.make_keys()
        place = {"round": moment[0], ATTEMPT: moment[1], "hospital": orders["hospital"]}
        said = int(reply.content["metrics"]["num-examples"])
        context.state[KEPT] = ConfigRecord({**place, **vars(own), "examples": said})
        reply.content[SENT] = ConfigRecord(vars(public))
    return reply


def _secrets(given: ConfigRecord, context: Context) -> tuple[int, secure.Secrets, dict[int, secure.Public]]:
    if KEPT not in context.state.config_records:
        raise ValueError("there are no secrets of this round: they were never made, or are revealed already")
    kept = context.state[KEPT]
    if kept["round"] != given["round"] or kept[ATTEMPT] != given.get(ATTEMPT, 0):
        raise ValueError(f"round {given['round']} is asked for, the secrets are of round {kept['round']}")
    own, public = secure.Secrets(kept["mask_seed"], kept["self_seed"], kept["cipher_key"]), _public(given)
    if public.get(kept["hospital"]) != secure.public_half(own):
        raise ValueError(f"round {given['round']}: this hospital is not in the list, or with other keys than its own")
    return kept["hospital"], own, public


def _check_orders(given: ConfigRecord, context: Context, config: Mapping[str, Any]) -> None:
    _secrets(given, context)
    kept, number = context.state[KEPT], given["round"]
    trained = [config.get("server-round", number), config.get(ATTEMPT, 0)]
    if trained != [number, given.get(ATTEMPT, 0)]:
        raise ValueError(f"round {number}: the order to train is of round {trained[0]}, attempt {trained[1]}")
    if not all(math.isfinite(given[name]) and given[name] >= 0 for name in ("clipping-norm", "noise-multiplier")):
        raise ValueError(f"round {number}: a clipping norm or a noise multiplier is no number from 0")
    if "used" in kept:
        raise ValueError(f"round {number}: these keys have masked an update already, and a mask is used once")
    if "listed" not in kept:
        raise ValueError(f"round {number}: no shares were made of these keys, and nobody could open the sum")
    if not set(_members(given)) <= set(kept["listed"]) or kept["agreed"] != _agreed(given):
        raise ValueError(f"round {number}: hospitals, weights or threshold are not those for which shares were made")
    if len(given["hospitals"]) < given["threshold"]:
        raise ValueError(f"round {number}: {len(given['hospitals'])} hospitals, {given['threshold']} are needed")


def _members(given: ConfigRecord) -> list[str]:
    """One text for each hospital in the orders of a round: its number, its weight and its keys."""
    keys = zip(given["mask_keys"], given["cipher_keys"], given["commitments"], strict=True)
    whole = zip(given["hospitals"], given["weights"], keys, strict=True)
    return [hashlib.sha256(f"{k} {weight} {b''.join(some).hex()}".encode()).hexdigest() for k, weight, some in whole]


def _agreed(given: ConfigRecord) -> str:
    names = ("round", "threshold", "value-range", "clipping-norm", "noise-multiplier", "noise-seed")
    return json.dumps([given[name] for name in names])


def spread(weights: Sequence[int], clipping_norm: float, noise_multiplier: float) -> float:
    """The standard deviation of the noise in a sum of weighted updates: of what the heaviest client can move it by."""
    return noise_multiplier * clipping_norm * max(weights)


def label(given: ConfigRecord) -> str:
    """What the masks of a round are drawn for: among whom, with which weights, threshold, range, clip and noise.

    Hospitals that were told different things mask for different sums, and none of them opens.
    """
    return hashlib.sha256(json.dumps([_members(given), _agreed(given)]).encode()).hexdigest()


def _masked(update: Adapter, given: ConfigRecord, context: Context) -> ArrayRecord:
    me, own, public = _secrets(given, context)
    if given["clipping-norm"]:
        update = clip(update, given["clipping-norm"])
    wide = spread(given["weights"], given["clipping-norm"], given["noise-multiplier"])
    code = secure.fixed_point(given["weights"], given["value-range"], wide)
    values = secure.encode(update, dict(zip(given["hospitals"], given["weights"], strict=True))[me], code)
    known = hashlib.sha256(values.tobytes()).hexdigest()  # before any noise: for a policy that knows what has left
    if wide:
        rounding = given["noise-multiplier"] * math.sqrt(len(values)) / 2  # of what rounding can add to an update
        numbers = (given["noise-seed"], 2, me, given["round"], given.get(ATTEMPT, 0))
        seed = np.random.SeedSequence(None if given["noise-seed"] < 0 else numbers)
        steps = (wide * 2.0**code.bits + rounding, given["threshold"], len(values))
        values = values + whole_share(*steps, np.random.default_rng(seed)).astype(np.uint32)
    context.state[KEPT]["used"] = _members(given)
    moment = [given["round"], given.get(ATTEMPT, 0)]
    context.state[LATEST] = ConfigRecord({"moment": moment, "update": known})
    return ArrayRecord({MASKED: Array(secure.mask(values, me, own, public, label(given)))})


def _public(given: ConfigRecord) -> dict[int, secure.Public]:
    if len(set(given["hospitals"])) < len(given["hospitals"]):
        raise ValueError(f"round {given['round']}: a hospital is in the list twice")
    keys = zip(given["mask_keys"], given["cipher_keys"], given["commitments"], strict=True)
    return {hospital: secure.Public(*key) for hospital, key in zip(given["hospitals"], keys, strict=True)}
