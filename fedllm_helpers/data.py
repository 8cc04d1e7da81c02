"""Flashcards: from an ontology, the hub or a file to prompts, and a train/test split."""

import csv
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, load_dataset
from omegaconf import DictConfig
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fedllm_helpers import ontology

logger = logging.getLogger(__name__)

# "short" costs few tokens; "course" is the template of Stanford Alpaca (tatsu-lab, 2023), which the course uses.
PROMPTS = {
    "short": "Question: {question}\nAnswer:",
    "course": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{question}\n\n### Response:"
    ),
}
COLUMNS = "'question' and 'answer' (or 'instruction', 'input' and 'output')"


def format_prompt(question: str, prompt: str = "short") -> str:
    """The text before an answer; the answer follows after one space.

    Raises:
        ValueError: ``prompt`` is not one of :data:`PROMPTS`.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"unknown prompt {prompt!r}: known are {', '.join(PROMPTS)}")
    return PROMPTS[prompt].format(question=question)


def load(cfg: DictConfig) -> tuple[Dataset, Dataset]:
    """Flashcards of a configuration, split by card.

    Returns:
        (train, test); the test part is empty where ``train.evaluate_split`` is 0.
    """
    cards = load_flashcards(cfg.dataset.name)
    chosen = choose(cards, cfg.dataset.specialties, cfg.dataset.max_cards_per_specialty, cfg.seed)
    if cfg.dataset.name != "hpo" and len(chosen) < len(cards):
        limit = cfg.dataset.max_cards_per_specialty
        logger.warning("dataset.max_cards_per_specialty=%s keeps %d of %d cards", limit, len(chosen), len(cards))
    share = cfg.train.evaluate_split
    return split(chosen, (0.1 if share else 0.0) if isinstance(share, bool) else share, cfg.seed)


def load_flashcards(name: str = "hpo") -> Dataset:
    """Read flashcards from the embedded ontology, a local file or the hub.

    Args:
        name: ``"hpo"``, the path of a ``.json``, ``.jsonl`` or ``.csv`` file, or a hub id. Columns are
            ``question`` and ``answer`` (``specialty`` and ``card_id`` where present), or medical-meadow's
            ``instruction``, ``input`` and ``output``.

    Returns:
        A dataset of ``question``, ``answer``, ``specialty``, ``card_id``. Cards without an answer and exact
        repetitions are left out, and logged with their number.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read as flashcards.
        ConnectionError: the hub cannot be reached.
    """
    if name == "hpo":
        rows = ontology.flashcards()
    elif Path(name).suffix in {".json", ".jsonl", ".csv"}:
        rows = read_rows(Path(name))
    else:
        rows = _read_hub(name)
    cards, seen, empty = [], set(), 0
    for number, row in enumerate(rows):
        card = _card(row, name, number)
        if not card["answer"] or not card["question"]:
            empty += 1
        elif (card["question"], card["answer"]) not in seen:
            seen.add((card["question"], card["answer"]))
            cards.append(card)
    if empty:
        logger.warning("%s: left out %d of %d cards without a question or an answer", name, empty, len(rows))
    if len(rows) - empty > len(cards):
        logger.info("%s: left out %d exact repetitions", name, len(rows) - empty - len(cards))
    if not cards:
        raise ValueError(f"{name}: no card with a question and an answer in {len(rows)} rows")
    return Dataset.from_list(cards)


def choose(cards: Dataset, specialties: Iterable[str] | None, max_per_specialty: int | None, seed: int = 0) -> Dataset:
    """Keep some specialties, and of each a seeded subset.

    Raises:
        ValueError: a specialty that no card has; the line names those that exist.
    """
    names = cards.with_format("numpy")["specialty"][:]
    present = sorted(set(names.tolist()))
    missing = sorted(set(specialties or ()) - set(present))
    if missing:
        raise ValueError(f"no card of specialty {missing[0]!r}: present are {', '.join(present)}")
    rng, keep = np.random.default_rng(seed), []
    for specialty in sorted(specialties) if specialties else present:
        index = np.flatnonzero(names == specialty)
        if max_per_specialty is not None and len(index) > max_per_specialty:
            index = np.sort(rng.choice(index, max_per_specialty, replace=False))
        keep.append(index)
    return cards.select(np.concatenate(keep))


def split(cards: Dataset, test_share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split by card and specialty; cards that share a question or an answer stay on one side.

    Args:
        cards: from :func:`load_flashcards`.
        test_share: share of each specialty that is held out, 0 to 0.9.
        seed: of the shuffle.

    Returns:
        (train, test), shuffled.

    Raises:
        ValueError: cards are so few, or share answers so widely, that one side would be empty.
    """
    frame = cards.to_pandas()
    frame["group"] = _groups(frame)
    rng = np.random.default_rng(seed)
    test, groups = np.zeros(len(frame), dtype=bool), frame.groupby("group").indices
    for _, part in frame.groupby("specialty", sort=True):
        wanted, taken = round(test_share * len(part)), 0
        for group in rng.permutation(part["group"].unique()):
            members = groups[group]
            if taken + len(members) <= wanted and not test[members].any():
                test[members] = True
                taken += len(members)
    if test_share > 0 and (not test.any() or test.all()):
        raise ValueError(
            f"train.evaluate_split={test_share}: {len(frame)} cards in {frame['group'].nunique()} groups of shared "
            "questions or answers cannot be split; set it to 0, or bring more cards"
        )
    order = rng.permutation(len(frame))
    return cards.select(order[~test[order]]), cards.select(order[test[order]])


