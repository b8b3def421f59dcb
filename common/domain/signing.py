"""The signatures of the HTTP contract: both request formulas, and both that a callback carries. All HMAC-SHA256."""

import base64
import hashlib
import hmac
import re
from functools import lru_cache
from typing import Final

from common.domain.times import parse_time

V1_PREFIX: Final = "v1="
# How far a timestamp may be off, either way, in what we and a rail say to each other. Source: worker/rails/PROTOCOL.md.
RAIL_WINDOW_SECONDS: Final = 60.0
WEBHOOK_SECRET_PREFIX: Final = "whsec_"  # noqa: S105 how the secrets of Standard Webhooks begin

_UNIX_SECONDS: Final = re.compile(r"\d{1,11}", re.ASCII)


def canonical_v1(timestamp: str, method: str, path: str, query: str, body: bytes) -> bytes:
    """The bytes that the v1 formula signs. `timestamp`, `path` and `query` are as sent, percent-encoding untouched."""
    pairs = "&".join(sorted(query.split("&"))) if query else ""
    return "\n".join(("v1", timestamp, method, path, pairs, hashlib.sha256(body).hexdigest())).encode()


def sign_v1(secret: str, timestamp: str, method: str, path: str, query: str, body: bytes) -> str:
    """`X-Signature` by the v1 formula, prefix included."""
    return V1_PREFIX + _hex_hmac(secret.encode(), canonical_v1(timestamp, method, path, query, body))


def sign_answer(secret: str, timestamp: str, request_signature: str, status: int, body: bytes) -> str:
    """`X-Signature` of a rail's answer: bound to the request that it answers, prefix included."""
    signed = "\n".join(("v1-answer", timestamp, request_signature, str(status), hashlib.sha256(body).hexdigest()))
    return V1_PREFIX + _hex_hmac(secret.encode(), signed.encode())


def sign_body(secret: str, timestamp: str, body: bytes) -> str:
    """`X-Signature` by the body formula: over the timestamp as sent, then the raw body."""
    return _hex_hmac(secret.encode(), timestamp.encode() + body)


def signatures_equal(expected: str, received: str) -> bool:
    """Compare in constant time; whatever a client may have sent is compared as bytes."""
    return hmac.compare_digest(expected.encode(), received.encode("utf-8", "surrogateescape"))


def parse_timestamp(text: str) -> float | None:
    """Unix seconds of an `X-Timestamp` (Unix seconds, or ISO-8601 UTC ending in Z), or None when it is neither."""
    if _UNIX_SECONDS.fullmatch(text):
        return float(text)
    moment = parse_time(text) if text.endswith("Z") else None
    return None if moment is None else moment.timestamp()


def sign_webhook(secrets: list[str], webhook_id: str, timestamp: int, body: bytes) -> str:
    """`webhook-signature`, one signature per live secret, newest first.

    Source: Standard Webhooks 1.0.0, "Signature scheme". The key is the base64-decoded part after `whsec_`.
    """
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    return " ".join("v1," + base64.b64encode(_hmac(_webhook_key(secret), signed)).decode() for secret in secrets)


@lru_cache(maxsize=1024)
def _webhook_key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(WEBHOOK_SECRET_PREFIX), validate=True)


def _hex_hmac(key: bytes, message: bytes) -> str:
    return _hmac(key, message).hex()


def _hmac(key: bytes, message: bytes) -> bytes:
    signature = _keyed(key).copy()
    signature.update(message)
    return signature.digest()


@lru_cache(maxsize=1024)
def _keyed(key: bytes) -> hmac.HMAC:
    """A key made ready once. OpenSSL's own HMAC would do it anew for every copy as well, so its SHA-256 is put inside."""
    return hmac.new(key, digestmod=_sha256)


def _sha256(data: bytes = b"") -> "hashlib._Hash":
    return hashlib.sha256(data)
