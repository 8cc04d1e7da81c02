"""What a hospital says of itself as its node starts, in ``--node-config``: checked before anything is done with it."""

import difflib
import logging
import sys

from flwr.app import Context

logger = logging.getLogger(__name__)
KNOWN = ("partition-id", "num-partitions", "data", "policy", "audit", "report", "alone", "simulated")


def simulated(context: Context) -> bool:
    """Whether a node only stands for a hospital, and may take its share of the configured dataset.

    The grids of :mod:`fedllm_helpers.grids` say so, processes of Flower's own simulation are it, and a node of a
    demonstration may say so itself, with ``simulated=true``.
    """
    ray = sys.modules.get("ray")
    return bool(context.node_config.get("simulated")) or (ray is not None and ray.is_initialized())


def check(context: Context) -> None:
    """Refuse a node without cards of its own, and one with a setting that has no effect.

    Raises:
        ValueError: in one line, without what was set: that is written to the node's own log only, as what an exception
            says is sent to the server.
    """
    given, where = context.node_config, f"hospital {context.node_config.get('partition-id')}"
    for name in sorted(set(given) - set(KNOWN)):
        close = difflib.get_close_matches(name, KNOWN, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(KNOWN)}"
        logger.error("%s: unknown setting %r in --node-config; %s", where, name, meant)
        raise ValueError(f"{where}: its node-config has a setting that is unknown; see the node's own log")
    if "data" not in given and not simulated(context):
        logger.error('%s: --node-config names no cards: data="FOLDER", or simulated=true for a demonstration', where)
        raise ValueError(f"{where}: its node-config names no folder of cards; see the node's own log")
