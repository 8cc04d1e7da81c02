"""Attacks against known answers: ranks by brute force, areas by formula, and a comparison that gives nothing away."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import norm

from fedllm_helpers import attacks, config, data, evaluation, training
from fedllm_helpers.attacks import leakage
from fedllm_helpers.training import batches

CFG = config.load("cpu")


def test_canaries_are_fictional_and_repeatable():
    planted = leakage.canaries((0, 1, 16), each=3, seed=4)
    assert [canary.copies for canary in planted] == [0] * 3 + [1] * 3 + [16] * 3
    assert len({canary.name for canary in planted}) == 9 and planted == leakage.canaries((0, 1, 16), each=3, seed=4)
    for canary in planted:
        assert set(canary.name.split("-")) <= set(leakage.WORDS) and "invented" in canary.question
        assert len(canary.secret) == 3 and canary.secret in canary.answer()
    for wrong in (((-1,), 1), ((1,), 0), ((1,), 10**6)):
        with pytest.raises(ValueError, match="canaries for each of"):
            leakage.canaries(*wrong)


def test_planted_copies_survive_the_loader(cards, tmp_path):
    planted = leakage.canaries((0, 1, 4), seed=1)
    together = leakage.plant(cards[0], planted, "eye")
    assert len(together) == len(cards[0]) + 5
    path = tmp_path / "cards.json"
    together.to_json(path, lines=False)
    loaded = data.load_flashcards(str(path))
    assert len(loaded) == len(together)  # exact repetitions would be dropped
    found = loaded.filter(lambda card: card["card_id"].startswith("canary"))
    assert set(found["specialty"]) == {"eye"} and sum(planted[2].name in q for q in found["question"]) == 4
    with pytest.raises(ValueError, match="no card of specialty 'ear'.*present are"):
        leakage.plant(cards[0], planted, "ear")


def test_exposure_is_the_rank_among_all_secrets(fresh):
    """Against the token losses of whole lines, for a hundred of the thousand candidates."""
    model, tokenizer = fresh
    canary = leakage.canaries((0,), seed=2)[0]
    numbers = [f"{n:03d}" for n in range(0, 1000, 10)]
    rows = [{"question": canary.question, "answer": canary.answer(number)} for number in numbers]
    losses = evaluation.token_losses(model, tokenizer, rows, CFG)
    digits = np.array([loss[3:6].sum() for loss in losses])  # " The", " number", " ", three digits
    likelihood = leakage.candidates(model, tokenizer, canary, CFG)
    assert np.abs(likelihood[::10] + digits).max() < 0.15 < digits.std()  # bfloat16
    order = np.argsort(-likelihood)
    for place, bits in ((0, np.log2(1000)), (499, 1.0), (999, 0.0)):
        other = leakage.Canary(canary.name, f"{order[place]:03d}", 0)
        assert leakage.exposure(likelihood, other) == pytest.approx(bits, abs=0.01)


def test_a_model_that_gives_no_numbers_knows_nothing(fresh, monkeypatch):
    monkeypatch.setattr(leakage, "_likelihood", lambda *given: np.full(1000, np.nan))
    canary = leakage.canaries((0,))[0]
    broken = leakage.candidates(*fresh, canary, CFG)
    assert leakage.exposure(broken, canary) == pytest.approx(np.log2(1000 / 500.5))
    assert leakage.exposure(broken, canary, np.zeros(1000)) == pytest.approx(np.log2(1000 / 500.5))


def test_calibrated_exposure_is_the_rank_of_what_was_gained():
    """A number that every model likes, and one that only this model came to like."""
    canary, before = leakage.Canary("Alfa-Bravo", "007", 1), np.full(1000, -9.0)
    before[500:], before[7] = -5.0, -12.0  # to the base model the true one is the least likely
    after = before + 0.1
    after[7] += 3.5
    assert leakage.exposure(after, canary) == pytest.approx(np.log2(1000 / 501), abs=0.01)
    assert leakage.exposure(after, canary, before) == pytest.approx(np.log2(1000))
    assert leakage.exposure(before, canary, before) == pytest.approx(np.log2(1000 / 500.5))


def test_a_canary_that_was_learned_is_exposed_and_read_out(fresh, cards):
    model, tokenizer = fresh
    planted = leakage.canaries((0, 16), seed=3)
    together = leakage.plant(cards[0].filter(lambda card: card["specialty"] == "eye").select(range(8)), planted, "eye")
    cfg = config.load("cpu", "train.training_arguments.max_steps=12", "train.training_arguments.learning_rate=5e-3")
    training.fine_tune(model, tokenizer, together, cfg, description=None)
    after = [leakage.candidates(model, tokenizer, canary, CFG) for canary in planted]
    with model.disable_adapter():
        before = [leakage.candidates(model, tokenizer, canary, CFG) for canary in planted]
    for never, often in (map(leakage.exposure, after, planted), map(leakage.exposure, after, planted, before)):
        assert often > 9 and often > never
    assert leakage.extracted(model, tokenizer, planted[1], CFG) and not leakage.extracted(
        model, tokenizer, planted[0], CFG
    )


def test_areas_and_rates_have_their_known_values():
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 4000), rng.normal(0, 1, 4000)
    roc = attacks.membership(members, others)
    assert roc.auc.value == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.01)
    assert roc.at_5_percent.value == pytest.approx(norm.sf(norm.isf(0.05) - 1), abs=0.03)
    assert roc.at_1_percent.low <= norm.sf(norm.isf(0.01) - 1) <= roc.at_1_percent.high
    assert roc.at_tenth_percent.low <= norm.sf(norm.isf(0.001) - 1) <= roc.at_tenth_percent.high
    assert roc.auc.low < roc.auc.value < roc.auc.high and roc.auc.n == 8000
    same = attacks.membership(rng.normal(size=200), rng.normal(size=200))
    assert same.auc.low < 0.5 < same.auc.high
    assert attacks.membership(np.ones(50), np.ones(50)).auc.value == 0.5  # a score that says nothing
    with pytest.raises(ValueError, match="1 members and 5 others"):
        attacks.membership(np.ones(1), np.ones(5))


def test_scores_of_the_attacks_by_hand():
    losses, reference = [np.array([1.0, 3.0, 0.0, 0.0, 1.0]), np.array([2.0])], [np.full(5, 2.0), np.array([1.0])]
    assert attacks.scores(losses).tolist() == [-1, -2]
    assert attacks.scores(losses, reference, attack="ratio").tolist() == [-0.5, -2]
    assert attacks.scores(losses, attack="min-k").tolist() == [-3, -2]
    assert attacks.scores(losses, attack="min-k", share=0.4).tolist() == [-2, -2]
    assert attacks.scores(losses, reference, attack="difference").tolist() == [5, -1]
    assert attacks.smallest([np.array([0.5, -3.0, -1.0, 2.0])], 0.5).tolist() == [-2]
    for wrong in ({"attack": "guess"}, {"attack": "ratio"}, {"attack": "difference"}):
        with pytest.raises(ValueError, match="known are loss, min-k"):
            attacks.scores(losses, **wrong)


def test_standardised_tokens_are_those_of_the_models_own_distribution(fresh):
    """Against the whole distribution of one card, token by token."""
    model, tokenizer = fresh
    card = {"question": "What is Aniridia?", "answer": "The absence of the iris."}
    losses, standing = evaluation.token_scores(model, tokenizer, [card], CFG)
    assert losses[0].tolist() == evaluation.token_losses(model, tokenizer, [card], CFG)[0].tolist()
    (row,) = batches.encode([card], tokenizer, 128, CFG.dataset.prompt)
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)[-len(losses[0]) :]
    p, own = logs.exp(), logs[torch.arange(len(logs)), ids[0, -len(logs) :]]
    mean = (p * logs).sum(-1)
    by_hand = (own - mean) / (p * (logs - mean[:, None]) ** 2).sum(-1).sqrt()
    assert np.allclose(standing[0], by_hand.numpy(), atol=0.03) and np.allclose(losses[0], -own.numpy(), atol=0.1)


def test_relative_gains_find_members_that_ease_alone_would_not():
    """Cards differ by 5 nats in how easy they are, and training gives a member 1."""
    rng, count = np.random.default_rng(0), 400
    easy, member = rng.normal(-30, 5, count), np.arange(count) < 200
    attacked = easy + member + rng.normal(0, 0.3, count)
    inside = rng.random((8, count)) < 0.5
    inside[0] &= ~inside[1]  # no card is in all
    shadows = easy + inside + rng.normal(0, 0.3, (8, count))
    gained = attacks.relative(attacked, shadows, inside, np.flatnonzero(~member))
    by_gain = attacks.membership(gained[member], gained[~member]).auc.value
    by_loss = attacks.membership(attacked[member], attacked[~member]).auc.value
    assert by_gain > 0.9 > 0.6 > by_loss and gained.min() >= 0 and gained.max() <= 1
    with pytest.raises(ValueError, match="card 3 was in the training of every shadow model"):
        attacks.relative(attacked, shadows, inside | (np.arange(count) == 3), np.arange(5))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_text_alone_tells_nothing_of_the_split(seed):
    cfg = config.load("cpu", f"seed={seed}", "dataset.max_cards_per_specialty=120", "train.evaluate_split=0.5")
    members, others = data.load(cfg)
    roc = attacks.text_baseline(members, others)
    assert roc.auc.n == len(members) + len(others) >= 700 and abs(roc.auc.value - 0.5) < 0.06
    assert roc.auc.low - 0.02 < 0.5 < roc.auc.high + 0.02


def test_the_text_alone_tells_everything_where_members_differ_in_kind(cards):
    """The course's comparison: questions against statements."""
    members = Dataset.from_list([{"question": c["question"], "answer": ""} for c in cards[0]])
    others = Dataset.from_list([{"question": "", "answer": c["answer"]} for c in cards[0]])
    assert attacks.text_baseline(members, others).auc.value > 0.99
