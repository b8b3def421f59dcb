"""Secrets at rest: AES-256-GCM under data keys that are derived per owner and day from a master key with an id.

A sealed value is bound to its row by associated data: moved to another row it does not open. Recipients are compared by a
keyed hash whose key is separate from the master keys, so that rotating those breaks no idempotency.
"""

import hmac
import os
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final
from uuid import UUID

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

# What a value is sealed for; part of what it is bound to. API keys belong to a merchant, a rail's secret to the rail, the
# others to a shop.
API_KEY_PURPOSE: Final = "api key"
WEBHOOK_SECRET_PURPOSE: Final = "webhook secret"  # noqa: S105 a purpose
RAIL_SECRET_PURPOSE: Final = "rail secret"  # noqa: S105 a purpose
RECIPIENT_PURPOSE: Final = "recipient"

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_SECONDS_PER_DAY: Final = 86_400
# Format, id of the master key, day of the data key (days since 1970); then nonce and ciphertext.
_HEADER: Final = struct.Struct(">BHI")
_FORMAT: Final = 1


class SealBroken(Exception):
    """A sealed value that does not open: another row's, damaged, or of a master key we do not have."""


@dataclass(frozen=True, slots=True)
class Keyring:
    """The master keys by id, the id new values are sealed with, and the key of the content hash."""

    master_keys: dict[int, bytes] = field(repr=False)
    current_id: int
    content_key: bytes = field(repr=False)

    def __hash__(self) -> int:
        return id(self)

    def seal(self, plain: bytes, *, owner: UUID, row: UUID, purpose: str, now: float) -> bytes:
        """Encrypt for one row. `now` is Unix seconds; it chooses the day of the data key."""
        day = int(now) // _SECONDS_PER_DAY
        header = _HEADER.pack(_FORMAT, self.current_id, day)
        nonce = os.urandom(_NONCE_BYTES)
        cipher = _data_key(self, self.current_id, day, owner)
        return header + nonce + cipher.encrypt(nonce, plain, _associated(purpose, row))

    def open(self, sealed: bytes, *, owner: UUID, row: UUID, purpose: str) -> bytes:
        """Decrypt a row's value. Raises: `SealBroken`."""
        try:
            form, key_id, day = _HEADER.unpack_from(sealed)
            if form != _FORMAT:
                raise SealBroken(f"unknown format {form}")
            nonce, cipher_text = sealed[_HEADER.size :][:_NONCE_BYTES], sealed[_HEADER.size + _NONCE_BYTES :]
            return _data_key(self, key_id, day, owner).decrypt(nonce, cipher_text, _associated(purpose, row))
        except SealBroken:
            raise
        except Exception as error:
            raise SealBroken(type(error).__name__) from None

    def reseal(self, sealed: bytes, *, owner: UUID, row: UUID, purpose: str) -> bytes:
        """The same value under the newest master key, still of its day: a data key seals no more values than before.

        Raises: `SealBroken`.
        """
        plain = self.open(sealed, owner=owner, row=row, purpose=purpose)
        _, _, day = _HEADER.unpack_from(sealed)
        return self.seal(plain, owner=owner, row=row, purpose=purpose, now=day * _SECONDS_PER_DAY)

    def digest(self, content: str, *, owner: UUID) -> bytes:
        """A keyed hash of content, to compare without storing it; equal content of two owners hashes differently."""
        return hmac.digest(self.content_key, owner.bytes + content.encode(), "sha256")


def _associated(purpose: str, row: UUID) -> bytes:
    return purpose.encode() + b"|" + row.bytes


@lru_cache(maxsize=4096)
def _data_key(keyring: Keyring, key_id: int, day: int, owner: UUID) -> AESGCM:
    """Source: RFC 5869 (HKDF); the info string makes each owner's and day's key its own."""
    master_key = keyring.master_keys.get(key_id)
    if master_key is None:
        raise SealBroken(f"no master key {key_id}")
    info = b"payouts data key|" + owner.bytes + struct.pack(">I", day)
    return AESGCM(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(master_key))
