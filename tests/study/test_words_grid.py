"""What is counted about words, by hand, and rows of the grid on few cards."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from fedllm_helpers import config
from fedllm_helpers.attacks import words as attack
from fedllm_helpers.models.process import base_model, first_adapter
from fedllm_helpers.study import audits, results, words

STORED = Path(__file__).resolve().parents[2] / "notebooks" / "results" / "privacy_words.csv"


@pytest.fixture
def scene():
    """The settings of the grid with few cards and steps, and two hospitals."""
    few = ["dataset.max_cards_per_specialty=8", "federation.threads=1", "federation.num_clients=2"]
    few += ["dataset.specialties=[eye,nervous system]"]
    short = "federation.training_arguments={max_steps: 1, per_device_train_batch_size: 2}"
    return config.load("cpu", *audits.SETTINGS, *few, short)


def with_b(cfg):
    """An adapter as after a first round: its B is not zero."""
    rng = np.random.default_rng(0)
    return {k: v if "_A" in k else rng.normal(0, 0.02, v.shape).astype("f4") for k, v in first_adapter(cfg).items()}


def test_a_first_round_moves_b_to_the_mean_of_the_hospitals(scene):
    start, after = first_adapter(scene), words.after_round(scene)
    sent = [words.first_update(scene, hospital, words.ADAM_RATE) for hospital in range(2)]
    key = next(key for key in start if "lora_B" in key)
    assert not start[key].any() and after[key].any()
    assert np.allclose(after[key], (sent[0][key] + sent[1][key]) / 2, atol=1e-7), "as many cards each"


def test_shares_of_cards_and_special_tokens_by_hand(loaded):
    _, tokenizer = loaded
    cards = [{"question": "What is an eye?", "answer": "An eye."}, {"question": "What is it?", "answer": "A heart."}]
    shares = words.card_shares(tokenizer, cards)
    eye, what, heart = (tokenizer(text)["input_ids"][0] for text in (" eye", " What", " heart"))
    assert (shares[eye], shares[what], shares[heart]) == (0.5, 1.0, 0.5) and shares.shape == (len(tokenizer),)
    with pytest.raises(ValueError, match="there are none to look into"):
        words.card_shares(tokenizer, [])
    by_hospital = np.array([[0.3, 0.5, 0.0, 0.02], [0.0, 0.1, 0.3, 0.0], [0.1, 0.5, 0.3, 0.0]])
    assert words.special(by_hospital).tolist() == [[True, False, False, False], [False] * 4, [False] * 4]
    assert words.special(by_hospital, times=2)[1:, 2].tolist() == [True, True]


def test_rows_of_single_steps(scene, tmp_path, monkeypatch):
    chosen = {name: dataclasses.replace(words.EXACT[name], rank=4) for name in ("one card", "Adam", "masked")}
    chosen["record ε = 8"] = dataclasses.replace(words.EXACT["record ε = 8"], rank=4)
    monkeypatch.setattr(words, "EXACT", chosen)
    monkeypatch.setattr(words, "RECORD", "federation.privacy.record.epsilon=8")
    monkeypatch.setattr(words, "after_round", with_b)
    rows = words.attack_steps(scene, 4, 1, tmp_path)
    by_name = {row["setting"]: row for row in rows}
    assert list(by_name) == list(chosen) and len({row["words"] for row in rows}) == 1, "the same card"
    right = {name: row["words_true"] for name, row in by_name.items()}
    assert right["one card"] > 4 > right["masked"] and right["one card"] > right["record ε = 8"]
    assert all(row["true"] <= row["tokens"] and 0 < row["chance"] < 0.1 for row in rows)
    monkeypatch.setattr(words, "after_round", lambda *given: pytest.fail("trained again"))
    assert words.attack_steps(scene, 4, 1, tmp_path) == rows


def test_cores_have_gains_and_no_row_space(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(words, "PROMPTS", words.PROMPTS[:2])
    rows = words.attack_round(scene, ("LoRA-XS, rank 16",), tmp_path)
    assert [row["truth"] for row in rows] == ["eye", "nervous system"] and rows[0]["guesses"] > 0
    assert all(row["special"] <= row["occur"] <= row["guesses"] <= words.COUNT for row in rows)
    cores = config.load(scene, *words.GAINED["LoRA-XS, rank 16"][1].split())
    with pytest.raises(ValueError, match="LoRA-XS, whose A is frozen"):
        attack.named(first_adapter(cores), *base_model(cores), 5)


def test_an_open_round_is_read_and_a_masked_one_is_beside_it(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(words, "PROMPTS", words.PROMPTS[:2])
    rows = words.attack_round(scene, ("open",), tmp_path)
    assert [(row["setting"], row["hospital"]) for row in rows] == [(s, h) for s in ("open", "masked") for h in (0, 1)]
    assert all(len(row["words"].split()) >= row["guesses"] for row in rows)
    assert words.attack_round(scene, ("open",), tmp_path) == rows


def test_the_stored_table_is_whole():
    columns = ["attack", "seed", "setting"]
    table, origin = results.read(STORED, columns)
    exact, gained = (table[table["attack"] == attack].dropna(axis=1, how="all") for attack in ("row space", "gained"))
    assert origin["embedded_model"] and origin["seeds"] == [0, 1, 2] and tuple(origin["prompts"]) == words.PROMPTS
    per_seed = itertools.product([0, 1, 2], words.EXACT, range(words.GROUPS))
    assert sorted(zip(exact["seed"], exact["setting"], exact["group"].astype(int), strict=True)) == sorted(per_seed)
    per_seed = itertools.product([0, 1, 2], [*words.GAINED, "masked"], range(4))
    there = zip(gained["seed"], gained["setting"], gained["hospital"].astype(int), strict=True)
    assert sorted(there) == sorted(per_seed)
    exact = exact.astype({"words": int})
    assert (exact["words_true"] <= exact["words"]).all() and (exact["true"] <= exact["tokens"]).all()
    assert (exact["words"] < exact["tokens"]).all() and exact["cards"].ge(1).all()
    assert (gained["special"] <= gained["occur"]).all() and gained["guesses"].le(words.COUNT).all()
    how = {name: dataclasses.asdict(step) for name, step in words.EXACT.items()}
    assert origin["settings"] == {"row space": how, "gained": {name: list(one) for name, one in words.GAINED.items()}}
