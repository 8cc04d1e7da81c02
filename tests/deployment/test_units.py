"""The units under systemd's own tools: no fault in them, little that they leave open, and addresses by name."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
MOST = 20  # of 100, where systemd-analyze takes 20 for well protected; as many as torch and Flower need
systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@pytest.fixture
def units(tmp_path):
    """The units as they are called where they are installed, with programs and a user that are here."""
    for path in [*DEPLOY.glob("*.service"), *DEPLOY.glob("*.timer")]:
        text = re.sub(r"=/opt/fedllm/bin/[\w-]+", "=/bin/true", path.read_text(encoding="utf-8"))
        (tmp_path / f"fedllm-{path.name}").write_text(text.replace("User=fedllm", "User=daemon"), encoding="utf-8")
    return sorted(tmp_path.iterdir())


def asked(*words):
    return subprocess.run(["systemd-analyze", *map(str, words)], capture_output=True, text=True)


@systemd
def test_systemd_finds_no_fault_in_the_units(units):
    assert len(units) >= 3
    for path in units:
        done = asked("verify", path)
        assert done.returncode == 0 and "fedllm" not in done.stderr, done.stderr


@systemd
def test_a_misspelt_key_would_be_found(units):
    text = units[0].read_text(encoding="utf-8").replace("ProtectSystem=", "ProtectSystems=")
    units[0].write_text(text, encoding="utf-8")
    assert "ProtectSystems" in asked("verify", units[0]).stderr


@systemd
@pytest.mark.parametrize("name", ["server", "hospital"])
def test_a_unit_leaves_little_open(name, units):
    done = asked("security", "--offline=true", f"--threshold={MOST}", DEPLOY / f"{name}.service")
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze rates only units that are loaded (--offline came with systemd 250)")
    assert done.returncode == 0, done.stdout[-400:] + done.stderr


def test_a_hospital_may_reach_the_server_and_nobody_else():
    text = {name: (DEPLOY / f"{name}.service").read_text(encoding="utf-8") for name in ("server", "hospital")}
    allowed = {name: re.findall(r"^IPAddressAllow=(.*)$", one, re.M) for name, one in text.items()}
    assert allowed == {"server": ["localhost"], "hospital": ["localhost", "192.0.2.10"]}
    assert all("\nIPAddressDeny=any\n" in one for one in text.values())
    assert "192.0.2.10" in (DEPLOY.parent / "docs" / "project.md").read_text(encoding="utf-8")
