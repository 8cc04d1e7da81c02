"""From rows to cards: which column is what, by well-known names or by ``dataset.columns``; nothing vanishes unsaid."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from fedllm_helpers.data import conversations
from fedllm_helpers.data.contents import BLANKS, INVISIBLE
from fedllm_helpers.data.files import Table

logger = logging.getLogger(__name__)
Left = dict[str, list[int]]  # rows, from 1, that are left out, by the reason
PAIRS = {
    "question": "answer",
    "instruction": "output",
    "prompt": "completion",
    "query": "response",
    "problem": "solution",
}
CHATS = ("messages", "conversations", "conversation")
OPTIONAL = ("context", "specialty", "card_id", "patient_id", "earlier_turns")
ROLES = ("question", "answer", "context", "specialty", "card_id", "patient_id", "messages", "input")  # for the settings
EXPECTED = (
    "expected 'question' and 'answer', 'instruction' (and 'input') and 'output', 'prompt' and 'completion', "
    "'messages', or others named by dataset.columns.question=… and dataset.columns.answer=…"
)
SENTENCE = re.compile(r"(\S+\s+){5}|\S\s.*[?.]\s*$")  # no name of a column
NAMELESS = "; these read like a card: is the row with the names of the columns missing?"


def normal(name: Any) -> str:
    """A column's name without what people add to it: case, blanks, marks that nobody sees."""
    return re.sub(r"[\s_\-]+", "_", INVISIBLE.sub("", str(name)).strip().casefold()).strip("_")


def to_cards(tables: Sequence[Table], columns: Mapping[str, str] | None = None) -> list[Dataset]:
    """Cards of tables that belong together, such as training and test rows, and one line of log for each.

    Instruction and input are joined, unless the instruction is one and the same in every row of all tables.

    Args:
        tables: from :func:`fedllm_helpers.data.files.read`.
        columns: names by role, where they are not well known; see :data:`ROLES`.

    Raises:
        ValueError: columns are missing, ambiguous or doubled; a value is no text; or no card is left.
    """
    found = [roles(table, columns or {}) for table in tables]
    tasks: set[str] = set()
    for table, role in zip(tables, found, strict=True):
        if "input" in role:
            tasks |= set(_texts(table, role, "question"))
    same = len(tasks - {""}) == 1
    return [_cards(table, role, same) for table, role in zip(tables, found, strict=True)]


def roles(table: Table, columns: Mapping[str, str]) -> dict[str, str]:
    """Which column of a table is the question, the answer, …; raises as :func:`to_cards`."""
    names, known = [str(name) for name in table.frame.columns], {}
    there = f"{table.name} has the columns {', '.join(names[:30])}"
    for name in names:
        if normal(name) in known:
            raise ValueError(f"{there}: {normal(name)!r} stands there twice; which one counts?")
        known[normal(name)] = name
    unknown = sorted(set(columns) - set(ROLES))
    if unknown:
        raise ValueError(f"dataset.columns.{unknown[0]}: allowed are {', '.join(ROLES)}")
    absent = [(role, name) for role, name in columns.items() if name not in names and normal(name) not in known]
    if absent:
        raise ValueError(f"{there}; dataset.columns.{absent[0][0]}={absent[0][1]} is none of them")
    mapped = {role: name if name in names else known[normal(name)] for role, name in columns.items()}
    twice = [role for role, name in mapped.items() if list(mapped.values()).count(name) > 1]
    if twice:
        said = f"dataset.columns takes one of them, {mapped[twice[0]]!r}, as {' and as '.join(twice)}"
        raise ValueError(f"{there}; {said}")
    free = {key: name for key, name in known.items() if name not in mapped.values()}
    chosen = {role: free[role] for role in OPTIONAL if role in free} | mapped
    if "messages" not in mapped:
        chosen |= _pair(free, mapped, there)
    if _of_turns(table, chosen):
        chosen = {name: column for name, column in chosen.items() if name not in ("context", "earlier_turns")}
    return chosen


