"""Three booted machines, by the documents alone, and what may go wrong between them: `make test-machines`, as root."""

import hashlib
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import federations
import machines
import pytest
from federations import RUNS, commands

from fedllm_helpers import config
from fedllm_helpers.federation import simulation

pytestmark = [
    pytest.mark.machines,
    pytest.mark.skipif(bool(machines.lacking()), reason=machines.lacking() or "machines can be made"),
]
LONG = "federation.training_arguments.max_steps=8"  # seconds enough to fall into
PATIENT = "federation.timeout=150"


@pytest.fixture(scope="module")
def fed():
    """A federation of three machines, as the documents make it."""
    with federations.machines() as found:
        found.founds()
        yield found


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A digest of the adapter that the same settings give in this process."""
    folder = tmp_path_factory.mktemp("here")
    simulation.run(config.load("cpu", *federations.SETTINGS.split(), LONG), folder=folder, progress=False)
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def whole(fed):
    """Afterwards all is as before, or the test has failed."""
    yield
    for name in fed.lines.names:
        fed.lines.pull(name, out=False)
        fed.lines.shape(name, 1000)
    fed.online()


def until(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.2)


def trained(machine):
    """How many orders to train a hospital has received since it was switched on."""
    return machine.does("journalctl -b -o cat -u fedllm-hospital").count("Receiving: train message")


def wait_for_training(fed, before, rounds=1):
    until(lambda: trained(fed.hospitals[1]) >= before + rounds, "an order to train")
    time.sleep(1)


def begin(fed, name, *overrides, rounds=1):
    """A run that is in its first training, or a later one."""
    before = trained(fed.hospitals[1])
    run = fed.begins(name, LONG, PATIENT, *overrides)
    wait_for_training(fed, before, rounds)
    return run


def end(run, seconds=900):
    said, _ = run.communicate(timeout=seconds)
    return said


def out_for(fed, seconds):
    """One hospital's cable, out and in again."""
    fed.lines.pull("h1", out=True)
    time.sleep(seconds)
    fed.lines.pull("h1", out=False)


def test_bare_machines_come_to_the_same_adapter_by_the_documents_alone(fed, right):
    typed = [(machine, command) for machine, command, _ in fed.steps if "supernode list" not in command]
    seconds = sum(took for *_, took in fed.steps)
    print(f"{len(typed)} commands on three machines, {seconds:.0f} s until every hospital is online")
    fed.run("undisturbed", LONG)
    _, clients = fed.tables("undisturbed")
    assert clients["status"].tolist() == ["used"] * 4 and fed.status()[0] == "finished:completed"
    assert fed.adapter("undisturbed") == right and len(typed) < 40


def test_the_services_are_those_of_the_units(fed):
    for machine, unit in [(fed.server, "fedllm-server"), *((one, "fedllm-hospital") for one in fed.hospitals)]:
        shown = machine.does(f"systemctl show {unit} -p User -p NoNewPrivileges -p ProtectSystem -p ActiveState")
        right = {"User=fedllm", "NoNewPrivileges=yes", "ProtectSystem=strict", "ActiveState=active"}
        assert set(shown.split()) == right
        port = 8001 if unit == "fedllm-server" else 9095
        machine.does(f"/opt/fedllm/bin/python -P -m fedllm_helpers.deployment.health 127.0.0.1:{port}")
    refused = fed.hospitals[0].does(f"timeout 5 bash -c '</dev/tcp/{machines.SERVER}/8000'", check=False)
    assert "refused" in refused, "the server's own port is not open to a hospital"


def test_the_check_before_the_day_finds_the_machines_ready(fed):
    hospital, server = commands("fedllm_helpers.site check")
    said = fed.types(fed.hospitals[0], hospital.replace("--preset gpu", "--preset cpu"))
    assert "FAULT" not in said and "ready" in said
    assert "FAULT" not in fed.types(fed.server, f"{server} --preset cpu")


@pytest.mark.parametrize("seconds", [10, 30])
def test_a_link_that_is_down_in_training(fed, right, seconds):
    run = begin(fed, f"down{seconds}")
    out_for(fed, seconds)
    end(run)
    assert fed.adapter(f"down{seconds}") == right


def test_a_link_that_is_down_for_longer_than_a_node_is_remembered(fed, right):
    run = begin(fed, "down75")
    out_for(fed, 75)
    said = end(run)
    _, clients = fed.tables("down75")
    assert fed.status()[0].startswith("finished") and len(clients) >= 4, said
    assert fed.adapter("down75") == right or "not combined" in " ".join(clients["status"])


def test_a_link_that_comes_and_goes(fed, right):
    run = begin(fed, "flapping")
    for _ in range(5):
        out_for(fed, 2)
        time.sleep(2)
    end(run)
    assert fed.adapter("flapping") == right


