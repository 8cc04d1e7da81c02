"""From a card to the text and the token ids that a model reads: templates, chats, control tokens kept out."""

import re
from typing import TYPE_CHECKING

from fedllm_helpers.config.prompts import CHAT, PROMPTS, template
from fedllm_helpers.data import conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GUARD = "\U0010fff0"  # a private character, put into control tokens that are written in a card until the text is cut
Encoded = tuple[list[int], int, int]  # ids of prompt and answer; where the labels start, and where they end


def format_prompt(question: str, prompt: str = "short") -> str:
    """The text before an answer; the answer follows after one space, or at once where the template ends with a line.

    Args:
        question: of a card.
        prompt: one of :data:`fedllm_helpers.config.prompts.PROMPTS`, or a template of one's own with ``{question}``.

    Raises:
        ValueError: ``prompt`` is neither; or it is ``chat``, which is a matter of the tokenizer (:func:`prompt_ids`).
    """
    if prompt == CHAT:
        raise ValueError("dataset.prompt=chat is written by the model's tokenizer: use batches.encode or prompt_ids")
    return template(prompt).rstrip(" ").replace("{question}", question)


def as_text(card: dict) -> str:
    """A card's question as plain text; turns before it stand above, each with its role."""
    turns = conversations.earlier(card)
    if not turns:
        return card["question"]
    turns = [*turns, {"role": "user", "content": card["question"]}]
    return "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


def prompt_ids(card: dict | str, tokenizer: "PreTrainedTokenizerBase", prompt: str = "short") -> list[int]:
    """Token ids of what stands before an answer: of a card, or of a question alone.

    Raises:
        ValueError: ``prompt`` is no template, or the tokenizer has none for chats.
    """
    card, control = {"question": card} if isinstance(card, str) else card, _control(tokenizer)
    return _prompt_ids(_before(card, tokenizer, prompt, control), tokenizer, prompt, control)


def card_ids(cards: list[dict], tokenizer: "PreTrainedTokenizerBase", prompt: str = "short") -> list[Encoded]:
    """Token ids of cards with their answers, and which of them to learn: the answer and its end.

    An answer ends with the end-of-text token, or in a chat with what the tokenizer's own template ends a turn with;
    what the template writes after that is read, not learned. Control tokens that are written in a card stay text.

    Raises:
        ValueError: as :func:`prompt_ids`.
    """
    control = _control(tokenizer)
    if prompt == CHAT:
        return [_chat_ids(card, tokenizer, control) for card in cards]
    prompts = [_before(card, tokenizer, prompt, control) for card in cards]
    answers = [_guard(card["answer"], control) for card in cards]
    texts = [f"{text}{'' if text[-1:].isspace() else ' '}{a}" for text, a in zip(prompts, answers, strict=True)]
    if tokenizer.is_fast and texts and not control.search(prompts[0]):
        found = _by_offsets([_unguard(text) for text in prompts], [_unguard(text) for text in texts], tokenizer)
    else:  # without offsets, the answer starts where the ids of both part from those of the prompt alone
        found = [
            (_ids(text, tokenizer, True, control), _prompt_ids(before, tokenizer, prompt, control))
            for text, before in zip(texts, prompts, strict=True)
        ]
        found = [(ids, _common(ids, before)) for ids, before in found]
    end = tokenizer.eos_token_id
    found = [(ids if ids[-1:] == [end] else [*ids, end], start) for ids, start in found]
    return [(ids, start, len(ids)) for ids, start in found]


