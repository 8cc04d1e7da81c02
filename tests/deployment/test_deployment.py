"""The two apps on real processes: the same bits, TLS and keys, who opens what and who stays outside."""

import json
import os
import socket
from pathlib import Path

import flwr
import pytest
from deployed import SMALL, log, same, started, told_to, until

from fedllm_helpers import config, deployment
from fedllm_helpers.deployment import certificates, hosts, parties
from fedllm_helpers.deployment import runs as deployed_runs
from fedllm_helpers.federation import simulation

CLOCKS = ["client_seconds", "seconds", "train_seconds"]
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(os.name == "nt", reason="Flower's processes need Linux or macOS"),
]

WHO_OPENS_WHAT = """
import os, sys
if "FLWR_HOME" in os.environ:
    sys.modules["ray"] = None  # as without the extra `sim`
    log = os.open(os.path.join(os.environ["FLWR_HOME"], "opened.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def hook(event, args):
        if event == "open" and "hospital-" in str(args[0]):
            os.write(log, (str(args[0]) + chr(10)).encode())
    sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def cfg():
    return config.load("cpu", *SMALL.split())


@pytest.fixture(scope="module")
def running(cfg, tmp_path_factory):
    """Two hospitals and a server, whose processes write down which files of hospitals they open."""
    with started(cfg, tmp_path_factory, WHO_OPENS_WHAT) as running:
        yield running


@pytest.fixture(scope="module")
def in_process(cfg):
    return simulation.run(cfg, progress=False)


def test_the_same_bits_as_in_one_process(running, cfg, in_process):
    said = []
    record = deployed_runs.run(running, cfg, "whole", show=said.append)
    assert same(record.adapter, in_process.adapter)
    drop = [column for column in CLOCKS if column in record.history]
    assert record.history.drop(columns=drop).equals(in_process.history.drop(columns=drop))
    drop = [column for column in CLOCKS if column in record.clients]
    assert record.clients.drop(columns=drop).equals(in_process.clients.drop(columns=drop))
    assert [line[:12] for line in said] == ["round 1 of 2", "round 2 of 2"]
    assert record.provenance["config"]["federation"]["num_rounds"] == 2 and record.provenance["embedded_model"]
    with pytest.raises(ValueError, match="holds a run with other settings: train.learning_rate_max"):
        deployed_runs.collect(running, config.load(cfg, "train.learning_rate_max=0.002"), "whole")


def test_no_hospital_opens_another_ones_files_and_the_server_none(running):
    """What its processes opened, what they were told, and what the server stores."""
    opened = {name: (running.folder / name / "flwr" / "opened.txt").read_text() for name in running.processes}
    cards = {name: str(running.folder / name / "data") for name in ("hospital-0", "hospital-1")}
    for name, own in cards.items():
        assert f"{own}/train.jsonl" in opened[name] and f"{own}/test.jsonl" in opened[name]
        others = set(cards.values()) - {own}
        assert not any(other in opened[name] or other in opened[parties.SERVER] for other in others)
        told = [words for words in told_to(running.mark).values() if f"/{name}/" in words]
        assert len(told) >= 2, "a SuperNode and its SuperExec"
        assert not any(other in words for words in told for other in others)
    assert (running.folder / "hospital-0").stat().st_mode & 0o077 == 0, "nor do other users"
    lines = (Path(cards["hospital-0"]) / "train.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    stored = b"".join(path.read_bytes() for path in running.folder.glob(f"{parties.SERVER}/state.db*"))
    assert questions and not any(question.encode() in stored for question in questions)
    assert b"finished" in stored, "the database was read as what it is"


def test_settings_and_runs_that_do_not_fit_are_one_line(running, cfg):
    with pytest.raises(ValueError, match="federation.num_clients=3: this deployment has 2 hospitals"):
        deployed_runs.submit(running, config.load(cfg, "federation.num_clients=3"))
    with pytest.raises(RuntimeError, match="has 0 of 2 rounds: submit the run again"):
        deployed_runs.collect(running, cfg, "never")
    with pytest.raises(RuntimeError, match="flwr list: .*Run ID not found") as error:
        deployed_runs.status(running, 123)
    assert "\n" not in str(error.value)
    app = deployed_runs.bundle(running, cfg, "large")
    (app / "fedllm_helpers" / "weights.py").write_bytes(os.urandom(11_000_000))
    with pytest.raises(
        RuntimeError, match="flwr run: FAB size exceeds maximum allowed size of 10,485,760 bytes"
    ) as error:
        deployed_runs.submit(running, cfg, "large", app=app)
    assert "\n" not in str(error.value)


def test_two_runs_at_once_end_as_each_alone_would(running, cfg, in_process):
    """And a third, in the folder of the first, is told so and leaves it whole."""
    other = config.load(
        cfg, "train.learning_rate_max=0.002", "federation.num_rounds=1", "federation.fraction_evaluate=0"
    )
    first, second = deployed_runs.submit(running, cfg, "first"), deployed_runs.submit(running, other, "second")
    until(lambda: (deployed_runs.run_folder(running, "first") / ".lock").exists())
    third = deployed_runs.submit(running, cfg, "first")
    with pytest.raises(RuntimeError, match="another run is at work in"):
        deployed_runs.follow(running, third, lambda line: None)
    for number in (first, second):
        assert deployed_runs.follow(running, number, lambda line: None)["status"] == "finished:completed"
    assert same(deployed_runs.collect(running, cfg, "first").adapter, in_process.adapter)
    alone = simulation.run(other, progress=False)
    assert same(deployed_runs.collect(running, other, "second").adapter, alone.adapter)


def _is_plain(running, name):
    return name == "plain" and "attempt failed" in log(running, name)  # it tries for ever


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stranger", "key is not registered"),
        ("twin", "another node with this key still counts as online"),
        ("misled", "certificate verify failed"),
        ("plain", "only TLS is spoken and this is plain text"),
        ("keyless", "does not point to a file|No such file"),
    ],
)
def test_who_may_not_come_in_stays_outside_and_is_told_why(running, name, words):
    options, secret = (), running.folder / "hospital-0" / "key"
    if name == "stranger":
        secret = certificates.make_node_key(running.folder / name / "key")
    if name == "misled":
        foreign = certificates.make_server(running.folder / "elsewhere")
        options = ("--root-certificates", str(foreign / certificates.AUTHORITY))
    if name == "plain":
        options = ("--insecure",)
    if name == "keyless":
        options = ("--root-certificates", str(running.folder / "nothing.crt"))
    before = sorted(node["node-id"] for node in parties.nodes(running))
    deployment.start_node(running, 0, *options, name=name, secret=secret)
    try:
        until(lambda: running.processes[name].poll() is not None or _is_plain(running, name), 60)
        with pytest.raises(RuntimeError, match=f"{name}: .*({words})") as error:
            deployment.wait_online(running, ["hospital-0", "hospital-1", name], patience=1)
        assert "\n" not in str(error.value)
        assert sorted(node["node-id"] for node in parties.nodes(running)) == before
    finally:
        if running.processes[name].poll() is None:
            deployment.kill(running, name)
        del running.processes[name]


def test_an_expired_certificate_is_named(cfg, tmp_path):
    certificates.make_server(tmp_path / parties.SERVER, days=-1)
    with pytest.raises(ValueError, match="server.crt has expired .* makes a new one") as error:
        deployment.start(cfg, tmp_path)
    assert "\n" not in str(error.value)


def test_a_port_in_use_and_another_flower_are_said_at_once(cfg, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind((parties.LOOPBACK, 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"port \d+ of this machine is in use"):
            deployment.start(cfg, tmp_path, port=taken.getsockname()[1])
    monkeypatch.setattr(flwr, "__version__", "1.43.0")
    with pytest.raises(ValueError, match=r"Flower 1.43.0: this was tried with 1.41 and 1.42"):
        deployment.start(cfg, tmp_path)


def test_a_port_is_none_that_the_system_lends_to_a_connection_before_a_process_listens():
    lent = Path("/proc/sys/net/ipv4/ip_local_port_range")  # macOS lends those from 49152
    first = int(lent.read_text().split()[0]) if lent.exists() else 49152
    if first < hosts.UNLENT.stop:
        pytest.skip(f"this machine was set to lend ports from {first}")
    ports = [hosts._free(None) for _ in range(200)]
    assert max(ports) < first and len(set(ports)) > 190
