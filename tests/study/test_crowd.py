"""Noise on the mean of a crowd: means by hand, noise of the promised length, a small crowd that is read back."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedllm_helpers import config
from fedllm_helpers.privacy import accounting, noise
from fedllm_helpers.study import crowd, frontier

STORED = Path(__file__).resolve().parents[2] / "notebooks" / "results"


@pytest.fixture
def some():
    rng = np.random.default_rng(0)
    return [{"a": rng.normal(size=(40, 50)).astype(np.float32)} for _ in range(4)]


def test_a_mean_is_that_of_clipped_updates(some):
    lengths = np.array([noise.norm(update) for update in some])
    limit = float(np.median(lengths))
    stacked = np.array([update["a"] for update in some], dtype=np.float64)
    by_hand = (stacked * np.minimum(1, limit / lengths)[:, None, None]).mean(axis=0)
    assert np.allclose(crowd.averaged(some, limit, None)["a"], by_hand, atol=1e-5)
    assert np.allclose(crowd.averaged(some, None, None)["a"], stacked.mean(axis=0), atol=1e-6)
    assert not np.allclose(by_hand, stacked.mean(axis=0), atol=1e-4), "a limit that cuts nothing shows nothing"


def test_the_noise_is_as_long_as_the_formula_says(some):
    limit, quiet = 3.0, crowd.averaged(some, 3.0, None)["a"]
    noisy = crowd.averaged(some, limit, np.random.default_rng(1))["a"]
    expected = crowd.multiplier() * limit * np.sqrt(quiet.size) / len(some)  # z C √d / n
    assert np.linalg.norm(noisy - quiet) == pytest.approx(expected, rel=0.05)


def test_the_promise_is_that_of_one_round_in_which_all_take_part():
    z = crowd.multiplier()
    assert accounting.epsilon(z, 1.0, 1, crowd.DELTA) == pytest.approx(crowd.EPSILON, rel=2e-3)
    assert accounting.epsilon(0.95 * z, 1.0, 1, crowd.DELTA) > crowd.EPSILON
    assert crowd.DELTA * max(crowd.SIZES) < 1


def test_every_mean_has_a_name_of_its_own():
    names = [crowd.name_of(*column) for column in crowd.columns()]
    assert len(set(names)) == len(names) == len(crowd.SIZES) * (1 + len(crowd.PARTS))
    assert set(crowd.RATES) <= set(frontier.KINDS)


def test_a_small_crowd_learns_and_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(crowd, "SIZES", (1, 2))
    small = ["dataset.max_cards_per_specialty=12", "federation.num_clients=2", "train.evaluate_split=0.2"]
    few = "federation.training_arguments={max_steps: 3, per_device_train_batch_size: 8}"  # 4 are too few for one
    cfg = config.load("cpu", "federation.threads=1", *crowd.SETTINGS, *small, few)
    found = crowd.run_kind(cfg, "LoRA-XS r 16", tmp_path)
    assert found["nll"].shape == (1 + 2 * (1 + len(crowd.PARTS)), found["tokens"].size)
    assert found["values"] == 60 * 16 * 16
    assert len(found["norms"]) == 2 and (found["norms"] > 0).all()
    total = found["nll"].sum(axis=1)
    untuned, alone, both = total[:3]
    assert both < untuned and alone < untuned
    assert total[5] - untuned > 3 * abs(both - untuned), "noise at n = 1 and the largest clip leaves no model"

    def never(*arguments):
        raise AssertionError("it was made again")

    monkeypatch.setattr(crowd, "updates", never)
    assert (crowd.run_kind(cfg, "LoRA-XS r 16", tmp_path)["nll"] == found["nll"]).all()


def test_the_stored_crowd_is_whole_and_was_promised_what_the_notebook_says():
    origin = json.loads((STORED / "crowd.json").read_text(encoding="utf-8"))
    table = pd.read_csv(STORED / "crowd_cards.csv")
    names = ["untuned", *(crowd.name_of(*column) for column in crowd.columns())]
    assert table[names].notna().all(axis=None) and set(table["kind"]) == set(origin["kinds"]) == set(crowd.RATES)
    assert sorted(set(table["seed"])) == origin["seeds"] == [0, 1, 2] and origin["embedded_model"]
    assert (origin["epsilon"], origin["delta"], tuple(origin["clips"])) == (crowd.EPSILON, crowd.DELTA, crowd.PARTS)
    assert origin["noise_multiplier"] == pytest.approx(crowd.multiplier(), abs=1e-4)
    assert {kind: one["values"] for kind, one in origin["kinds"].items()} == {
        "LoRA r 16": 921_600, "LoRA-XS r 16": 60 * 16 * 16, "LoRA-XS r 4": 60 * 4 * 4
    }  # fmt: skip
    assert (table.groupby("kind")["128 hospitals"].sum() < table.groupby("kind")["untuned"].sum()).all()
