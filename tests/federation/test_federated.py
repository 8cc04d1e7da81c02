"""The two apps on the real model: in this process, on Ray, by ``flwr run``, and killed in between."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedllm_helpers import communication, config, models, training
from fedllm_helpers.data import partitions
from fedllm_helpers.federation import client_app, simulation
from fedllm_helpers.models import embedded, lora
from fedllm_helpers.models.process import base_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "federation.num_clients=2 federation.num_rounds=2 federation.training_arguments.max_steps=1 federation.threads=1 "
    "federation.training_arguments.per_device_train_batch_size=2 dataset.max_cards_per_specialty=6 "
    "train.evaluate_split=0.34 federation.evaluate_cards=4"
)
CLOCKS = ["client_seconds", "seconds"]
CLIENT_CLOCKS = ["train_seconds", "seconds"]


@pytest.fixture(scope="module")
def small():
    return config.load("cpu", *SMALL.split())


@pytest.fixture(scope="module")
def record(small):
    return simulation.run(small, progress=False)


def test_a_federation_learns_and_says_what_it_did(small, record):
    history, clients = record.history, record.clients
    assert history["round"].tolist() == [0, 1, 2] and clients["client"].tolist() == [0, 1, 0, 1]
    assert history["nll"].iloc[-1] < history["nll"].iloc[0]
    assert (clients["loss_after"] < clients["loss_before"]).all()
    assert history["learning_rate"].tolist()[1:] == [step.learning_rate for step in training.rounds(small)]
    assert (clients["examples"] == 2).all() and (clients["tokens"] > 20).all()
    assert (clients["train_seconds"] < clients["seconds"]).all()
    counts = communication.parameter_counts(small.model.name, small.model.lora)
    assert clients["bytes_up"].between(4 * counts.trainable, 4 * counts.trainable * 1.02).all()
    assert history["bytes_up"].tolist()[1:] == clients.groupby("round")["bytes_up"].sum().tolist()
    assert record.provenance["embedded_model"] and record.provenance["config"]["seed"] == 0
    assert record.provenance["backend"] == "in-process" and record.provenance["versions"]["flwr"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(small, record):
    again = simulation.run(small, progress=False)
    other = simulation.run(config.load(small, "seed=1"), progress=False)
    assert all(np.array_equal(record.adapter[key], again.adapter[key]) for key in record.adapter)
    assert not all(np.array_equal(record.adapter[key], other.adapter[key]) for key in record.adapter)


def test_one_bar_shows_rounds_and_clients(small, capsys):
    simulation.run(config.load(small, "federation.num_rounds=1", "federation.evaluate_every=0"))
    out, err = capsys.readouterr()
    assert "2/2" in out and "loss" in out and "INFO" not in out + err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("federation.num_clients=5000", "num_clients=5000: there are only"),
        ("dataset.specialties=[eyes]", "no card of specialty 'eyes'"),
        ("federation.fraction_train=0", "federation.fraction_train"),
        ("federation.fraction_train=1.5", "to 1"),
        ("federation.num_rounds=0", "from 1 to"),
        ("federation.strategy=FedMean", "allowed are FedAvg, FedAvgM"),
    ],
)
def test_settings_that_cannot_work_stop_before_anything_runs(small, override, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        simulation.run(config.load(small, override), progress=False)
    assert "\n" not in str(error.value)


def test_an_unknown_backend_names_the_known(small):
    with pytest.raises(ValueError, match="unknown backend 'Ray': known are in-process, side-by-side, ray"):
        simulation.run(small, "Ray")


def test_a_hospital_with_one_card_takes_part():
    cfg = config.load("cpu", *SMALL.split(), "dataset.specialties=[eye]", "dataset.max_cards_per_specialty=4")
    cfg = config.load(cfg, "train.evaluate_split=0.25", "federation.num_clients=3", "federation.num_rounds=1")
    clients = simulation.run(cfg, progress=False).clients
    assert clients["cards"].tolist() == [1, 1, 1] and (clients["examples"] == 2).all()


def test_rounds_train_on_fresh_cards_while_there_are_any(small):
    cards = client_app.own_cards(small, 0)[0]
    cfg = config.load(small, "federation.training_arguments.max_steps=3")
    n, each = len(cards), 6
    drawn = [list(client_app.cards_of_round(cards, cfg, number, 0)["card_id"]) for number in range(1, 6)]
    assert all(len(some) == each for some in drawn)
    everything = sum(drawn, [])
    assert sorted(everything[:n]) == sorted(cards["card_id"]), "a card comes again when all have been seen"
    assert sorted(everything[n : 2 * n]) == sorted(cards["card_id"])
    assert drawn[0] == list(client_app.cards_of_round(cards, cfg, 1, 0)["card_id"])
    assert drawn[0] != list(client_app.cards_of_round(cards, cfg, 1, 1)["card_id"])
    epochs = config.load(small, "federation.training_arguments.max_steps=-1")
    assert client_app.cards_of_round(cards, epochs, 4, 0)["card_id"] == cards["card_id"]


def test_fedprox_keeps_the_adapter_near_where_it_came_from(fresh, cards, cfg):
    model, tokenizer = fresh
    before, moved = models.get_adapter(model), {}
    for mu in (0.0, 1000.0):
        models.set_adapter(model, before)
        training.fine_tune(model, tokenizer, cards[0], cfg, proximal_mu=mu, description=None)
        after = models.get_adapter(model)
        moved[mu] = sum(float(((after[key] - before[key]) ** 2).sum()) for key in before)
    assert moved[1000.0] < 0.7 * moved[0.0]


def test_a_process_holds_one_model_also_while_it_loads_the_next(cfg, monkeypatch):
    load, left = lora.load, []
    first = weakref.ref(base_model(config.load(cfg, "model.lora.peft_lora_r=2"))[0])

    def load_next(settings):
        gc.collect()
        left.append(first())
        return load(settings)

    monkeypatch.setattr(lora, "load", load_next)
    base_model(config.load(cfg, "model.lora.peft_lora_r=3"))
    assert left == [None]


def test_hospitals_score_the_average_on_their_own_held_out_cards(small):
    cfg = config.load(small, "federation.fraction_evaluate=1.0", "federation.num_rounds=1", "federation.partition=iid")
    history = simulation.run(cfg, progress=False).history
    assert 1 < history["client_nll"].iloc[-1] < 6


@pytest.mark.processes
@pytest.mark.usefixtures("on_ray")
def test_ray_gives_the_same_bits(small, record):
    ray = simulation.run(small, "ray", progress=False)
    assert all(np.array_equal(record.adapter[key], ray.adapter[key]) for key in record.adapter)
    assert record.history["nll"].tolist() == ray.history["nll"].tolist()


@pytest.mark.processes
@pytest.mark.usefixtures("on_ray")
def test_flwr_run_gives_the_same_bits(record, tmp_path):
    port = 39091  # of the SuperLink that `flwr run` starts and leaves running
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    before = set(_listening(port))
    assert not before, f"another SuperLink listens on {port}; end it before this test"
    settings = f'preset="cpu" overrides="{SMALL}" folder="{tmp_path / "run"}"'
    command = ["flwr", "run", ".", "--stream", "-c", settings]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    finally:
        for pid in set(_listening(port)) - before:
            os.kill(pid, signal.SIGTERM)
    folder = tmp_path / "run"
    assert (folder / "adapter").is_dir(), done.stdout[-3000:] + done.stderr[-3000:]
    assert "round 2 of 2: 2 of 2 hospitals" in done.stdout + done.stderr
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(np.array_equal(record.adapter[key], adapter[key]) for key in record.adapter)
    assert json.loads((folder / "provenance.json").read_text())["config"]["federation"]["num_rounds"] == 2
    base = AutoModelForCausalLM.from_pretrained(embedded.fetch())
    assert PeftModel.from_pretrained(base, folder / "adapter").peft_config["default"].r == 16


def _listening(port):
    """Process numbers that listen on a port of this machine."""
    import psutil

    return [c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port and c.pid]


KILLED = """
import sys
from fedllm_helpers import config
from fedllm_helpers.federation import simulation
simulation.run(config.load("cpu", *sys.argv[2:]), folder=sys.argv[1], progress=False)
"""


@pytest.mark.processes
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path):
    """SIGKILL before the first round is done, right after a round, and later; FedAdam's moments included."""
    overrides = [*SMALL.split(), "federation.num_rounds=4", "federation.strategy=FedAdam"]
    overrides += ["federation.strategy_arguments.eta=0.001", "train.save_every_round=3"]
    cfg = config.load("cpu", *overrides)
    whole = simulation.run(cfg, folder=tmp_path / "whole", progress=False)
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(folder), *overrides]
    moments = [(".lock", 2.0), ("round-000001.safetensors", 0.0), ("round-000002.safetensors", 0.7)]
    for name, pause in moments:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = (folder / name).stat().st_mtime_ns if (folder / name).exists() else None
        while not (folder / name).exists() or (folder / name).stat().st_mtime_ns == before:
            assert process.poll() is None, "the run ended by itself"
            time.sleep(0.01)
        time.sleep(pause)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (folder / "adapter").exists()
    again = simulation.run(cfg, folder=folder, progress=False)
    assert all(np.array_equal(whole.adapter[key], again.adapter[key]) for key in whole.adapter)
    assert whole.history.drop(columns=CLOCKS).equals(again.history.drop(columns=CLOCKS))
    assert whole.clients.drop(columns=CLIENT_CLOCKS).equals(again.clients.drop(columns=CLIENT_CLOCKS))
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(np.array_equal(whole.adapter[key], saved[key]) for key in saved)
    assert (folder / "adapters" / "round-000003").is_dir() and (folder / "adapters" / "round-000004").is_dir()


