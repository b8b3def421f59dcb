"""`python certificates.py FOLDER NAME…`: a certificate for each server of that name, by an authority made for them alone.

Writes `FOLDER/authority/ca.pem`, which clients verify by, and `FOLDER/NAME/certificate.pem` and `key.pem`. The authority's own
key is never written, so nobody can make another server of these names; what is still good for a while is left alone, else
everything is made anew. For a machine of its own; where there is an authority already, ask that one.
"""

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_VALID: Final = timedelta(days=398)
# Looked at whenever the servers are brought up.
_LEFT_MIN: Final = timedelta(days=30)
_CLOCKS_DIFFER: Final = timedelta(minutes=5)


def make_all(folder: Path, names: list[str]) -> bool:
    """Make what is missing or ends soon; returns whether anything was made."""
    files = [folder / "authority" / "ca.pem", *(folder / name / "certificate.pem" for name in names)]
    if all(_is_good(file) for file in files) and all((folder / name / "key.pem").exists() for name in names):
        return False
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate(_name("payouts"), authority_key, None, authority_key)
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write(folder / name / "key.pem", private, 0o600)
        _write(folder / name / "certificate.pem", _pem(_certificate(_name(name), key, authority, authority_key)), 0o644)
    # Last, so that what was broken off is made anew.
    _write(folder / "authority" / "ca.pem", _pem(authority), 0o644)
    (folder / "authority").chmod(0o755)
    return True


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """Of an authority when nobody issues it, else of a server. Source: RFC 5280, 4.2.1."""
    now, public = datetime.now(UTC), key.public_key()
    usage = dict.fromkeys(
        ("content_commitment", "data_encipherment", "encipher_only", "decipher_only", "key_encipherment"), False
    )
    signs = issuer is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=signs, path_length=0 if signs else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                **usage, digital_signature=not signs, key_agreement=not signs, key_cert_sign=signs, crl_sign=signs
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not signs:
        name = subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(str(name))]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _is_good(file: Path) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return certificate.not_valid_after_utc - datetime.now(UTC) > _LEFT_MIN


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write(file: Path, content: bytes, mode: int) -> None:
    """Whole or not at all, and never readable for longer than it shall be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(content)
    unfinished.chmod(mode)
    unfinished.replace(file)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python certificates.py FOLDER NAME…")
    print("made" if make_all(Path(sys.argv[1]), sys.argv[2:]) else "still good")
