"""Datasets of the hub: one line within seconds where there is no network, no such name, or no split to train on."""

import datasets
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from fedllm_helpers import hub
from fedllm_helpers.data.files import Table, from_arrow

INSTEAD = "or set dataset.name to 'hpo' or to a local .json, .jsonl, .csv or .parquet file"


def read(name: str) -> dict[str, Table]:
    """The splits of a hub dataset by name; from the cache where the hub cannot be reached.

    Raises:
        ConnectionError: the hub cannot be reached, and the cache does not have it.
        FileNotFoundError: the hub has no such dataset, or shows it only to those who ask.
        ValueError: it needs a choice between configurations, a script, or is otherwise no plain table.
    """
    problem = hub.ask("dataset", name)
    if isinstance(problem, (GatedRepoError, RepositoryNotFoundError, HFValidationError)):
        raise FileNotFoundError(f"dataset {name!r}: no file or folder here, and {hub.reason(problem)}; {INSTEAD}")
    online, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, problem is not None
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the library raises a dozen types; what matters is which of the two it is
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if problem is None:
            raise ValueError(
                f"dataset {name!r} cannot be read as a table ({said}): {_choice(error)}{INSTEAD}"
            ) from None
        raise ConnectionError(
            f"dataset {name!r}: no file or folder here, and {hub.reason(problem)}; no copy either; {INSTEAD}"
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
