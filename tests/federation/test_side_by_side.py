"""Hospitals in worker processes, on the real model: the same bits, one copy of the weights, no more than fit."""

import os
import time
from functools import partial

import numpy as np
import psutil
import pytest
from flwr.app import Message, RecordDict
from omegaconf import OmegaConf

from fedllm_helpers import config
from fedllm_helpers.federation import client_app, simulation
from fedllm_helpers.grids import sizing
from fedllm_helpers.grids.side_by_side import SideBySideGrid
from fedllm_helpers.models import shared
from fedllm_helpers.models.process import base_model

SMALL = (
    "federation.num_clients=3 federation.num_rounds=2 federation.training_arguments.max_steps=1 federation.threads=1 "
    "federation.training_arguments.per_device_train_batch_size=2 dataset.max_cards_per_specialty=4 "
    "dataset.specialties=[eye,ear] train.seq_length=64 train.evaluate_split=0.25 federation.evaluate_cards=2"
)
CLOCKS = [
    "client_seconds",
    "train_seconds",
    "seconds",
    "bytes_down",
]  # of edits, one that went on gets all


def settings(*more):
    return config.load("cpu", *SMALL.split(), *more)


def stumbling(message, context):
    """The package's client; hospital 1 raises in round 1, and in round 2 kills its process."""
    orders = message.content.config_records.get("config", {})
    if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
        if orders["server-round"] == 1:
            raise ArithmeticError("a full disk")
        psutil.Process().kill()
    return client_app.app(message, context)


def reading(message, context):
    """Read every weight, so that its memory is there."""
    model, _ = base_model(OmegaConf.create(context.run_config["config"]))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    time.sleep(1.0)  # the other worker gets the next
    return Message(RecordDict(), reply_to=message)


def same(one, other):
    assert one.adapter.keys() == other.adapter.keys() and one.edit.keys() == other.edit.keys()
    assert all(np.array_equal(value, other.adapter[key]) for key, value in one.adapter.items())
    assert all(np.array_equal(value, other.edit[key]) for key, value in one.edit.items())
    for table in ("history", "clients"):
        mine, theirs = (getattr(record, table).drop(columns=CLOCKS, errors="ignore") for record in (one, other))
        assert mine.equals(theirs)


def test_the_same_bits_as_in_process_and_a_run_goes_on_with_either(tmp_path, capsys):
    cfg = settings("federation.compression.up=int4")  # what rounding loses is remembered
    alone = simulation.run(cfg, progress=False)
    record = simulation.run(cfg, "side-by-side", folder=tmp_path)
    same(alone, record)
    out, err = capsys.readouterr()
    assert "side by side: workers=" in out and "fit into" in out and "6/6" in out and "loss" in out and not err
    assert record.provenance["backend"] == "side-by-side" and record.provenance["workers"] >= 1
    (tmp_path / "round-000002.safetensors").unlink()
    same(alone, simulation.run(cfg, folder=tmp_path, progress=False))


@pytest.mark.processes
def test_edits_of_the_base_are_right_in_every_worker_after_a_run_that_was_cut_off(tmp_path):
    cfg = settings("federation.aggregation=FedEx-LoRA", "federation.num_rounds=3")
    alone = simulation.run(cfg, folder=tmp_path, progress=False)
    (tmp_path / "round-000003.safetensors").unlink()
    same(alone, simulation.run(cfg, "side-by-side", folder=tmp_path, progress=False, workers=2))


@pytest.mark.processes
def test_hospitals_that_fail_are_rows_of_the_table_and_the_run_goes_on(caplog, monkeypatch):
    monkeypatch.setattr(sizing, "cores", lambda: 1)
    record = simulation.run(settings(), "side-by-side", progress=False, workers=2, client=stumbling)
    failed = record.clients.set_index(["round", "client"])["status"]
    assert failed[1, 1] == "it failed: ArithmeticError: a full disk"
    assert failed[2, 1] == "it failed: the worker process was killed by SIGKILL (as for want of memory)"
    assert (failed.drop([(1, 1), (2, 1)]) == "used").all()
    assert sum("federation.threads=1 times workers=2 is more than 1 cores" in line for line in caplog.messages) == 1


@pytest.mark.processes
@pytest.mark.parametrize("dtype", ["bfloat16"])  # float32, too; it takes as long again
def test_all_processes_have_one_copy_of_the_weights(dtype):
    """The proportional set size of the mapped weights, over server and workers, is the size of the weights."""
    cfg = settings(f"model.dtype={dtype}")
    model, text = base_model(cfg)[0], OmegaConf.to_yaml(cfg)
    size = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "lora_" not in name)
    with shared.weights(model) as folder, SideBySideGrid(reading, 4, {"config": text}, 2) as grid:
        assert bool(folder) == (dtype == "bfloat16"), "float32 is how the files have it"
        grid.begin, grid.scratch = partial(simulation._begin, text, folder, 1), folder
        while not all(worker.ready for worker in grid.team.workers):
            grid.team._come()
        requests = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        assert not any(reply.has_error() for reply in grid.send_and_receive(requests))
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        maps = [weights_of(pid) for pid in (os.getpid(), *(worker.process.pid for worker in grid.team.workers))]
    assert all(one.rss > 0.95 * size for one in maps), [one.rss / size for one in maps]
    assert sum(one.pss for one in maps) < 1.05 * size
    assert bool(shared.own(model)) == bool(folder), "this process has its own again"


def weights_of(pid):
    """What a process maps of files of weights."""
    maps = psutil.Process(pid).memory_maps()
    return max((one for one in maps if one.path.endswith(".safetensors")), key=lambda one: one.rss, default=None)


def test_what_is_said_of_workers_and_how_many_fit(monkeypatch):
    monkeypatch.setattr(sizing, "free_bytes", lambda device: 4_000_000_000)
    monkeypatch.setattr(sizing, "cores", lambda: 16)
    cfg = config.load("cpu", "federation.threads=2")
    number, why = sizing.workers(cfg)
    assert 1 <= number < 6 and f"{number} fit into" in why, "memory decides"
    with pytest.raises(ValueError, match=rf"workers={number + 1}: {number} fit into \d"):
        sizing.workers(cfg, number + 1)
    assert sizing.workers(cfg, number) == (number, "")
    monkeypatch.setattr(sizing, "free_bytes", lambda device: 4_000_000_000_000)
    assert sizing.workers(cfg)[0] == 6 and "6 hospitals in a round" in sizing.workers(cfg)[1], "hospitals decide"
    cfg = config.load(cfg, "federation.threads=8")
    assert sizing.workers(cfg)[0] == 2, "cores decide"
    monkeypatch.setattr(sizing, "free_bytes", lambda device: 1)
    assert sizing.workers(cfg)[0] == 1, "one is tried"
