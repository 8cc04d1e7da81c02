"""Splits: nothing on both sides that gives a card away, the share that was asked for, the default as it was."""

import hashlib
import json
import unicodedata

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from fedllm_helpers import config, data
from fedllm_helpers.data import splitting


def cards(questions, answers, specialties=None):
    """Cards from lists; one specialty unless given."""
    rows = {"question": list(questions), "answer": list(answers)}
    size = len(rows["question"])
    rows |= {"specialty": specialties or ["s"] * size, "card_id": [str(i) for i in range(size)]}
    return Dataset.from_dict(rows)


def of(name, values):
    return [f"{name} {value}" for value in values]


def long(values):
    return [f"This answer of some length says nothing but {value}" for value in values]


KEPT = {  # card_ids of the default settings' (train, test), hashed, from before the split was changed
    ("", 0): (1200, 240, "b45c7467980dd58b", "2ea49789b67be345"),
    ("", 1): (1200, 240, "5f39bed273510dcd", "ffc523f23a26dd36"),
    ("", 2): (1200, 240, "18444dcc7fd95f55", "7edab22c9620f436"),
    ("dataset.specialties=null", 0): (2941, 588, "90890a28a707a4fb", "ec27464b40d97af6"),
    ("dataset.specialties=null", 1): (2941, 588, "e6f0f38f71c62303", "6ebeaf967ff7c8e6"),
    ("dataset.specialties=null", 2): (2941, 588, "b0b2427928371463", "e0aa957387ee0247"),
}


@pytest.mark.parametrize(("override", "seed"), KEPT)
def test_the_default_split_is_what_stored_results_were_made_of(override, seed, caplog):
    parts = data.load(config.load("cpu", f"seed={seed}", *filter(None, [override])))
    found = [hashlib.sha256(json.dumps(list(part["card_id"])).encode()).hexdigest()[:16] for part in parts]
    assert (*map(len, parts), *found) == KEPT[override, seed]
    assert not caplog.messages, "the embedded text has nothing to say"


@pytest.mark.parametrize("seed", [0, 1])
def test_no_question_or_answer_on_both_sides(seed):
    answers = [f"An  Answer {i // 2}." if i % 2 else f"an answer {i // 2}" for i in range(60)]
    some = cards((f"q{i % 50}" for i in range(60)), answers)
    assert len(set(splitting.groups(some.to_pandas())[0])) < 30, "there is something to leak"
    train, test = data.split(some, 0.3, seed)
    assert len(train) + len(test) == 60 and len(test) > 0

    def plain(part, column):
        return {" ".join(text.lower().replace(".", "").split()) for text in part[column]}

    assert not plain(train, "answer") & plain(test, "answer")
    assert not plain(train, "question") & plain(test, "question")


def test_split_is_seeded_and_stratified():
    some = data.choose(data.load_flashcards("hpo"), ["eye", "ear"], 60)
    first, again, other = data.split(some, 0.25, 3), data.split(some, 0.25, 3), data.split(some, 0.25, 4)
    assert first[1]["card_id"] == again[1]["card_id"] != other[1]["card_id"]
    assert sorted(first[1]["specialty"]).count("eye") == 15


CONSONANTS = "कखगघङचछजझञटठडढणतथदधनपफबभमय"
DEVANAGARI = [f"अक्षर {c}{sign}" for c in CONSONANTS for sign in ("", *"ािीुूेैोौ")]