def _by_offsets(
    prompts: list[str], texts: list[str], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], int]]:
    tokens = tokenizer(texts, return_offsets_mapping=True, split_special_tokens=True)
    return [
        (ids, next((i for i, (_, end) in enumerate(offsets) if end > len(text)), len(ids)))
        for text, ids, offsets in zip(prompts, tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]


def _chat_ids(card: dict, tokenizer: "PreTrainedTokenizerBase", control: re.Pattern) -> Encoded:
    answer = _guard(card["answer"], control)
    turns = _turns(card, control)
    whole = _render([*turns, {"role": "assistant", "content": answer}], tokenizer, False)
    ids, before = (
        _ids(whole, tokenizer, False, control),
        _ids(_render(turns, tokenizer, True), tokenizer, False, control),
    )
    start, pieces = _common(ids, before), control.split(whole)[::2]
    if start < len(before) - 1:  # one may have merged with the answer
        raise ValueError(
            "dataset.prompt=chat: the tokenizer's chat template writes another prompt once the answer is there"
        )
    special = set(tokenizer.convert_tokens_to_ids(control.findall(whole)))
    marks = [i for i in range(start, len(ids)) if ids[i] in special]
    last = max((place for place, piece in enumerate(pieces) if answer.strip() in piece), default=0)
    ends = min(len(pieces) - 1 - last, len(marks))
    joined = start < len(before)
    while joined and ids[start] not in special and not tokenizer.decode(ids[start]).strip():
        start += 1  # a line's end of the prompt, which is cut otherwise once the answer follows
    if not ends:
        return [*ids, tokenizer.eos_token_id], start, len(ids) + 1
    return ids, start, marks[-ends] + 1


def _before(card: dict, tokenizer: "PreTrainedTokenizerBase", prompt: str, control: re.Pattern) -> str:
    """The text before an answer, in which only the template's own control tokens are left."""
    if prompt == CHAT:
        return _render(_turns(card, control), tokenizer, True)
    return format_prompt(_guard(as_text(card), control), prompt)


def _turns(card: dict, control: re.Pattern) -> list[conversations.Turn]:
    turns = [*conversations.earlier(card), {"role": "user", "content": card["question"]}]
    return [{**turn, "content": _guard(turn["content"], control)} for turn in turns]


def _render(turns: list[conversations.Turn], tokenizer: "PreTrainedTokenizerBase", ask: bool) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"dataset.prompt=chat: the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; "
            f"take {', '.join(PROMPTS)}, or a template of your own with {{question}} in it"
        )
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template is a program, and may raise anything
        said = " ".join(str(error).split())
        raise ValueError(f"dataset.prompt=chat: the tokenizer's chat template refuses a card: {said[:200]}") from None


def _prompt_ids(text: str, tokenizer: "PreTrainedTokenizerBase", prompt: str, control: re.Pattern) -> list[int]:
    ids, end = _ids(text, tokenizer, prompt != CHAT, control), [tokenizer.eos_token_id]
    ended = prompt != CHAT and ids[-1:] == end == tokenizer("")["input_ids"][-1:]  # by the tokenizer, not the text
    return ids[:-1] if ended else ids


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase", add: bool, control: re.Pattern) -> list[int]:
    """Ids of a text: its control tokens are control tokens, and guarded ones are text."""
    add = add and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    plain = _unguard(text)
    pieces = control.split(text)
    if plain == text or len(pieces) == 1:
        return list(tokenizer(plain, add_special_tokens=add, split_special_tokens=len(pieces) == 1)["input_ids"])
    ids = tokenizer("")["input_ids"][:1] if add and tokenizer.bos_token_id is not None else []
    for place, piece in enumerate(pieces):
        if place % 2:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        elif piece:
            piece = _unguard(piece)
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def _control(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern:
    """All control tokens of a tokenizer; the pattern's one group is the token."""
    named = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    named |= set(tokenizer.all_special_tokens)
    return re.compile(f"({'|'.join(map(re.escape, sorted(named, key=len, reverse=True))) or '(?!)'})")


def _guard(text: str, control: re.Pattern) -> str:
    """Put private characters within control tokens; transformers can do so itself only as of 5.24, and for chats."""
    return control.sub(lambda found: f"{found[0][0]}{GUARD}{found[0][1:]}", text)


def _unguard(text: str) -> str:
    return text.replace(GUARD, "")


def _common(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
