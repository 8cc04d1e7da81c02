"""Quality against bytes: arms that differ in what they say."""

import json
from pathlib import Path

import pandas as pd
import pytest

from fedllm_helpers import communication, config
from fedllm_helpers.models import editing
from fedllm_helpers.study import frontier, lab

STORED = Path(__file__).resolve().parents[2] / "notebooks" / "results"
CFG = config.load("cpu", "federation.threads=1", *lab.SETTINGS)


@pytest.mark.parametrize("arm", frontier.ARMS)
def test_every_arm_is_what_its_name_says(arm):
    cfg = frontier.settings(CFG, arm, 2, "iid")
    size = int(arm.split(" r ")[1].split(",")[0])
    assert (cfg.seed, cfg.federation.partition, cfg.model.lora.peft_lora_r) == (2, "iid", size)
    assert editing.scaling(cfg.model.lora) == frontier.SCALE and cfg.model.lora.core == arm.startswith("LoRA-XS")
    assert cfg.federation.aggregation == ("LoRA-XS" if arm.startswith("LoRA-XS") else "FedIT")
    assert len(cfg.model.lora.target_modules or ()) == (7 if arm.endswith(", all") else 0)
    packed = cfg.federation.compression
    assert (packed.up, packed.keep) == ("int4" if "int4" in arm else "int8" if "int8" in arm else "fp32",
                                        0.1 if "top 10 %" in arm else 1.0)  # fmt: skip


def test_lora_at_rank_16_is_the_federation_of_the_other_grid():
    assert frontier.settings(CFG, "LoRA r 16") == CFG


def test_the_search_for_a_rate_ends_between_worse_ones():
    tried = pd.DataFrame({"kind": "a", "learning_rate": [1.0, 2.0, 4.0], "nll": [3.0, 2.0, 2.5]})
    assert lab._further("a", tried) is None
    assert lab._further("a", tried.assign(nll=[1.0, 2.0, 3.0])) == ("a", 0.5)
    assert lab._further("a", tried.assign(nll=[3.0, 2.0, 1.0])) == ("a", 8.0)
    assert lab.chosen(tried) == {"a": 2.0}


def test_a_grid_goes_on_where_it_was_and_refuses_tables_of_other_cards(tmp_path):
    assert frontier._done(tmp_path, {"cards": "x"}) == {}
    (tmp_path / "frontier.json").write_text(json.dumps({"fingerprint": {"cards": "x"}, "seconds": {"rates": 9}}))
    assert frontier._done(tmp_path, {"cards": "x"}) == {"rates": 9}
    with pytest.raises(ValueError, match="of other cards, seeds or another model; take another --folder"):
        frontier._done(tmp_path, {"cards": "y"})
    table = pd.DataFrame({"partition": "iid", "value": [1, 2]})
    for part in (table, table.assign(partition="specialty"), table.assign(value=[3, 4])):
        frontier._add(tmp_path / "table.csv", part)
    found = pd.read_csv(tmp_path / "table.csv").groupby("partition")["value"].sum()
    assert found.to_dict() == {"iid": 7, "specialty": 3}, "a part that was cut off is not there twice"


@pytest.fixture(scope="module")
def stored():
    """(provenance, cards, bytes, rates) of the grid that comes with the notebooks."""
    origin = json.loads((STORED / "frontier.json").read_text(encoding="utf-8"))
    return origin, *(pd.read_csv(STORED / f"frontier_{what}.csv") for what in ("cards", "bytes", "rates"))


def test_the_stored_tables_are_whole(stored):
    origin, cards, sent, _ = stored
    assert set(origin["learning_rates"]) == set(frontier.KINDS) and set(origin["arms"]) == set(frontier.ARMS)
    for partition in set(cards["partition"]):
        some = cards[cards["partition"] == partition]
        assert sorted(set(some["seed"])) == origin["seeds"] and len(some) == 240 * len(origin["seeds"])
        assert some[list(frontier.ARMS)].gt(0).all(axis=None)
        rows = sent[sent["partition"] == partition]
        assert len(rows) == len(frontier.ARMS) * len(origin["seeds"]) * 6


def test_each_stored_rate_lies_between_worse_ones(stored):
    origin, _, _, rates = stored
    for kind, tried in rates.groupby("kind"):
        best = origin["learning_rates"][kind]
        assert tried.loc[tried["nll"].idxmin(), "learning_rate"] == best
        assert tried["learning_rate"].min() < best < tried["learning_rate"].max(), kind


def test_the_stored_bytes_are_those_of_the_formula(stored):
    sent = stored[2].groupby("arm")["bytes_up"].mean() / 4  # rounds
    for arm, (_, changes) in frontier.ARMS.items():
        cfg = frontier.settings(CFG, arm)
        numbers = communication.parameter_counts(cfg.model.name, cfg.model.lora).trainable
        if "keep" not in changes:
            formula = communication.transfer_bytes(numbers, cfg.federation.compression.up)
            assert formula < sent[arm] < 1.25 * formula + 40_000, arm  # names and shapes of up to 420 arrays


def test_lora_of_rank_16_is_what_the_grid_of_rules_found(stored):
    """The same federation, run twice: other processors round differently."""
    _, cards, _, _ = stored
    mine = cards[cards["partition"] == "specialty"]
    theirs = pd.read_csv(STORED / "aggregation_cards.csv")
    both = mine.merge(theirs, on=["card_id", "seed"])
    assert len(both) == len(mine)
    apart = (both["LoRA r 16"].sum() - both["FedIT"].sum()) / both["tokens_x"].sum()
    assert abs(apart) < 0.02
