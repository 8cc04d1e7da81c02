"""Datasets of the hub: one line within seconds where there is no network, no such name, or no split to train on."""

import threading
from collections.abc import Callable
from typing import Any

import datasets
from httpx import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from fedllm_helpers.data.files import Table, from_arrow

SECONDS = 4.0  # to answer at all: the client's own retries take up to 50
INSTEAD = "or set dataset.name to 'hpo' or to a local .json, .jsonl, .csv or .parquet file"


def read(name: str) -> dict[str, Table]:
    """The splits of a hub dataset by name; from the cache where the hub cannot be reached.

    Raises:
        ConnectionError: the hub cannot be reached, and the cache does not have it.
        FileNotFoundError: the hub has no such dataset, or shows it only to those who ask.
        ValueError: it needs a choice between configurations, a script, or is otherwise no plain table.
    """
    problem = _within(SECONDS, lambda: HfApi().dataset_info(name, timeout=SECONDS))
    if isinstance(problem, GatedRepoError):
        raise FileNotFoundError(
            f"dataset {name!r} is gated: ask its owners for access, and log in to the hub, {INSTEAD}"
        )
    if isinstance(problem, (RepositoryNotFoundError, HFValidationError)):
        raise FileNotFoundError(
            f"there is no file or folder {name!r} here, and the hub has no such dataset (or hides it): "
            f"check the name, {INSTEAD}"
        )
    online, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, problem is not None
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the library raises a dozen types; what matters is which of the two it is
        said = f"{type(problem or error).__name__}: {' '.join(str(problem or error).split())[:200]}"
        if problem is None:
            raise ValueError(
                f"dataset {name!r} cannot be read as a table ({said}): {_choice(error)}{INSTEAD}"
            ) from None
        raise ConnectionError(
            f"dataset {name!r}: the hub cannot be reached ({said}): check the network, {INSTEAD}"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = online
    return {
        str(split): Table(name, from_arrow(part.with_format("arrow")[:]), f"hub, split {split}")
        for split, part in found.items()
    }


def _choice(error: Exception) -> str:
    many = "Config name is missing" in str(error)
    return "save the one you mean by datasets.load_dataset(NAME, CONFIG)['train'].to_parquet(FILE), " if many else ""


def _within(seconds: float, action: Callable[[], Any]) -> Exception | None:
    """What an action raised, or that it is not done in time: resolving a name knows no time limit of its own."""
    raised: list[Exception | None] = []

    def run() -> None:
        try:
            action()
            raised.append(None)
        except (OSError, HTTPError, HfHubHTTPError, HFValidationError) as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return raised[0] if raised else TimeoutError(f"no answer within {seconds:.0f} seconds")
