"""Faults in mid-round on real processes: what is left out, what goes on to the same bits, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from deployed import SMALL, log, running_server_apps, same, started, until
from omegaconf import OmegaConf

from fedllm_helpers import config, deployment
from fedllm_helpers.deployment import parties, watchdog
from fedllm_helpers.deployment import runs as deployed_runs
from fedllm_helpers.federation import checkpoints, simulation

resource = pytest.importorskip("resource")
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(os.name == "nt", reason="Flower's processes need Linux or macOS"),
]


@pytest.fixture(scope="module")
def cfg():
    return config.load("cpu", *SMALL.split())


@pytest.fixture(scope="module")
def running(cfg, tmp_path_factory):
    """Two hospitals and a server."""
    with started(cfg, tmp_path_factory) as running:
        yield running


CHEAT = """
def cheat(message, context, call_next):
    reply, orders = call_next(message, context), message.content.config_records.get("config", {})
    if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
        if orders["server-round"] == 1:
            reply.content["arrays"] = to_record({"lora": np.full((3, 3), np.nan, np.float32)})
        if orders["server-round"] == 2:
            time.sleep(75)  # and keeps its node busy: a SuperNode takes one message at a time
    return reply


OUTSIDE = [packing.client_mod, cheat, """


def test_garbage_and_a_late_reply_are_left_out_and_said(running, cfg):
    """Hospital 1 sends garbage in the first round and, in the second, nothing within the timeout."""
    cfg = config.load(cfg, "federation.fraction_evaluate=0", "federation.timeout=60", "federation.min_share=0")
    app, said = deployed_runs.bundle(running, cfg, "cheated"), []
    code = (app / "fedllm_helpers" / "federation" / "client_app.py").read_text()
    assert "OUTSIDE = [packing.client_mod, " in code
    (app / "fedllm_helpers" / "federation" / "client_app.py").write_text(
        code.replace("OUTSIDE = [packing.client_mod, ", CHEAT)
    )
    deployed_runs.follow(running, deployed_runs.submit(running, cfg, "cheated", app=app), said.append)
    clients = deployed_runs.collect(running, cfg, "cheated").clients
    assert clients["status"].tolist()[::2] == ["used", "used"], "whoever trained is not lost"
    assert "keys are missing or unknown" in clients["status"][1] and clients["status"][3] == "no reply"
    assert any("hospital 1 is left out" in line for line in said)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can fill the disk of one process")
def test_a_server_that_is_killed_and_one_whose_disk_is_full_go_on_to_the_same_bits(running, cfg):
    cfg = config.load(cfg, "federation.fraction_evaluate=0", "federation.num_rounds=3")
    folder, lines = deployed_runs.run_folder(running, "hard"), []

    def strike():
        until((folder / "round-000001.safetensors").exists)
        deployment.kill(running, parties.SERVER)

    blow = threading.Thread(target=strike, daemon=True)
    blow.start()
    with pytest.raises(RuntimeError, match="the server is gone: start_server brings it back"):
        deployed_runs.follow(running, deployed_runs.submit(running, cfg, "hard"), lines.append)
    blow.join()
    deployment.start_server(running)
    deployment.wait_online(running, ["hospital-0", "hospital-1"])

    number = deployed_runs.submit(running, cfg, "hard")
    until((folder / "round-000002.safetensors").exists)
    for pid in running_server_apps(running.mark):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # no larger file is taken
    with pytest.raises(
        RuntimeError, match="round 3 cannot be kept in .*File too large.* the rounds before are whole: make room"
    ):
        deployed_runs.follow(running, number, lines.append)
    assert not list(folder.glob("*.part")) and checkpoints.latest(folder, OmegaConf.to_container(cfg)).number == 2

    record = deployed_runs.run(running, cfg, "hard", show=lines.append)
    assert same(record.adapter, simulation.run(cfg, progress=False).adapter)
    assert [line for line in lines if line.startswith("going on")][-1].startswith("going on after round 2 of 3")


def test_a_hospital_that_is_killed_in_training_is_missed_and_comes_back(running, cfg):
    cfg = config.load(cfg, "federation.fraction_evaluate=0", "federation.num_rounds=2", "federation.min_share=0")
    before = log(running, "hospital-1").count("Receiving: train")

    def strike():
        until(lambda: log(running, "hospital-1").count("Receiving: train") > before)
        deployment.kill(running, "hospital-1")

    blow = threading.Thread(target=strike, daemon=True)
    blow.start()
    record = deployed_runs.run(running, cfg, "missed", show=lambda line: None)
    blow.join()
    rows = record.clients.set_index(["round", "client"])["status"]
    assert rows[1, 0] == rows[2, 0] == "used" and "Node Unavailable" in rows[1, 1]
    assert deployment.bring_back(running, 1) < 120
    again = deployed_runs.run(running, config.load(cfg, "federation.num_rounds=1"), "again", show=lambda line: None)
    assert again.clients["status"].tolist() == ["used", "used"]


def test_nodes_that_disagree_or_have_no_cards_stop_a_run_in_one_line(running, cfg, tmp_path):
    (running.folder / "hospital-1" / "data").rename(tmp_path / "away")
    try:
        small = config.load(cfg, "federation.num_rounds=1", "federation.timeout=60")
        number, said = deployed_runs.submit(running, small, "incomplete"), []
        with pytest.raises(RuntimeError, match="the run ended as finished:failed"):
            deployed_runs.follow(running, number, said.append)
        assert any("data folder cannot be read" in line for line in said)
        assert not any(str(tmp_path) in line or "hospital-1/data" in line for line in said), "no path is sent"
        assert "hospital-1/data" in log(running, "hospital-1"), "but it stands in the node's own log"
    finally:
        (tmp_path / "away").rename(running.folder / "hospital-1" / "data")
    deployment.kill(running, "hospital-1")
    odd = parties.Deployment(
        running.folder, 3, running.port, running.mark, running.guard, running.warm, running.processes
    )
    deployment.bring_back(odd, 1)
    with pytest.raises(RuntimeError, match=r"disagree on how many hospitals there are: num-partitions=\[2, 3\]"):
        deployed_runs.run(running, cfg, "odd", show=lambda line: None)


ABANDONED = """
import signal, sys
from fedllm_helpers import config, deployment
from fedllm_helpers.deployment import runs as deployed_runs
signal.signal(signal.SIGINT, signal.default_int_handler)  # as a kernel does; a shell's background ignores it
cfg = config.load("cpu", *sys.argv[2:])
with deployment.start(cfg, sys.argv[1]) as running:
    print(running.mark, flush=True)
    deployed_runs.run(running, cfg)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_nothing_is_left_of_a_process_that_died_or_was_interrupted(tmp_path, how):
    command = [sys.executable, "-c", ABANDONED, str(tmp_path), *SMALL.split()]
    with open(tmp_path / "said.txt", "w") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
    mark = process.stdout.readline().strip()
    assert mark, (tmp_path / "said.txt").read_text()
    until(lambda: running_server_apps(mark))
    process.send_signal(how)
    process.wait(60)
    until(lambda: not list(watchdog.marked(mark)), 60)
    if how == signal.SIGINT:
        assert (tmp_path / "said.txt").read_text().strip().endswith("KeyboardInterrupt"), (
            "and no error of stopping twice"
        )
