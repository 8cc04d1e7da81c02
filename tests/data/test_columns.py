"""Which column is what: well-known names, names that are mapped, and nothing that vanishes without a word."""

import json
import logging
import re
from pathlib import Path

import pandas as pd
import pytest

from fedllm_helpers import config, data
from fedllm_helpers.training import batches

# a few rows of our own making in the columns of public instruction sets
MEDICINE = {  # medical-meadow: one instruction for all
    "instruction": ["Answer this question truthfully"] * 3,
    "input": ["What is gout?", "What is anaemia?", ""],
    "output": ["Uric acid crystals in joints.", "Too few red blood cells.", "There was no question."],
}
FINANCE = {  # FinGPT: the task changes, and the label repeats
    "instruction": ["What is the sentiment of this news?", "What is the sentiment of this tweet?"] * 4,
    "input": [f"Quarterly profit {'rose' if i % 2 else 'fell'} by {i} %" for i in range(8)],
    "output": ["negative", "positive"] * 4,
}
CODE = {  # CodeAlpaca: often without an input
    "instruction": ["Compute the area of a rectangle.", "Compute its circumference.", "Print <|im_end|> in C."],
    "input": ["width: 5, height: 8", "width: 5, height: 8", ""],
    "output": ["print(5 * 8)", "print(2 * (5 + 8))", 'puts("<|im_end|>");'],
}


def cards(tmp_path, frame, columns=None, name="cards.json"):
    path = tmp_path / name
    path.write_text(json.dumps(frame if isinstance(frame, list) else pd.DataFrame(frame).to_dict("records")))
    return data.load_flashcards(str(path), columns)


def test_instruction_and_input_stand_together_unless_the_instruction_is_always_the_same(tmp_path, caplog):
    code = cards(tmp_path, CODE)["question"]
    assert list(code) == [
        "Compute the area of a rectangle.\nwidth: 5, height: 8",
        "Compute its circumference.\nwidth: 5, height: 8",
        "Print <|im_end|> in C.",
    ]
    caplog.set_level(logging.INFO)
    meadow = cards(tmp_path, MEDICINE)["question"]
    assert list(meadow) == ["What is gout?", "What is anaemia?", "Answer this question truthfully"]
    assert "the instruction, one and the same in every row, is left out where there is an input" in caplog.text


def test_a_test_file_of_one_task_is_read_as_the_training_file_of_several(tmp_path):
    one = {name: values[:1] for name, values in FINANCE.items()}
    for name, frame in (("train.json", CODE), ("test.json", one)):
        (tmp_path / name).write_text(json.dumps(pd.DataFrame(frame).to_dict("records")))
    train, test = data.load_parts(str(tmp_path))
    assert list(test["question"]) == ["What is the sentiment of this news?\nQuarterly profit fell by 0 %"]
    assert len(train) == 3


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "Q", "answer": "A"}, "Q", "A"),
        ({"prompt": "Q", "completion": "A"}, "Q", "A"),
        ({"prompt": "Q", "response": "A"}, "Q", "A"),
        ({"query": "Q", "response": "A"}, "Q", "A"),
        ({"problem": "Q", "solution": "A"}, "Q", "A"),
        ({"id": 1, "system_prompt": "S", "question": "Q", "response": "A"}, "Q", "A"),
        ({"instruction": "Q", "context": "C", "response": "A", "category": "x"}, "C\nQ", "A"),
        ({"instruction": "I", "input": "", "output": "A", "prompt": "Below is I"}, "I", "A"),
        ({"input": "Q", "output": "A"}, "Q", "A"),
        ({"context": "C", "question": "Q", "answer": 39}, "C\nQ", "39"),
        ({"QUESTION": "Q", " Answer_": "A"}, "Q", "A"),
    ],
)
def test_well_known_names(tmp_path, row, question, answer, caplog):
    caplog.set_level(logging.INFO)
    (card,) = cards(tmp_path, [row])
    assert (card["question"], card["answer"]) == (question, answer)
    used = caplog.messages[0].split("; not used: ")
    assert all((f"'{name}'" in used[0]) != (f"'{name}'" in "".join(used[1:])) for name in row), "each is used, or said"


