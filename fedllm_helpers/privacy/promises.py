"""A mod that lets nothing leave a client but what was trained by a plan of DP-SGD, within the client's own limit."""

from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message

from fedllm_helpers import limits
from fedllm_helpers.privacy.accounting import RecordPrivacy

PROMISE = "promise"  # the record of a reply in which an app says by which plan it was trained; it stays at the client
Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


def promise(plan: RecordPrivacy) -> dict[str, ConfigRecord]:
    """What an app puts into its reply for :func:`only_private`; a private trainer makes it, once it has trained."""
    return {PROMISE: ConfigRecord({"epsilon": plan.epsilon, "delta": plan.delta, "noise": plan.noise_multiplier})}


def only_private(most_epsilon: float) -> Mod:
    """A mod for a client that decides for itself: replies to training leave it only with a promise within its limit.

    Args:
        most_epsilon: the largest ε of all rounds together that this client allows, whatever the server asks for.

    Raises:
        ValueError: a limit that is not above 0; and, by the mod, a reply that follows no plan, or one beyond the limit.
            The line says nothing about the client's data.
    """
    limits.number("most_epsilon", most_epsilon)

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """Flower client mod: the reply as it is, without its promise; or an error in its place."""
        reply = call_next(message, context)
        if message.metadata.message_type != "train" or reply.has_error():
            return reply
        given = reply.content.config_records.get(PROMISE)
        if given is None:
            raise ValueError("what was trained here follows no plan of DP-SGD: nothing is sent")
        if not (given["noise"] > 0 and given["epsilon"] <= most_epsilon):
            raise ValueError(
                f"what was trained here promises no ε within this client's limit, {most_epsilon}: not sent"
            )
        del reply.content[PROMISE]
        return reply

    return mod
