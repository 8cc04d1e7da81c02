"""Figures and intervals against hand counts and an independent bootstrap."""

import numpy as np
import pytest
import torch

from fedllm_helpers import config, data, evaluation

CFG = config.load("cpu")


def test_scores_agree_with_a_plain_forward_in_any_order(loaded, cards):
    model, tokenizer = loaded
    some = cards[1].select(range(7))
    scores = evaluation.score_answers(model, tokenizer, some, CFG, batch_size=3)
    for card, nll, tokens in zip(some, scores.nll, scores.tokens, strict=True):
        prompt = tokenizer(data.format_prompt(card["question"])).input_ids
        answer = tokenizer(" " + card["answer"]).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = (
                model(torch.tensor([prompt + answer], device=model.device))
                .logits[0]
                .float()
                .log_softmax(-1)[len(prompt) - 1 : -1]
            )
        assert tokens == len(answer)
        assert nll == pytest.approx(-log_p[torch.arange(len(answer)), answer].sum().item(), rel=0.02)


def test_mean_nll_weighs_by_tokens_and_its_interval_covers():
    """Coverage of the 95 % interval over 200 samples whose truth is known."""
    rng, hits = np.random.default_rng(0), 0
    for seed in range(200):
        tokens = rng.integers(5, 40, 60)
        nll = tokens * 2.5 + rng.normal(0, 3, 60) * np.sqrt(tokens)
        estimate = evaluation.mean_nll(evaluation.AnswerScores(nll, tokens), seed)
        assert estimate.value == pytest.approx(nll.sum() / tokens.sum()) and estimate.n == 60
        hits += estimate.low <= 2.5 <= estimate.high
    assert 180 <= hits <= 199


def test_pairing_sees_what_separate_intervals_do_not():
    rng = np.random.default_rng(1)
    tokens, hard = rng.integers(10, 30, 80), rng.gamma(4, 0.7, 80)
    first = evaluation.AnswerScores(tokens * hard, tokens)
    second = evaluation.AnswerScores(tokens * (hard - 0.1 + rng.normal(0, 0.05, 80)), tokens)
    assert not evaluation.mean_nll(first).apart_from(evaluation.mean_nll(second))
    difference = evaluation.nll_difference(first, second)
    assert 0.05 < difference.low < difference.value < difference.high < 0.15
    with pytest.raises(ValueError, match="same cards"):
        evaluation.nll_difference(first, evaluation.AnswerScores(tokens * 1.0, tokens + 1))


def test_an_interval_over_seeds_is_student_s():
    found = evaluation.over_seeds([0.021, 0.012, 0.040])
    assert found.value == pytest.approx(0.0243, abs=1e-4) and found.n == 3
    assert (found.high - found.low) / 2 == pytest.approx(4.3027 * np.std([21, 12, 40], ddof=1) / 1e3 / 3**0.5, rel=1e-4)
    assert found.low < 0, "three seeds that agree in sign need not exclude nought"
    with pytest.raises(ValueError, match="at least 2 seeds, there are 1"):
        evaluation.over_seeds([0.3])


def test_perplexity_is_the_exponential_and_accuracy_the_share():
    scores = evaluation.AnswerScores(np.array([2.0, 4.0, 9.0]), np.array([2, 2, 3]))
    assert evaluation.perplexity(scores).value == pytest.approx(np.exp(15 / 7))
    right = np.array([True] * 57 + [False] * 43)
    estimate = evaluation.accuracy(right)
    assert estimate.value == 0.57 and estimate.low == pytest.approx(0.47, abs=0.02)  # binomial: ±1.96 · 0.0495
    assert str(estimate).startswith("0.57 [0.4") and "(n = 100)" in str(estimate)
    with pytest.raises(ValueError, match="at least 2"):
        evaluation.accuracy(np.array([True]))


def test_one_long_question_does_not_lose_the_others(loaded, cards, caplog):
    model, tokenizer = loaded
    some, long = list(cards[1].select(range(6))), "Is this " + "very " * 200 + "long?"
    wanted = evaluation.score_answers(model, tokenizer, some, CFG)
    for place in (0, 3, 6):
        mixed = [*some[:place], {"question": long, "answer": "Yes."}, *some[place:]]
        caplog.clear()
        scores = evaluation.score_answers(model, tokenizer, mixed, CFG)
        (said,) = [r.getMessage() for r in caplog.records if "cannot be scored" in r.getMessage()]
        wanted_line = "1 of 7 cards cannot be scored, their questions fill train.seq_length=128: the first is card"
        assert said.startswith(f"{wanted_line} {place + 1},")
        assert scores.tokens[place] == scores.nll[place] == 0 and len(scores.nll) == 7
        assert np.array_equal(np.delete(scores.tokens, place), wanted.tokens)
        assert np.delete(scores.nll, place) == pytest.approx(wanted.nll, rel=0.02)
        assert evaluation.mean_nll(scores).n == evaluation.nll_difference(scores, scores).n == 6
    with pytest.raises(ValueError, match="leaves 2 of them no token of their answer: the first is card 1"):
        evaluation.score_answers(model, tokenizer, [{"question": long, "answer": "Yes."}] * 2, CFG)


def test_none_and_one_card_are_one_line():
    """As with 3 rows, or with train.evaluate_split=0."""
    nothing = evaluation.AnswerScores(np.zeros(0), np.zeros(0, int))
    one = evaluation.AnswerScores(np.ones(1), np.array([4]))
    for scores in (nothing, evaluation.AnswerScores(np.zeros(2), np.zeros(2, int))):
        with pytest.raises(ValueError, match="^no card was scored: train.evaluate_split holds out") as error:
            evaluation.mean_nll(scores)
        assert "\n" not in str(error.value)
    estimate = evaluation.mean_nll(one)
    assert str(estimate) == "0.25 (n = 1, too few for an interval)" and not estimate.apart_from(estimate)
    assert evaluation.perplexity(one).value == pytest.approx(np.exp(0.25))


def test_greedy_answers_do_not_depend_on_the_batch(loaded):
    model, tokenizer = loaded
    questions = ["What is blood?", "What is the heart, and what does it do in the body of an adult?"]
    together = evaluation.generate(model, tokenizer, questions, CFG, max_new_tokens=8)
    alone = [evaluation.generate(model, tokenizer, [question], CFG, max_new_tokens=8)[0] for question in questions]
    assert [text[:10] for text in together] == [text[:10] for text in alone] and all(together)


def test_holm_multiplies_by_the_questions_that_are_left():
    """0.01, 0.02, 0.03, 0.04 of Holm's own scheme: 4, 3, 2 and 1 times, and never smaller than one before."""
    assert evaluation.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert evaluation.holm([0.5, 0.9]).tolist() == [1.0, 1.0] and evaluation.holm([]).tolist() == []
    with pytest.raises(ValueError, match="allowed are numbers from 0 to 1"):
        evaluation.holm([0.1, np.nan])


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0, "p < 1e-5"), (9e-6, "p < 1e-5"), (1.4e-4, "p = 1e-04"), (0.0197, "p = 0.020"), (1.0, "p = 1.000")],
)
def test_a_small_p_value_is_no_zero(p, text):
    assert evaluation.p_text(p) == text