def _of_turns(table: Table, role: dict[str, str]) -> bool:
    """Whether rows are conversations, be it in one column or in two, and be it only some of the rows."""
    pair = (table.frame[role[name]] for name in ("question", "answer") if name in role)
    return "messages" in role or any(conversations.is_turns(value) for values in pair for value in values)


def _pair(free: dict[str, str], mapped: dict[str, str], there: str) -> dict[str, str]:
    """The columns of question and answer, or of whole conversations."""
    asked = [mapped["question"]] if "question" in mapped else [free[name] for name in PAIRS if name in free]
    if not asked and "input" in free:
        asked = [free["input"]]
    said = [mapped["answer"]] if "answer" in mapped else [free[name] for name in PAIRS.values() if name in free]
    chats = [] if mapped.keys() & {"question", "answer"} else [free[name] for name in CHATS if name in free]
    pairs = [(free[q], free[a]) for q, a in PAIRS.items() if q in free and a in free]
    if len(asked) == len(said) == 1:
        pairs = [(asked[0], said[0])]
    elif "question" in mapped or "answer" in mapped:
        pairs = [(q, a) for q in asked for a in said]
    if len(pairs) + len(chats) != 1:
        many = ", several of which may be question and answer" if pairs or chats or (asked and said) else ""
        raise ValueError(f"{there}{many}; {EXPECTED}{NAMELESS * any(map(SENTENCE.search, free.values()))}")
    if chats:
        return {"messages": chats[0]}
    found = dict(zip(("question", "answer"), pairs[0], strict=True))
    if normal(found["question"]) == "instruction" and "input" in free and "question" not in mapped:
        found["input"] = free["input"]
    return found


def _cards(table: Table, role: dict[str, str], same: bool) -> Dataset:
    left, cut, keep, seen = {}, [], [], set()
    if _of_turns(table, role):
        cards = _from_turns(table, role, left, cut)
    else:
        cards = {"question": _questions(table, role, same), "answer": _texts(table, role, "answer")}
        cards["earlier_turns"] = _texts(table, role, "earlier_turns")
        wrong = next((i for i, text in enumerate(cards["earlier_turns"], 1) if not conversations.is_history(text)), 0)
        if wrong:
            raise ValueError(f"{table.name}: row {wrong}: earlier_turns is no list of turns with role and content")
    refused = {row for rows in left.values() for row in rows}
    for row, card in enumerate(zip(cards["question"], cards["answer"], cards["earlier_turns"], strict=True), 1):
        if row in refused:
            continue
        if not card[0] or not card[1]:
            left.setdefault("without a question or an answer", []).append(row)
        elif card in seen:
            left.setdefault("that are exact repetitions", []).append(row)
        else:
            seen.add(card)
            keep.append(row - 1)
    _say(table, role, left, sorted(set(cut) - refused), same)
    if not keep:
        raise ValueError(f"{table.name}: no card with a question and an answer in {len(table.frame)} rows{_list(left)}")
    cards |= {name: _texts(table, role, name) for name in ("specialty", "card_id", "patient_id")}
    cards["specialty"] = [text or "general" for text in cards["specialty"]]
    cards["card_id"] = [text or f"{Path(table.name).stem}-{row}" for row, text in enumerate(cards["card_id"])]
    names = ["question", "answer", "specialty", "card_id"]
    names += [name for name in ("patient_id", "earlier_turns") if any(cards[name])]
    cards = {name: [cards[name][row] for row in keep] for name in names}
    _check_encodable(table, cards, keep)
    return Dataset.from_dict(cards)


def _questions(table: Table, role: dict[str, str], same: bool) -> list[str]:
    parts = [_texts(table, role, name) for name in ("context", "question", "input")]
    if same and "input" in role:
        parts[1] = [task if not given else "" for task, given in zip(parts[1], parts[2], strict=True)]
    asked = zip(*parts[1:], strict=True)  # a context alone is no question
    return ["\n".join(filter(None, (c, *q))) if any(q) else "" for c, q in zip(parts[0], asked, strict=True)]


