"""What one update shows: nothing behind masks, its specialty where it is open, and a stored table that is whole."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kstest

from fedllm_helpers import config, models, training
from fedllm_helpers.attacks import battery
from fedllm_helpers.federation import client_app, simulation
from fedllm_helpers.models.process import base_model, cpu_threads, first_adapter
from fedllm_helpers.privacy import secure_aggregation as secure
from fedllm_helpers.study import audits, results, views

CFG = config.load("cpu")

STORED = Path(__file__).resolve().parents[2] / "notebooks" / "results" / "privacy_views.csv"
SYSTEMS = ["eye", "heart", "eye", "heart"]


@pytest.fixture
def scene():
    """The settings of the grid with few cards."""
    return config.load("cpu", *audits.SETTINGS, "dataset.max_cards_per_specialty=12", "federation.threads=1")


def audit(nll, exposure=(), tokens=10):
    """An audit of these losses: summed nats per card."""
    nll = np.array(nll, dtype=float)
    tokens, likelihood = np.full(len(nll), tokens), np.zeros((len(exposure), 1000))
    return battery.Audit(nll, tokens, -nll, -nll, likelihood, np.array(exposure), np.array(exposure) > 9, 0.0)


def flat(adapter):
    return np.concatenate([value.ravel() for value in adapter.values()])


def test_a_masked_view_is_the_same_noise_for_every_update(monkeypatch):
    """Held against the uniform distribution and against each other; without masks the same tests see the updates."""
    keys, weights, rng = [secure.make_keys() for _ in range(4)], [81, 60, 60, 60], np.random.default_rng(0)
    near, far = ({"b": rng.normal(0.2, 0.01, (300, 200)), "a": rng.normal(0, scale, 40_000)} for scale in (1e-4, 0.5))
    given = itertools.cycle(keys)
    monkeypatch.setattr(secure, "make_keys", lambda: next(given))
    seen = [flat(views.masked_view(update, 1, weights)) for update in (near, far)]
    half = 2.0**31 * 2.0 ** -secure.fixed_point(weights, 1.0).bits / weights[1]
    for view, update in zip(seen, (near, far), strict=True):
        assert kstest(view, "uniform", args=(-half, 2 * half)).pvalue > 1e-6
        assert abs(np.corrcoef(view, flat(update))[0, 1]) < 0.02
    assert kstest(*seen).pvalue > 1e-6 and not np.array_equal(*seen)
    monkeypatch.setattr(secure, "mask", lambda values, *rest, **more: values)
    seen = [flat(views.masked_view(update, 1, weights)) for update in (near, far)]
    assert kstest(*seen).pvalue < 1e-6 and np.abs(seen[1] - flat(far).clip(-1, 1)).max() < 1e-6


def test_answers_of_the_attacks_are_those_by_hand():
    before = audit([20, 20, 20, 20, 20, 20])  # two cards of the hospital, four held out
    found = views.read(before, audit([10, 16, 14, 19, 15, 18], [9.5, 2.5]), SYSTEMS, "eye")
    assert (found["truth"], found["guess"], found["right"], found["extracted"]) == ("eye", "eye", 1, 1)
    assert found["gain: eye"] == pytest.approx(0.2) == -found["gain: heart"]  # 0.55 and 0.15 nats per token
    of_these = views.gains(before, audit([14, 19, 15, 18]), SYSTEMS)  # of the held-out cards alone
    assert of_these["eye"] == found["gain: eye"] and of_these["heart"] == found["gain: heart"]
    assert found["nll"] == pytest.approx(1.65) and found["exposure"] == pytest.approx(6.0)
    assert found["area"] == 0.5  # of the losses 10 and 16 against 14 and 15
    assert not views.read(before, audit([10, 16, 14, 19, 15, 18], [0.0]), SYSTEMS, "heart")["right"]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_losses_that_are_not_finite_tell_nothing(broken):
    before = audit([20, 30, 20, 20, 20, 20])
    found = views.read(before, audit([broken] * 6, [1.0]), SYSTEMS, "eye")
    assert found["area"] == 0.5 and found["gain: eye"] == found["gain: heart"] == 0 and found["nll"] == 2.0


def test_an_open_update_is_the_federation_s_and_tells_its_specialty(scene, tmp_path):
    """The cards of the hospital that trained stand for its specialty: few, and seen several times."""
    short = "federation.training_arguments={max_steps: 3, per_device_train_batch_size: 4}"
    staged, members, _, _ = audits.stage(config.load(scene, short), tmp_path, copies=(0, 2))
    (model, tokenizer), start, mine = base_model(staged), first_adapter(staged), client_app.own_cards(staged, 2)[0]
    update = views.first_update(staged, 2, 8e-3)
    models.set_adapter(model, start)
    before = battery.audit(model, tokenizer, members.select([]), members, [], CFG)
    models.set_adapter(model, {key: start[key] + update[key] for key in start})
    by_system = views.gains(
        before, battery.audit(model, tokenizer, members.select([]), members, [], CFG), members["specialty"]
    )
    assert by_system.idxmax() == mine["specialty"][0] and by_system.sum() == pytest.approx(0, abs=1e-9)
    models.set_adapter(model, start)
    local = training.round_config(staged, 1, 2)
    with cpu_threads(staged):
        cards = client_app.cards_of_round(mine, staged, 1, 2)
        training.fine_tune(model, tokenizer, cards, local, learning_rate=8e-3, description=None)
    by_hand, kept = models.get_adapter(model), {}
    assert all(np.array_equal(by_hand[key] - start[key], update[key]) for key in start)
    one_round = ["federation.num_rounds=1", "train.learning_rate_max=8e-3", "federation.evaluate_every=0"]
    simulation.run(config.load(staged, *one_round), client=views.recorder(kept), progress=False)
    assert sorted(kept) == [(1, hospital) for hospital in range(4)]
    assert all(np.array_equal(kept[1, 2][key], by_hand[key]) for key in start), "what a federation's server gets"


def test_a_hospital_has_a_row_per_view_and_is_read_back(scene, tmp_path, monkeypatch):
    short = "federation.training_arguments={max_steps: 1, per_device_train_batch_size: 2}"
    few = config.load(scene, "dataset.max_cards_per_specialty=4", short)
    monkeypatch.setitem(
        views.VIEWS, "record ε = 8", ("federated/specialty", 2e-2, "federation.privacy.record.epsilon=8")
    )
    rows = views.attack_hospital(few, 1, 1, tmp_path)
    assert [row["view"] for row in rows] == ["open", "record ε = 8", "masked"]
    assert {row["truth"] for row in rows} == {"eye"} and all(np.isfinite(row["nll"]) for row in rows)
    assert rows[2]["nll"] > 2 * rows[0]["nll"], "a masked update makes no model"
    assert len(next(tmp_path.glob("views-*.json")).read_text()) > 100 and not list(tmp_path.glob("*.part"))
    with pytest.raises(RuntimeError, match="hospital 9 failed"):
        views.first_update(few, 9, 8e-3)
    monkeypatch.setattr(views, "first_update", lambda *given: pytest.fail("trained again"))
    assert views.attack_hospital(few, 1, 1, tmp_path) == rows


def test_the_stored_table_is_whole():
    table, origin = results.read(STORED, ["truth", "guess", "right", "nll", "area", "exposure", "extracted"])
    names = ["open", "record ε = 8", "masked"]
    assert sorted(zip(table["seed"], table["hospital"], table["view"], strict=True)) == sorted(
        itertools.product([0, 1, 2], range(4), names)
    )
    assert (table["right"] == (table["guess"] == table["truth"])).all() and table["area"].between(0, 1).all()
    assert table["exposure"].between(0, np.log2(1000)).all() and np.isfinite(table["nll"]).all()
    gains = table.filter(like="gain: ")
    assert (gains.idxmax(axis=1) == "gain: " + table["guess"]).all() and gains.sum(axis=1).abs().max() < 1e-3
    assert origin["embedded_model"] and origin["seeds"] == [0, 1, 2]
    for name, how in json.loads(json.dumps(origin["views"])).items():
        assert tuple(how.values()) == views.VIEWS[name], "the settings are those of the grid"
