"""A hospital's own policy: what may leave it, whatever a server orders; and its ledger of what has left.

A node that is started with ``--node-config policy=FILE`` follows the YAML file of that name, with the keys of
:class:`fedllm_helpers.config.policies.Policy`; its app has :func:`mod` among its mods, and says in its reply where it
trained by DP-SGD or put noise on a score (:mod:`promises`). What the policy forbids is refused in one line that says
nothing about the cards. Server and settings cannot change it; other *code* could, and a deployed run brings its code
along: it binds those who read or sign that. ``python -m fedllm_helpers.policy FILE`` says what it allows, what is spent
and what is left.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from filelock import Timeout
from flwr.app import ConfigRecord, Context, Message

from fedllm_helpers.adapters.updates import kind_of
from fedllm_helpers.config.policies import Policy, load
from fedllm_helpers.privacy.ledger import MECHANISM, NOISE, ROUND, Ledger
from fedllm_helpers.privacy.masked_clients import LATEST, SENT
from fedllm_helpers.privacy.promises import PROMISE

logger = logging.getLogger(__name__)
TOLD = ("partition-id", "num-examples", "examples", "rule-followed")  # all that leaves beside arrays without losses


class Refused(ValueError):
    """What this hospital's policy forbids; the line may be sent to the server."""


def of(context: Context) -> Policy | None:
    """The policy of a node; None where it was started without one.

    Raises:
        Refused: it has one that cannot be read; why is written to the node's own log alone.
    """
    if "policy" not in context.node_config:
        return None
    try:
        return load(str(context.node_config["policy"]))
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        raise Refused("this hospital's policy cannot be read, and so nothing leaves; see the node's own log") from None