def test_two_runs_do_not_share_a_folder(small, tmp_path):
    lock = FileLock(tmp_path / ".lock")
    with lock, pytest.raises(RuntimeError, match="another run is at work in"):
        simulation.run(small, folder=tmp_path, progress=False)


def test_a_client_that_raises_leaves_the_model_as_the_next_one_needs_it(fresh, cards, cfg):
    model, tokenizer = fresh
    broken = {key: np.full_like(array, np.inf) for key, array in models.get_adapter(model).items()}
    models.set_adapter(model, broken)
    with pytest.raises(FloatingPointError):
        training.fine_tune(model, tokenizer, cards[0], cfg, description=None)
    assert not model.training
    assert all(np.isposinf(value).all() for value in models.get_adapter(model).values())


def test_clients_keep_nothing_on_their_own_disk():
    for preset in config.PRESETS:
        assert training.round_config(config.load(preset)).train.training_arguments.save_strategy == "no"


def test_who_holds_what_is_the_same_for_client_and_notebook(small):
    from fedllm_helpers import data

    train, _ = data.load(small)
    how = small.federation
    parts = partitions.partition(train, how.num_clients, how.partition, alpha=how.dirichlet_alpha, seed=small.seed)
    assert [part["card_id"] for part in parts] == [client_app.own_cards(small, h)[0]["card_id"] for h in range(2)]