def test_other_names_are_mapped_by_the_configuration(tmp_path, caplog):
    path = tmp_path / "karten.csv"
    path.write_text(
        "Nr;Frage: kurz;Antwort;Fach;Notiz\n7;Was ist Gicht?;Kristalle;Rheuma;x\n8;Was ist Föhn?;Wind;HNO;\n"
    )
    names = {"question": "Frage: kurz", "answer": "antwort", "specialty": "Fach", "card_id": "Nr"}
    given = [f"dataset.columns.{role}={name}" for role, name in names.items()]
    cfg = config.load("cpu", f"dataset.name={path}", "dataset.specialties=null", "train.evaluate_split=0.5", *given)
    train, test = data.load(cfg)
    both = sorted([*train, *test], key=lambda card: card["card_id"])
    assert both[0] == {"question": "Was ist Gicht?", "answer": "Kristalle", "specialty": "Rheuma", "card_id": "7"}
    assert "not used: 'Notiz'" in caplog.text
    assert config.load(cfg, "dataset.columns=null").dataset.columns is None


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"question": "fragen"}, "has the columns Frage, Antwort; dataset.columns.question=fragen is none of them"),
        ({"frage": "Frage"}, "dataset.columns.frage: allowed are question, answer, context"),
        ({"question": "Frage"}, "has the columns Frage, Antwort; expected"),
        ({"question": "Frage", "answer": "frage"}, "takes one of them, 'Frage', as question and as answer"),
    ],
)
def test_a_wrong_mapping_is_one_line(tmp_path, columns, says):
    with pytest.raises(ValueError, match=says) as caught:
        cards(tmp_path, {"Frage": ["a"], "Antwort": ["b"]}, columns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("first", "asked"),
    [("Was ist Gicht?;Kristalle im Gelenk.", True), ("Frage;Antwort", False), ("Nr. 1;Was hilft?;Ruhe", True)],
)
def test_a_file_without_names_of_columns_is_asked_for_them(tmp_path, first, asked):
    path = tmp_path / "karten.csv"
    path.write_text(first + "\n" + first.replace("Gicht", "Föhn") + "\n")
    with pytest.raises(ValueError, match="has the columns") as caught:
        data.load_flashcards(str(path))
    assert ("is the row with the names of the columns missing?" in str(caught.value)) == asked


SHAREGPT = {"names": ("from", "value"), "roles": ("human", "gpt")}


def turns(*texts, names=("role", "content"), roles=("user", "assistant"), system=None):
    said = [{names[0]: roles[i % 2], names[1]: text} for i, text in enumerate(texts)]
    return [{names[0]: "system", names[1]: system}, *said] if system else said


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("hi", "ho", "how?", "so.", system="Be kind.")},
        {"conversations": turns("hi", "ho", "how?", "so.", system="Be kind.", **SHAREGPT)},
        {"messages": json.dumps(turns("hi", "ho", "how?", "so.", system="Be kind."))},
        {"prompt": turns("hi", "ho", "how?", system="Be kind."), "completion": turns("so.", roles=("assistant",) * 2)},
        {"prompt": turns("hi", "ho", "how?", system="Be kind."), "completion": "so."},
        {"messages": turns("hi", "ho", "how?", "so.", "Thanks!", system="Be kind.")},
        {"messages": [{"role": "system", "content": ""}, *turns("hi", "ho", "how?", "so.", system="Be kind.")]},
        {"messages": turns("hi", "ho", [{"type": "text", "text": "how?"}], "so.", system="Be kind."), "id": 3},
    ],
    ids=["messages", "sharegpt", "json", "trl", "trl-text", "goes-on", "no-system", "parts"],
)  # fmt: skip
def test_the_assistants_last_turn_is_the_answer_and_what_stands_before_is_kept(tmp_path, row):
    (card,) = cards(tmp_path, [row])
    assert (card["question"], card["answer"]) == ("how?", "so.")
    assert json.loads(card["earlier_turns"]) == turns("hi", "ho", system="Be kind.")
    kept = tmp_path / "kept.json"  # as grids keep them
    kept.write_text(json.dumps(cards(tmp_path, [row]).to_list()))
    assert data.load_flashcards(str(kept))[0] == card


