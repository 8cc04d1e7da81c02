"""The examples for real machines: the units start on this one, and the gateway lets in hospitals and nobody else."""

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedllm_helpers.deployment import certificates, health, hosts, parties, watchdog

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Flower's processes need Linux or macOS")


def unit(name):
    """A unit file's sections; a key may come several times, and a line go on after a backslash."""
    text = (DEPLOY / name).read_text().replace("\\\n", " ")
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str
    parser.read_string(text)
    environment = [pair for line in re.findall(r"^Environment=(.*)$", text, flags=re.M) for pair in shlex.split(line)]
    return parser, dict(pair.split("=", 1) for pair in environment)


@pytest.mark.parametrize("name", ["server.service", "hospital.service"])
def test_units_restart_and_may_write_their_own_folder_alone(name):
    sections, environment = unit(name)
    service = sections["Service"]
    assert service["Restart"] == "always" and int(service["RestartSec"]) >= 10
    assert service["ProtectSystem"] == "strict" and service["NoNewPrivileges"] == "yes" and service["User"] == "fedllm"
    assert all(environment[key].startswith("/var/lib/fedllm/") for key in ("FLWR_HOME", "FEDLLM_CACHE"))
    assert environment["HOME"] == "/var/lib/fedllm", "the hub's cache lies there, and must be writable"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert "127.0.0.1" in service["ExecStart"], "what need not be reached from outside is not"
    assert service["IPAddressDeny"] == "any"
    assert service["CapabilityBoundingSet"] == "" and service["LimitCORE"] == "0"
    assert "MemoryDenyWriteExecute" not in service, "torch and CUDA write code to memory and run it"
    assert sections["Install"]["WantedBy"] == "multi-user.target"


@pytest.fixture
def machine(tmp_path):
    """Starts a unit's own command line here: same options, other paths, and ports of this machine."""
    mark, ports = os.urandom(6).hex(), {name: str(hosts._free(None)) for name in ("8000", "8001", "9094", "9095")}
    (tmp_path / "log").mkdir()
    certificates.make_server(tmp_path / "etc", ("fed.example.org", "127.0.0.1", "localhost"))
    certificates.make_node_key(tmp_path / "etc" / "node")
    scripts = Path(sys.executable).parent
    moves = {"/opt/fedllm/bin": str(scripts), "/etc/fedllm": str(tmp_path / "etc"), "/var/lib/fedllm": str(tmp_path)}
    moves |= {"/var/log/fedllm": str(tmp_path / "log")}

    def here(text, superlink):
        text = text.replace("fed.example.org:9093", superlink)
        for there, now in moves.items():
            text = text.replace(there, now)
        return re.sub(r"(?<=[: ])(8000|8001|9094|9095)\b", lambda found: ports[found[0]], text)

    def start(name, superlink=f"127.0.0.1:{ports['8000']}"):
        sections, environment = unit(name)
        environment = {key: here(value, superlink) for key, value in environment.items()}
        command = shlex.split(here(sections["Service"]["ExecStart"], superlink))
        environment = {**os.environ, **environment, watchdog.MARK: mark}
        with open(tmp_path / f"{name}.txt", "w") as log:
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)

    yield tmp_path, int(ports["8000"]), start, mark
    watchdog.end(mark)


def flwr(folder, port, *command, connection="trial"):
    """A Flower command's answer, against a port."""
    home = folder / f"flwr-{port}"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink.{connection}]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{folder}/etc/ca.crt"\n'
    )
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"FLWR_HOME": str(home), "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": scripts}
    done = subprocess.run(
        ["flwr", *command, connection, "--format", "json"], env=environment, capture_output=True, text=True, timeout=60
    )
    return json.loads(done.stdout[done.stdout.index("{") :])


def wait(condition, process, log):
    for _ in range(300):
        if condition():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.mark.processes
def test_the_units_commands_start_a_server_and_let_a_hospital_in(machine):
    folder, port, start, _ = machine
    server = start("server.service")
    wait(lambda: hosts._listens(port), server, folder / "server.service.txt")
    assert flwr(folder, port, "supernode", "register", str(folder / "etc" / "node.pub"))["success"]
    node = start("hospital.service")
    online = lambda: flwr(folder, port, "supernode", "list")["nodes"][0]["status"] == "online"  # noqa: E731
    wait(online, node, folder / "hospital.service.txt")
    assert (folder / "state.db").exists()
    assert "Starting" in (folder / "log" / "superlink.log").read_text(encoding="utf-8")
    ports = [re.search(r"health-server-address (\S+)", " ".join(one.args))[1] for one in (server, node)]
    assert all(health.alive(port) for port in ports) and not health.alive(f"127.0.0.1:{hosts._free(None)}", 1)


@contextlib.contextmanager
def gateway_of(folder, text):
    """nginx by a configuration; it writes over its environment, so that no mark finds it afterwards."""
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/err; events {{}} http {{ access_log off; {paths} {text} }}"
    )
    with subprocess.Popen(["nginx", "-e", f"{folder}/err", "-c", str(folder / "nginx.conf")]) as nginx:
        try:
            yield nginx
        finally:
            nginx.terminate()


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_the_gateway_passes_nodes_and_refuses_whoever_would_start_a_run(machine):
    folder, port, start, _ = machine
    server, outside = start("server.service"), hosts._free(None)
    text = (DEPLOY / "gateway.conf").read_text().replace("/etc/fedllm", f"{folder}/etc").replace(":8000", f":{port}")
    text = text.replace("listen 9093", f"listen 127.0.0.1:{outside}")
    with gateway_of(folder, text) as gateway:
        wait(lambda: hosts._listens(port) and hosts._listens(outside), server, folder / "server.service.txt")
        assert flwr(folder, port, "supernode", "register", str(folder / "etc" / "node.pub"))["success"]
        node = start("hospital.service", f"127.0.0.1:{outside}")
        online = lambda: flwr(folder, port, "supernode", "list")["nodes"][0]["status"] == "online"  # noqa: E731
        wait(online, node, folder / "hospital.service.txt")
        refused = flwr(folder, outside, "list")
        assert not refused["success"] and flwr(folder, port, "list")["success"]
        assert gateway.poll() is None and parties.LOOPBACK == "127.0.0.1"
    assert gateway.returncode == 0, "it is asked to end, and does"
