"""Questions from cards and files, picks by likelihood, and baselines without a model."""

import json

import pytest

from fedllm_helpers import config, evaluation
from fedllm_helpers.evaluation import multiple_choice

CFG = config.load("cpu")


def test_choice_questions_are_of_one_specialty_with_one_right_option(cards):
    train, test = cards
    questions = multiple_choice.from_cards(test, train, seed=2)
    system = {card["answer"]: card["specialty"] for part in cards for card in part}
    for card, question in zip(test, questions, strict=True):
        assert question["options"][question["answer"]] == card["answer"]
        assert len(set(question["options"])) == 4 and {system[o] for o in question["options"]} == {card["specialty"]}
    assert len({q["answer"] for q in questions}) == 4
    assert (
        questions == multiple_choice.from_cards(test, train, seed=2) != multiple_choice.from_cards(test, train, seed=3)
    )
    with pytest.raises(ValueError, match="other answers, 3 are needed"):
        multiple_choice.from_cards(test, test.select(range(2)))


def test_choosing_takes_the_likelier_option_per_token(loaded):
    """Obvious ones, and one where the sum and the mean of the log-likelihood disagree."""
    model, tokenizer = loaded
    questions = [
        {
            "question": "What is the capital of France?",
            "options": ["Purple run the of.", "The capital is Paris."],
            "answer": 1,
        },
        {"question": "What is water?", "options": ["Water is a liquid that people drink.", "zxqj vvk"], "answer": 0},
    ]
    assert multiple_choice.choose(model, tokenizer, questions, CFG).tolist() == [True, True]
    long = "Ice is water that is frozen solid, and it floats on the lakes and rivers of cold countries in winter."
    cards = [{"question": "What is ice?", "answer": answer} for answer in ("It.", long)]
    scores = evaluation.score_answers(model, tokenizer, cards, CFG)
    assert scores.nll[0] < scores.nll[1] and scores.nll[0] / scores.tokens[0] > scores.nll[1] / scores.tokens[1]
    question = {"question": "What is ice?", "options": [card["answer"] for card in cards], "answer": 1}
    assert multiple_choice.choose(model, tokenizer, [question, question], CFG).all()


def test_baselines_of_a_benchmark_with_fixed_options():
    options = ["yes", "no", "maybe"]
    questions = [{"question": "q", "options": options, "answer": i} for i in [0] * 552 + [1] * 338 + [2] * 110]
    found = multiple_choice.baselines(questions)
    assert found["chance"] == pytest.approx(1 / 3) and found["majority"] == 0.552


def test_word_overlap_needs_no_model():
    questions = [
        {"question": "What is renal colic?", "options": ["Colic of renal origin.", "Pain.", "Red eye."], "answer": 0},
        {"question": "What is ataxia?", "options": ["Loss of control.", "A rash."], "answer": 1},
    ]
    assert multiple_choice.baselines(questions)["word overlap"] == (1 + 1 / 2) / 2


def test_questions_of_benchmarks(tmp_path):
    rows = [
        {"question": "Q1", "options": {"A": "yes", "B": "no"}, "answer": "B"},
        {"question": "Q2", "options": ["yes", "no", "maybe"], "answer": "maybe"},
        {"question": "Q3", "options": ["x", "y"], "answer": 0},
        {"question": "Q4", "options": ["1", "2", "3"], "answer": "2"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    rows += [
        {"question": "Q5", "options": [1, 2, 3], "answer": 2},
        {"question": "Q6", "options": {"A": "x", "B": "y", "C": None}, "answer": " y "},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert [q["answer"] for q in multiple_choice.from_file(path)] == [1, 2, 0, 1, 1, 1]
    assert [len(q["options"]) for q in multiple_choice.from_file(path)] == [2, 3, 2, 3, 3, 2]
    for row in ({"question": ["Q"], "answer": "a"}, {"question": "Q", "answer": True}):
        path.write_text(json.dumps({"options": ["a", "b"], **row}))
        with pytest.raises(ValueError, match="row 1: expected a text as question"):
            multiple_choice.from_file(path)
    path.write_text(json.dumps({"question": "Q", "options": ["a"], "answer": "a"}))
    with pytest.raises(ValueError, match="row 1: 'options' must be a list or a mapping of two texts or more"):
        multiple_choice.from_file(path)
    (tmp_path / "q.csv").write_text('question,options,answer\nQ,"[""x"", ""y""]",1\n')
    assert multiple_choice.from_file(tmp_path / "q.csv")[0]["answer"] == 1
    path.write_text(json.dumps({"question": "Q", "options": ["a", "b"], "answer": "c"}))
    with pytest.raises(ValueError, match="row 1: answer 'c' names 0 of the options A, B"):
        multiple_choice.from_file(path)
    path.write_text(json.dumps({"question": "Q", "options": "yes, no", "answer": "yes"}))
    with pytest.raises(ValueError, match="row 1: 'options' must be a list"):
        multiple_choice.from_file(path)
    path.write_text(json.dumps({"question": "Q", "answer": "c"}))
    with pytest.raises(ValueError, match="row 1 needs"):
        multiple_choice.from_file(path)
