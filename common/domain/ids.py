"""Ids: UUIDv7 inside (RFC 9562, time-ordered, kind to B-trees), a typed lower-case form outside (`po_01jeb7…`)."""

from functools import lru_cache
from hashlib import sha256
from typing import Final
from uuid import UUID

import uuid_utils

# Crockford's base32, lower case: no i, l, o, u.
_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_VALUE: Final = {letter: value for value, letter in enumerate(_ALPHABET)}
_LENGTH: Final = 26
_PAIRS: Final = tuple(first + second for first in _ALPHABET for second in _ALPHABET)

PAYOUT: Final = "po"
PAYIN: Final = "pi"
EVENT: Final = "evt"


# The bits of a UUID that name its version, and the version that is free for meanings of one's own (RFC 9562, section 5.8).
_VERSION_SHIFT: Final = 76
_DERIVED_VERSION: Final = 8


def new_id() -> UUID:
    """A new time-ordered id."""
    return UUID(int=uuid_utils.uuid7().int)


def new_payout_id() -> UUID:
    """A new time-ordered id, as version 8: it says that the payout's reference is derived from what its merchant calls it."""
    return UUID(int=uuid_utils.uuid7().int & ~(0xF << _VERSION_SHIFT) | _DERIVED_VERSION << _VERSION_SHIFT)


def payout_reference(payout_id: UUID, shop_id: UUID, external_id: str) -> str:
    """What a payout is called towards its rail, `po_…`, for its whole life and beyond.

    It follows from shop and external id alone: a payout that a restored database has forgotten gets the same reference when its
    merchant creates it again, and a rail pays a reference once. Payouts whose id is of version 7 were accepted when the id
    itself was the reference.
    """
    if payout_id.version != _DERIVED_VERSION:
        return render_id(PAYOUT, payout_id)
    return render_id(PAYOUT, UUID(bytes=sha256(shop_id.bytes + external_id.encode()).digest()[:16]))


_MILLISECONDS_MAX: Final = (1 << 48) - 1


def first_id(seconds: float) -> UUID:
    """The least id that can be made at a moment, in Unix seconds, or later; moments out of its range are the nearest in it."""
    return UUID(int=min(max(0, int(seconds * 1000)), _MILLISECONDS_MAX) << 80)


def made_at(value: UUID) -> float:
    """When an id of ours was made, in Unix seconds, by the clock of the machine that made it."""
    return (value.int >> 80) / 1000


@lru_cache(maxsize=4096)
def render_id(prefix: str, value: UUID) -> str:
    """The public form of an id: prefix, underscore, 26 characters that sort as the id does."""
    number = value.int
    pairs = [_PAIRS[(number >> shift) & 1023] for shift in range(120, -1, -10)]
    return f"{prefix}_{''.join(pairs)}"


def parse_id(prefix: str, text: str) -> UUID | None:
    """The id behind a public form, or None when the text is not one of that prefix."""
    head, _, tail = text.partition("_")
    if head != prefix or len(tail) != _LENGTH or any(letter not in _VALUE for letter in tail):
        return None
    number = 0
    for letter in tail:
        number = number << 5 | _VALUE[letter]
    return UUID(int=number) if number < 1 << 128 else None
