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
def install(tmp_path):
    """Installs into a folder of its own; pip may look at two wheels and nowhere else."""
    for version in ("1.0", "2.0"):
        wheel(tmp_path, version)
    (tmp_path / "old.txt").write_text("tiny-package<2\n")
    (tmp_path / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {tmp_path}\npre = no\n")
    left = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}

    def run(*wanted, **variables):
        ours = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "UV_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, INSTALL, "--target", tmp_path / "there", *wanted]
        return subprocess.run(command, env=left | ours | variables, capture_output=True, text=True)

    return run


def version_in(folder):
    return (folder / "there" / "tiny_package.py").read_text()


def test_uv_follows_the_files_and_the_variables_of_pip(install, tmp_path):
    done = install("tiny-package")
    assert (done.returncode, done.stderr, version_in(tmp_path)) == (0, "", "VERSION = '2.0'\n")
    bound = install("tiny-package", "--reinstall", PIP_CONSTRAINT=str(tmp_path / "old.txt"))  # pip has no --reinstall
    assert (bound.returncode, bound.stderr, version_in(tmp_path)) == (0, "", "VERSION = '1.0'\n")


def test_no_address_stands_in_a_command(tmp_path, monkeypatch):
    """It may hold a password. What uv is told by its own settings stays as it is."""
    spec = importlib.util.spec_from_file_location("install", INSTALL)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    listed = ["global.index-url='https://me:secret@mirror.test/simple'", "install.no-binary='a b'", "global.pre='yes'"]
    listed += [
        ":env:.extra-index-url='https://one.test https://two.test'",
        "global.find-links='w\\nv'",
        "global.cert='c'",
    ]
    listed += ["global.no-index='0'", "download.only-binary='x'", ":env:.index-url='https://you:secret@other.test'"]
    calls = []

    def run(command, **options):
        calls.append((command, options.get("env", {})))
        return subprocess.CompletedProcess(command, 0, "\n".join(listed))

    monkeypatch.setattr(program.subprocess, "run", run)
    monkeypatch.setenv("UV_FIND_LINKS", "mine")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    assert program.main(["-e", ".[lab]"]) == 0
    command, environment = calls[-1]
    assert command[-5:] == ["--no-binary=a", "--no-binary=b", "--pre", "-e", ".[lab]"]
    assert not any("test" in word or "secret" in word for word in map(str, command[1:]))
    told = {"UV_DEFAULT_INDEX": "https://you:secret@other.test", "UV_INDEX": "https://one.test https://two.test"}
    told |= {"UV_FIND_LINKS": "mine", "SSL_CERT_FILE": "c"}
    assert told.items() <= environment.items()


def test_pip_takes_what_uv_cannot(install, tmp_path):
    done = install("tiny-package", "--ignore-installed")  # an option that uv does not have
    assert done.returncode == 0 and "uv cannot install this: pip tries" in done.stderr
    assert version_in(tmp_path) == "VERSION = '2.0'\n"


def test_what_nobody_has_is_said_and_is_a_failure(install):
    done = install("no-such-package-anywhere")
    assert done.returncode != 0 and "no-such-package-anywhere" in done.stderr
