"""Conversations as chat models learn from them: the last turn is the answer, what stands before it is the prompt."""

import json
from collections.abc import Iterable
from typing import Any

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user", "ai": "assistant",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
}  # fmt: skip
SPEAKER, SAID = ("role", "from"), ("content", "value", "text")  # their names within a turn
Turn = dict[str, str]  # role and content, as chat templates take them


class Unusable(Exception):
    """Why one conversation is left out."""


def is_turns(value: Any) -> bool:
    """Whether a value is a list of turns in the manner of ``messages`` or of ShareGPT's ``conversations``."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, dict) and {"role", "from"} & set(x) for x in value)
    )


def turns(value: Any, speaker: str = "") -> list[Turn]:
    """A list of turns, or such a list as JSON text, with the roles system, user and assistant.

    Args:
        value: of a row.
        speaker: whose single turn a plain text is.

    Raises:
        ValueError: it is no list of turns.
        Unusable: a turn is an image, a tool or empty.
    """
    if isinstance(value, str) and speaker:
        return [{"role": speaker, "content": value.strip()}]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("a conversation is text, and no list of turns") from None
    if value == []:
        raise Unusable("without a turn")
    if not is_turns(value):
        raise ValueError('a conversation is no list of turns such as {"role": "user", "content": "…"}')
    found = []
    for turn in value:
        role, content = (next((turn[key] for key in keys if key in turn), None) for keys in (SPEAKER, SAID))
        role = ROLES.get(str(role).strip().lower())
        if role is None or any(turn.get(key) for key in ("tool_calls", "function_call")):
            raise Unusable("with tool calls or a role other than system, user and assistant")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise Unusable("with images or sounds")
            content = "\n".join(part["text"] for part in content)
        if content is not None and not isinstance(content, str):
            raise ValueError(f"the content of a turn is {type(content).__name__}; expected text")
        found.append({"role": role, "content": (content or "").strip()})
    return [turn for turn in found if turn != {"role": "system", "content": ""}]  # many exports have empty ones


def card(value: list[Turn]) -> tuple[str, str, str]:
    """(earlier turns, question, answer) of a conversation; the earlier turns as JSON text, empty where there are none.

    Raises:
        Unusable: the assistant's last turn does not answer a user's, or a turn before it is empty.
    """
    value = value[: max((end for end, turn in enumerate(value, 1) if turn["role"] == "assistant"), default=0)]
    if [turn["role"] for turn in value[-2:]] != ["user", "assistant"]:
        raise Unusable("that do not end with a user's turn and the assistant's")
    if not all(turn["content"] for turn in value):
        raise Unusable("with an empty turn")
    before = value[:-2]
    return json.dumps(before, ensure_ascii=False) if before else "", value[-2]["content"], value[-1]["content"]


def unused(values: Iterable[Any]) -> set[str]:
    """Names within turns of what is not used, such as a model's reasoning."""
    lists = (value for value in values if is_turns(value))
    found = (item for turns in lists for turn in turns for item in turn.items())
    return {name for name, said in found if name not in (*SPEAKER, *SAID) and said not in (None, "", [], {})}


def is_history(text: str) -> bool:
    """Whether a text is what :func:`earlier` reads."""
    try:
        found = json.loads(text or "[]")
    except ValueError:
        return False
    return isinstance(found, list) and all(
        isinstance(turn, dict) and turn.get("role") in ROLES.values() and isinstance(turn.get("content"), str)
        for turn in found
    )


def earlier(card: dict) -> list[Turn]:
    """The turns before a card's question, the first first; none for most cards."""
    return json.loads(card.get("earlier_turns") or "[]")
