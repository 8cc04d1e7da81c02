"""Multiple choice: questions from cards or from a benchmark's file, a model's picks, and what needs no model."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from omegaconf import DictConfig
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import limits
from fedllm_helpers.data import columns, files
from fedllm_helpers.evaluation.scoring import score_answers


def from_cards(cards: Dataset, pool: Dataset, n_options: int = 4, seed: int = 0) -> list[dict]:
    """Ask for the right answer among answers of the same specialty. Taught in notebook 01.

    Args:
        cards: the questions, with their right answers.
        pool: cards that lend wrong answers of the same specialty.
        n_options: options per question.
        seed: of the draw and of the right option's position.

    Returns:
        Rows of ``question``, ``options`` and ``answer`` (position of the right option).

    Raises:
        ValueError: a specialty has too few different answers, or fewer than two options are asked for.
    """
    limits.whole("n_options", n_options, 2)
    rng, by_specialty = np.random.default_rng(seed), {}
    for card in pool:
        by_specialty.setdefault(card["specialty"], set()).add(card["answer"])
    questions = []
    for card in cards:
        others = sorted(by_specialty.get(card["specialty"], set()) - {card["answer"]})
        if len(others) < n_options - 1:
            raise ValueError(
                f"specialty {card['specialty']!r} has {len(others)} other answers, {n_options - 1} are needed"
            )
        options = [card["answer"], *rng.choice(others, n_options - 1, replace=False).tolist()]
        order = rng.permutation(n_options)
        options = [options[i] for i in order]
        questions.append({"question": card["question"], "options": options, "answer": options.index(card["answer"])})
    return questions


def from_file(path: str | Path) -> list[dict]:
    """Read a multiple-choice benchmark in the manner of MedQA or PubMedQA.

    Args:
        path: any file that :func:`fedllm_helpers.data.files.read` takes, with rows of ``question``, ``options`` (a
            list, or a mapping from letter to text, in CSV written as JSON) and ``answer`` (a letter, an option's text,
            or its position from 0).

    Returns:
        Rows of ``question``, ``options`` (list of str) and ``answer`` (position of the right option).

    Raises:
        ValueError: a row lacks one of the three, or its answer is none of its options.
    """
    table = files.read(path)
    frame = table.frame.rename(columns=columns.normal)
    absent = [name for name in ("question", "options", "answer") if list(frame.columns).count(name) != 1]
    if absent:
        there = ", ".join(map(str, table.frame.columns))
        raise ValueError(f"{path}: row 1 needs 'question', 'options' and 'answer', one column each; there are {there}")
    asked = zip(frame["question"], frame["options"], frame["answer"], strict=True)
    return [_question(f"{path}: row {number}", *row) for number, row in enumerate(asked, 1)]


def _question(where: str, question: Any, options: Any, answer: Any) -> dict:
    if any(columns.missing(value) or value == "" for value in (question, options, answer)):
        raise ValueError(f"{where} needs 'question', 'options' and 'answer'")
    try:
        options = json.loads(options) if isinstance(options, str) else options
    except ValueError:
        options = None
    if isinstance(options, dict):  # arrow fills up the letters that only other rows have
        options = {letter: text for letter, text in options.items() if not columns.missing(text)}
    texts = list(options.values()) if isinstance(options, dict) else options
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, (str, int, float)) for text in texts):
        raise ValueError(f"{where}: 'options' must be a list or a mapping of two texts or more, in CSV written as JSON")
    if not isinstance(question, str) or isinstance(answer, bool):
        raise ValueError(f"{where}: expected a text as question and a letter, a text or a position as answer")
    letters = list(options) if isinstance(options, dict) else [chr(ord("A") + i) for i in range(len(texts))]
    places = [str(i) if isinstance(answer, str) else i for i in range(len(texts))]  # in CSV they are text
    given = answer.strip() if isinstance(answer, str) else answer
    readings = [[i for i, name in enumerate(names) if name in (answer, given)] for names in (texts, letters, places)]
    right = next((reading for reading in readings if reading), [])
    if len(right) != 1:
        raise ValueError(f"{where}: answer {answer!r} names {len(right)} of the options {', '.join(letters)}")
    return {"question": question, "options": [str(text) for text in texts], "answer": right[0]}


def choose(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict],
    cfg: DictConfig,
    *,
    description: str | None = None,
) -> np.ndarray:
    """Pick for each question the option with the highest log-likelihood per token.

    The length divides, or long options would lose for their length alone (Brown et al. 2020, arXiv:2005.14165).

    Returns:
        Whether the pick was right, boolean, shape (questions,).

    Raises:
        ValueError: there are no questions.
    """
    if not questions:
        raise ValueError("questions: there are none; from_cards or from_file makes some")
    cards = [{"question": q["question"], "answer": option} for q in questions for option in q["options"]]
    scores = score_answers(model, tokenizer, cards, cfg, description=description)
    ends = np.cumsum([len(q["options"]) for q in questions])
    if not scores.tokens.all():
        raise ValueError("a question is so long that no option has room: the line before in the log says which")
    picks = [int(part.argmin()) for part in np.split(scores.nll / scores.tokens, ends[:-1])]
    return np.array([pick == q["answer"] for pick, q in zip(picks, questions, strict=True)])


def baselines(questions: list[dict]) -> dict[str, float]:
    """Accuracy without any model.

    Returns:
        ``chance``: picking blindly; ``majority``: always the option (or position) that is right most often; ``word
        overlap``: the option that shares most words of four letters or more with the question, ties split evenly.
    """
    chance = float(np.mean([1 / len(q["options"]) for q in questions]))
    same = len({tuple(q["options"]) for q in questions}) == 1  # PubMedQA: always yes, no, maybe
    rights = [q["options"][q["answer"]] if same else q["answer"] for q in questions]
    points = []
    for q in questions:
        asked, *offered = (set(re.findall(r"\w{4,}", text.lower())) for text in (q["question"], *q["options"]))
        shared = [len(asked & words) for words in offered]
        points.append((shared[q["answer"]] == max(shared)) / shared.count(max(shared)))
    majority = max(rights.count(right) for right in set(rights)) / len(rights)
    return {"chance": chance, "majority": majority, "word overlap": float(np.mean(points))}
