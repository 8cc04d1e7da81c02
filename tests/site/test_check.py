"""The check before the day: every line with a real certificate, key, socket, policy and cards."""

import contextlib
import datetime as dt
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading

import pytest

from fedllm_helpers import config
from fedllm_helpers.deployment import certificates
from fedllm_helpers.privacy.ledger import Ledger
from fedllm_helpers.site import commands, findings, hospital, machine, reading

CARDS = [{"question": f"What is sign {n}?", "answer": f"A sign of kind {n}.", "specialty": "eye"} for n in range(12)]
NODE = 'partition-id=0 num-partitions=2 data="{}"'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = certificates.make_server(tmp_path_factory.mktemp("keys"), ("127.0.0.1", "localhost"), days=200)
    certificates.make_node_key(folder / "node")
    return folder


@contextlib.contextmanager
def serving(folder):
    """A TLS server on loopback that answers as the gateway does a stranger; its port."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        def log_message(self, *words):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def port(made):
    with serving(made) as found:
        yield found


@pytest.fixture
def cards(tmp_path):
    (tmp_path / "cards").mkdir()
    lines = "".join(json.dumps(card) + "\n" for card in CARDS)
    (tmp_path / "cards" / "train.jsonl").write_text(lines + json.dumps(CARDS[0]) + "\n")
    (tmp_path / "cards" / "test.jsonl").write_text(json.dumps({**CARDS[0], "question": "What is a sign?"}) + "\n")
    return tmp_path / "cards"


def found(capsys, *words):
    """Exit code, and lines by what was looked at."""
    with pytest.raises(SystemExit) as ended:
        commands.main(["check", *map(str, words)])
    lines = [line.split(None, 2) for line in capsys.readouterr().out.splitlines()]
    return ended.value.code, [(state, what, said) for state, what, said in lines[:-1]]


def flags(made, port, cards, **others):
    """Flags of a hospital at which everything is right."""
    given = {"superlink": f"127.0.0.1:{port}", "root-certificates": made / "ca.crt", "node-config": NODE.format(cards)}
    given |= {"auth-supernode-private-key": made / "node", "preset": "cpu"} | others
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def test_a_hospital_at_which_everything_is_right_is_ready(made, port, cards, capsys):
    code, lines = found(capsys, *flags(made, port, cards))
    assert code == 0, lines
    said = {what: text for _, what, text in lines}
    assert "hospital 0 of 2" in said["settings"] and "days left" in said["authority"]
    assert "answers" in said["server"] and "seconds from the server" in said["clock"]
    public = (made / "node.pub").read_text().strip()
    assert public[-16:] in said["key"]
    assert [text for state, what, text in lines if what == "cards" and state == "ok"][0].endswith("1 held out")
    assert any("exact repetition" in text or "left out" in text for state, _, text in lines if state == "note")
    assert "one step took" in said["step"] and "train.seq_length=128" in said["length"]


FAULTS = {
    "superlink": ("127.0.0.1:9", "server", "is not reached"),
    "root-certificates": ("{made}/node.pub", "authority", "no certificate"),
    "auth-supernode-private-key": ("{made}/ca.crt", "key", "no private key"),
}


@pytest.mark.parametrize("flag", FAULTS)
def test_what_stands_in_the_way_is_one_line_and_exit_code_1(flag, made, port, cards, capsys):
    value, what, text = FAULTS[flag]
    code, lines = found(capsys, *flags(made, port, cards, **{flag: value.format(made=made)}), "--no-step")
    faults = [(where, said) for state, where, said in lines if state == "FAULT"]
    assert code == 1 and any(where == what and text in said for where, said in faults), faults


@pytest.mark.parametrize(
    ("node", "text"),
    [
        ("partition-id=2 num-partitions=2", "numbered from 0"),
        ("partition-id=0", "num-partitions=None"),
        ("partition-id=0 num-partitions=2", "names no cards"),
        ('partition-id=0 num-partitions=2 dta="x"', "unknown dta"),
        ('partition-id=0 num-partitions=2 data="/nowhere/at/all"', "no folder at /nowhere/at/all"),
        ('partition-id=0 num-partitions=2 data="/tmp" policy="/nowhere.yaml"', "/nowhere.yaml"),
        ("partition-id num-partitions=2", "'partition-id' is no key=value"),
    ],
)
def test_a_node_config_that_will_not_work(node, text, made, port, cards, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(["check", *flags(made, port, cards, **{"node-config": node}), "--no-step"])
    out = capsys.readouterr()
    assert ended.value.code in (1, 2) and text in out.out + out.err


def test_another_authority_is_told_from_a_server_that_is_away(port, tmp_path):
    other = certificates.make_server(tmp_path / "other")
    (line,) = findings.look({"server": lambda: machine.server("127.0.0.1", port, str(other / "ca.crt"))})
    assert line.state == "FAULT" and "is reached, but its certificate does not hold here" in line.said


def test_a_certificate_out_of_its_time_may_be_a_clock_that_is_wrong(tmp_path):
    old = certificates.make_server(tmp_path / "old", days=-1)
    with serving(old) as number:
        (line,) = findings.look({"server": lambda: machine.server("127.0.0.1", number, str(old / "ca.crt"))})
    today = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d")
    assert line.state == "FAULT" and f"expired, or this machine's clock is wrong: it says {today}" in line.said


def test_a_certificate_of_yesterday_and_one_that_ends_soon(tmp_path):
    old = certificates.make_server(tmp_path / "old", days=-1)
    (line,) = machine.lasting("certificate", str(old / "server.crt"))
    assert line.state == "FAULT" and "it has expired" in line.said
    soon = certificates.make_server(tmp_path / "soon", days=9)
    (line,) = machine.lasting("certificate", str(soon / "server.crt"))
    assert line.state == "note" and "time to renew it" in line.said


def test_a_policy_that_leaves_nothing(tmp_path, made, port, cards, capsys):
    path = tmp_path / "policy.yaml"
    node = NODE.format(cards) + f' policy="{path}"'
    path.write_text("most_rounds: 1\n")
    code, lines = found(capsys, *flags(made, port, cards, **{"node-config": node}), "--no-step")
    assert code == 1 and any("policy.ledger is missing" in said for _, what, said in lines if what == "policy")
    ledger = Ledger(tmp_path / "policy.ledger")
    ledger.begin()
    code, lines = found(capsys, *flags(made, port, cards, **{"node-config": node}), "--no-step")
    assert code == 0 and any("0 rounds answered" in said for _, what, said in lines if what == "policy")
    ledger.add({"kind": "round", "run": 1, "number": 1})
    code, lines = found(capsys, *flags(made, port, cards, **{"node-config": node}), "--no-step")
    assert code == 1 and any("most_rounds=1 leaves none" in said for _, what, said in lines if what == "policy")


def test_a_hospital_with_three_cards(cards):
    (cards / "train.jsonl").write_text("".join(json.dumps(card) + "\n" for card in CARDS[:3]))
    cfg = config.load("cpu", "federation.training_arguments.per_device_train_batch_size=16")
    lines = list(hospital._cards(str(cards), cfg))
    assert lines[-1].state == "note" and "a batch of 16 is more than there are cards (3)" in lines[-1].said
    cfg = config.load("cpu", "federation.training_arguments.per_device_train_batch_size=32")
    assert list(hospital._cards(str(cards), cfg))[-1].state == "FAULT"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="file modes bind nobody else here")
def test_a_key_that_others_can_read(made, tmp_path):
    key = tmp_path / "node"
    key.write_bytes((made / "node").read_bytes())
    key.chmod(0o644)
    states = [line.state for line in machine.key("key", str(key))]
    assert states == ["FAULT", "ok"]


def test_a_model_that_is_not_here_is_not_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    (line,) = machine.model(config.load("cpu"))
    assert line.state == "FAULT" and "is not on this machine" in line.said and not list(tmp_path.iterdir())


def test_a_clock_that_is_a_day_off(port, made, monkeypatch):
    real = machine.email.utils.parsedate_to_datetime
    shift = machine.dt.timedelta(days=1)
    monkeypatch.setattr(machine.email.utils, "parsedate_to_datetime", lambda text: real(text) + shift)
    lines = list(machine.server("127.0.0.1", port, str(made / "ca.crt")))
    assert lines[1].state == "FAULT" and "set it" in lines[1].said


def test_the_units_that_come_with_the_project_are_read(made):
    words, around = reading.unit("deploy/hospital.service")
    assert set(hospital.FLAGS) <= set(reading.flags(words)) and around["FLWR_HOME"]
    assert reading.node_config(reading.flags(words)["--node-config"])["num-partitions"] == 2


def test_the_server_is_looked_at(made, port, tmp_path, capsys):
    words = ["--server", "--ssl-ca-certfile", made / "ca.crt", "--ssl-certfile", made / "server.crt", "--preset", "cpu"]
    words += ["--ssl-keyfile", made / "server.key", "--database", tmp_path / "state.db", "--enable-supernode-auth"]
    code, lines = found(capsys, *words, "--port", port, "--gateway", f"localhost:{port}")
    assert code == 0, lines
    said = {what: (state, text) for state, what, text in lines}
    assert (
        said["port"][0] == "note"
        and "localhost" in said["names"][1]
        and "answers" in said["gateway" if "gateway" in said else "server"][1]
    )
    other = certificates.make_server(tmp_path / "other")
    words[words.index("--ssl-keyfile") + 1] = other / "server.key"
    code, lines = found(capsys, *words, "--host", "0.0.0.0")
    faults = [text for state, _, text in lines if state == "FAULT"]
    assert code == 1 and any("is not the key of" in text for text in faults)
    assert any("whoever reaches this port may start runs" in text for text in faults)


def test_the_command_stands_alone(made):
    run = [sys.executable, "-m", "fedllm_helpers.site", "check", "--server", "--preset", "cpu", "--insecure"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "nothing is encrypted" in done.stdout and "Traceback" not in done.stderr
