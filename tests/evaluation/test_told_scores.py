"""What hospitals tell of the average on their own held-out cards: with the noise that was promised, and no other."""

import numpy as np
import pytest

from fedllm_helpers import config, evaluation
from fedllm_helpers.evaluation import AnswerScores, told_scores
from fedllm_helpers.federation import client_app, simulation
from fedllm_helpers.models.process import base_model
from fedllm_helpers.privacy import accounting, noise, promises
from fedllm_helpers.training import guarantees

SMALL = (
    "federation.num_clients=2 federation.num_rounds=2 dataset.specialties=[eye,ear] dataset.max_cards_per_specialty=9 "
    "train.evaluate_split=0.34 federation.evaluate_every=0 train.seq_length=64 federation.fraction_evaluate=1 "
    "federation.training_arguments.max_steps=1 federation.training_arguments.per_device_train_batch_size=2"
)
SCORES = AnswerScores(np.array([6.0, 30.0, 0.0, 8.0]), np.array([3, 3, 0, 4]))  # 2, 10, none and 2 nats per token


def test_every_card_counts_once_and_with_so_much_at_most():
    free = np.random.default_rng(0)
    assert told_scores.protected(SCORES, 8.0, 0.0, free) == (2 + 8 + 4 + 2) / 4
    assert told_scores.protected(SCORES, 20.0, 0.0, free) == (2 + 10 + 10 + 2) / 4
    assert min(told_scores.protected(SCORES, 8.0, 50.0, free) for _ in range(50)) >= 0
    assert max(told_scores.protected(SCORES, 8.0, 50.0, free) for _ in range(50)) <= 8


def test_whoever_makes_a_card_overflow_learns_nothing_of_it():
    some = AnswerScores(np.array([6.0, np.nan, np.inf]), np.array([3, 3, 3]))
    assert told_scores.protected(some, 8.0, 0.0, np.random.default_rng(0)) == (2 + 4 + 8) / 3


def test_cards_of_which_none_can_be_scored_are_answered_like_others(caplog):
    more = ["federation.privacy.scores.epsilon=4", "federation.privacy.noise_seed=0", "train.seq_length=2"]
    cfg = config.load("cpu", *SMALL.split(), *more)
    cards = client_app.own_cards(cfg, 0)[1]
    numbers, promise = told_scores.told(*base_model(cfg), cards, cfg, noise.noise_seed(cfg, 3, 1, 0))
    normal = np.random.default_rng(noise.noise_seed(cfg, 3, 1, 0)).normal()
    assert numbers["nll"] == pytest.approx(np.clip(4 + normal * guarantees.score_noise(cfg, len(cards)), 0, 8))
    assert promise and "train.seq_length=2" in caplog.text, "it is said at home"
    with pytest.raises(ValueError, match=r"train.seq_length=2"):
        told_scores.told(*base_model(cfg), cards, config.load("cpu", *SMALL.split(), more[2]), noise.noise_seed(cfg, 3))


def test_what_does_not_fit_is_said_before_anyone_trains():
    cfg = config.load("cpu", *SMALL.split(), "federation.privacy.scores.epsilon=4")
    for change, said in (
        ("federation.privacy.scores.delta=0.09 dataset.max_cards_per_specialty=40", "scores.delta=0.09 is not below"),
        ("federation.privacy.record.cards_per_patient=1", "the cards have no column patient_id"),
    ):
        with pytest.raises(ValueError, match=said):
            simulation.run(config.load(cfg, *change.split()), progress=False)


def test_the_noise_has_the_size_that_is_said_and_hides_the_card_that_moves_most():
    cfg = config.load("cpu", *SMALL.split(), "federation.privacy.scores.epsilon=2")
    plan, size = guarantees.score_privacy(cfg, 50), guarantees.score_noise(cfg, 50)
    drawn = np.random.default_rng(1)
    found = [told_scores.protected(AnswerScores(np.full(50, 4.0), np.ones(50)), 8.0, size, drawn) for _ in range(4000)]
    assert np.std(found) == pytest.approx(size, rel=0.05) and np.mean(found) == pytest.approx(4, abs=size / 10)
    assert 1.99 < accounting.epsilon(size * 50 / 4.0, 1.0, 2, 1e-3) <= 2, "noise on the sum, over half of 8 nats"
    assert plan.epsilon <= 2 and plan.steps == 2 and plan.clipping_norm == 4.0
    free, whole = np.random.default_rng(0), AnswerScores(np.arange(50.0), np.ones(50))
    middle = [AnswerScores(np.where(np.arange(50) == one, 4.0, whole.nll), whole.tokens) for one in range(50)]
    sums = [50 * told_scores.protected(some, 8.0, 0.0, free) for some in (whole, *middle)]
    assert np.abs(np.array(sums[1:]) - sums[0]).max() == pytest.approx(plan.clipping_norm)


