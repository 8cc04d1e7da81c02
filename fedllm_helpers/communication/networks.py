"""Larger networks on paper: where one server's line is full, and what a tree of aggregators changes."""

import math
from collections.abc import Iterable

import pandas as pd

from fedllm_helpers import limits


def network(
    clients: Iterable[int],
    size: float,
    *,
    client_bandwidth: float = 20e6,
    server_bandwidth: float = 10e9,
    fan_out: int | None = None,
    train_seconds: float = 0.0,
) -> pd.DataFrame:
    """Time of a round in networks of several sizes, on paper. Taught in notebook 07.

    Assumed: all clients train at once and as long; a server's line is shared evenly; nothing is lost or late; an
    aggregator passes a message on when it has the whole of it. At each level the slower side sets the pace.

    Args:
        clients: numbers of clients, such as 10 to 1,000,000.
        size: bytes of one transfer.
        client_bandwidth, server_bandwidth: in bits per second; aggregators have lines like the server's.
        fan_out: children of each aggregator at most; None: every client talks to the one server.
        train_seconds: of a client, between down and up.

    Returns:
        Columns ``clients``, ``levels``, ``aggregators`` (the server included), ``server_bytes`` (in and out of the top
        server in a round) and ``seconds`` of a round.

    Raises:
        ValueError: a size, number or bandwidth that is not above 0, or a fan-out below 2.
    """
    for name, value in (("client_bandwidth", client_bandwidth), ("server_bandwidth", server_bandwidth), ("size", size)):
        limits.number(name, value)
    limits.number("train_seconds", train_seconds, above=False)
    if fan_out is not None:
        limits.whole("fan_out", fan_out, 2)
    rows = []
    for count in clients:
        limits.whole("clients", count)
        levels = _levels(count, fan_out or count)
        lines = [client_bandwidth, *[server_bandwidth] * (len(levels) - 1)]
        paces = [max(1 / line, children / server_bandwidth) for line, (children, _) in zip(lines, levels, strict=True)]
        nodes = sum(parents for _, parents in levels)
        seconds = train_seconds + 2 * 8 * size * sum(paces)
        rows.append((count, len(levels), nodes, 2 * levels[-1][0] * size, seconds))
    return pd.DataFrame(rows, columns=["clients", "levels", "aggregators", "server_bytes", "seconds"])


def _levels(below: int, fan_out: int) -> list[tuple[int, int]]:
    """From the clients up: children of a parent at most, and how many parents there are."""
    levels = []
    while below > fan_out:
        levels.append((fan_out, math.ceil(below / fan_out)))
        below = math.ceil(below / fan_out)
    return [*levels, (below, 1)]
