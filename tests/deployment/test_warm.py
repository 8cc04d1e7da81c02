"""Parties whose processes are ready: the same bits, nothing imported twice, nothing left, and a way back."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from deployed import SMALL, started, until

from fedllm_helpers import config, deployment
from fedllm_helpers.deployment import runs as deployed_runs
from fedllm_helpers.deployment import same_code, warm, watchdog
from fedllm_helpers.federation import simulation

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Flower starts a process for each message")
FORKING = "fedllm_helpers.deployment.forking"
OPEN = ["--insecure"]  # to a SuperNode on the same machine
WHO_IMPORTS_WHAT = """
import os, sys
if "FLWR_HOME" in os.environ:
    log = os.open(os.path.join(os.environ["FLWR_HOME"], "imported.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def hook(event, args):
        if event == "import":
            os.write(log, f"{os.getpid()} {args[0]}".encode() + bytes([10]))
    sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def cfg():
    return config.load("cpu", *SMALL.split())


@pytest.fixture(scope="module")
def running(cfg, tmp_path_factory):
    """Two hospitals and a server that are kept ready, and write down what each of their processes imports."""
    with started(cfg, tmp_path_factory, WHO_IMPORTS_WHAT, warm=True) as running:
        yield running


def family(running, party):
    """The process of the SuperNode or SuperLink, the one that stands by, the one that is ready."""
    node = psutil.Process(running.processes[party].pid)
    until(lambda: node.children() and node.children()[0].children())
    keeper = node.children()[0]
    return node, keeper, keeper.children()[0]


def imported_by(running, party):
    """Names of modules by process, of the ready one and of those that were forked from it."""
    found, ready = {}, family(running, party)[2].pid
    for line in (running.folder / party / "flwr" / "imported.txt").read_text().splitlines():
        number, name = line.split()
        found.setdefault(int(number), set()).add(name)
    commands = [process.pid for process in family(running, party)[:2]]
    return found[ready], {number: names for number, names in found.items() if number not in (ready, *commands)}


@linux
@pytest.mark.processes
def test_the_same_bits_and_children_import_nothing_anew(running, cfg):
    record = deployed_runs.run(running, cfg, "whole", show=lambda line: None)
    here = simulation.run(cfg, progress=False)
    assert record.adapter.keys() == here.adapter.keys()
    assert all(np.array_equal(record.adapter[key], here.adapter[key]) for key in here.adapter)
    heavy = {"torch", "transformers", "peft", "datasets"}
    for hospital in ("hospital-0", "hospital-1"):
        ready, messages = imported_by(running, hospital)
        assert len(messages) == 5, "one to say who it is, two rounds of training and scoring"
        assert all(len(names) < len(ready) / 100 for names in messages.values()), messages
        assert heavy <= ready and not any(heavy & names for names in messages.values())
    ready, others = imported_by(running, "server")  # the others are a run, and Flower's commands
    assert heavy <= ready and others and not any(heavy & names for names in others.values())
    assert "round 1 of 2" not in (running.folder / "server" / "log.txt").read_text(), "a run has a log of its own"
    for party in ("hospital-0", "hospital-1", "server"):
        assert "warm:" not in (running.folder / party / "log.txt").read_text(), "nothing was out of order"


@linux
@pytest.mark.processes
def test_when_the_ready_process_is_killed_messages_are_answered_all_the_same(running, cfg):
    parties = {party: family(running, party) for party in ("hospital-0", "server")}
    for _, keeper, ready in parties.values():
        ready.kill()
        until(lambda keeper=keeper: any("superexec" in word for word in keeper.cmdline()))
    one = config.load(cfg, "federation.num_rounds=1", "federation.fraction_evaluate=0")
    record = deployed_runs.run(running, one, "cold", show=lambda line: None)
    assert record.clients["status"].tolist() == ["used", "used"]
    for party, (node, *_) in parties.items():
        said = [line for line in (running.folder / party / "log.txt").read_text().splitlines() if "warm:" in line]
        assert len(said) == 1 and "ended (-9): from now on each message starts one of its own" in said[0]
        assert node.is_running() and node.pid == running.processes[party].pid


@linux
@pytest.mark.processes
@pytest.mark.parametrize("party", ["hospital-1", "server"])
def test_nothing_is_left_of_a_party_that_was_killed(running, party):
    if party == "server":  # whose ready process is gone
        deployment.kill(running, party)
        deployment.start_server(running)
        until(lambda: FORKING in " ".join(family(running, party)[2].cmdline()))
    home = str(running.folder / party)
    node, *others = family(running, party)
    os.kill(node.pid, signal.SIGKILL)
    until(lambda: not any(process.is_running() for process in others), 20)
    left = [process for process in watchdog.marked(running.mark) if home in process.environ()["FLWR_HOME"]]
    assert not left and not list(running.folder.rglob("*.sock"))


CHANGED = """
import os, sys
from pathlib import Path
from fedllm_helpers import config, deployment
from fedllm_helpers.deployment import forking
from fedllm_helpers.models import process

def first(model):  # a number of the weights
    return float(sum(p.double().abs().sum() for n, p in model.named_parameters() if "lora" not in n))

def child(ready, cfg):  # what a message's process finds, and what it tells
    if forking.begun(ready):
        import json
        was = process.held()[0]
        print(bool(was), first(process.base_model(cfg)[0]), flush=True)
        os.write(ready.fresh["pipe"], json.dumps(process.held()).encode())
        os._exit(0)
    while ready.told:
        forking.reap(ready)

os.environ.update(forking.ONLY_HERE)
ready, folder, other = forking.prepared(), Path(sys.argv[1]), Path(sys.argv[2])
cfg = config.load("cpu", f"model.name={folder}", "model.dtype=float32", "train.seq_length=48")
child(ready, cfg)
child(ready, cfg)
(other / "model.safetensors").replace(folder / "model.safetensors")
forking.check(ready, [])
child(ready, cfg)
child(ready, cfg)
ready.code = ((ready.code[0][0], 1, 1), *ready.code[1:])
os.execv = lambda *command: print("anew", flush=True)
forking.check(ready, [sys.executable, "-c", "print('cold')"])
os.wait()
"""


@linux
@pytest.mark.processes
def test_a_model_or_code_that_changed_on_disk_is_not_used_any_longer(folder_of, tmp_path):
    for name, factor in {"model": 1.0, "other": 2.0}.items():
        shutil.copytree(folder_of("llama"), tmp_path / name)
        if factor != 1:
            scale(tmp_path / name / "model.safetensors", factor)
    command = [sys.executable, "-c", CHANGED, str(tmp_path / "model"), str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("warm:")]
    assert len(said) == 2, done.stderr + done.stdout
    assert "base model's files have changed" in said[0] and "code on this machine has changed" in said[1]
    loads, sums = zip(*(line.split() for line in done.stdout.splitlines()[:4]), strict=True)
    assert loads == ("False", "True", "False", "True"), "loaded by the first message, kept for the second; then anew"
    assert sums[0] == sums[1] and sums[2] == sums[3]
    assert float(sums[2]) == pytest.approx(2 * float(sums[0]))
    assert sorted(done.stdout.splitlines()[4:]) == ["anew", "cold"]


def scale(path, factor):
    from safetensors.torch import load_file, save_file

    save_file({name: value * factor for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


BROUGHT = """
import sys
from pathlib import Path
from fedllm_helpers import folders, limits
from fedllm_helpers.deployment import same_code
kept = same_code.Kept(same_code.digest(Path(same_code.__file__).parents[1]))
kept.put_aside()
sys.path.insert(0, sys.argv[1])
import fedllm_helpers.folders
from fedllm_helpers import limits as now
print(kept.used, fedllm_helpers.folders is folders, now is limits, sys.argv[1] in fedllm_helpers.folders.__file__)
"""


@pytest.mark.parametrize("changed", [False, True], ids=["same", "another"])
def test_a_run_gets_the_code_that_it_brought(tmp_path, changed):
    package = Path(same_code.__file__).parents[1]
    copy = tmp_path / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "stored"))
    if changed:
        (copy / "limits.py").write_text((copy / "limits.py").read_text() + "\n")
    command = [sys.executable, "-c", BROUGHT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(value) for value in (not changed, not changed, not changed, changed)], (
        done.stderr
    )


def test_where_it_cannot_be_flower_starts_processes_itself(monkeypatch):
    options = ["--superlink", "fed:1", "--port", "7", "--node-config", 'data="--isolation"']
    monkeypatch.setattr(sys, "platform", "linux")
    assert warm.why_cold(warm.NODE, options) == "" and warm.asked_at(warm.NODE, options) == ("127.0.0.1", 7, OPEN)
    assert warm.asked_at(warm.NODE, ["--host=0.0.0.0"]) == ("127.0.0.1", 9094, OPEN)
    assert warm.why_cold(warm.NODE, [*options, "--isolation=process"]) == "--isolation is set"
    assert warm.why_cold(warm.NODE, [*options, "--ssl-certfile", "a"]) == "--ssl-certfile is set"
    monkeypatch.setattr(warm.metadata, "version", lambda name: "1.41.0")
    assert "Flower 1.41.0" in warm.why_cold(warm.NODE, options)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "only on Linux" in warm.why_cold(warm.NODE, options)
    monkeypatch.setattr(warm.psutil, "virtual_memory", Free)
    assert not warm.fits(3) and warm.fits(2)


def test_a_superlink_is_asked_as_its_own_options_say(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    options = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile=server.crt", "--host", "::"]
    assert warm.asked_at(warm.LINK, options) == ("::1", 8000, ["--root-certificates", "ca.crt"])
    assert warm.asked_at(warm.LINK, ["--port=7", "--insecure"]) == ("127.0.0.1", 7, OPEN)
    assert warm.asked_at(warm.LINK, ["--ssl-certfile=server.crt"])[2] == [], "the system's authorities"
    monkeypatch.setenv(warm.INSTALLS, "1")
    assert warm.why_cold(warm.LINK, options) == ""
    assert warm.why_cold(warm.LINK, [*options, "--simulation"]) == "--simulation is set"
    monkeypatch.delenv(warm.INSTALLS)
    assert warm.why_cold(warm.LINK, [*options, warm.NOTHING_INSTALLED]) == ""
    assert "what a run asks for is installed" in warm.why_cold(warm.LINK, options)


class Free:
    """A machine with room for two."""

    available = 2_500_000_000