def test_a_hospital_tells_the_noisy_mean_and_with_little_noise_the_mean_itself():
    cfg = config.load("cpu", *SMALL.split())
    model, tokenizer = base_model(cfg)
    cards = client_app.own_cards(cfg, 0)[1]
    scores = evaluation.score_answers(model, tokenizer, cards, cfg)
    numbers, promise = told_scores.told(model, tokenizer, cards, cfg, np.random.SeedSequence(3))
    assert numbers == {"num-examples": len(cards), "nll": scores.nll.sum() / scores.tokens.sum()} and not promise
    loose = config.load(cfg, "federation.privacy.scores.epsilon=1e4", "federation.privacy.scores.largest_nll=20")
    numbers, promise = told_scores.told(model, tokenizer, cards, loose, np.random.SeedSequence(3))
    assert numbers["nll"] == pytest.approx((scores.nll / scores.tokens).mean(), abs=0.3)
    assert promise[promises.PROMISE]["steps"] == 1 and not promise[promises.PROMISE]["seeded"]
    strict = config.load(cfg, "federation.privacy.scores.epsilon=1", "federation.privacy.noise_seed=0")
    numbers, promise = told_scores.told(model, tokenizer, cards, strict, noise.noise_seed(strict, 3, 1, 0))
    normal = np.random.default_rng(noise.noise_seed(strict, 3, 1, 0)).normal()
    wanted = (scores.nll / scores.tokens).mean() + normal * guarantees.score_noise(strict, len(cards))
    assert numbers["nll"] == pytest.approx(np.clip(wanted, 0, 8)) and promise[promises.PROMISE]["seeded"]
    many = config.load(strict, "federation.privacy.scores.delta=0.09", "federation.num_clients=2")
    with pytest.raises(ValueError, match="scores.delta=0.09 is not below 1 / 12 held-out cards: it promises nothing"):
        guarantees.score_privacy(many, 12)


def test_masks_and_noisy_scores_protect_patients_without_dp_sgd():
    more = ["federation.secure_aggregation.threshold=2", "federation.privacy.scores.epsilon=4"]
    cfg = config.load("cpu", *SMALL.split(), *more, "federation.privacy.record.cards_per_patient=2")
    assert guarantees.score_privacy(cfg, 5).clipping_norm == 8.0 and guarantees.record_privacy(cfg, 5) is None


def test_of_a_patient_so_many_cards_are_scored_and_the_noise_hides_them_all():
    more = ["federation.privacy.scores.epsilon=4", "federation.privacy.record.noise_multiplier=1"]
    cfg = config.load("cpu", *SMALL.split(), *more, "federation.privacy.record.cards_per_patient=2")
    cards = client_app.own_cards(config.load("cpu", *SMALL.split()), 0)[0]
    cards = cards.add_column("patient_id", ["a"] * (len(cards) - 1) + ["b"])
    numbers, promise = told_scores.told(*base_model(cfg), cards, cfg, np.random.SeedSequence(0))
    assert len(cards) > 3, "and one is of another patient"
    assert numbers["num-examples"] == 3 and promise[promises.PROMISE]["clipping-norm"] == 2 * 4.0


@pytest.mark.parametrize(
    "promise", ["federation.privacy.record.noise_multiplier=1", "federation.secure_aggregation.threshold=2"]
)
def test_a_federation_that_promises_privacy_scores_with_noise(promise):
    cfg = config.load(
        "cpu", *SMALL.split(), promise, "federation.privacy.scores.epsilon=4", "federation.privacy.noise_seed=1"
    )
    record = simulation.run(cfg, progress=False)
    sizes = [len(client_app.own_cards(cfg, hospital)[1]) for hospital in (0, 1)]
    assert record.scores["cards"].tolist() == sizes * 2 and record.scores["nll"].between(0, 8).all()
    assert record.scores["noise"].tolist() == pytest.approx([guarantees.score_noise(cfg, n) for n in sizes * 2])
    assert record.clients["loss_before"].isna().all() and record.history["client_nll"].iloc[-1] > 0