def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower client mod: holds every order against the policy before anything is done; it stands first.

    Raises:
        Refused: the policy forbids what is ordered.
    """
    policy, kind = of(context), kind_of(message)
    if policy is None:
        reply = call_next(message, context)
        if not reply.has_error():
            reply.content.pop(PROMISE, None)  # it is nobody else's
        return reply
    if SENT in message.content.config_records and kind != "query.keys":
        _check_masks(policy, message)
    if kind == "evaluate":
        return _scored(policy, message, context, call_next)
    if kind != "train":
        return call_next(message, context)
    entry = _entry(message)
    with _at_home(), Ledger(policy.ledger).held():
        _check_round(policy, entry)
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    given = reply.content.pop(PROMISE, None)
    _check_noise(policy, given, entry["clipped"])
    if not policy.losses:
        _only_told(reply)
    if entry["masked"]:
        entry["update"] = str(context.state[LATEST]["update"])
    with _at_home():
        _book(policy, context.run_id, entry | {"private": given is not None}, given)
    return reply


def _scored(policy: Policy, message: Message, context: Context, call_next: Callable) -> Message:
    """The reply with a score: as it is where the policy lets scores leave, or with noise that its ε has room for."""
    with_noise = policy.scores is None and policy.largest_epsilon is not None and not policy.least_hospitals
    if not policy.scores and not with_noise:
        raise Refused("this hospital's policy: scores=false")
    ledger = Ledger(policy.ledger)
    if with_noise:
        with _at_home(), ledger.held():
            _check_left(policy)
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    given = reply.content.pop(PROMISE, None)
    if given is None and not policy.scores:
        raise Refused("this hospital's policy: scores leave with noise alone, and this has none")
    if given is not None:
        _check_seed(policy, given)
        with _at_home(), ledger.held():
            ledger.add(_spent(policy, context.run_id, given))
    return reply


@contextmanager
def _at_home() -> Iterator[None]:
    """Say of a ledger that cannot be held or written no more than that: its path stays here."""
    try:
        yield
    except (OSError, Timeout) as error:
        logger.error("%s", error)
        raise Refused("this hospital's ledger cannot be written, and so nothing leaves; see its own log") from None


def _only_told(reply: Message) -> None:
    """Take out of a reply every number and text that is not among :data:`TOLD`."""
    for name, record in [*reply.content.metric_records.items(), *reply.content.config_records.items()]:
        for key in [key for key in record if key not in TOLD]:
            del record[key]
        if not record and name != "metrics":
            del reply.content[name]


def _check_masks(policy: Policy, message: Message) -> None:
    given, least = message.content[SENT], policy.least_hospitals
    if least and min(given["threshold"], len(given["hospitals"])) < least:
        raise Refused(f"this hospital's policy: least_hospitals={least}, and {given['threshold']} would open the sum")
    if least and len(set(given["hospitals"])) < least:
        raise Refused(f"this hospital's policy: least_hospitals={least}, and the list has fewer")
    if given.get("noise-seed", -1) >= 0 and not policy.known_noise:
        raise Refused("this hospital's policy: known_noise=false, and the order names the seed of the noise")
    limit, clip = policy.largest_clipping_norm, given["clipping-norm"]
    if limit and not 0 <= clip <= limit:
        raise Refused(f"this hospital's policy: largest_clipping_norm={limit}, and the order says {clip}")


def _entry(message: Message) -> dict[str, Any]:
    """What the ledger keeps of an order to train."""
    config, given = (message.content.config_records.get(name) for name in ("config", SENT))
    rule, number = message.content.config_records.get("rule", {}), int((config or {}).get("server-round", 0))
    clipped = bool(given and given["clipping-norm"])
    return {"number": number, "masked": given is not None, "rule": str(rule.get("name", "FedIT")), "clipped": clipped}


def _check_round(policy: Policy, entry: dict[str, Any]) -> None:
    if policy.least_hospitals and not entry["masked"]:
        raise Refused(f"this hospital's policy: least_hospitals={policy.least_hospitals}, and this order has no masks")
    if policy.rules is not None and entry["rule"] not in policy.rules:
        raise Refused(f"this hospital's policy: rules={', '.join(policy.rules)}, and the order is {entry['rule']}")
    answered = _known(Ledger(policy.ledger))
    if policy.most_rounds is not None and len(answered) >= policy.most_rounds:
        raise Refused(f"this hospital's policy: most_rounds={policy.most_rounds}, all answered")
    _check_left(policy)
    if "update" in entry and any(one.get("update") == entry["update"] for one in answered):
        raise Refused("this very update left behind masks before, and two sums with it could be told apart")


def _check_left(policy: Policy) -> None:
    _known(Ledger(policy.ledger), NOISE)  # one that is damaged is said without its path
    if policy.largest_epsilon is not None and Ledger(policy.ledger).epsilon(policy.delta) >= policy.largest_epsilon:
        raise Refused(f"this hospital's policy: largest_epsilon={policy.largest_epsilon} over all runs, all spent")


def _known(ledger: Ledger, kind: str = ROUND) -> list[dict[str, Any]]:
    try:
        return ledger.entries(kind)
    except ValueError as error:
        logger.error("%s", error)
        raise Refused("this hospital's ledger cannot be read, and so nothing leaves; see the node's own log") from None


def _check_noise(policy: Policy, given: ConfigRecord | None, clipped: bool) -> None:
    """Hold what an app says of its training against the policy; ``clipped``: the update was, behind masks."""
    if given is None:
        if policy.largest_clipping_norm is not None and not clipped:
            raise Refused(f"this hospital's policy: largest_clipping_norm={policy.largest_clipping_norm}, no clip here")
        for name in ("largest_epsilon", "least_noise_multiplier"):
            if getattr(policy, name) is not None:
                raise Refused(f"this hospital's policy: {name}={getattr(policy, name)}, and this was no DP-SGD")
        return
    _check_seed(policy, given)
    least, most = policy.least_noise_multiplier, policy.largest_clipping_norm
    if least is not None and not given["noise"] >= least:
        raise Refused(f"this hospital's policy: least_noise_multiplier={least}, and this was {given['noise']:.4g}")
    if most is not None and not given["clipping-norm"] <= most:
        raise Refused(
            f"this hospital's policy: largest_clipping_norm={most}, and this was {given['clipping-norm']:.4g}"
        )


def _check_seed(policy: Policy, given: ConfigRecord) -> None:
    if given["seeded"] and not policy.known_noise:
        raise Refused("this hospital's policy: known_noise=false, and the settings name the seed of the noise")


def _book(policy: Policy, run: int, entry: dict[str, Any], given: ConfigRecord | None) -> None:
    """Write down what leaves now, unless another run took what was left while this one trained."""
    ledger = Ledger(policy.ledger)
    with ledger.held():
        _check_round(policy, entry)
        entries = [] if given is None else [_spent(policy, run, given)]
        ledger.add(*entries, {"kind": ROUND, "run": run, **entry})


def _spent(policy: Policy, run: int, given: ConfigRecord) -> dict[str, Any]:
    """The ledger's entry of a mechanism whose result leaves now, unless there is not that much left."""
    mechanism = (given["noise"], given["rate"], given["steps"])
    _known(Ledger(policy.ledger), NOISE)  # one that is damaged is said without its path
    after = Ledger(policy.ledger).epsilon(policy.delta, [mechanism])
    if policy.largest_epsilon is not None and after > policy.largest_epsilon:
        limit = f"largest_epsilon={policy.largest_epsilon} over all runs"
        raise Refused(f"this hospital's policy: {limit}, and with this round it would be {after:.3g}")
    return {"kind": NOISE, "run": run, **dict(zip(MECHANISM, mechanism, strict=True))}
