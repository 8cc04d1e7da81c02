"""Who holds which cards: partitions over hospitals, by Flower's partitioners."""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from datasets import Dataset

from fedllm_helpers.config.schema import PARTITIONS

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def partition(
    cards: Dataset, num_clients: int, scheme: str = "iid", *, alpha: float = 0.5, seed: int = 0
) -> list[Dataset]:
    """Divide cards over hospitals; every card goes to exactly one. Taught in notebook 03.

    Args:
        cards: flashcards with a ``specialty``.
        num_clients: hospitals.
        scheme: ``"iid"``: evenly and at random. ``"specialty"``: a hospital has some specialties, and where there are
            more hospitals than specialties, several share one. ``"dirichlet"``: the cards of each specialty in
            proportions drawn from Dirichlet(α) (Hsu et al. 2019, arXiv:1909.06335). ``"quantity"``: at random, but the
            k-th hospital has k times as many as the first.
        alpha: of the Dirichlet distribution; small is uneven.
        seed: of the shuffle and of the proportions.

    Returns:
        One dataset per hospital, none empty.

    Raises:
        ValueError: an unknown scheme, more hospitals than cards, or a scheme that leaves a hospital without a card.
    """
    if scheme not in PARTITIONS:
        raise ValueError(f"federation.partition={scheme}: allowed are {', '.join(PARTITIONS)}")
    if num_clients > len(cards):
        raise ValueError(f"federation.num_clients={num_clients}: there are only {len(cards)} cards")
    order = np.random.default_rng(seed).permutation(len(cards))
    specialty = np.asarray(cards["specialty"])[order]
    names = sorted(set(specialty))
    groups = np.array([i * num_clients // len(names) if num_clients < len(names) else i for i in range(len(names))])
    rows = {"row": order, "specialty": specialty, "group": groups[np.searchsorted(names, specialty)]}
    partitioner = _partitioner(scheme, num_clients, alpha, seed)
    partitioner.dataset = Dataset.from_dict(rows)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # a page for each draw that it rejects
            parts = [partitioner.load_partition(client)["row"] for client in range(num_clients)]
    except ValueError as error:
        raise ValueError(
            f"federation.partition={scheme} cannot give each of {num_clients} hospitals a card of {len(cards)}: {error}"
        ) from None
    return [cards.select(part) for part in parts]


def partition_like(cards: Dataset, parts: list[Dataset]) -> list[Dataset]:
    """Divide held-out cards as the training cards are: each specialty in the shares that the hospitals have of it.

    Returns:
        One dataset per hospital, possibly empty; cards of a specialty that no hospital has go to none.
    """
    counts, specialty = holdings(parts), np.asarray(cards["specialty"])
    index: list[list[int]] = [[] for _ in parts]
    for name in counts.columns:
        where, shares = np.flatnonzero(specialty == name), np.cumsum(counts[name]) / counts[name].sum()
        for client, some in enumerate(np.split(where, np.rint(shares * len(where)).astype(int)[:-1])):
            index[client] += some.tolist()
    return [cards.select(sorted(some)) for some in index]


def holdings(parts: list[Dataset]) -> pd.DataFrame:
    """Cards by hospital (rows, from 0) and specialty (columns)."""
    return (
        pd.DataFrame([pd.Series(part["specialty"]).value_counts() for part in parts])
        .fillna(0)
        .astype(int)
        .sort_index(axis=1)
        .reset_index(drop=True)
    )


def _partitioner(scheme: str, num_clients: int, alpha: float, seed: int) -> "Partitioner":
    from flwr_datasets.partitioner import (  # imports a plotting library: a second that few clients need
        DirichletPartitioner,
        IidPartitioner,
        LinearPartitioner,
        PathologicalPartitioner,
    )

    if scheme == "specialty":
        return PathologicalPartitioner(num_clients, "group", 1, "first-deterministic", seed=seed)
    if scheme == "dirichlet":
        return DirichletPartitioner(num_clients, "specialty", alpha, min_partition_size=1, seed=seed)
    return LinearPartitioner(num_clients) if scheme == "quantity" else IidPartitioner(num_clients)
