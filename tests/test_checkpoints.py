"""Rounds on disk: whole files only, the same settings only, and no bit lost when a run goes on."""

import json
import logging

import numpy as np
import pytest
import tiny

from fedllm_helpers import checkpoints, config

CLOCKS = ["client_seconds", "seconds"]


class Ended(Exception):
    """Stands for the end of a process between two rounds."""


def until(number):
    """An ``evaluate`` that ends the process in a round, after its training."""
    calls = []

    def evaluate(adapter):
        calls.append(1)
        if len(calls) == number + 1:  # the first call is round 0
            raise Ended
        return float(adapter["b.A"].sum())

    return evaluate


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedMedian"])
def test_a_run_that_was_ended_goes_on_to_the_same_bits(tmp_path, name):
    extra = ["federation.strategy_arguments.server_momentum=0.9"] if name == "FedAvgM" else []
    cfg = tiny.settings(f"federation.strategy={name}", "federation.fraction_train=0.5", *extra, rounds=5)
    whole, tables = tiny.federate(cfg, evaluate=until(99), folder=tmp_path / "whole")
    for stop in (2, 1, 1):  # ended in round 2, in round 2 again, and in round 3
        with pytest.raises(Ended):
            tiny.federate(cfg, evaluate=until(stop), folder=tmp_path / "parts")
    resumed, again = tiny.federate(cfg, evaluate=until(99), folder=tmp_path / "parts")
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)
    assert list(whole) == list(resumed)
    first, second = tables.history_frame().drop(columns=CLOCKS), again.history_frame().drop(columns=CLOCKS)
    assert first.equals(second)
    assert tables.clients_frame().equals(again.clients_frame())


def test_a_finished_run_is_not_run_again(tmp_path):
    cfg, seen = tiny.settings(), []
    adapter, _ = tiny.federate(cfg, folder=tmp_path)
    again, tables = tiny.federate(cfg, tiny.client(seen=seen), folder=tmp_path)
    assert not seen and len(tables.history) == 3
    assert all(np.array_equal(adapter[key], again[key]) for key in adapter)


@pytest.mark.parametrize("damage", ["truncated", "empty", "no record"])
def test_a_damaged_file_falls_back_to_the_round_before(tmp_path, caplog, damage):
    cfg = tiny.settings(rounds=4)
    wanted, _ = tiny.federate(cfg, folder=tmp_path)
    files = sorted(tmp_path.glob("round-*"))
    assert [path.stem for path in files] == ["round-000003", "round-000004"], "the newest two are kept, nothing else"
    if damage == "no record":
        from safetensors.numpy import save_file

        save_file({"a": np.zeros(1)}, files[-1])
    else:
        files[-1].write_bytes(files[-1].read_bytes()[: 0 if damage == "empty" else -7])
    seen = []
    with caplog.at_level(logging.WARNING):
        adapter, _ = tiny.federate(cfg, tiny.client(seen=seen), folder=tmp_path)
    assert "round-000004.safetensors is damaged" in caplog.text
    assert {number for number, _, _ in seen} == {4}
    assert all(np.array_equal(wanted[key], adapter[key]) for key in adapter)


def test_two_damaged_files_do_not_take_the_new_ones_with_them(tmp_path, caplog):
    cfg = tiny.settings(rounds=4)
    wanted, _ = tiny.federate(cfg, folder=tmp_path)
    for path in tmp_path.glob("round-*"):
        path.write_bytes(b"nothing")
    with pytest.raises(Ended):
        tiny.federate(cfg, evaluate=until(2), folder=tmp_path)
    seen = []
    adapter, _ = tiny.federate(cfg, tiny.client(seen=seen), folder=tmp_path)
    assert {number for number, _, _ in seen} == {2, 3, 4}, "round 1 was kept beside the damaged files"
    assert all(np.array_equal(wanted[key], adapter[key]) for key in adapter)


def test_a_longer_timeout_may_go_on_with_a_run(tmp_path):
    cfg, seen = tiny.settings(), []
    tiny.federate(cfg, folder=tmp_path)
    tiny.federate(config.load(cfg, "federation.timeout=99"), tiny.client(seen=seen), folder=tmp_path)
    assert not seen


def test_other_settings_are_named(tmp_path):
    cfg = tiny.settings()
    tiny.federate(cfg, folder=tmp_path)
    other = config.load(cfg, "seed=3", "train.learning_rate_max=0.01")
    with pytest.raises(
        ValueError, match="seed .0 there, 3 here., train.learning_rate_max .0.008 there, 0.01 here."
    ) as e:
        tiny.federate(other, folder=tmp_path)
    assert "\n" not in str(e.value) and "num_rounds" not in str(e.value)


def test_an_interrupted_write_leaves_the_last_whole_round(tmp_path, monkeypatch):
    cfg = tiny.settings()
    monkeypatch.setattr(checkpoints.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        tiny.federate(cfg, folder=tmp_path)
    assert checkpoints.latest(tmp_path, cfg) is None
    assert not list(tmp_path.glob("*.safetensors"))


def test_nothing_is_pickled(tmp_path):
    cfg = tiny.settings("federation.strategy=FedAdam")
    tiny.federate(cfg, folder=tmp_path)
    raw = sorted(tmp_path.glob("round-*"))[-1].read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert {"adapter/b.A", "strategy/m_t/b.A", "strategy/v_t/b.A"} <= header.keys()
    assert json.loads(header["__metadata__"]["record"])["config"]["seed"] == 0
