"""Certificates and keys for a deployed federation: who the server is, and which hospital a node is.

``python -m fedllm_helpers.certificates FOLDER HOST…`` makes an authority and a server's certificate, and
``… FOLDER --renew`` a new certificate by the same authority, for which no hospital needs anything new. A hospital makes
its own key, at home: ``ssh-keygen -t ecdsa -b 384 -N '' -f node``.
"""

import datetime as dt
import logging
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedllm_helpers import folders
from fedllm_helpers.deployment import signing

logger = logging.getLogger(__name__)
AUTHORITY, AUTHORITY_KEY, SERVER, SERVER_KEY = "ca.crt", "ca.key", "server.crt", "server.key"
LONGEST = 3650  # days
YEAR, FIVE_YEARS = 365, 1826
SOON = 30  # days before its end from which a certificate should be renewed
Signer = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def make_server(
    folder: str | Path,
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost"),
    days: int = 30,
    replace: bool = False,
    authority_days: int | None = None,
    keep: bool = False,
) -> Path:
    """Make a certificate authority, and with it a certificate for the server.

    As a function it makes what a short trial needs: 30 days, and the authority's own key is kept nowhere, so that
    nobody can make another certificate with it. The command keeps that key, and makes both last longer.

    Args:
        folder: for ``ca.crt`` (every hospital gets it), ``server.crt`` and ``server.key`` (the server's alone).
        hosts: names or addresses by which hospitals reach the server; another one is refused by them.
        days: until the server's certificate ends; negative for one that has ended, to see what happens then.
        replace: make new ones in place of those that are there. No hospital gets in until it has the new ``ca.crt``.
        authority_days: until the authority ends; None for as long as the server's certificate.
        keep: keep the authority's key in ``ca.key``, for :func:`renew`. It belongs on a safe medium off the server.

    Returns:
        The folder.

    Raises:
        ValueError: no host, or what is none, days that no certificate has, or there are keys or certificates already.
    """
    folder = folders.place(folder)
    span = abs(_days(days)) if authority_days is None else _days(authority_days)
    if span < days:
        raise ValueError(f"days={days}: a server's certificate ends with its authority at the latest, after {span}")
    names = _checked(folder, hosts, replace)
    key = signing.new_key()
    authority = signing.authority(key, span)
    end, also = dt.datetime.now(dt.UTC) + dt.timedelta(days=days), (AUTHORITY, AUTHORITY_KEY) if keep else (AUTHORITY,)
    _write(folder, names, (authority, key), end, also)
    if not keep:
        (folder / AUTHORITY_KEY).unlink(missing_ok=True)  # of an authority that is no more
    return folder


def renew(
    folder: str | Path, hosts: tuple[str, ...] = (), days: int = YEAR, authority: str | Path | None = None
) -> Path:
    """Make a new certificate and key for the server by the same authority: hospitals need nothing new.

    Args:
        folder: with the ``ca.crt`` that hospitals have; ``server.crt`` and ``server.key`` in it are replaced.
        hosts: as for :func:`make_server`; none for those of the ``server.crt`` that is there.
        days: until it ends, which is not after its authority does.
        authority: the folder with ``ca.key``; None for ``folder``.

    Returns:
        The folder.

    Raises:
        ValueError: ``ca.key`` or ``ca.crt`` is missing, is none, or one does not fit the other; the authority has
            ended; or hosts or days are wrong.
    """
    folder = folders.place(folder)
    signer = _signer(folder / AUTHORITY, folders.place(authority or folder) / AUTHORITY_KEY)
    if _days(days) < 0:
        raise ValueError(f"days={days}: a renewed certificate is valid for 1 to {LONGEST} days")
    if not hosts and (folder / SERVER).is_file():
        hosts = signing.hosts_of(_certificates(folder / SERVER)[0])
    names = _checked(folder, hosts, replace=True)
    end = min(dt.datetime.now(dt.UTC) + dt.timedelta(days=days), signer[0].not_valid_after_utc)
    _write(folder, names, signer, end)
    return folder


def _signer(path: Path, key_path: Path) -> Signer:
    """An authority with its key, held against each other."""
    for one, advice in ((path, "hospitals have a copy"), (key_path, "name its folder with --authority FOLDER")):
        if not one.is_file():
            raise ValueError(f"{one} is missing: {advice}; without it only --replace is left, and a new ca.crt for all")
    found, key = _certificates(path)[0], _private(key_path)
    if found.public_key() != key.public_key():
        raise ValueError(f"{key_path} does not fit {path}: it is the key of another authority")
    if (left := days_left(path)) <= 0:
        raise ValueError(f"{path} ended {-left:.0f} days ago: make a new one with --replace, and bring it to all")
    return found, key