@pytest.mark.parametrize("seconds", [10, 30])
def test_a_link_that_is_down_in_an_upload(fed, right, seconds):
    fed.lines.shape("h1", 4)
    run = begin(fed, f"upload{seconds}")
    sent = fed.lines.bytes("h1")[0]
    until(lambda: fed.lines.bytes("h1")[0] > sent + 500_000, "an upload")
    out_for(fed, seconds)
    end(run)
    assert fed.adapter(f"upload{seconds}") == right


def test_a_hospital_whose_service_is_started_anew(fed, right):
    run = begin(fed, "restarted")
    fed.hospitals[1].does("systemctl restart fedllm-hospital")
    said = end(run)
    assert fed.status()[0].startswith("finished"), said
    _, clients = fed.tables("restarted")
    print(f"a hospital restarted in training: {clients['status'].tolist()}")
    assert fed.adapter("restarted") == right or "not combined" in str(clients["status"].tolist())


def test_a_hospital_without_power_is_back_after_it_boots(fed, right):
    run = begin(fed, "power")
    fed.hospitals[1].cut_power()
    time.sleep(5)
    fed.hospitals[1].boot()
    end(run)
    fed.online()
    fed.run("after-power", LONG)
    assert fed.adapter("after-power") == right


@pytest.mark.parametrize("how", ["killed", "power"])
def test_a_server_that_dies_goes_on_where_it_was(fed, right, how):
    run = begin(fed, f"server-{how}", rounds=2)  # the first round is kept by now
    if how == "power":
        fed.server.cut_power()
        run.kill()
        fed.server.boot()
        fed.server.does(f"mkdir -p ~/.flwr\ncat > ~/.flwr/config.toml <<'END'\n{federations.TOML}END")
    else:
        fed.server.does("systemctl kill -s KILL fedllm-server")
    end(run)
    until(lambda: "active" in fed.server.does("systemctl is-active fedllm-server", check=False).split(), "the server")
    fed.online(seconds=240)
    said = fed.run(f"server-{how}", LONG, PATIENT)
    assert fed.adapter(f"server-{how}") == right and len(fed.tables(f"server-{how}")[0]) == 2, said


@contextmanager
def disk(machine, path, size, full=False):
    """A small disk of its own at a path, for everybody to write; ``full``: nothing more fits on it."""
    fill = f"dd if=/dev/zero of={path}/filler bs=1k 2>/dev/null || true" if full else "true"
    machine.does(f"mkdir -p {path} && mount -t tmpfs -o size={size},mode=0777 tmpfs {path}\n{fill}")
    try:
        yield
    finally:
        machine.does(f"umount -l {path}")


def test_a_run_that_has_no_room_says_so_first(fed):
    with disk(fed.server, f"{RUNS}/small", "256k"):
        said = fed.run("small")
    assert (
        "are free, and the adapters of a run take about" in said and "round 1" not in said and "Traceback" not in said
    )


def test_a_disk_that_fills_at_the_server_in_a_run(fed, right):
    with disk(fed.server, f"{RUNS}/filled", "40m"):
        run = begin(fed, "filled", rounds=2)
        fed.server.does(f"dd if=/dev/zero of={RUNS}/filled/filler bs=1k 2>/dev/null || true")
        said = end(run)
        assert "No space left" in said and fed.status()[0] == "finished:failed"
        fed.server.does(f"rm {RUNS}/filled/filler")
        said = fed.run("filled", LONG, PATIENT)
        assert "going on after round 1 of 2" in said and "round 2 of 2: 2 of 2 hospitals" in said, said
        assert fed.adapter("filled") == right


def test_a_disk_that_is_full_at_a_hospital_with_the_ledger(fed, right):
    hospital, ledger = fed.hospitals[1], "/var/lib/fedllm/ledger"
    with disk(hospital, "/media/full", "64k"):
        hospital.does(f"cp -p {ledger} /media/full/ledger && mount --bind /media/full/ledger {ledger}")
        hospital.does("dd if=/dev/zero of=/media/full/filler bs=1k 2>/dev/null || true")
        hospital.does("yes '' | head -c 8000 >> /media/full/ledger || true")  # to the last block
        try:
            said = fed.run("full-ledger", LONG)
        finally:
            hospital.does(f"umount -l {ledger}")
    assert "this hospital's ledger cannot be" in said and "2 of 2" not in said
    fed.run("full-ledger-2", LONG)
    assert fed.adapter("full-ledger-2") == right


def test_a_disk_that_is_full_at_a_hospital_with_flowers_files(fed, right):
    with disk(fed.hospitals[1], "/var/lib/fedllm/flwr", "64k", full=True):
        said = fed.run("full-flower", LONG, "federation.timeout=60")
    assert "2 of 2" not in said and fed.status()[0] == "finished:failed", said
    fed.run("full-flower-2", LONG)
    assert fed.adapter("full-flower-2") == right


