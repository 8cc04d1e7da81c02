"""A renewed certificate: hospitals that trust the old authority accept it, and nothing but the right key makes one."""

import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509

from fedllm_helpers.deployment import certificates, homes, signing

HOSTS = ("127.0.0.1", "localhost", "fed.example.org")


def command(*words):
    done = [sys.executable, "-m", "fedllm_helpers.certificates", *map(str, words)]
    return subprocess.run(done, capture_output=True, text=True)


@pytest.fixture
def made(tmp_path):
    """A server's folder as the command makes it, with the authority's key."""
    return certificates.make_server(tmp_path / "etc", HOSTS, 300, authority_days=certificates.FIVE_YEARS, keep=True)


def handshake(folder, authority, name="127.0.0.1"):
    """The certificate that a client sees which trusts ``authority`` and calls ``name``; raises what the client says."""
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(folder / "server.crt", folder / "server.key")
    strict = ssl.create_default_context(cafile=authority)
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    here, there = socket.socketpair()

    def serve():
        try:
            served.wrap_socket(there, server_side=True).close()
        except OSError:
            there.close()

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        with here, strict.wrap_socket(here, server_hostname=name) as safe:
            return x509.load_der_x509_certificate(safe.getpeercert(binary_form=True))
    finally:
        serving.join()


