"""Which cards, and on which side of the split: seeded subsets, and groups of cards that give each other away."""

import logging
import unicodedata
from collections.abc import Iterable
from numbers import Real

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

logger = logging.getLogger(__name__)
LABEL_WORDS, LABEL_LETTERS = 3, 30  # an answer that is no longer may be a label, a number, or yes and no
LABEL_CARDS, LABEL_SHARE = 2, 0.02  # and is one if more cards have it; a longer one, if this share of all has it
LARGEST_SHARE = 0.9
ENDS = " .?…。।؟"  # of a sentence
SHAPES = str.maketrans("“”„«»‘’", '"""""\'\'') | dict.fromkeys(  # quotes; and marks that nobody sees
    [0xAD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFE0E, 0xFE0F, 0xFEFF]
)


def choose(cards: Dataset, specialties: Iterable[str] | None, max_per_specialty: int | None, seed: int = 0) -> Dataset:
    """Keep some specialties, and of each a seeded subset.

    Raises:
        ValueError: no specialty is named, or no card has one; a limit below 1. The line names what there is.
    """
    present, index = _by_value(cards.select_columns(["specialty"]).to_pandas()["specialty"])
    wanted = present if specialties is None else sorted(set(specialties))
    if not wanted or isinstance(specialties, str):
        raise ValueError(f"dataset.specialties={specialties}: expected a list of at least one, or null for all")
    if max_per_specialty is not None and max_per_specialty < 1:
        raise ValueError(f"dataset.max_cards_per_specialty={max_per_specialty}: allowed is 1 or more, or null for all")
    place = {name: number for number, name in enumerate(present)}
    missing = [name for name in wanted if name not in place]
    if missing:
        there = f"{', '.join(present[:30])}{', …' * (len(present) > 30)}"
        raise ValueError(f"dataset.specialties: no card of specialty {missing[0]!r}: present are {there}")
    rng, keep = np.random.default_rng(seed), []
    for name in wanted:
        some = index[place[name]]
        if max_per_specialty is not None and len(some) > max_per_specialty:
            some = np.sort(rng.choice(some, max_per_specialty, replace=False))
        keep.append(some)
    return cards.select(np.concatenate(keep))


def split(cards: Dataset, test_share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split by card and specialty; cards that share a question or an identifying answer stay on one side.

    An answer identifies unless it is a label: one of at most three words and 30 characters that more than two cards
    have (yes, no, a number), or a longer one that more than ten cards and a fiftieth of all have. Labels tie nothing
    together; each is held out in the same share as the others.

    Args:
        cards: from :func:`fedllm_helpers.data.load_flashcards`.
        test_share: share of the cards that is held out, 0 to 0.9; of each specialty as nearly as whole cards allow.
        seed: of the shuffle.

    Returns:
        (train, test), shuffled.

    Raises:
        ValueError: an impossible share, no cards, or cards so few or so tied that one side would be empty.
    """
    if not isinstance(test_share, Real) or not 0 <= test_share <= LARGEST_SHARE:
        raise ValueError(f"train.evaluate_split={test_share}: allowed is a share from 0 to {LARGEST_SHARE}")
    if not len(cards):
        raise ValueError("there are no cards to split")
    frame = cards.to_pandas()
    group, labels = groups(frame)
    rng, test = np.random.default_rng(seed), np.zeros(len(frame), dtype=bool)
    _, strata = _by_value(frame["specialty"] + "\0" + labels)
    quotas = _quotas(np.array([len(part) for part in strata]), test_share, seed)
    members, orders = _by_value(pd.Series(group))[1], [rng.permutation(pd.unique(group[part])) for part in strata]
    total = round(test_share * len(frame))
    for part, quota, order in zip(strata, quotas, orders, strict=True):
        _hold_out(test, members, order, min(quota - test[part].sum(), total - test.sum()))
    _hold_out(test, members, np.concatenate(orders), total - test.sum())  # what groups too large left open
    said = (
        f"train.evaluate_split={test_share}: {len(frame)} cards in {len(members)} groups of shared questions or answers"
    )
    if test_share > 0 and (not test.any() or test.all()):
        why = f" (that share of them is {total} cards)" if total in (0, len(frame)) else ""
        raise ValueError(f"{said} cannot be split{why}; set it to 0, or bring more cards")
    if test.sum() < total:
        logger.warning("%s: held out are %d instead of %d, for a group stays together", said, test.sum(), total)
    order = rng.permutation(len(frame))
    return cards.select(order[~test[order]]), cards.select(order[test[order]])


def _hold_out(test: np.ndarray, members: list[np.ndarray], order: np.ndarray, wanted: int) -> None:
    """Mark groups of cards, in this order, as long as they fit."""
    for group in order:
        if wanted <= 0:
            return
        some = members[group]
        if len(some) <= wanted and not test[some].any():
            test[some] = True
            wanted -= len(some)


def _quotas(sizes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Held-out cards of each part: its rounded share, and where these miss the share of the whole, the nearest ones."""
    wanted = np.array([round(share * size) for size in sizes.tolist()])
    missing, ties = round(share * sizes.sum()) - wanted.sum(), np.random.default_rng([seed, 1]).random(len(sizes))
    sign = np.sign(missing)
    nearest = np.lexsort((ties, -sign * (share * sizes - wanted)))[: abs(missing)]
    wanted[nearest] += sign
    return wanted


def groups(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Which cards belong together, by connected components of shared questions and answers; shapes (cards,).

    Returns:
        A number per card, the same for cards of one group; and its answer where that is a label, else an empty text.
    """
    question, answers = pd.factorize(questions(frame))[0], pd.Series(map(key, frame["answer"]), dtype=object)
    answer, texts = pd.factorize(answers)
    held, short = np.bincount(answer), np.array([is_short(text) for text in texts])
    label = (held > LABEL_CARDS) & (short | (held > np.maximum(LABEL_SHARE * len(frame), 10)))
    ties = ~label[answer]
    size = question.max() + 1 + answer.max() + 1
    edges = coo_array((np.ones(ties.sum()), (question[ties], question.max() + 1 + answer[ties])), shape=(size, size))
    number = pd.factorize(connected_components(edges, directed=False)[1][question])[0]
    return number, np.where(ties, "", answers)


def questions(frame: pd.DataFrame) -> pd.Series:
    """What makes the question of each card: its :func:`key`, after those of the turns before it."""
    asked = frame["question"] + "\0" + frame["earlier_turns"] if "earlier_turns" in frame else frame["question"]
    return pd.Series(map(key, asked), dtype=object)


def key(text: str) -> str:
    """A text without what leaves its meaning: form, case, blanks, quotes' shape, marks unseen, an end's stop."""
    if not text.isascii():  # casefolding may undo the form
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(SHAPES)
    text = " ".join(text.casefold().split())
    return text.rstrip(ENDS) or text


def is_short(text: str) -> bool:
    """Whether a text is no longer than a label."""
    return len(text) <= LABEL_LETTERS and len(text.split()) <= LABEL_WORDS


def _by_value(values: pd.Series) -> tuple[list, list[np.ndarray]]:
    """The different values in order, and of each the rows that have it."""
    codes, names = pd.factorize(values, sort=True)
    rows = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    return list(names), rows
