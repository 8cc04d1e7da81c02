"""A look at the server before the first round: certificate, key, ports, the gateway, the model, and room for a run."""

import socket
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from omegaconf import DictConfig

from fedllm_helpers.site import machine, reading
from fedllm_helpers.site.findings import FAULT, NOTE, OK, Finding, Look

FLAGS = ("--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile", "--database")


def of_server(flags: Mapping[str, str], cfg: DictConfig, gateway: str = "") -> dict[str, Look]:
    """What is looked at, by name, for :func:`fedllm_helpers.site.findings.look`.

    Args:
        flags: of ``flower-superlink``, such as ``--ssl-certfile``.
        cfg: of the run that is planned.
        gateway: HOST:PORT where hospitals come in.
    """
    parts: dict[str, Look] = {"versions": machine.versions, "settings": partial(_settings, flags)}
    authority, certificate, key = (flags.get(name, "") for name in FLAGS[:3])
    if authority:
        parts["authority"] = partial(machine.lasting, "authority", authority)
    if certificate:
        parts["certificate"] = partial(machine.lasting, "certificate", certificate)
        parts["names"] = partial(_names, certificate, key)
    if key:
        parts["key"] = partial(machine.key, "key", key)
    if "--port" in flags:
        parts["port"] = partial(_port, flags.get("--host", "127.0.0.1"), flags["--port"])
    if gateway:
        parts["gateway"] = lambda: machine.server(*reading.address(gateway), authority)
    parts["disk"] = lambda: machine.disk(machine.flower_home(), Path(flags.get("--database", ".")).absolute().parent)
    parts["model"] = partial(machine.model, cfg)
    return parts


def _settings(flags: Mapping[str, str]) -> Iterator[Finding]:
    missing = [name for name in FLAGS if not flags.get(name)]
    if "--insecure" in flags:
        yield Finding(FAULT, "settings", "--insecure: nothing is encrypted, and nobody knows whom they talk to")
    elif missing:
        yield Finding(FAULT, "settings", f"{', '.join(missing)} is not set")
    if "--enable-supernode-auth" not in flags:
        yield Finding(FAULT, "settings", "--enable-supernode-auth is not set: anybody may be a hospital")
    if flags.get("--host", "127.0.0.1") not in ("127.0.0.1", "localhost", "::1"):
        said = f"--host {flags['--host']}: whoever reaches this port may start runs; 127.0.0.1, behind the gateway"
        yield Finding(FAULT, "settings", said)
    if not missing and "--enable-supernode-auth" in flags:
        yield Finding(OK, "settings", "TLS, hospitals known by their keys, a database that outlives a restart")


def _names(certificate: str, key: str) -> Iterator[Finding]:
    found = x509.load_pem_x509_certificate(Path(certificate).read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    said = ", ".join(str(name.value) for name in names)
    yield Finding(OK, "names", f"{certificate} is for {said}; hospitals reach the server by one of these alone")
    if key and Path(key).is_file():
        private = serialization.load_pem_private_key(Path(key).read_bytes(), password=None)
        if private.public_key() != found.public_key():
            yield Finding(FAULT, "key", f"{key} is not the key of {certificate}")


def _port(host: str, port: str) -> Iterator[Finding]:
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(reading.address(f"{host}:{port}"))
        except OSError:
            yield Finding(NOTE, "port", f"{host}:{port} is taken: by this server, if it runs already")
            return
    yield Finding(OK, "port", f"{host}:{port} is free")
