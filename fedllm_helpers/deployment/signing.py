"""What :mod:`certificates` writes: an authority, certificates that it signs, and files for their owner alone."""

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

LABEL = r"[a-z\d_]([\w-]{0,61}[a-z\d_])?"  # with _, as containers are named
NAME = re.compile(rf"(\*\.(?=.+\.))?({LABEL}\.)*(?!\d+$){LABEL}", re.IGNORECASE | re.ASCII)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key on the curve P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    """A certificate that the key gives itself, to sign others with."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of one federation")])
    return (
        _certificate(name, name, key.public_key(), dt.datetime.now(dt.UTC) + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def server(
    names: list[x509.GeneralName],
    key: ec.EllipticCurvePublicKey,
    signer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey],
    end: dt.datetime,
) -> x509.Certificate:
    """A certificate for a server, by an authority and its key, until ``end``, which may lie in the past."""
    issuer, signing_key = signer
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(names[0].value)[:64])])
    return (
        _certificate(subject, issuer.subject, key, end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
        .sign(signing_key, hashes.SHA384())
    )


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, end: dt.datetime
) -> x509.CertificateBuilder:
    start = min(end - dt.timedelta(days=1), dt.datetime.now(dt.UTC) - dt.timedelta(minutes=5))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    names += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


def host(name: str) -> x509.GeneralName:
    """A name or an address, as it stands in a certificate.

    Raises:
        ValueError: it is neither.
    """
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(str(name)))
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > 253:
        raise ValueError(
            f"host {name!r}: give a name such as fed.example.org, or an address, without scheme, port or path"
        )
    return x509.DNSName(name)


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The names and addresses that a certificate is for."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(one.value) for one in found)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as a PEM file has it, without a passphrase."""
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def secret(path: Path, content: bytes, like: Path | None = None) -> None:
    """Write a new file that its owner alone may read; root gives it to the owner of the file ``like``, if that exists.

    Raises:
        OSError: it is there already, or cannot be written.
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    if like is not None and like.exists() and hasattr(os, "geteuid") and os.geteuid() == 0:
        os.chown(path, like.stat().st_uid, like.stat().st_gid)