@pytest.mark.parametrize(
    ("texts", "number"),
    [
        (DEVANAGARI, 260),
        (["C", "C++", "C#", "c", ".NET", "NET", "F#", "F"], 7),
        (["5", "-5", "+5", "5 %", "0.5", "05", "5²"], 7),
        ([chr(0x1F600 + i) for i in range(60)], 60),
        (["👍🏻", "👍🏿", "👩‍⚕️", "👨‍⚕️"], 4),
        (["résumé", "resume", "re\u0301sume\u0301"], 2),
        (["שָׁלוֹם", "שלום"], 2),
        (["\u200fسؤال؟", "سؤال", "\u2067سؤال\u2069", "سُؤال"], 2),
        (["❤️", "❤", "♥", "👩", "👩\u200d👧", "👧"], 5),
        (["co\u00adoperate", "cooperate", "co\u200boperate", "\ufeffcooperate", "co-operate"], 2),
        (["क्ष", "क्\u200dष"], 2),
        (["ﬁber", "fiber", "FIBER", "ｆｉｂｅｒ", " fiber ", "fiber."], 1),
        (["Straße", "STRASSE", "“a”", '"a"'], 2),
        (["f(x)", "f[x]", "f{x}", "a < b", "a > b", "x = 1", "x == 1"], 7),
        (["?", "...", "¿", ""], 4),
    ],
)
def test_keys_keep_what_bears_meaning_and_drop_what_does_not(texts, number):
    assert len({splitting.key(text) for text in texts}) == number
    frame = cards(texts, long(range(len(texts)))).to_pandas()
    assert len(set(splitting.groups(frame)[0])) == number


def test_one_question_in_two_unicode_forms_stays_on_one_side():
    names = [f"Qu’est-ce qu’une névrosé{i}e à l’œil ?" for i in range(300)]
    both = [unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD")]
    train, test = data.split(cards(both, long(range(600))), 0.2, 1)
    assert len(test) == 120
    assert not {splitting.key(text) for text in train["question"]} & {splitting.key(text) for text in test["question"]}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 15, 4000])
@pytest.mark.parametrize("share", [0.1, 0.25])
def test_the_share_holds_over_the_whole_whatever_the_size_of_specialties(size, share):
    specialties = [f"s{i // size}" for i in range(4000)]
    train, test = data.split(cards(of("q", range(4000)), long(range(4000)), specialties), share)
    assert len(test) == 4000 * share and len(train) + len(test) == 4000
    held = pd.Series(test["specialty"]).value_counts()
    assert held.max() <= np.ceil(share * size), "no specialty gives more than its part"


