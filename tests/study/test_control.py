"""Form or knowledge: what controls share with the right training and what not, and a stored table that is whole."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from fedllm_helpers import config, data, evaluation, models
from fedllm_helpers.models.process import base_model, first_adapter
from fedllm_helpers.study import control

STORED = Path(__file__).resolve().parents[2] / "notebooks" / "results"
CFG = config.load("cpu")


def cards_of(count):
    return Dataset.from_list([{"question": f"q{i}", "answer": f"a{i}"} for i in range(count)])


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 50, 1200])
@pytest.mark.parametrize("seed", [0, 1, 2, 17])
def test_shuffled_pairs_keep_all_texts_and_no_pair(count, seed):
    rows = control.shuffled(cards_of(count), seed)
    assert [row["question"] for row in rows] == [f"q{i}" for i in range(count)]
    assert Counter(row["answer"] for row in rows) == Counter(f"a{i}" for i in range(count))
    assert not [row for row in rows if row["question"][1:] == row["answer"][1:]]
    assert rows == control.shuffled(cards_of(count), seed)


@pytest.mark.parametrize("answers", ["aab", "aaaa", "abab"])
def test_answers_that_occur_twice_are_shuffled_too(answers):
    given = Dataset.from_list([{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)])
    for seed in range(10):
        rows = control.shuffled(given, seed)
        assert [row["question"] for row in rows] == given["question"][:]
        assert Counter(row["answer"] for row in rows) == Counter(answers)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_cards_cannot_be_shuffled(count):
    with pytest.raises(ValueError, match="^shuffled: . cards; expected at least 2$") as refusal:
        control.shuffled(cards_of(2).select(range(count)), 0)
    assert f" {count} cards" in str(refusal.value)


def test_examples_stand_solved_above_the_question():
    (card,) = control.with_examples(cards_of(3).select([2]), cards_of(2))
    text = data.format_prompt(card["question"], "short")
    assert text == "Question: q0\nAnswer: a0\n\nQuestion: q1\nAnswer: a1\n\nQuestion: q2\nAnswer:"
    assert card["answer"] == "a2"


def test_other_fields_share_no_field_and_no_card():
    train, test = data.load(CFG)
    others = control.other_fields(CFG, len(train))
    assert len(others) == len(train) == len(set(others["card_id"]))
    assert not set(others["specialty"]) & set(CFG.dataset.specialties)
    assert not set(others["card_id"]) & {*train["card_id"], *test["card_id"]}
    again, another = (control.other_fields(config.load(CFG, f"seed={seed}"), 50)["card_id"] for seed in (0, 1))
    assert list(again) == list(control.other_fields(CFG, 50)["card_id"]) != list(another)
    every = data.load_flashcards("hpo")["specialty"]
    there = sum(specialty not in set(CFG.dataset.specialties) for specialty in every)
    assert len(control.other_fields(CFG, 1_000_000)) == there < len(every), "all of them, and no more"


@pytest.mark.parametrize("arm", control.TUNED)
def test_every_training_has_as_many_cards(arm):
    assert len(control.cards_of(CFG, arm)) == 1200


def test_losses_tell_words_from_the_end_and_are_those_of_scoring(tmp_path, monkeypatch):
    """Of an untouched model, also after a training in the same process; the end is checked by hand."""
    monkeypatch.setattr(control, "KEPT", tmp_path)
    few = ("dataset.max_cards_per_specialty=6", "train.training_arguments.max_steps=1", "federation.threads=1")
    cfg = config.load(CFG, *few)
    trained, found = control.losses(cfg, "right pairs", 1e-3), control.losses(cfg, "untuned", 0.0)
    model, tokenizer = base_model(cfg)
    models.set_adapter(model, first_adapter(cfg))
    test = data.load(cfg)[1]
    assert found.shape == trained.shape == (len(test), 2) and (found > 0).all() and not np.allclose(found, trained)
    assert np.allclose(found.sum(axis=1), evaluation.score_answers(model, tokenizer, test, cfg).nll, rtol=1e-5)
    text = f"{data.format_prompt(test['question'][0], 'short')} {test['answer'][0]}"
    ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        last = model(input_ids=ids).logits[0, -2].float().log_softmax(-1)
    assert found[0, 1] == pytest.approx(-float(last[tokenizer.eos_token_id]), rel=0.02)
    kept = {path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert np.array_equal(control.losses(cfg, "untuned", 0.0), found), "and is read back"
    assert kept == {path.stat().st_mtime_ns for path in tmp_path.iterdir()} and len(kept) == 2


def test_the_stored_control_is_whole_and_agrees_with_the_other_grid():
    cards, other = pd.read_csv(STORED / "control_cards.csv"), pd.read_csv(STORED / "federated_cards.csv")
    arms = [*control.UNTUNED, *control.TUNED]
    numbers = [*arms, *(f"end: {arm}" for arm in arms)]
    assert set(cards) == {"card_id", "specialty", "seed", "tokens", *numbers}
    assert cards["seed"].value_counts().to_dict() == {0: 240, 1: 240, 2: 240} and len(cards) == 720
    assert not cards.duplicated(["card_id", "seed"]).any()
    assert np.isfinite(cards[numbers]).all(axis=None) and (cards[numbers] >= 0).all(axis=None)
    both = cards.merge(other, on=["card_id", "seed"], suffixes=("", " there"))
    assert len(both) == 720 and (both["tokens"] + 1 == both["tokens there"]).all()
    assert (both["untuned"] + both["end: untuned"] - both["untuned there"]).abs().max() < 0.02, "nats of a card"


def test_the_stored_rates_are_the_best_of_those_tried():
    rates, origin = pd.read_csv(STORED / "control_rates.csv"), json.loads((STORED / "control.json").read_text())
    assert set(rates["arm"]) == set(origin["learning_rates"]) == set(control.TUNED)
    assert origin["seeds"] == [0, 1, 2] and origin["examples"] == control.EXAMPLES and origin["embedded_model"]
    assert np.isfinite(rates["nats_per_card"]).all()
    for arm, part in rates.groupby("arm"):
        best = part.loc[part["nats_per_card"].idxmin(), "learning_rate"]
        assert origin["learning_rates"][arm] == best and min(control.RATES) < best < max(control.RATES)
        assert sorted(part["learning_rate"]) == sorted(control.RATES)