def _write(
    folder: Path, names: list[x509.GeneralName], signer: Signer, end: dt.datetime, also: tuple[str, ...] = ()
) -> None:
    """Put a server's certificate and key in place, and ``also`` the authority, with its key or without."""
    key, encoding = signing.new_key(), serialization.Encoding.PEM
    with folders.replaced(folder, *also, SERVER_KEY, SERVER, private=(SERVER_KEY, AUTHORITY_KEY)) as scratch:
        (scratch / SERVER).write_bytes(signing.server(names, key.public_key(), signer, end).public_bytes(encoding))
        signing.secret(scratch / SERVER_KEY, signing.pem(key), like=folder / SERVER_KEY)
        if AUTHORITY in also:
            (scratch / AUTHORITY).write_bytes(signer[0].public_bytes(encoding))
        if AUTHORITY_KEY in also:
            signing.secret(scratch / AUTHORITY_KEY, signing.pem(signer[1]))


def _days(days: int) -> int:
    if isinstance(days, bool) or not isinstance(days, int) or not 1 <= abs(days) <= LONGEST:
        raise ValueError(f"days={days!r}: a certificate is valid for 1 to {LONGEST} days")
    return days


def _checked(folder: Path, hosts: tuple[str, ...], replace: bool) -> list[x509.GeneralName]:
    if not hosts or isinstance(hosts, str):
        raise ValueError(f"hosts={hosts!r}: give names or addresses by which hospitals reach the server, one or more")
    folders.clear(folder, folders.PART)
    there = [name for name in (AUTHORITY, AUTHORITY_KEY, SERVER_KEY, SERVER) if (folder / name).exists()]
    if there and not replace:
        raise ValueError(
            f"{folder} has {', '.join(there)} already, and new ones lock every hospital out: name another folder, keep "
            "the authority by --renew, or make all anew by --replace (replace=True), and bring the new ca.crt to all"
        )
    return [signing.host(host) for host in hosts]


def _certificates(path: str | Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(Path(path).expanduser().read_bytes())
    except ValueError:
        raise ValueError(f"{path}: no certificate") from None


def _private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        found = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError):
        found = None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path}: no authority's key without a passphrase, as this command makes one")
    return found


def days_left(path: str | Path) -> float:
    """Days until a PEM certificate ends, the first of several to end; negative where it has ended.

    Raises:
        ValueError: the file is no certificate.
        OSError: it cannot be read.
    """
    end = min(one.not_valid_after_utc for one in _certificates(path))
    return (end - dt.datetime.now(dt.UTC)) / dt.timedelta(days=1)


def check(folder: Path) -> None:
    """See that the server's certificate is valid today: Flower would start with another one, and refuse every client.

    From 30 days before its end, or from a third of its time where that is shorter, one line of log says so.

    Raises:
        ValueError: it has ended, or is not valid yet.
    """
    path = folder / SERVER
    found = _certificates(path)[0]
    first, last, now = found.not_valid_before_utc, found.not_valid_after_utc, dt.datetime.now(dt.UTC)
    if not first <= now <= last:
        what = "has expired" if now > last else "is not valid yet"
        valid = f"{first:%Y-%m-%d} to {last:%Y-%m-%d}"
        raise ValueError(f"{path} {what} ({valid}): make_server makes a new one, with replace=True")
    left = days_left(path)
    if left <= min(SOON, (last - first) / dt.timedelta(days=3)):
        logger.warning("%s ends in %.0f days, and then no hospital gets in: renew it (--renew)", path, left)


def make_node_key(path: str | Path) -> Path:
    """Make the key pair by which the server knows a hospital: ``path`` stays there, ``path.pub`` goes to the server.

    Returns:
        The path of the private key, in OpenSSH's format, as ``ssh-keygen -t ecdsa -b 384`` makes it.

    Raises:
        ValueError: there is such a key already, by which a server may know the hospital.
    """
    path = Path(path).expanduser()
    public_path = path.with_name(f"{path.name}.pub")
    if path.exists() or public_path.exists():
        raise ValueError(f"{path} is there already, and a server may know it: move it away, or name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    key = signing.new_key()
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    signing.secret(path, key.private_bytes(pem, serialization.PrivateFormat.OpenSSH, plain))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    public_path.write_bytes(public + b"\n")
    return path