def test_groups_across_small_specialties_leave_the_share_as_it_is():
    """Pairs that share a question, each in a specialty of its own two: none fits the quota of a specialty."""
    specialties = [f"s{i // 2}" for i in range(1000)]
    train, test = data.split(cards(of("q", (i // 2 for i in range(1000))), long(range(1000)), specialties), 0.1)
    assert len(test) == 100 and not set(train["question"]) & set(test["question"])


@pytest.mark.parametrize(
    ("answers", "share", "held"),
    [
        (["yes", "no"] * 100, 0.1, {"yes": 10, "no": 10}),
        (["yes"] * 50 + ["no"] * 350, 0.1, {"yes": 5, "no": 35}),
        (["Yes."] * 20 + ["yes"] * 30 + ["NO"] * 350, 0.1, {"yes": 5, "no": 35}),
        ([str(i % 7) for i in range(70)], 0.2, {str(i): 2 for i in range(7)}),
        (["It cannot be told from the text that was given."] * 40 + long(range(160)), 0.1, {}),
    ],
)
def test_a_label_that_many_cards_share_ties_nothing_and_stands_on_both_sides(answers, share, held):
    train, test = data.split(cards(of("Is it", range(len(answers))), answers), share)
    assert len(test) == round(share * len(answers))
    counts = pd.Series([splitting.key(text) for text in test["answer"]]).value_counts().to_dict()
    assert not held or counts == held
    if not held:
        assert counts.pop("it cannot be told from the text that was given") == 4 and len(counts) == 16


def test_a_conversation_is_its_question_after_the_turns_before_it():
    frame = cards(["Why?"] * 3, long(range(3))).to_pandas()
    frame["earlier_turns"] = [
        "",
        '[{"role": "user", "content": "It hurts."}]',
        '[{"role": "user", "content": "It itches."}]',
    ]
    assert len(set(splitting.groups(frame)[0])) == 3


SOME = cards(of("q", range(20)), long(range(20)))
NONE = SOME.select([])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: data.split(SOME, -1), "train.evaluate_split=-1: allowed is a share from 0 to 0.9"),
        (lambda: data.split(SOME, 0.95), "train.evaluate_split=0.95: allowed"),
        (lambda: data.split(SOME, float("nan")), "train.evaluate_split=nan: allowed"),
        (lambda: data.split(SOME, "0.1"), "train.evaluate_split=0.1: allowed"),
        (lambda: data.split(SOME, None), "train.evaluate_split=None: allowed"),
        (lambda: data.split(SOME.select([0, 1]), 0.1), r"cannot be split \(that share of them is 0 cards\)"),
        (lambda: data.split(NONE, 0.1), "there are no cards to split"),
        (lambda: data.split(SOME, 0.01), "train.evaluate_split=0.01: 20 cards in 20 groups .*bring more cards"),
        (
            lambda: data.split(cards(["q"] * 40, long(range(40))), 0.2),
            "evaluate_split=0.2: 40 cards in 1 groups of shared",
        ),
        (lambda: data.choose(SOME, None, 0), "dataset.max_cards_per_specialty=0: allowed is 1 or more"),
        (lambda: data.choose(SOME, None, -3), "dataset.max_cards_per_specialty=-3"),
        (lambda: data.choose(SOME, [], None), r"dataset.specialties=\[\]: expected a list of at least one"),
        (lambda: data.choose(SOME, "eye", None), "dataset.specialties=eye: expected a list"),
        (lambda: data.choose(SOME, ["eyes"], None), "no card of specialty 'eyes': present are s"),
    ],
)
def test_what_cannot_be_chosen_or_split_is_one_line(call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_share_that_groups_do_not_allow_is_said(caplog):
    _, test = data.split(cards(["one"] * 90 + [f"q{i}" for i in range(10)], long(range(100))), 0.5)
    assert len(test) == 10 and "held out are 10 instead of 50, for a group stays together" in caplog.text


def test_a_specialty_named_twice_counts_once():
    assert len(data.choose(SOME, ["s", "s"], None)) == 20


def test_a_file_of_its_own_is_held_out(tmp_path, caplog):
    rows = [{"question": f"q{i}", "answer": f"a{i}", "specialty": "ab"[i % 2]} for i in range(30)]
    for name, some in (("mine.json", rows[:20]), ("exam.json", rows[18:])):
        (tmp_path / name).write_text(json.dumps(some))
    mine = [
        f"dataset.name={tmp_path / 'mine.json'}",
        "dataset.specialties=null",
        f"dataset.test={tmp_path / 'exam.json'}",
    ]
    train, test = data.load(config.load("cpu", *mine))
    assert sorted(train["question"]) == sorted(f"q{i}" for i in range(18)) and list(test["question"])[0] == "q18"
    assert "left out 2 of 20 training cards whose question stands in the test part" in caplog.text
    train, test = data.load(config.load("cpu", *mine, "dataset.specialties=[a]", "train.evaluate_split=0"))
    assert set(train["specialty"]) == set(test["specialty"]) == {"a"} and len(test) == 6
    with pytest.raises(FileNotFoundError, match="no data file at .*nowhere.csv"):
        data.load(config.load("cpu", mine[0], "dataset.specialties=null", "dataset.test=nowhere.csv"))
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(rows[:20]))
    (folder / "test.json").write_text(json.dumps(rows[20:]))
    whole = ["dataset.specialties=null", f"dataset.name={folder}"]
    assert len(data.load(config.load("cpu", *whole))[1]) == 10
    caplog.clear()
    assert len(data.load(config.load("cpu", *whole, "train.evaluate_split=false"))[1]) == 0
    assert "its own test part is not used, for train.evaluate_split is 0" in caplog.text