def _from_turns(table: Table, role: dict[str, str], left: Left, cut: list[int]) -> dict[str, list[str]]:
    """Question, answer and history of rows that are conversations, or a prompt and a completion made of turns.

    Rows that cannot be used are put into ``left``, and those that go on after the answer into ``cut``.
    """
    speakers = {"messages": ""} if "messages" in role else {"question": "user", "answer": "assistant"}
    cards, unused = [], set()
    rows = zip(*(table.frame[role[name]] for name in speakers), strict=True)
    for row, values in enumerate(rows, 1):
        try:
            given = zip(values, speakers.values(), strict=True)
            whole = [conversations.turns(value, speaker) for value, speaker in given if not missing(value)]
            said = [turn for turns in whole for turn in turns]
            unused |= conversations.unused(values)
            cards.append(conversations.card(said))
            cut += [row] * (said[-1]["role"] != "assistant")
        except conversations.Unusable as reason:
            left.setdefault(str(reason), []).append(row)
            cards.append(("", "", ""))
        except ValueError as error:
            raise ValueError(f"{table.name}: row {row}: {error}") from None
    if unused:
        logger.warning("%s: not used within turns: %s", table.name, ", ".join(sorted(map(repr, unused))))
    return dict(zip(("earlier_turns", "question", "answer"), map(list, zip(*cards, strict=True)), strict=True))


def _texts(table: Table, role: dict[str, str], name: str) -> list[str]:
    """A column's values as text; empty texts where there is no such column."""
    if name not in role:
        return [""] * len(table.frame)
    values = table.frame[role[name]]
    return [
        value.strip(BLANKS) if type(value) is str else _text(value, table, name, i) for i, value in enumerate(values, 1)
    ]


def _text(value: Any, table: Table, name: str, row: int) -> str:
    if missing(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()  # as JSON writes it
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, (list, dict, bytes)):
        shown = " ".join(repr(value)[:60].split())
        kind = {list: "a list", dict: "a mapping", bytes: "bytes"}[type(value)]
        raise ValueError(f"{table.name}: row {row}: the {name} is {kind} ({shown}); expected text")
    return str(value).strip()


def missing(value: Any) -> bool:
    """Whether a value of a row stands for none."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _list(left: Left) -> str:
    parts = [
        f"{len(rows)} {reason} (row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:5]))}{', …' * (len(rows) > 5)})"
        for reason, rows in left.items()
    ]
    return ": " * bool(parts) + ", ".join(parts)


def _say(table: Table, role: dict[str, str], left: Left, cut: list[int], same: bool) -> None:
    """One line on what was found out; a warning where something is not used, left out or doubtful."""
    unused = [repr(name) for name in table.frame.columns if name not in role.values()]
    parts = [table.found, ", ".join(f"{name} from {column!r}" for name, column in role.items())]
    if "input" in role and same:
        parts.append("the instruction, one and the same in every row, is left out where there is an input")
    if unused:
        parts.append(f"not used: {', '.join(unused[:30])}")
    total = sum(map(len, left.values()))
    if total:
        parts.append(f"left out {total} of {len(table.frame)} cards{_list(left)}")
    if cut:
        parts.append("used without what follows the assistant's last turn" + _list({"conversations": cut}))
    serious = unused or total or cut or table.doubt
    parts.append(table.doubt)
    if serious or table.found:  # the ontology has nothing to say
        logger.log(logging.WARNING if serious else logging.INFO, "%s: %s", table.name, "; ".join(filter(None, parts)))


def _check_encodable(table: Table, cards: dict[str, list[str]], keep: list[int]) -> None:
    for name, texts in cards.items():
        for row, text in zip(keep, texts, strict=True):
            if not text.isascii() and (half := re.search(r"[\ud800-\udfff]", text)):
                said = (
                    f"the {name} holds half a character ({half[0]!r}, a lone surrogate): write the file anew as UTF-8"
                )
                raise ValueError(f"{table.name}: row {row + 1}: {said}")
