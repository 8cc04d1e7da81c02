"""Certificates of a trial: none is replaced unasked, hosts are hosts, and the command ends in one line."""

import datetime as dt
import ipaddress
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509

from fedllm_helpers.deployment import certificates

FILES = (certificates.AUTHORITY, certificates.SERVER, certificates.SERVER_KEY)
NO_HOSTS = [
    "https://fed.example.org", "http://10.0.0.5", "fed.example.org:9093", "10.0.0.5:8000", "fed example.org", " ", "",
    "fed.example.org ", "fed.example.org/fleet", "user@fed.example.org", "10.0.0.0/24", "10.0.0.256", "1.2.3", "[::1]",
    "fed..example.org", ".example.org", "fed.example.org.", "-fed.example.org", "fed-.example.org", "*", "*.org",
    "a*.b.org", "fed.*.org", "spital.österreich", "x" * 64 + ".org", "a." * 130 + "org", "fed\n.org", "fed,example.org",
    None, 5,
]  # fmt: skip
HOSTS = ["localhost", "fed.example.org", "FED-2.example.org", "super_link", "*.fed.example.org", "10.0.0.5", "::1",
         "xn--sterreich-z7a.at", "4cores.example", "x" * 63 + ".org"]  # fmt: skip


def made(folder):
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def command(folder, *more):
    done = [sys.executable, "-m", "fedllm_helpers.certificates", str(folder), *more]
    return subprocess.run(done, capture_output=True, text=True)


@pytest.mark.parametrize("host", NO_HOSTS)
def test_what_is_no_host_is_refused_before_anything_is_made(host, tmp_path):
    with pytest.raises(ValueError, match="^host .*give a name such as fed.example.org, or an address") as error:
        certificates.make_server(tmp_path / "new", ("fed.example.org", host))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("hosts", [(), "fed.example.org"])
def test_hosts_are_several(hosts, tmp_path):
    with pytest.raises(ValueError, match="names or addresses by which hospitals reach the server"):
        certificates.make_server(tmp_path, hosts)


def test_a_home_is_found_before_anything_in_it_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert certificates.make_server("~/keys") == tmp_path / "keys"
    before = made(tmp_path / "keys")
    with pytest.raises(ValueError, match="new ones lock every hospital out"):
        certificates.make_server(Path("~/keys"))
    (tmp_path / "mine" / certificates.AUTHORITY).mkdir(parents=True)
    with pytest.raises(ValueError, match="ca.crt is a folder, where a file belongs"):
        certificates.make_server(tmp_path / "mine", replace=True)
    assert made(tmp_path / "keys") == before and certificates.make_node_key("~/key").parent == tmp_path


def test_hosts_stand_in_the_certificate_as_they_are(tmp_path):
    certificates.make_server(tmp_path, tuple(HOSTS))
    found = x509.load_pem_x509_certificate((tmp_path / certificates.SERVER).read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(one) for one in ("10.0.0.5", "::1")]
    assert set(names.get_values_for_type(x509.DNSName)) == set(HOSTS) - {"10.0.0.5", "::1"}


@pytest.mark.parametrize("days", [0, 10**6, -(10**6), 3651, 1.5, True, None, float("nan")])
def test_days_that_no_certificate_has_are_refused(days, tmp_path):
    with pytest.raises(ValueError, match=f"days={days}: a certificate is valid for 1 to 3650 days"):
        certificates.make_server(tmp_path, days=days)
    assert not list(tmp_path.iterdir())


def test_an_expired_one_can_be_made_and_renewed(tmp_path):
    certificates.make_server(tmp_path, days=-1)
    with pytest.raises(ValueError, match="has expired .* make_server makes a new one, with replace=True"):
        certificates.check(tmp_path)
    certificates.make_server(tmp_path, replace=True)
    certificates.check(tmp_path)
    found = x509.load_pem_x509_certificate((tmp_path / certificates.SERVER).read_bytes())
    assert found.not_valid_after_utc > dt.datetime.now(dt.UTC) + dt.timedelta(days=29)
    assert (tmp_path / certificates.SERVER_KEY).stat().st_mode & 0o077 == 0 and sorted(made(tmp_path)) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_whatever_is_there_already_is_not_replaced(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"has {name} already, .* lock every hospital out") as error:
        certificates.make_server(tmp_path)
    assert "\n" not in str(error.value) and made(tmp_path) == {name: b"mine"}


def test_a_write_that_fails_leaves_the_old_ones(tmp_path, monkeypatch):
    certificates.make_server(tmp_path)
    before, real, calls = made(tmp_path), os.replace, []

    def second_fails(*given):
        calls.append(given)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*given)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="No space"):
        certificates.make_server(tmp_path, replace=True)
    assert made(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("there", ["key", "key.pub"])
def test_a_hospitals_key_is_not_replaced(there, tmp_path):
    (tmp_path / there).write_text("mine")
    with pytest.raises(ValueError, match="key is there already, and a server may know it"):
        certificates.make_node_key(tmp_path / "key")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    folder = tmp_path / "etc"
    done = command(folder, "fed.example.org", "127.0.0.1")
    assert done.returncode == 0 and "made in" in done.stdout, done.stderr
    before = made(folder)
    wrong = {
        "has ca.crt, ca.key, server.key, server.crt already": [folder, "fed.example.org"],
        "host 'https://fed.example.org'": [tmp_path / "new", "https://fed.example.org"],
        "--days -5: allowed are 1 to 3650": [tmp_path / "new", "fed.example.org", "--days", "-5"],
        "is a file": [tmp_path / "etc" / "ca.crt", "fed.example.org"],
    }
    for said, given in wrong.items():
        done = command(*given)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and not done.stdout and said in last and "Traceback" not in done.stderr, done.stderr
    assert made(folder) == before and not (tmp_path / "new").exists()
    assert command(folder, "fed.example.org", "--replace").returncode == 0 and made(folder) != before