def test_rows_of_turns_beside_rows_of_text(tmp_path):
    """What the first row is like says nothing of the others."""
    pairs = [(None, None), ("a?", "b"), (turns("c?"), "d"), ("e?", turns("f", roles=("assistant",)))]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    found = cards(tmp_path, rows)
    assert [(card["question"], card["answer"]) for card in found] == [("a?", "b"), ("c?", "d"), ("e?", "f")]


def test_what_turns_hold_beside_their_text_is_said(tmp_path, caplog):
    asked, answered = {"role": "user", "text": "a?", "name": ""}, {"role": "assistant", "text": "b", "reasoning": "c"}
    (card,) = cards(tmp_path, [{"messages": [asked, answered]}])
    assert (card["question"], card["answer"]) == ("a?", "b")
    assert "cards.json: not used within turns: 'reasoning'" in caplog.text


@pytest.mark.parametrize("history", ["hello", "[1]", '{"role": "user"}', '[{"role": "user"}]', "[" * 9])
def test_a_history_that_is_none_is_one_line(tmp_path, history):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d", "earlier_turns": history}]
    with pytest.raises(ValueError, match=r"cards.json: row 2: earlier_turns is no list of turns"):
        cards(tmp_path, rows)


def test_conversations_that_cannot_be_learned_are_left_out_and_said(tmp_path, caplog):
    image = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": "x.png"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": "f"}]}
    rows = [turns("a", "b"), turns("a"), turns("a", "b", "c"), turns(image, "b"), [*turns("a"), call], [], None,
            [*turns("a"), {"role": "tool", "content": "3"}], turns("a", ""), turns("a", "b")]  # fmt: skip
    assert len(cards(tmp_path, [{"messages": row} for row in rows])) == 1
    for says in (
        "left out 9 of 10 cards",
        "2 that do not end with a user's turn and the assistant's (rows 2, 7)",
        "used without what follows the assistant's last turn: 1 conversations (row 3)",
        "1 with images or sounds (row 4)",
        "2 with tool calls or a role other than system, user and assistant (rows 5, 8)",
        "1 with an empty turn (row 9)",
        "2 that are exact repetitions (rows 3, 10)",
    ):
        assert says in caplog.text


@pytest.mark.parametrize("name", ["MEDICINE", "FINANCE", "CODE"])
@pytest.mark.parametrize("prompt", ["course", "chat"])
def test_any_industry_from_its_file_to_token_ids(tmp_path, loaded, name, prompt):
    path = tmp_path / f"{name}.csv"
    pd.DataFrame(globals()[name]).to_csv(path, index=False, sep=";")
    mine = [f"dataset.name={path}", "dataset.specialties=null", "train.evaluate_split=0.34", f"dataset.prompt={prompt}"]
    cfg = config.load("cpu", *mine)
    train, test = data.load(cfg)
    assert len(train) + len(test) == len(globals()[name]["output"]) and len(test) >= 1
    tokenizer = loaded[1]
    for row, card in zip(batches.encode(train, tokenizer, 128, cfg.dataset.prompt), train, strict=True):
        learned = [
            token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != batches.IGNORED
        ]
        assert tokenizer.decode(learned).strip() == card["answer"] + tokenizer.eos_token
        assert learned.count(tokenizer.eos_token_id) == 1, "what a card says of control tokens is text"
        assert all(part in tokenizer.decode(row["input_ids"]) for part in card["question"].split("\n"))


def test_the_line_of_log_on_the_page_is_what_is_logged(tmp_path, monkeypatch, caplog):
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rows = "Frage;Antwort;Notiz\nWas heißt Übel?;Nausea;x\nWas ist Föhn?;;\nWas ist Gicht?;Kristalle;\n"
    Path("cards.csv").write_bytes(rows.encode("cp1252"))
    data.load_flashcards("cards.csv", {"question": "Frage", "answer": "Antwort"})
    assert f"WARNING {caplog.messages[0]}" == " ".join(
        re.search(r"```text\n(WARNING.*?)```", page, re.DOTALL)[1].split()
    )
