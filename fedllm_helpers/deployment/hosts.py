"""A federation on real processes of this machine: Flower's SuperLink and a SuperNode for each hospital, TLS and keys.

Two apps, unchanged, on Flower's Deployment Engine. The folder of a deployment has one part for each party: ``server``
is what the server's machine would have, ``hospital-0`` what the first hospital's would; only ``ca.crt`` is in all.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import flwr
import psutil
from omegaconf import DictConfig
from packaging.version import Version

from fedllm_helpers import folders
from fedllm_helpers.config import checked
from fedllm_helpers.deployment import certificates, homes, watchdog
from fedllm_helpers.deployment import warm as ready
from fedllm_helpers.deployment.parties import (
    CONNECTION,
    LOOPBACK,
    SERVER,
    Deployment,
    last_words,
    launch,
    nodes,
    register,
)

TRIED = ("1.41", "1.42")  # versions of Flower
NAME = "hospital-{}"  # of a hospital's process and folder
UNLENT = range(20_000, 32_768)  # ports that no system, as it comes, lends to a connection before a process listens


def start(
    cfg: DictConfig,
    folder: str | Path,
    *,
    port: int | None = None,
    patience: float = 90.0,
    keep_cards: bool = False,
    warm: bool | None = None,
) -> Deployment:
    """Start a server and ``federation.num_clients`` hospitals, each with its own cards, and wait until all are there.

    Keys, certificates and cards are made where the folder has none yet. Everything ends with
    :meth:`Deployment.stop`, with the ``with`` block, or when this process is gone, however it went. Taught in notebook
    06.

    Only for a machine whose users you trust: Flower asks nobody who starts a run, so any of them could, and so run code
    as you.

    Args:
        cfg: who holds which cards, as in :func:`fedllm_helpers.federation.simulation.run`.
        folder: of the deployment; a folder of an earlier one is gone on with.
        port: of the server on this machine; None takes a free one.
        patience: seconds to wait for the server, and for the hospitals.
        keep_cards: use the cards that hospitals' folders hold, whatever ``cfg`` would give them.
        warm: each party keeps a process with torch and, after its first training or run, the model, which forks one for
            each message. False: each message starts Python and imports torch, as Flower does. None: where memory fits.

    Raises:
        ValueError: another Flower than those that were tried, a port in use, an expired certificate, cards that cannot
            be divided, a folder of something else, or cards there that are damaged or others than these settings give.
        RuntimeError: a process does not come up; with the line of its log that says why.
    """
    _check_flower()
    folder, count, port = folders.place(folder).resolve(), checked(cfg).federation.num_clients, _free(port)
    places = [folder / NAME.format(hospital) for hospital in range(count)]
    homes.prepare({home: homes.cards(cfg, home, hospital, keep_cards) for hospital, home in enumerate(places)})
    homes.prepare_server(folder / SERVER, (LOOPBACK, "localhost"))
    mark = secrets.token_hex(8)
    guard = subprocess.Popen([sys.executable, watchdog.__file__, mark], stdin=subprocess.PIPE, start_new_session=True)
    deployment = Deployment(folder, count, port, mark, guard, ready.fits(count + 1) if warm is None else warm)
    try:
        start_server(deployment, patience=patience)
        stale = _activated(deployment)  # of an earlier deployment in this folder that had no time for a goodbye
        for hospital, home in enumerate(places):
            register(deployment, home / "key.pub")
            if not stale:
                start_node(deployment, hospital)
        for hospital in range(count if stale else 0):
            bring_back(deployment, hospital, patience)
        wait_online(deployment, [home.name for home in places], patience)
    except BaseException:
        deployment.stop()
        raise
    return deployment


def start_server(deployment: Deployment, *, patience: float = 90.0) -> None:
    """Start the SuperLink, whose state is kept in the folder: after a crash this starts it again with what it knew."""
    home = deployment.folder / SERVER
    (home / "flwr").mkdir(parents=True, exist_ok=True)
    authority = home / certificates.AUTHORITY
    connection = f'address = "{LOOPBACK}:{deployment.port}"\nroot-certificates = "{authority}"\n'
    (home / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{connection}', encoding="utf-8"
    )
    command = ready.command("flower-superlink") if deployment.warm else ["flower-superlink"]
    command += ["--host", LOOPBACK, "--port", str(deployment.port), "--enable-supernode-auth"]
    command += ["--ssl-ca-certfile", str(authority), "--ssl-certfile", str(home / certificates.SERVER)]
    command += ["--ssl-keyfile", str(home / certificates.SERVER_KEY), "--database", str(home / "state.db")]
    process, start = launch(deployment, SERVER, command), time.monotonic()
    while not _listens(deployment.port):
        if process.poll() is not None or time.monotonic() - start > patience:
            raise RuntimeError(f"the server does not come up: {last_words(deployment, SERVER)}")
        time.sleep(0.1)


def start_node(
    deployment: Deployment, hospital: int, *options: str, name: str = "", secret: Path | None = None
) -> None:
    """Start a hospital's SuperNode, or start it again.

    Args:
        deployment: whose server it connects to.
        hospital: from 0; its folder has key and cards, and perhaps its ``policy.yaml``.
        options: of ``flower-supernode``, in place of the authority's certificate.
        name: of its folder and process; by default ``hospital-k``.
        secret: private key, in place of the hospital's own.
    """
    name = name or NAME.format(hospital)
    home = deployment.folder / name
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(deployment.folder / SERVER / certificates.AUTHORITY, home / certificates.AUTHORITY)
    trust = options or ("--root-certificates", str(home / certificates.AUTHORITY))
    node = {"partition-id": hospital, "num-partitions": deployment.hospitals, "data": str(home / "data")}
    node |= {"policy": str(home / "policy.yaml")} if (home / "policy.yaml").exists() else {}
    command = ready.command() if deployment.warm else ["flower-supernode"]
    command += ["--superlink", f"{LOOPBACK}:{deployment.port}", "--port", str(_free(None)), *trust]
    command += ["--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in node.items())]
    if "--insecure" not in options:
        command += ["--auth-supernode-private-key", str(secret or home / "key")]
    launch(deployment, name, command)


def bring_back(deployment: Deployment, hospital: int, patience: float = 120.0) -> float:
    """Start a hospital's SuperNode again and again, as a service manager does, until the server lets it in.

    For up to a minute after a crash the server takes the old node for alive, and refuses a second one with its key.

    Returns:
        Seconds that it took.

    Raises:
        RuntimeError: it did not get in; with the line of its log that says why.
    """
    name, start, before = NAME.format(hospital), time.monotonic(), _activated(deployment)
    while time.monotonic() - start < patience:
        if name not in deployment.processes or deployment.processes[name].poll() is not None:
            start_node(deployment, hospital)
        time.sleep(2)
        if _activated(deployment) - before:
            return time.monotonic() - start
    raise RuntimeError(f"{name} does not come back: {last_words(deployment, name)}")


def _activated(deployment: Deployment) -> set[tuple[str, str]]:
    return {(node["node-id"], node["online-at"]) for node in nodes(deployment) if node["status"] == "online"}


def wait_online(deployment: Deployment, names: Iterable[str], patience: float = 90.0) -> None:
    """Wait until as many nodes are online as there are names of processes.

    Raises:
        RuntimeError: one of them gave up, or time is up; with the line of its log that says why.
    """
    names, start = list(names), time.monotonic()
    while True:
        ended = [name for name in names if deployment.processes[name].poll() is not None]
        if not ended and len(_activated(deployment)) >= len(names):
            return
        if ended or time.monotonic() - start > patience:
            words = "; ".join(f"{name}: {last_words(deployment, name)}" for name in ended or names)
            raise RuntimeError(f"not all hospitals come online: {words}")
        time.sleep(0.3)


def kill(deployment: Deployment, name: str) -> None:
    """Kill a process and what it started, without a goodbye, as a power cut does."""
    process = deployment.processes[name]
    family = psutil.Process(process.pid).children(recursive=True)
    for one in [*family, process]:
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.wait()


def _check_flower() -> None:
    found = Version(flwr.__version__)
    if f"{found.major}.{found.minor}" not in TRIED:
        raise ValueError(f"Flower {flwr.__version__}: this was tried with {' and '.join(TRIED)}; install one of them")
    if os.name == "nt":
        raise ValueError("deployment needs Linux or macOS: on Windows, simulation.run does the same in one process")


def _free(port: int | None) -> int:
    if port is not None and (isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535):
        raise ValueError(f"port={port!r}: allowed are whole numbers from 1 to 65535, or None for a free one")
    for wanted in [port] if port else secrets.SystemRandom().sample(UNLENT, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of connections that have just ended
            with contextlib.suppress(OSError):
                probe.bind((LOOPBACK, wanted))
                return wanted
    raise ValueError(f"port {wanted} of this machine is in use: end what listens there, or name another")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0
