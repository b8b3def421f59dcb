"""What is sealed of a payout: its recipient and the payment data. One place packs it, the worker unpacks it."""

import json
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson

from common.sealing import RECIPIENT_PURPOSE, Keyring


@dataclass(frozen=True, slots=True)
class Recipient:
    """Who is paid: wallet, account or card number, and what else the rail needs to know. Never printed."""

    number: str = field(repr=False)
    payment_data: dict[str, Any] | None = field(repr=False)


def seal_recipient(keyring: Keyring, recipient: Recipient, *, shop_id: UUID, payout_id: UUID, now: float) -> bytes:
    """Encrypt for that payout of that shop. `now` is Unix seconds."""
    return keyring.seal(_pack(recipient), owner=shop_id, row=payout_id, purpose=RECIPIENT_PURPOSE, now=now)


def _pack(recipient: Recipient) -> bytes:
    content = [recipient.number, recipient.payment_data]
    try:
        return orjson.dumps(content)
    except TypeError:
        # It does not take all that JSON may hold: numbers of more than 64 bits, for one.
        return json.dumps(content).encode()


def open_recipient(keyring: Keyring, sealed: bytes, *, shop_id: UUID, payout_id: UUID) -> Recipient:
    """Raises: `SealBroken`."""
    number, payment_data = json.loads(keyring.open(sealed, owner=shop_id, row=payout_id, purpose=RECIPIENT_PURPOSE))
    return Recipient(number, payment_data)
