"""Throw-away certificates and keys for a deployed federation: who the server is, and which hospital a node is.

``python -m fedllm_helpers.certificates FOLDER HOST…`` makes an authority and a server's certificate for a trial between
machines. A hospital makes its own key, at home: ``ssh-keygen -t ecdsa -b 384 -N '' -f node``.
"""

import argparse
import contextlib
import datetime as dt
import ipaddress
import os
import re
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm_helpers import folders

AUTHORITY, SERVER, SERVER_KEY = "ca.crt", "server.crt", "server.key"
LONGEST = 3650  # days
LABEL = r"[a-z\d_]([\w-]{0,61}[a-z\d_])?"  # with _, as containers are named
NAME = re.compile(rf"(\*\.(?=.+\.))?({LABEL}\.)*(?!\d+$){LABEL}", re.IGNORECASE | re.ASCII)


def make_server(
    folder: str | Path, hosts: tuple[str, ...] = ("127.0.0.1", "localhost"), days: int = 30, replace: bool = False
) -> Path:
    """Make a certificate authority, and with it a certificate for the server.

    The authority's own key is kept nowhere: it signs this one certificate, and nobody can make another with it.

    Args:
        folder: for ``ca.crt`` (every hospital gets it), ``server.crt`` and ``server.key`` (the server's alone).
        hosts: names or addresses by which hospitals reach the server; another one is refused by them.
        days: until the certificate expires; negative for one that has expired, to see what happens then.
        replace: make new ones in place of those that are there. No hospital gets in until it has the new ``ca.crt``.

    Returns:
        The folder.

    Raises:
        ValueError: no host, or what is none, days that no certificate has, or there are keys or certificates already.
    """
    folder = folders.place(folder)
    names = _checked(folder, hosts, days, replace)
    authority_key, key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of one federation")])
    authority = (
        _certificate(issuer, issuer, authority_key, abs(days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(authority_key, hashes.SHA384())
    )
    server = (
        _certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])]), issuer, key, days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    with folders.replaced(folder, AUTHORITY, SERVER_KEY, SERVER, private=(SERVER_KEY,)) as scratch:
        (scratch / AUTHORITY).write_bytes(authority.public_bytes(pem))
        (scratch / SERVER).write_bytes(server.public_bytes(pem))
        _secret(scratch / SERVER_KEY, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return folder


def _checked(folder: Path, hosts: tuple[str, ...], days: int, replace: bool) -> list[x509.GeneralName]:
    if not hosts or isinstance(hosts, str):
        raise ValueError(f"hosts={hosts!r}: give names or addresses by which hospitals reach the server, one or more")
    if isinstance(days, bool) or not isinstance(days, int) or not 1 <= abs(days) <= LONGEST:
        raise ValueError(f"days={days!r}: a certificate is valid for 1 to {LONGEST} days")
    folders.clear(folder, folders.PART)
    there = [name for name in (AUTHORITY, SERVER_KEY, SERVER) if (folder / name).exists()]
    if there and not replace:
        raise ValueError(
            f"{folder} has {', '.join(there)} already, and new ones lock every hospital out: name another folder, or "
            "renew them with --replace (replace=True), and bring the new ca.crt to all"
        )
    return [_host(host) for host in hosts]


def check(folder: Path) -> None:
    """See that the server's certificate is valid today: Flower would start with another one, and refuse every client.

    Raises:
        ValueError: it has expired, or is not valid yet.
    """
    found = x509.load_pem_x509_certificate((folder / SERVER).read_bytes())
    first, last, now = found.not_valid_before_utc, found.not_valid_after_utc, dt.datetime.now(dt.UTC)
    if not first <= now <= last:
        what = "has expired" if now > last else "is not valid yet"
        valid = f"{first:%Y-%m-%d} to {last:%Y-%m-%d}"
        raise ValueError(f"{folder / SERVER} {what} ({valid}): make_server makes a new one, with replace=True")


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
    key = ec.generate_private_key(ec.SECP384R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    _secret(path, key.private_bytes(pem, serialization.PrivateFormat.OpenSSH, plain))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    public_path.write_bytes(public + b"\n")
    return path


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=abs(days) + 1 if days < 0 else 0, minutes=5))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    names += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


def _host(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(str(host)))
    if not isinstance(host, str) or not NAME.fullmatch(host) or len(host) > 253:
        raise ValueError(
            f"host {host!r}: give a name such as fed.example.org, or an address, without scheme, port or path"
        )
    return x509.DNSName(host)


def _secret(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def main() -> None:
    """Command line of :func:`make_server`; what is wrong is one line, and exit code 2."""
    parser = argparse.ArgumentParser(description="An authority and a server's certificate for a trial.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("hosts", nargs="+", help="names or addresses by which hospitals reach the server")
    parser.add_argument("--days", type=int, default=30, help=f"until they expire, 1 to {LONGEST}")
    parser.add_argument("--replace", action="store_true", help="renew those there: hospitals need the new ca.crt")
    given = parser.parse_args()
    if given.days < 0:
        parser.error(f"--days {given.days}: allowed are 1 to {LONGEST}")
    try:
        made = make_server(given.folder, tuple(given.hosts), given.days, given.replace)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"made in {made}: {AUTHORITY}, {SERVER}, {SERVER_KEY}")


if __name__ == "__main__":
    main()
