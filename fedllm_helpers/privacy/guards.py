"""Flower client mods that hold a client to what it was told of a run: what was promised is kept, or nothing leaves.

An app says how it knows: each of these takes a function of the context.
"""

import logging
from collections.abc import Callable

from flwr.app import Context, Message

from fedllm_helpers.privacy import masked_clients, policy

logger = logging.getLogger(__name__)
Next = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Next], Message]


def promised(masks: Callable[[Context], bool], silent: Callable[[Context], bool]) -> Mod:
    """A mod that refuses orders against what was promised; it stands without :func:`masked_clients.mod`.

    Args:
        masks: whether updates of the run are masked.
        silent: whether the run promises privacy, so that scores and losses stay here.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        """Raise ValueError for an order to train without masks, and for scores, which would leave to the last digit."""
        kind, masked = message.metadata.message_type, masked_clients.SENT in message.content.config_records
        if kind == "train" and not masked and masks(context):
            raise ValueError("masks were promised, and this order to train has none: nothing is sent")
        if kind == "evaluate" and silent(context):
            raise ValueError("privacy was promised, and scores of cards leave without any: nothing is sent")
        return call_next(message, context)

    return mod


def closed(silent: Callable[[Context], bool]) -> Mod:
    """A mod that says nothing of an app's error where privacy is promised: its text may quote a card; it stands last.

    Args:
        silent: as in :func:`promised`.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        """Raise RuntimeError in place of an app's error, unless that is a refusal; the node's own log has all of it."""
        try:
            return call_next(message, context)
        except policy.Refused:
            raise
        except Exception as error:
            if not silent(context):
                raise
            kind = message.metadata.message_type
            logger.exception("%s failed", kind)
            raise RuntimeError(f"{type(error).__name__} in {kind}; the node's own log says more") from None

    return mod
