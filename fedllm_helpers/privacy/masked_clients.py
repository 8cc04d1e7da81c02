"""Secure aggregation on Flower's messages, at a hospital: keys, shares, the mask, and the opening."""

from collections.abc import Callable

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedllm_helpers.adapters.records import Adapter, from_record
from fedllm_helpers.adapters.updates import PASSING, START, update_of
from fedllm_helpers.privacy import secure_aggregation as secure
from fedllm_helpers.privacy.noise import clip

# a hospital's secrets, which are nobody else's and in no checkpoint; the server's part of a message; what it gets
KEPT, SENT, MASKED = f"{PASSING}secrets", "secure", "masked"


def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower client mod: adds fresh keys to the answer to ``query.keys``, and masks what training returns.

    The secrets of a round live in the client's state, which on a deployed node is in the memory of its SuperNode, until
    it reveals its shares or makes new keys.
    """
    kind, given = message.metadata.message_type, message.content.config_records.get(SENT)
    if kind == "query.keys":
        return _publish(message, context, call_next(message, context))
    if kind != "train" or given is None:
        return call_next(message, context)
    del message.content[SENT]
    received, message.content[START] = from_record(message.content["arrays"]), ConfigRecord()
    reply = call_next(message, context)
    if not reply.has_error():
        reply.content["arrays"] = _masked(update_of(reply, received), given, context)
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
    """Answer ``query.shares``: an encrypted share of one's seeds for every hospital of the round.

    Raises:
        ValueError: there are no secrets of this round, or the threshold is too low.
    """
    given = message.content[SENT]
    me, own, public = _secrets(given, context)
    made = secure.make_shares(me, own, public, given["threshold"], given["round"])
    answer = ConfigRecord({"hospitals": list(made), "shares": list(made.values())})
    return Message(RecordDict({SENT: answer}), reply_to=message)


def reveal(message: Message, context: Context) -> Message:
    """Answer ``query.reveal``: one's shares of what takes the masks off the sum; once.

    Raises:
        ValueError: as :func:`fedllm_helpers.privacy.secure_aggregation.reveal`, or the secrets are gone.
    """
    given = message.content[SENT]
    me, own, public = _secrets(given, context)
    del context.state[KEPT]  # a second question, with other survivors, is not answered
    held, survivors = dict(zip(given["makers"], given["shares"], strict=True)), set(given["survivors"])
    opened = secure.reveal(me, own, public, held, survivors, given["round"], given["threshold"])
    answer = ConfigRecord({"hospitals": list(opened), "opened": list(opened.values())})
    return Message(RecordDict({SENT: answer}), reply_to=message)


def _publish(message: Message, context: Context, reply: Message) -> Message:
    if not reply.has_error():
        own, public = secure.make_keys()
        number, hospital = message.content[SENT]["round"], message.content[SENT]["hospital"]
        context.state[KEPT] = ConfigRecord({"round": number, "hospital": hospital, **vars(own)})
        reply.content[SENT] = ConfigRecord(vars(public))
    return reply


def _secrets(given: ConfigRecord, context: Context) -> tuple[int, secure.Secrets, dict[int, secure.Public]]:
    if KEPT not in context.state.config_records:
        raise ValueError("there are no secrets of this round: they were never made, or are revealed already")
    kept = context.state[KEPT]
    if kept["round"] != given["round"]:
        raise ValueError(f"round {given['round']} is asked for, the secrets are of round {kept['round']}")
    own = secure.Secrets(kept["mask_seed"], kept["self_seed"], kept["cipher_key"])
    return kept["hospital"], own, _public(given)


def _masked(update: Adapter, given: ConfigRecord, context: Context) -> ArrayRecord:
    me, own, public = _secrets(given, context)
    if given["clipping-norm"]:
        update = clip(update, given["clipping-norm"])
    code = secure.fixed_point(given["weights"], given["value-range"])
    values = secure.encode(update, dict(zip(given["hospitals"], given["weights"], strict=True))[me], code)
    return ArrayRecord({MASKED: Array(secure.mask(values, me, own, public, given["round"]))})


def _public(given: ConfigRecord) -> dict[int, secure.Public]:
    keys = zip(given["mask_keys"], given["cipher_keys"], given["commitments"], strict=True)
    return {hospital: secure.Public(*key) for hospital, key in zip(given["hospitals"], keys, strict=True)}