def _card(row: dict, name: str, number: int) -> dict:
    text = {
        key: "" if pd.isna(value) else str(value).strip()
        for key, value in row.items()
        if not isinstance(value, (list, dict))
    }
    if "question" in text and "answer" in text:
        question, answer = text["question"], text["answer"]
    elif "output" in text and ("input" in text or "instruction" in text):
        question, answer = text.get("input") or text.get("instruction", ""), text["output"]
    else:
        raise ValueError(f"{name}: row {number + 1} has the columns {', '.join(row)}; expected {COLUMNS}")
    specialty, card_id = text.get("specialty") or "general", text.get("card_id") or f"{Path(name).stem}-{number}"
    return {"question": question, "answer": answer, "specialty": specialty, "card_id": card_id}


def read_rows(path: Path) -> list[dict]:
    """Read a ``.json``, ``.jsonl`` or ``.csv`` file as rows; see :func:`load_flashcards` for what it raises."""
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise ValueError("the file is empty")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines(keepends=True), strict=True))
            ragged = [i for i, row in enumerate(rows, 2) if None in row or None in row.values()]
            if ragged:
                raise ValueError(
                    f"line {ragged[0]} has another number of columns than the first; quote text with commas"
                )
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]}: {error}; is the file whole?") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of rows with {COLUMNS}")
    return rows


def _read_hub(name: str) -> list[dict]:
    try:
        return load_dataset(name, split="train").to_list()
    except Exception as error:  # the hub client raises a dozen types; all mean that there are no cards
        raise ConnectionError(
            f"dataset {name!r} cannot be read from the hub ({type(error).__name__}): check the name and the network, "
            "or set dataset.name to 'hpo' or to a local .json, .jsonl or .csv file"
        ) from error


def _groups(frame: pd.DataFrame) -> np.ndarray:
    """Connected components of cards that share a normalised question or answer; shape (cards,)."""
    normal = frame[["question", "answer"]].map(lambda text: " ".join(re.findall(r"\w+", text.casefold())))
    question, answer = pd.factorize(normal["question"])[0], pd.factorize(normal["answer"])[0]
    size = question.max() + 1 + answer.max() + 1
    edges = coo_array((np.ones(len(frame)), (question, question.max() + 1 + answer)), shape=(size, size))
    return connected_components(edges, directed=False)[1][question]
