"""The scene of the attacks, audits that are read back, and stored results that agree with their settings."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedllm_helpers import config, data
from fedllm_helpers.federation import client_app
from fedllm_helpers.models.process import first_adapter
from fedllm_helpers.study import audits
from fedllm_helpers.study.lab import chosen
from fedllm_helpers.training import guarantees

STORED = Path(__file__).resolve().parents[2] / "notebooks" / "results"


@pytest.fixture
def scene():
    """The settings of the grid with few cards."""
    return config.load("cpu", *audits.SETTINGS, "dataset.max_cards_per_specialty=12", "federation.threads=1")


def test_a_scene_has_canaries_in_one_hospital_and_as_many_others_as_members(scene, tmp_path):
    cfg, members, others, planted = audits.stage(scene, tmp_path, copies=(0, 2, 3), each=2)
    assert len(members) == len(others) == 24 and not set(members["card_id"]) & set(others["card_id"])
    assert [canary.copies for canary in planted] == [0, 0, 2, 2, 3, 3]
    lines = [
        sum(card_id.startswith("canary") for card_id in client_app.own_cards(cfg, hospital)[0]["card_id"])
        for hospital in range(4)
    ]
    assert lines == [10, 0, 0, 0] and client_app.own_cards(cfg, 0)[0]["specialty"][0] == audits.VICTIM
    assert len(data.load(cfg)[0]) == 24 + 10 and not len(data.load(cfg)[1])
    assert audits.stage(scene, tmp_path, copies=(0, 2, 3), each=2)[0] == cfg and not list(tmp_path.glob("*.part"))


def test_an_audit_is_read_back(scene, tmp_path, monkeypatch):
    first = audits.audit_arm(scene, "untuned", 0.0, 1, tmp_path)
    assert len(first.nll) == 48 and len(first.exposure) == 4 and (first.tokens > 3).all() and first.seconds >= 0
    assert first.exposure.min() >= 0 and first.exposure.max() <= np.log2(1000) and not first.extracted.any()

    def never(*arguments):
        raise AssertionError("it was made again")

    monkeypatch.setattr(audits, "train_arm", never)
    assert (audits.audit_arm(scene, "untuned", 0.0, 1, tmp_path).nll == first.nll).all()
    with pytest.raises(AssertionError, match="made again"):
        audits.audit_arm(scene, "untuned", 0.0, 2, tmp_path)


def test_two_shadow_models_of_a_pair_share_no_card_and_have_all_of_them(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(audits, "train_arm", lambda cfg, *rest: (first_adapter(cfg), None))
    four = [audits.shadow(scene, number, 4e-3, tmp_path) for number in range(4)]
    inside = np.array([one["inside"] for one in four])
    assert (inside[0] == ~inside[1]).all() and (inside[2] == ~inside[3]).all() and (inside[0] != inside[2]).any()
    assert inside.sum(axis=1).tolist() == [24] * 4 and inside.shape == (4, 48)
    outside = audits._outside(four)
    assert outside == pytest.approx(four[0]["nll"]), "all of them are the untuned model, whatever is left out"


def test_an_arm_that_promises_nothing_has_no_audit_and_dp_sgd_shows_less_than_it_promises(scene):
    assert np.isnan(audits.least_epsilon(scene))
    changes = ["federation.num_rounds=1", "federation.training_arguments.max_steps=1"]
    promise = ["federation.privacy.record.epsilon=8", "federation.privacy.noise_seed=0"]
    least = audits.least_epsilon(config.load(scene, *audits.CORE.split(), *changes, *promise))
    assert 0 < least < 8


def test_the_stored_grid_is_whole_and_its_guarantees_follow_from_its_settings():
    origin = json.loads((STORED / "privacy.json").read_text(encoding="utf-8"))
    cards, lines = pd.read_csv(STORED / "privacy_cards.csv"), pd.read_csv(STORED / "privacy_canaries.csv")
    assert origin["embedded_model"] and len(origin["seeds"]) >= 3 and set(origin["arms"]) == set(audits.PRIVACY)
    assert cards[list(origin["arms"])].notna().all(axis=None) and cards.groupby("seed")["member"].mean().eq(0.5).all()
    assert lines.groupby(["arm", "seed", "copies"]).size().eq(3).all() and lines["exposure"].between(0, 10).all()
    assert lines["calibrated"].isna().eq(lines["arm"] == "untuned").all() and cards["shadows"].gt(0).all()
    rates = chosen(pd.read_csv(STORED / "privacy_rates.csv"))
    for name, (trained, rate, changes) in audits.PRIVACY.items():
        assert origin["arms"][name] == {
            "trained": trained, "learning_rate": rates.get(rate, rate), "settings": changes
        }  # fmt: skip
    for name, bounds in origin["audited"].items():
        assert len(bounds) == len(origin["seeds"]) and max(bounds) < max(origin["guarantees"][name])
    for name, bounds in origin["guarantees"].items():
        cfg = config.load("cpu", *audits.SETTINGS, *origin["arms"][name]["settings"].split())
        if "ε" in name:
            again = guarantees.per_hospital(cfg, [60 + 3 * sum(audits.COPIES), 60])["epsilon"]
            assert bounds[:2] == pytest.approx(again.tolist(), rel=0.01)
            assert max(bounds) <= cfg.federation.privacy.record.epsilon
        else:
            assert bounds[0] == pytest.approx(guarantees.client_epsilon(cfg), rel=0.01)
