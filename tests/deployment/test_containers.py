"""The image and the compose files: locked down, nothing secret in them, and every flag and path is a real one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
FILES = ["compose.yaml", "compose.hospital.yaml"]
BUILDERS = ("podman", "buildah", "docker")
COMMANDS = {"flower-superlink": "flower-superlink", "fedllm_helpers.deployment.warm": "flower-supernode"}
SECRET = re.compile(r"\.key|(?<![\w-])node(?![\w-])|ca\.crt|policy|\.ya?ml|password|token|cards", re.IGNORECASE)


def services():
    """(file, name, service) of every service."""
    for file in FILES:
        for name, service in yaml.safe_load((DEPLOY / file).read_text(encoding="utf-8"))["services"].items():
            yield pytest.param(file, service, id=f"{file}-{name}")


def words(service):
    return [word.split("=", 1)[0] for word in service["command"]]


@pytest.mark.parametrize(("file", "service"), services())
def test_a_service_is_locked_down(file, service):
    assert service["image"] == "fedllm" and service["user"] == "10001:10001" and service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "environment", "env_file"} & set(service)
    assert all(one.startswith("/tmp:") for one in service["tmpfs"])
    assert service["logging"]["options"]["max-size"]
    assert service["command"] == ["sleep", "infinity"] or service["healthcheck"]["test"][0] == "CMD"
    known = yaml.safe_load((DEPLOY / file).read_text(encoding="utf-8"))["volumes"]
    for volume in service.get("volumes", []):
        if isinstance(volume, str):
            source, target = volume.split(":")
            assert source in known and target in ("/var/lib/fedllm", "/var/lib/fedllm/cache")
            continue
        source, target = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume["source"]), volume["target"]
        assert target.startswith(("/etc/", "/srv/")) and not target.endswith("ca.key")
        assert volume["read_only"], f"{source}: what is not the party's own is read and no more"
        assert source.startswith("/") or (DEPLOY / source).is_file(), f"{source}: no such file"
        missing = "a folder that is missing is said in one line, and no empty one is made in its place"
        assert volume["bind"] == {"create_host_path": False}, missing


def test_the_gateways_port_and_no_other_is_on_the_host():
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert {name: one["ports"] for name, one in found.items() if "ports" in one} == {"ground": ["9093:9093"]}
    assert {found[name]["network_mode"] for name in ("server", "gateway")} == {"service:ground"}
    assert "listen 9093" in (DEPLOY / "gateway.conf").read_text(encoding="utf-8")
    assert "--host=127.0.0.1" in found["server"]["command"], "the SuperLink is reached from within alone"
    hospital = yaml.safe_load((DEPLOY / "compose.hospital.yaml").read_text(encoding="utf-8"))["services"]["hospital"]
    assert "ports" not in hospital and "--host=127.0.0.1" in hospital["command"]


@pytest.mark.parametrize(("file", "service"), services())
def test_every_flag_is_one_of_the_installed_flower(file, service):
    command = next((real for name, real in COMMANDS.items() if name in service["command"]), None)
    if command is None:
        assert service["command"][0] in ("nginx", "sleep")
        return
    path = Path(sys.executable).parent / command
    known = re.findall(r"--[\w-]+", subprocess.run([path, "--help"], capture_output=True, text=True).stdout)
    flags = {word for word in words(service) if word.startswith("--")}
    assert flags and flags <= set(known), flags - set(known)
    unit = DEPLOY / ("server.service" if command == "flower-superlink" else "hospital.service")
    there = set(re.findall(r"(?<=\s)--[\w-]+", unit.read_text(encoding="utf-8").split("ExecStart=")[1].split("\n[")[0]))
    assert flags | {flag for flag in there if flag.startswith("--log")} == there, "as the unit starts it"


def test_what_a_containers_health_is_asked_of_is_what_it_serves():
    for file in FILES:
        for service in yaml.safe_load((DEPLOY / file).read_text(encoding="utf-8"))["services"].values():
            if "healthcheck" not in service:
                continue
            module, address = service["healthcheck"]["test"][4:6]
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
            served = [word for word in service["command"] if word.startswith("--health-server-address=")]
            assert served == [f"--health-server-address={address}"] or address == "localhost:9093"


def test_the_image_copies_what_is_named_and_runs_as_nobody_special():
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    steps = [line.split(None, 1) for line in text.replace("\\\n", " ").splitlines() if line and line[0] not in "# "]
    assert [given for step, given in steps if step == "USER"][-1] == "10001:10001"
    copied = [given.split()[:-1] for step, given in steps if step == "COPY" and "--from" not in given]
    sources = {source.removeprefix("./") for line in copied for source in line}
    assert sources == {"pyproject.toml", "README.md", "LICENSE", "fedllm_helpers", "notebooks/results"}
    assert all((ROOT / source).exists() for source in sources) and not any(step == "ADD" for step, _ in steps)
    given = " ".join(given for step, given in steps if step in ("ENV", "ARG", "COPY"))
    assert not SECRET.search(given), SECRET.search(given)
    unit = (DEPLOY / "server.service").read_text(encoding="utf-8")
    for pair in re.findall(r"(?:FLWR|FEDLLM)_\w+=\S+", unit):
        assert pair in text, f"{pair} is set in the unit, and not in the image"


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_takes_the_gateway_as_nobody_special(tmp_path):
    from fedllm_helpers.deployment import certificates

    certificates.make_server(tmp_path / "etc", ("fed.example.org", "localhost"))
    gateway = (DEPLOY / "gateway.conf").read_text(encoding="utf-8").replace("/etc/fedllm", f"{tmp_path}/etc")
    (tmp_path / "fedllm.conf").write_text(gateway, encoding="utf-8")
    main = (DEPLOY / "nginx.conf").read_text(encoding="utf-8").replace("/tmp/", f"{tmp_path}/")
    (tmp_path / "nginx.conf").write_text(main.replace("/etc/nginx/conf.d", str(tmp_path)), encoding="utf-8")
    done = subprocess.run(
        ["nginx", "-t", "-e", "stderr", "-c", str(tmp_path / "nginx.conf")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def builder():
    """A program that builds images here and can fetch the base; or a skip that says what is missing."""
    base = re.search(r"^ARG BASE=(\S+)", (DEPLOY / "Containerfile").read_text(encoding="utf-8"), re.M)[1]
    found = [name for name in BUILDERS if shutil.which(name)]
    for name in found:
        if subprocess.run([name, "pull", base], capture_output=True, timeout=300).returncode == 0:
            return name
    pytest.skip(f"{base} is not fetched here by {', '.join(found)}" if found else "no podman, buildah or docker here")


@pytest.mark.processes
def test_the_image_is_built_and_answers():
    name = builder()
    file, image = DEPLOY / "Containerfile", "localhost/fedllm-test"
    done = subprocess.run([name, "build", "-f", file, "-t", image, ROOT], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    if name == "buildah":
        return
    locked = ["--rm", "--read-only", "--cap-drop=ALL", "--network=none", "--tmpfs=/tmp"]
    for command in (["flower-superlink", "--version"], ["nginx", "-v"], ["id", "-u"]):
        done = subprocess.run([name, "run", *locked, image, *command], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "10001"
