"""From a configuration to cards: the ontology, a file, a folder or the hub, and the test part where there is one."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from omegaconf import DictConfig

from fedllm_helpers.config import checked
from fedllm_helpers.data import files, ontology, splitting
from fedllm_helpers.data.columns import to_cards
from fedllm_helpers.data.contents import SHEETS, SUFFIXES
from fedllm_helpers.data.files import Table

logger = logging.getLogger(__name__)
# settings with which a file of cards is read as it is
WHOLE_FILE = (
    "dataset.test=null",
    "dataset.columns=null",
    "dataset.specialties=null",
    "dataset.max_cards_per_specialty=null",
)
TESTS = ("test", "validation", "valid", "val", "dev", "eval")  # names of a test part, the best first


def load(cfg: DictConfig) -> tuple[Dataset, Dataset]:
    """Flashcards of a configuration: split by card, or with the test part that the data bring.

    Returns:
        (train, test). The test part is ``dataset.test``, else the dataset's own, else split off; the latter two are
        empty where ``train.evaluate_split`` is 0.
    """
    how, share = checked(cfg).dataset, cfg.train.evaluate_split
    cards, own = load_parts(how.name, how.columns, how.test)
    if own is not None and how.test is None and not share:
        logger.warning("%s: its own test part is not used, for train.evaluate_split is 0", how.name)
        own = None
    chosen = splitting.choose(cards, how.specialties, how.max_cards_per_specialty, cfg.seed)
    if how.name != "hpo" and len(chosen) < len(cards):
        limit = how.max_cards_per_specialty
        logger.warning("dataset.max_cards_per_specialty=%s keeps %d of %d cards", limit, len(chosen), len(cards))
    if own is None:
        return splitting.split(chosen, (0.1 if share else 0.0) if isinstance(share, bool) else share, cfg.seed)
    if how.specialties is not None:
        present = sorted(set(how.specialties) & set(own["specialty"]))
        if not present:
            raise ValueError(f"{how.test or how.name}: no test card is of dataset.specialties={how.specialties}")
        own = splitting.choose(own, present, None)
    order = np.random.default_rng(cfg.seed).permutation(len(chosen))
    return chosen.select(order), own


def load_flashcards(name: str = "hpo", columns: Mapping[str, str] | None = None) -> Dataset:
    """Read the flashcards to train on; see :func:`load_parts`."""
    return load_parts(name, columns)[0]


def load_parts(
    name: str = "hpo", columns: Mapping[str, str] | None = None, test: str | None = None
) -> tuple[Dataset, Dataset | None]:
    """Read flashcards from the embedded ontology, a local file, a folder or the hub, and their test part if any.

    Args:
        name: ``"hpo"``; the path of a file that :func:`fedllm_helpers.data.files.read` takes; that of a folder with
            ``train.*`` and perhaps ``test.*``; or a hub id.
        columns: column names by role, where they are not well known.
        test: a second such name, for the test part.

    Returns:
        (train, test): datasets of ``question``, ``answer``, ``specialty``, ``card_id``, and of conversations
        ``earlier_turns``; None for a test part that does not exist. Cards without an answer, exact repetitions and
        training cards whose question stands in the test part are left out, and logged.

    Raises:
        FileNotFoundError: no such file, folder or dataset.
        ValueError: the rows cannot be read as flashcards.
        ConnectionError: the hub cannot be reached.
    """
    parts = _tables(name)
    if "train" not in parts:
        raise ValueError(f"{name}: there is no split to train on: there are {', '.join(parts)}; name a file of it")
    own = next((part for part in TESTS if part in parts), None)
    if test is not None:
        others = _tables(test)
        parts |= {"dataset.test": others[next((part for part in (*TESTS, "train") if part in others), "train")]}
        own = "dataset.test"
    unused = [part for part in parts if part not in ("train", own)]
    if own or unused:
        said = f"; not used: {', '.join(unused)}" if unused else ""
        logger.info("%s: its test part is %s%s", name, test or own or "none, so one is split off", said)
    found = to_cards([parts[part] for part in ("train", own) if part], columns)
    return (found[0], None) if own is None else (_apart(name, *found), found[1])


def _apart(name: str, train: Dataset, test: Dataset) -> Dataset:
    """Training cards whose question is in no test card."""
    asked = [splitting.questions(part.to_pandas()) for part in (train, test)]
    known = asked[0].isin(set(asked[1])).to_numpy()
    both = np.flatnonzero(known).tolist()
    if len(both) == len(train):
        raise ValueError(f"{name}: every training question stands in the test part, too")
    if both:
        said = (
            f"{name}: left out {len(both)} of {len(train)} training cards whose question stands in the test part, too"
        )
        logger.warning("%s (%s%s)", said, ", ".join(train.select(both[:5])["card_id"]), ", …" * (len(both) > 5))
    return train.select(np.flatnonzero(~known)) if both else train


def _tables(name: str) -> dict[str, Table]:
    if name == "hpo":
        return {"train": Table("hpo", pd.DataFrame(ontology.flashcards(), dtype=object))}
    if "://" in name:
        raise ValueError(f"{name}: an address; fetch what is there, and name the file")
    path = Path(name).expanduser()
    if name and os.path.isdir(path):
        return _folder(path)
    spelt = re.match(r"[~./\\]|[A-Za-z]:[\\/]", name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    if os.path.exists(path) or spelt or files.known_suffix(path) or path.suffix.lower() in (*SHEETS, ".txt", ".pdf"):
        return {"train": files.read(path)}
    from fedllm_helpers.data import hub  # its client takes a second to import

    return hub.read(name)


def _folder(path: Path) -> dict[str, Table]:
    """The tables of a folder by their part, which may lie in pieces such as ``train-00000-of-00002.parquet``."""
    pieces: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        part = re.match(rf"({'|'.join(('train', *TESTS))})(-\d+-of-\d+)?\.", file.name.lower())
        if part and files.known_suffix(file):
            pieces.setdefault(part[1], []).append(file)
    if not pieces and (path / "data").is_dir():  # as repositories of the hub are laid out
        return _folder(path / "data")
    if "train" not in pieces:
        there = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(f"no data file train.* ({', '.join(SUFFIXES)}) in the folder {path}; there is {there}")
    return {part: _together(path, part, found) for part, found in pieces.items()}


def _together(path: Path, part: str, found: list[Path]) -> Table:
    if len(found) > 1 and not all(re.match(r"\w+-\d+-of-\d+\.", file.name) for file in found):
        raise ValueError(
            f"{path} holds {len(found)} files of {part}: {', '.join(file.name for file in found)}; keep one"
        )
    tables = [files.read(file) for file in found]
    if len(tables) == 1:
        return tables[0]
    return Table(str(path / part), pd.concat([table.frame for table in tables], ignore_index=True), tables[0].found)
