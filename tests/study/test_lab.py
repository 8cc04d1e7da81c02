"""The grid of notebook 04: what a poisoner sends, and the stored tables held against the settings that made them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedllm_helpers import communication, config
from fedllm_helpers.attacks import poisoning
from fedllm_helpers.config.schema import RULES
from fedllm_helpers.federation import chain
from fedllm_helpers.models.process import first_adapter
from fedllm_helpers.study import lab

STORED = Path(__file__).resolve().parents[2] / "notebooks" / "results"


@pytest.fixture(scope="module")
def origin():
    return json.loads((STORED / "aggregation.json").read_text(encoding="utf-8"))


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(30, 20)).astype(np.float32), "b": rng.normal(size=500).astype(np.float32)}


def length(update):
    return np.sqrt(sum(np.square(value).sum() for value in update.values()))


def test_a_flipped_update_points_the_other_way_and_is_as_long_as_it_says():
    received, trained = arrays(0), arrays(1)
    bad = poisoning.poisoned(received, trained, "flipped", 10)
    for key in bad:
        np.testing.assert_allclose(bad[key] - received[key], -10 * (trained[key] - received[key]), rtol=1e-4, atol=1e-5)


def test_garbage_is_noise_of_the_length_it_says_around_what_was_received():
    received, trained = arrays(0), arrays(1)
    bad = poisoning.poisoned(received, trained, "garbage", 10, seed=3)
    noise = {key: bad[key] - received[key] for key in bad}
    honest = {key: trained[key] - received[key] for key in bad}
    assert length(noise) == pytest.approx(10 * length(honest), rel=1e-3)
    along = sum((noise[key] * honest[key]).sum() for key in bad) / length(noise) / length(honest)
    assert abs(along) < 0.2, "it has nothing to do with the update"
    again = poisoning.poisoned(received, trained, "garbage", 10, seed=4)
    assert not np.allclose(bad["a"], again["a"])


def test_every_arm_is_a_federation_that_starts():
    cfg = config.load("cpu", *lab.SETTINGS)
    for changes, rule, poison in lab.LAB.values():
        chain.named_strategy(config.load(cfg, *changes.split()))
        assert rule in RULES and poison in ("", *poisoning.KINDS)


def test_the_stored_grid_is_whole(origin):
    cards = pd.read_csv(STORED / "aggregation_cards.csv")
    assert origin["embedded_model"] and len(origin["seeds"]) >= 3
    assert {name: tuple(arm.values()) for name, arm in origin["arms"].items()} == lab.LAB
    assert cards[list(lab.LAB)].notna().all(axis=None) and cards.groupby("seed").size().eq(240).all()
    assert sorted(cards["seed"].unique()) == origin["seeds"] and (cards["tokens"] > 2).all()


def test_the_stored_rates_are_the_best_of_those_tried(origin):
    rates = pd.read_csv(STORED / "aggregation_rates.csv")
    assert all(tuple(part["learning_rate"]) == lab.RATES for _, part in rates.groupby("rule"))
    best = rates.loc[rates.groupby("rule")["nll"].idxmin()].set_index("rule")["learning_rate"].to_dict()
    assert best == origin["learning_rates"] and set(best) == set(lab.OF_FACTORS)


def test_the_stored_bytes_are_those_that_each_rule_sends(origin):
    """And names, shapes and settings beside the values: 250 bytes for each array of adapter and edit, no more."""
    sizes = pd.read_csv(STORED / "aggregation_bytes.csv")
    cfg = config.load("cpu", *lab.SETTINGS)
    start = first_adapter(cfg)
    for name, (changes, _, _) in lab.LAB.items():
        changed = config.load(cfg, *changes.split())
        count, total = chain.values(changed, start), changed.federation.num_rounds
        for hospital, part in sizes[sizes["arm"] == name].groupby("hospital"):
            for direction in ("up", "down"):
                values = sum(sum(count(number, hospital, direction)) for number in range(1, total + 1))
                formula = communication.transfer_bytes(values, "fp32")
                assert (
                    part[f"bytes_{direction}"].between(formula, formula + total * (2 * len(start) * 250 + 2000)).all()
                ), (name, direction)
        assert len(sizes[sizes["arm"] == name]) == cfg.federation.num_clients * len(origin["seeds"])
