"""What every party's machine needs: versions, certificates, a way to the server, the model, disk and memory."""

import datetime as dt
import email.utils
import http.client
import os
import platform
import shutil
import socket
import ssl
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from omegaconf import DictConfig

from fedllm_helpers.deployment import certificates
from fedllm_helpers.models import embedded
from fedllm_helpers.site.findings import FAULT, NOTE, OK, Finding

ROOM = 1_000_000_000  # bytes: checkpoints, logs and Flower's own files of a short run
SECONDS = 10.0
OF_TIME = 9, 10  # what OpenSSL calls a certificate that is not valid yet, and one that has expired
PACKAGES = ("fedllm-helpers", "flwr", "torch", "transformers", "peft", "datasets")


def versions() -> Iterator[Finding]:
    """Python and the packages whose version is to be the same at all parties."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding(FAULT, "versions", f"{name} is not installed here")
    python = f"Python {platform.python_version()}"
    yield Finding(OK, "versions", f"{python}, {', '.join(found)} (compare this line with the other parties')")


def lasting(what: str, path: str) -> Iterator[Finding]:
    """How many days a certificate lasts."""
    left = certificates.days_left(path)
    state = FAULT if left <= 0 else NOTE if left <= certificates.SOON else OK
    said = "it has expired: have it renewed" if left <= 0 else f"{left:.0f} days left"
    yield Finding(state, what, f"{path}: {said}{', time to renew it' if state == NOTE else ''}")


def key(what: str, path: str) -> Iterator[Finding]:
    """Whether a private key can be read here, by its owner alone, and which public half it has."""
    raw, mode = Path(path).expanduser().read_bytes(), Path(path).expanduser().stat().st_mode
    load = serialization.load_ssh_private_key if b"OPENSSH" in raw else serialization.load_pem_private_key
    try:
        public = load(raw, password=None).public_key()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: no private key without a passphrase ({str(error)[:60]})") from None
    if os.name == "posix" and mode & 0o077:
        yield Finding(FAULT, what, f"{path}: others on this machine can read it; chmod 600 {path}")
    text = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    yield Finding(OK, what, f"{path}: its public half ends in …{text.decode()[-16:]} (the server lists it so)")


def server(host: str, port: int, authority: str) -> Iterator[Finding]:
    """Whether the server is reached, shows a certificate of the authority for this name, and has the same time."""
    try:
        reached = socket.create_connection((host, port), timeout=SECONDS)
    except socket.gaierror:
        raise ValueError(f"{host}: no such name; ask the server's people, or your own network's") from None
    except OSError as error:
        raise ValueError(
            f"{host}:{port} is not reached ({error}): is the server up, and does a firewall let you out?"
        ) from None
    with reached:
        try:
            with ssl.create_default_context(cafile=authority).wrap_socket(reached, server_hostname=host) as safe:
                shown = x509.load_der_x509_certificate(safe.getpeercert(binary_form=True))
        except ssl.SSLError as error:
            said = getattr(error, "verify_message", "") or error.reason or str(error)
            if getattr(error, "verify_code", 0) in OF_TIME:
                said += f", or this machine's clock is wrong: it says {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC"
            raise ValueError(f"{host}:{port} is reached, but its certificate does not hold here: {said}") from None
    left = (shown.not_valid_after_utc - dt.datetime.now(dt.UTC)).days
    state = NOTE if left <= certificates.SOON else OK
    yield Finding(state, "server", f"{host}:{port} answers; its certificate is the authority's, {left} days left")
    yield from _time(host, port, authority)


def _time(host: str, port: int, authority: str) -> Iterator[Finding]:
    connection = http.client.HTTPSConnection(
        host, port, timeout=SECONDS, context=ssl.create_default_context(cafile=authority)
    )
    try:
        connection.request("GET", "/")
        said = connection.getresponse().headers.get("Date")
    except (OSError, http.client.HTTPException):  # it speaks no HTTP to strangers
        said = None
    finally:
        connection.close()
    if said is None:
        return
    apart = abs((email.utils.parsedate_to_datetime(said) - dt.datetime.now(dt.UTC)).total_seconds())
    state = FAULT if apart > 300 else OK
    yield Finding(state, "clock", f"{apart:.0f} seconds from the server's{': set it' if state == FAULT else ''}")


def model(cfg: DictConfig) -> Iterator[Finding]:
    """Whether the base model lies on this machine: nothing is fetched for it."""
    folder = embedded.folder_of(cfg.model.name)
    if folder is None:
        how = "bring its folder here and name that in model.name, or let this machine fetch it once"
        yield Finding(FAULT, "model", f"{cfg.model.name} is not on this machine: {how} (docs/project.md)")
        return
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    yield Finding(OK, "model", f"{cfg.model.name}: {size / 1e9:.1f} GB in {folder}")


def disk(*folders: Path) -> Iterator[Finding]:
    """Whether there is room, and the right to write, where a party keeps its files."""
    for folder in dict.fromkeys(folders):
        there = next(one for one in (folder, *folder.parents) if one.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding(FAULT, "disk", f"{folder}: nothing can be written there by this user")
        elif free < ROOM:
            yield Finding(FAULT, "disk", f"{folder}: {free / 1e9:.2f} GB free, {ROOM / 1e9:.0f} GB are needed")
        else:
            yield Finding(OK, "disk", f"{folder}: {free / 1e9:.0f} GB free")


def flower_home() -> Path:
    """Where Flower writes; the folder of models is only read, once a model is there."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