def test_a_hospital_with_the_old_authority_accepts_the_renewed_certificate(made, tmp_path):
    hospitals = shutil.copy(made / "ca.crt", tmp_path / "hospitals.crt")
    before, key = handshake(made, hospitals), (made / "server.key").read_bytes()
    medium = tmp_path / "medium"
    medium.mkdir()
    shutil.move(made / "ca.key", medium)
    done = command(made, "--renew", "--authority", medium)
    assert done.returncode == 0 and "for 365 days; restart the server" in done.stdout, done.stderr
    after = handshake(made, hospitals)
    assert after.serial_number != before.serial_number and (made / "server.key").read_bytes() != key
    assert handshake(made, hospitals, "fed.example.org") == after and signing.hosts_of(after) == HOSTS
    assert 364.9 < certificates.days_left(made / "server.crt") <= 365 < certificates.days_left(made / "ca.crt")
    assert (made / "server.key").stat().st_mode & 0o077 == 0 and not (made / "ca.key").exists()
    other = certificates.make_server(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(made, other / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(made, hospitals, "elsewhere.example.org")


def test_one_that_has_ended_is_renewed_for_other_names(tmp_path):
    folder = certificates.make_server(tmp_path, days=-3, authority_days=400, keep=True)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(folder, folder / "ca.crt")
    certificates.renew(folder, ("fed.example.org",), days=30)
    assert signing.hosts_of(handshake(folder, folder / "ca.crt", "fed.example.org")) == ("fed.example.org",)


def test_no_certificate_outlasts_its_authority(tmp_path):
    with pytest.raises(ValueError, match="days=31: .* ends with its authority at the latest, after 30"):
        certificates.make_server(tmp_path / "new", days=31, authority_days=30)
    folder = certificates.make_server(tmp_path / "short", days=5, authority_days=10, keep=True)
    done = command(folder, "--renew")
    assert done.returncode == 0 and "ends on the same day: before it does, all need a new one" in done.stdout
    assert abs(certificates.days_left(folder / "server.crt") - certificates.days_left(folder / "ca.crt")) < 0.01


def test_the_command_keeps_the_authoritys_key_unless_it_is_thrown_away(tmp_path):
    done = command(tmp_path / "kept", "fed.example.org")
    assert done.returncode == 0 and "ca.key belongs on a safe medium off the server" in done.stdout
    assert (tmp_path / "kept" / "ca.key").stat().st_mode & 0o177 == 0
    assert 364 < certificates.days_left(tmp_path / "kept" / "server.crt") <= 365
    assert 1825 < certificates.days_left(tmp_path / "kept" / "ca.crt") <= 1826
    done = command(tmp_path / "kept", "fed.example.org", "--replace", "--throw-away")
    assert done.returncode == 0 and "ca.key" not in done.stdout and not (tmp_path / "kept" / "ca.key").exists()


def test_renewing_is_refused_in_one_line_and_changes_nothing(made, tmp_path):
    other = certificates.make_server(tmp_path / "other", keep=True)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "ca.key").write_text("no key")
    (tmp_path / "empty").mkdir()
    over = certificates.make_server(tmp_path / "over", days=-2, keep=True)
    ended = signing.authority(key := signing.new_key(), -2)
    (over / "ca.crt").write_bytes(ended.public_bytes(certificates.serialization.Encoding.PEM))
    (over / "ca.key").write_bytes(signing.pem(key))
    before = {path: path.read_bytes() for path in made.iterdir()}
    wrong = {
        "ca.key is missing: name its folder with --authority": (made, "--renew", "--authority", tmp_path / "empty"),
        "does not fit": (made, "--renew", "--authority", other),
        "no authority's key without a passphrase": (made, "--renew", "--authority", tmp_path / "odd"),
        "ca.crt is missing": (tmp_path / "odd", "--renew"),
        "ca.crt ended 2 days ago": (over, "--renew"),
        "host 'https://x.org'": (made, "https://x.org", "--renew"),
        "a certificate is valid for 1 to 3650 days": (made, "--renew", "--days", "3651"),
        "not allowed with": (made, "--renew", "--replace"),
        "goes with --renew": (made, "a.org", "--authority", other),
        "goes without --throw-away": (made, "--renew", "--throw-away"),
    }
    for said, words in wrong.items():
        done = command(*words)
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, said
    assert before == {path: path.read_bytes() for path in made.iterdir()}


def test_days_left(made, tmp_path):
    assert 299.9 < certificates.days_left(made / "server.crt") <= 300
    old = certificates.make_server(tmp_path / "old", days=-2)
    assert -2.1 < certificates.days_left(str(old / "server.crt")) < -1.9
    chain = tmp_path / "chain.pem"
    chain.write_bytes((made / "ca.crt").read_bytes() + (made / "server.crt").read_bytes())
    assert 299.9 < certificates.days_left(chain) <= 300, "the first of several to end"
    (tmp_path / "node.pub").write_text("ecdsa-sha2-nistp384 AAAA\n")
    for path in (tmp_path / "node.pub", made / "server.key"):
        with pytest.raises(ValueError, match=f"^{path}: no certificate$"):
            certificates.days_left(path)
    with pytest.raises(FileNotFoundError):
        certificates.days_left(tmp_path / "nowhere.crt")


def test_the_command_says_how_many_days_are_left(made, tmp_path):
    done = command(made)
    assert done.returncode == 0 and done.stdout.splitlines() == [
        f"{made / 'ca.crt'}: 1826 days left",
        f"{made / 'server.crt'}: 300 days left",
    ]
    done = command(made, "--within", "301")
    assert done.returncode == 1 and "300 days left, time for a new one (by --renew)" in done.stdout
    old = certificates.make_server(tmp_path / "old", days=-2, authority_days=400)
    done = command(old, "--within", "0")  # what units ask before they start anything
    assert done.returncode == 1 and "server.crt: ended 2 days ago, time for a new one" in done.stdout
    done = command(tmp_path)
    assert done.returncode == 2 and "has no ca.crt and no server.crt" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*.crt")), "nothing is made"


def test_units_ask_for_the_days_left(tmp_path):
    """Once a day, and before a start: there, what has ended is one line in the journal."""
    deploy = Path(__file__).resolve().parents[2] / "deploy"
    certificates.make_server(tmp_path, days=-1, authority_days=9)
    starts = {"certificates.service": "ExecStart", "server.service": "ExecStartPre", "hospital.service": "ExecStartPre"}
    for name, key in starts.items():
        words = re.search(rf"^{key}=(.*)$", (deploy / name).read_text(encoding="utf-8"), re.M)[1].split()
        assert words[:2] == ["/opt/fedllm/bin/python", "-P"]
        done = [sys.executable, *(word.replace("/etc/fedllm", str(tmp_path)) for word in words[1:])]
        done = subprocess.run(done, capture_output=True, text=True)
        assert done.returncode == 1 and "server.crt: ended 1 days ago" in done.stdout and not done.stderr
        assert "ca.crt: 9 days left" in done.stdout and ("ca.crt: 9 days left, time" in done.stdout) == (
            key == "ExecStart"
        )
    assert "OnCalendar=daily" in (deploy / "certificates.timer").read_text(encoding="utf-8")


@pytest.mark.parametrize("days", [9, 29, 31, 400])
def test_a_fresh_certificate_is_not_complained_of(days, tmp_path, caplog):
    homes.prepare_server(certificates.make_server(tmp_path, days=days), HOSTS)
    assert not caplog.messages


def test_a_start_says_in_one_line_that_the_end_is_near(made, caplog, monkeypatch):
    class Later(certificates.dt.datetime):
        passed = 271

        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + certificates.dt.timedelta(days=cls.passed)

    monkeypatch.setattr(certificates.dt, "datetime", Later)
    with caplog.at_level(logging.WARNING):
        homes.prepare_server(made, HOSTS)
    (line,) = caplog.messages
    assert "server.crt ends in 29 days, and then no hospital gets in: renew it (--renew)" in line and "\n" not in line
    caplog.clear()
    Later.passed = 269
    certificates.check(made)
    assert not caplog.messages


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives a file away")
def test_the_services_user_owns_the_renewed_key_too(made):
    os.chown(made / "server.key", 1234, 1234)
    certificates.renew(made)
    assert (made / "server.key").stat().st_uid == 1234 and (made / "ca.key").stat().st_uid == 0
