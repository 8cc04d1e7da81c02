"""``install.py``: uv with the settings that pip has, and pip where uv cannot."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

INSTALL = Path(__file__).parent.parent / "install.py"


def wheel(folder, version):
    """A whole, empty package that no index has."""
    info = f"tiny_package-{version}.dist-info"
    with zipfile.ZipFile(folder / f"tiny_package-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_package.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-package\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No settings of this machine's pip and uv: only ``pip.conf`` in the test's folder."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def install(clean, tmp_path):
    """Installs into a folder of its own; pip may look at two wheels and nowhere else."""
    (tmp_path / "wheels").mkdir()
    for version in ("1.0", "2.0"):
        wheel(tmp_path / "wheels", version)
    (tmp_path / "old.txt").write_text("tiny-package<2\n")
    (tmp_path / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {tmp_path / 'wheels'}\n")

    def run(wanted, *options):
        command = [sys.executable, INSTALL, wanted, "--", "--target", tmp_path / "there", *options]
        return subprocess.run(command, capture_output=True, text=True)

    return run


def version_in(folder):
    return (folder / "there" / "tiny_package.py").read_text()


@pytest.mark.parametrize("by_uv", [True, False], ids=["uv", "pip"])
def test_files_variables_and_options_of_pip_count(install, tmp_path, monkeypatch, by_uv):
    """uv leaves its cache behind; pip takes over where it has an option that uv is not told."""
    more = [] if by_uv else ["--ignore-installed"]
    done = install("tiny-package", *more)
    assert (done.returncode, done.stderr, version_in(tmp_path)) == (0, "", "VERSION = '2.0'\n")
    assert (tmp_path / "cache").exists() == by_uv
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "old.txt"))
    (tmp_path / "there").rename(tmp_path / "before")
    bound = install("tiny-package", *more)
    assert (bound.returncode, bound.stderr, version_in(tmp_path)) == (0, "", "VERSION = '1.0'\n")


def test_what_nobody_has_is_said_and_is_a_failure(install):
    done = install("no-such-package-anywhere")
    assert done.returncode != 0 and "no-such-package-anywhere" in done.stderr
    assert "uv cannot install this: pip tries" in done.stderr


@pytest.fixture
def told(clean, tmp_path, monkeypatch):
    """What each program is started with, the first one apart: that is pip's own reading of its settings."""
    spec = importlib.util.spec_from_file_location("install", INSTALL)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    real, calls = subprocess.run, []

    def run(command, **options):
        if program.EFFECTIVE in command:
            return real(command, **options)
        calls.append((list(map(str, command)), options.get("env")))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(program.subprocess, "run", run)

    def started(*options):
        assert program.main(["-e", ".[lab]", "--", *options]) == 0
        return calls.pop()

    return started


def test_an_option_goes_before_a_variable_and_that_before_a_file(told, tmp_path, monkeypatch):
    conf = "[global]\nindex-url = https://file.test\nextra-index-url = https://one.test https://two.test\n"
    (tmp_path / "pip.conf").write_text(f"{conf}quiet = 1\ntimeout = 99\n[install]\nno-binary = a,b\n")
    found = []
    for given, options in (
        ({}, []),
        ({"PIP_INDEX_URL": "https://me:secret@v.test"}, []),
        ({}, ["-i", "https://o.test"]),
    ):
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        command, environment = told(*options)
        assert command[-4:] == ["--no-binary=a", "--no-binary=b", "-e", ".[lab]"]
        assert not any(".test" in word or "secret" in word for word in command), "every user of a machine sees them"
        assert (environment["UV_INDEX"], environment["UV_HTTP_TIMEOUT"]) == (
            "https://one.test https://two.test",
            "99",
        )
        found.append(environment["UV_DEFAULT_INDEX"])
    assert found == ["https://file.test", "https://me:secret@v.test", "https://o.test"]


def test_an_empty_variable_leaves_the_file_and_uv_s_own_variables_stay(told, tmp_path, monkeypatch):
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://file.test\nproxy = http://p.test:1\n")
    for name, value in {"PIP_INDEX_URL": "", "PIP_NO_CACHE_DIR": "1", "HTTPS_PROXY": "http://q.test"}.items():
        monkeypatch.setenv(name, value)
    command, environment = told()
    assert environment["UV_DEFAULT_INDEX"] == "https://file.test" and "--no-cache" in command
    assert environment["HTTPS_PROXY"] == environment["HTTP_PROXY"] == "http://p.test:1", "as for pip"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mine.test")
    monkeypatch.setenv("UV_INDEX_STRATEGY", "first-index")
    _, environment = told()
    assert (environment["UV_DEFAULT_INDEX"], environment["UV_INDEX_STRATEGY"]) == ("https://mine.test", "first-index")


def test_a_setting_that_uv_is_not_told_is_left_to_pip(told, tmp_path):
    (tmp_path / "pip.conf").write_text("[install]\nkeyring-provider = subprocess\n")
    command, _ = told("--pre")
    assert command[1:4] == ["-m", "pip", "install"] and command[-3:] == ["--pre", "-e", ".[lab]"]
