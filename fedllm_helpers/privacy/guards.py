"""Flower client mods that hold a client to what it was told of a run: what was promised is kept, or nothing leaves.

An app says how it knows: each of these takes a function of the context.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Message

from fedllm_helpers.adapters.updates import kind_of
from fedllm_helpers.privacy import masked_clients, policy

logger = logging.getLogger(__name__)
Next = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Next], Message]


def promised(masks: Callable[[Context], Mapping[str, Any]], unscored: Callable[[Context], bool]) -> Mod:
    """A mod that refuses orders against what was promised; it stands without :func:`masked_clients.mod`.

    Args:
        masks: what the orders of a masked round have to say, such as ``threshold``; nothing where there are no masks.
        unscored: whether the run promises privacy and no noise on scores, so that these stay here.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        """Raise ValueError for an order to train without masks, and for scores, which would leave to the last digit."""
        kind, given = kind_of(message), message.content.config_records.get(masked_clients.SENT)
        wanted = masks(context) if kind == "train" or given is not None else {}
        if kind == "train" and given is None and wanted:
            raise ValueError("masks were promised, and this order to train has none: nothing is sent")
        for name, value in wanted.items() if given is not None and kind != "query.keys" else ():
            if given.get(name) != value:
                raise ValueError(f"masks were promised with {name}={value}, and the order says {given.get(name)}")
        if kind == "evaluate" and unscored(context):
            raise ValueError("privacy was promised, and scores of cards leave without any: nothing is sent")
        return call_next(message, context)

    return mod


def closed(private: Callable[[Context], bool]) -> Mod:
    """A mod that says nothing of an app's error where privacy is promised: its text may quote a card; it stands last.

    Args:
        private: whether the run promises privacy.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        """Raise RuntimeError in place of an app's error, unless that is a refusal; the node's own log has all of it."""
        try:
            return call_next(message, context)
        except policy.Refused:
            raise
        except Exception as error:
            if not private(context):
                raise
            kind = kind_of(message)
            logger.exception("%s failed", kind)
            raise RuntimeError(f"{type(error).__name__} in {kind}; the node's own log says more") from None

    return mod