def test_a_certificate_that_has_ended_is_one_line_and_renewed_by_the_documents(fed, right):
    names = "Path('/media/old'), ('localhost',), days=-1"
    script = (
        f"from pathlib import Path; from fedllm_helpers.deployment import certificates as c; c.make_server({names})"
    )
    fed.server.does("cp /etc/fedllm/server.crt /media/safe/")
    fed.server.does(f'/opt/fedllm/bin/python -c "{script}" && cp /media/old/server.crt /etc/fedllm/server.crt')
    try:
        fed.server.does("systemctl restart fedllm-server", check=False)
        assert "server.crt: ended 1 days ago" in fed.server.does("journalctl -n 40 -o cat -u fedllm-server")
    finally:
        fed.server.does("cp /media/safe/server.crt /etc/fedllm/")
    renew, restart = commands("--renew --authority")
    fed.types(fed.server, renew)
    fed.types(fed.server, restart)
    fed.online(seconds=240)
    fed.run("renewed", LONG)
    assert fed.adapter("renewed") == right, "no hospital had to change anything"


def test_two_runs_at_once(fed, right):
    first = begin(fed, "both-1")
    second = fed.begins("both-2", LONG, PATIENT)
    end(first)
    end(second)
    assert fed.adapter("both-1") == fed.adapter("both-2") == right


def test_a_policy_that_forbids_it(fed, right):
    policy = "/etc/fedllm/policy.yaml"
    fed.hospitals[1].does(f"cp -p {policy} {policy}.kept && sed -i 's/^most_rounds: .*/most_rounds: 0/' {policy}")
    try:
        said = fed.run("forbidden", LONG)
    finally:
        fed.hospitals[1].does(f"mv {policy}.kept {policy}")
    assert "most_rounds=0, all answered" in said and "2 of 2" not in said
    fed.run("allowed", LONG)
    assert fed.adapter("allowed") == right


FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"  # Debian's libfaketime: machines here share a clock


@contextmanager
def clock(hospital, shift):
    """What a hospital's service, and the command of the check, take for the time."""
    told = [f"LD_PRELOAD={FAKETIME}", f"FAKETIME={shift}"]
    folder = "/etc/systemd/system/fedllm-hospital.service.d"
    lines = "[Service]\n" + "".join(f"Environment={one}\n" for one in told)
    hospital.write(f"{folder}/clock.conf", lines)
    hospital.does("systemctl daemon-reload && systemctl restart fedllm-hospital")
    try:
        yield " ".join(told)
    finally:
        hospital.does(f"rm -r {folder} && systemctl daemon-reload && systemctl restart fedllm-hospital")


@pytest.mark.skipif(not Path(FAKETIME).is_file(), reason="needs Debian's libfaketime")
@pytest.mark.parametrize("shift", ["-1d", "+1d"])
def test_a_clock_that_is_a_day_wrong(fed, right, shift):
    hospital, (check, _) = fed.hospitals[1], commands("fedllm_helpers.site check")
    with clock(hospital, shift) as told:
        check = check.replace("--preset gpu", "--preset cpu").replace("sudo -u fedllm", f"sudo -u fedllm env {told}")
        said = fed.types(hospital, f"{check} || true")
        assert any("FAULT" in line and "clock" in line for line in said.splitlines()), said
        said = fed.run(f"clock{shift}", LONG, "federation.timeout=60")
        assert "1 of 2 hospitals are connected after" in said and "Traceback" not in said, said
    fed.online()
    fed.run(f"clock{shift}-after", LONG)
    assert fed.adapter(f"clock{shift}-after") == right


def renumbered(hospital, old, new):
    unit = "/etc/systemd/system/fedllm-hospital.service"
    hospital.does(f"sed -i s/partition-id={old}/partition-id={new}/ {unit} && systemctl daemon-reload")
    hospital.does("systemctl restart fedllm-hospital")
    time.sleep(5)


def test_two_nodes_with_one_number(fed, right):
    renumbered(fed.hospitals[1], 1, 0)
    try:
        fed.online()
        said = fed.run("twice", LONG, "federation.timeout=20")
    finally:
        renumbered(fed.hospitals[1], 0, 1)
    assert "are both hospital 0" in said, said
    fed.online()
    fed.run("once", LONG)
    assert fed.adapter("once") == right


def test_a_hospital_with_other_code_runs_what_the_run_brought(fed, right):
    hospital = fed.hospitals[1]
    (packages,) = hospital.path("/opt/fedllm/lib").glob("python*/site-packages")
    shutil.copytree(machines.ROOT / "fedllm_helpers", packages / "fedllm_helpers")
    module = packages / "fedllm_helpers" / "federation" / "client_app.py"
    module.write_text(module.read_text() + "\n\ndef of_another_version():\n    pass\n")
    try:
        hospital.does("systemctl restart fedllm-hospital")
        time.sleep(5)
        fed.online()
        fed.run("other-code", LONG)
    finally:
        shutil.rmtree(packages / "fedllm_helpers")
        hospital.does("systemctl restart fedllm-hospital")
        time.sleep(5)
    assert fed.adapter("other-code") == right
