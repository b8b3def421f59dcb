"""Bytes in, values out, and back: the strict JSON of requests, the fields of a create, the JSON of a payout and of
a payin.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NoReturn

from aiohttp import web

from common.db.merchants import Shop
from common.db.payins import Payin
from common.db.payouts import PastMove, Payout
from common.domain.addresses import parse_callback_url
from common.domain.ids import PAYIN, PAYOUT, render_id
from common.domain.money import CURRENCY_EXPONENTS, parse_amount, render_amount
from common.domain.payin import render_payin_failure
from common.domain.payout import State, render_failure
from common.domain.times import parse_time, render_time
from common.errors import FieldError, InvalidRequest

DEPTH_MAX: Final = 32
METADATA_MAX: Final = 20
METADATA_KEY_CHARACTERS_MAX: Final = 64
METADATA_VALUE_CHARACTERS_MAX: Final = 500
# Fields that are only kept and shown again, with their greatest length in characters.
_TEXT_FIELDS: Final = {"description": 500, "merchant_user_id": 128, "merchant_user_ip": 64}
_METADATA_TOO_LONG: Final = (
    f"metadata must have keys of at most {METADATA_KEY_CHARACTERS_MAX} characters"
    f" and values of at most {METADATA_VALUE_CHARACTERS_MAX}"
)
# In the contract's order.
_FIELDS: Final = (
    *("external_id", "amount", "currency", "card_number", "callback_url", "shop_code"),
    *("description", "metadata", "merchant_user_id", "merchant_user_ip", "paymentData", "expires_at"),
)
# Before the shop is known, an amount that fits any currency passes; the exponent of most is tried first.
_EXPONENTS: Final = tuple(exponent for exponent, _ in Counter(CURRENCY_EXPONENTS.values()).most_common())

AMOUNT_INVALID: Final = FieldError("amount", "amount must be a positive decimal string")
CALLBACK_URL_INVALID: Final = FieldError("callback_url", "callback_url must be a valid URL")

_EXTERNAL_ID: Final = re.compile(r"(?!\.+\Z)[A-Za-z0-9._:-]{1,128}", re.ASCII)
_RECIPIENT: Final = re.compile(r"[A-Za-z0-9._:@+-]{4,128}", re.ASCII)
_SHOP_CODE: Final = re.compile(r"[^\x00-\x1f\x7f]{1,64}")


@dataclass(frozen=True, slots=True)
class CreatePayout:
    """A create whose fields are in order. The amount is still text: its scale is the shop's currency's. Scheme and port of the
    callback are still to be judged: they are the shop's too.
    """

    external_id: str
    amount: str
    currency: str
    recipient: str
    callback_url: str | None
    shop_code: str | None
    payment_data: dict[str, Any] | None
    details: dict[str, Any]
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class CreatePayin:
    """The same of a payin, which has a payer and no recipient."""

    external_id: str
    amount: str
    currency: str
    callback_url: str | None
    shop_code: str | None
    payment_data: dict[str, Any] | None
    details: dict[str, Any]
    expires_at: datetime | None = None


def parse_json_object(body: bytes) -> dict[str, Any]:
    """The object a body holds. Raises: `InvalidRequest` (field `body`) for anything but one plain JSON object:
    bad UTF-8, a key twice, NaN, NUL or a lone surrogate in a string, nesting deeper than `DEPTH_MAX`.

    Source: RFC 8259; section 4 leaves equal keys undefined, so we refuse them.
    """
    try:
        value = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError:
        _refuse_body("Request body must be UTF-8")
    except _KeyTwice:
        _refuse_body("Request body must not have a key twice")
    except (ValueError, RecursionError):
        _refuse_body("Request body must be valid JSON")
    if not isinstance(value, dict):
        _refuse_body("Request body must be a JSON object")
    if b"\\" in body or body.count(b"{") + body.count(b"[") > DEPTH_MAX:
        _judge_tree(value)
    return value


class _KeyTwice(ValueError):
    pass


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _KeyTwice
    return value


def _finite(text: str) -> float:
    # What is not finite could not be stored: JSON has no word for it.
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("out of range")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique_pairs, parse_float=_finite, parse_constant=_no_constant)


def _judge_tree(value: Any) -> None:
    """Depth and strings of a whole tree. Only escapes can bring what plain text cannot, so most bodies need no walk."""
    level = [value]
    for _ in range(DEPTH_MAX):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    _refuse_body(f"Request body must not be nested deeper than {DEPTH_MAX}")


def _children(node: Any) -> Iterator[Any]:
    children = [*node, *node.values()] if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        if isinstance(child, str):
            if "\x00" in child or any("\ud800" <= letter <= "\udfff" for letter in child):
                _refuse_body("Request body must not contain NUL or lone surrogates")
        elif isinstance(child, dict | list):
            yield child


def _refuse_body(message: str) -> NoReturn:
    raise InvalidRequest(FieldError("body", message))


def parse_create_payout(body: bytes, *, private_callbacks: bool) -> CreatePayout:
    """The fields of `POST /payouts`. Raises: `InvalidRequest` with every field that is wrong, in the contract's order."""
    fields = _Fields(parse_json_object(body))
    create = CreatePayout(
        external_id=fields.external_id(),
        amount=fields.amount(),
        currency=fields.currency(),
        recipient=fields.recipient(),
        callback_url=fields.callback_url(private_callbacks),
        shop_code=fields.shop_code(),
        payment_data=fields.payment_data(),
        details=fields.details(),
        expires_at=fields.expires_at(),
    )
    if fields.errors:
        raise InvalidRequest(*fields.errors_in_order())
    return create


def parse_create_payin(body: bytes, *, private_callbacks: bool) -> CreatePayin:
    """The fields of `POST /payins`. Raises: as `parse_create_payout`."""
    fields = _Fields(parse_json_object(body))
    create = CreatePayin(
        external_id=fields.external_id(),
        amount=fields.amount(),
        currency=fields.currency(),
        callback_url=fields.callback_url(private_callbacks),
        shop_code=fields.shop_code(),
        payment_data=fields.payment_data(),
        details=fields.details(),
        expires_at=fields.expires_at(),
    )
    if fields.errors:
        raise InvalidRequest(*fields.errors_in_order())
    return create


class _Fields:
    """Reads fields one by one and gathers what is wrong with them; a refused field reads as an empty value."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self.errors: list[FieldError] = []

    def errors_in_order(self) -> list[FieldError]:
        """What is wrong, in the order in which the contract names the fields."""
        return sorted(self.errors, key=lambda error: _FIELDS.index(error.field))

    def _refuse(self, field: str, message: str) -> None:
        self.errors.append(FieldError(field, message))

    def external_id(self) -> str:
        value = self._values.get("external_id")
        if not isinstance(value, str) or not value:
            self._refuse("external_id", "external_id is required")
        elif not _EXTERNAL_ID.fullmatch(value):
            self._refuse("external_id", "external_id must be 1 to 128 characters of A-Z a-z 0-9 . _ : -")
        return str(value)

    def amount(self) -> str:
        value = self._values.get("amount")
        if all(parse_amount(value, exponent) is None for exponent in _EXPONENTS):
            self.errors.append(AMOUNT_INVALID)
        return str(value)

    def currency(self) -> str:
        value = self._values.get("currency")
        if not isinstance(value, str) or not value:
            self._refuse("currency", "currency is required")
        return str(value)

    def recipient(self) -> str:
        value = self._values.get("card_number")
        if not isinstance(value, str) or not (value := value.replace(" ", "")):
            self._refuse("card_number", "card_number is required")
        elif not _RECIPIENT.fullmatch(value):
            self._refuse("card_number", "card_number is not valid")
        return str(value)

    def callback_url(self, private_allowed: bool) -> str | None:
        """Before the shop is known, any port passes, and http."""
        value = self._values.get("callback_url")
        if value is None:
            return None
        url = parse_callback_url(value, private_allowed=private_allowed, ports=frozenset())
        if url is None:
            self.errors.append(CALLBACK_URL_INVALID)
        return url

    def shop_code(self) -> str | None:
        value = self._values.get("shop_code")
        if value is None:
            return None
        if not isinstance(value, str) or not _SHOP_CODE.fullmatch(value):
            self._refuse("shop_code", "shop_code must be a string of 1 to 64 characters")
        return str(value)

    def payment_data(self) -> dict[str, Any] | None:
        """An empty object says nothing and is taken as absent."""
        value = self._values.get("paymentData")
        if value is not None and not isinstance(value, dict):
            self._refuse("paymentData", "paymentData must be an object")
            return None
        return value or None

    def details(self) -> dict[str, Any]:
        """What is only kept and shown again."""
        details = {
            name: self._text(name, characters_max)
            for name, characters_max in _TEXT_FIELDS.items()
            if self._values.get(name) is not None
        }
        metadata = self._values.get("metadata")
        if metadata is not None and not _is_metadata(metadata):
            self._refuse("metadata", f"metadata must be an object of at most {METADATA_MAX} strings")
        elif metadata and not _fits(metadata):
            self._refuse("metadata", _METADATA_TOO_LONG)
        elif metadata:
            details["metadata"] = metadata
        return details

    def expires_at(self) -> datetime | None:
        value = self._values.get("expires_at")
        if value is None:
            return None
        moment = parse_time(value) if isinstance(value, str) else None
        if moment is None:
            self._refuse("expires_at", "expires_at must be an RFC 3339 time such as 2026-01-31T12:00:00Z")
        return moment

    def _text(self, name: str, characters_max: int) -> str:
        value = self._values[name]
        if not isinstance(value, str) or len(value) > characters_max:
            self._refuse(name, f"{name} must be a string of at most {characters_max} characters")
        return str(value)


def _is_metadata(value: object) -> bool:
    return (
        isinstance(value, dict) and len(value) <= METADATA_MAX and all(isinstance(text, str) for text in value.values())
    )


def _fits(metadata: dict[str, str]) -> bool:
    return all(
        len(key) <= METADATA_KEY_CHARACTERS_MAX and len(text) <= METADATA_VALUE_CHARACTERS_MAX
        for key, text in metadata.items()
    )


def read_query(request: web.Request, name: str) -> str | None:
    """One parameter of the query. Raises: `InvalidRequest` when it is there twice: pairs are signed in any order."""
    values = request.query.getall(name, [])
    if len(values) > 1:
        raise InvalidRequest(FieldError(name, f"{name} must be given once"))
    return values[0] if values else None


def render_payout(payout: Payout, shop: Shop) -> dict[str, Any]:
    """A payout as merchants see it; what is absent is left out, and the recipient is masked."""
    details = payout.details or {}
    shown = {
        "id": render_id(PAYOUT, payout.id),
        "external_id": payout.external_id,
        "shop_code": shop.code,
        "status": payout.state.status,
        "stage": payout.state.stage,
        "amount": render_amount(payout.amount_minor, shop.currency_exponent),
        "currency": payout.currency,
        "card_number": payout.recipient_masked,
        "callback_url": payout.callback_url,
        "transaction_type": "payout",
        **{name: details.get(name) for name in _TEXT_FIELDS},
        "metadata": details.get("metadata", {}),
        "failure": None if payout.failure_code is None else render_failure(payout.failure_code),
        "provider_reference": payout.provider_reference,
        "created_at": render_time(payout.created_at),
        "updated_at": render_time(payout.updated_at),
        "expires_at": None if payout.expires_at is None else render_time(payout.expires_at),
        "finalization_date": None if payout.finalized_at is None else render_time(payout.finalized_at),
    }
    return {name: value for name, value in shown.items() if value is not None}


def render_payin(payin: Payin, shop: Shop) -> dict[str, Any]:
    """A payin as merchants see it, with what its payer needs; what is absent is left out."""
    details = payin.details or {}
    shown = {
        "id": render_id(PAYIN, payin.id),
        "external_id": payin.external_id,
        "shop_code": shop.code,
        "status": payin.state.value,
        "amount": render_amount(payin.amount_minor, shop.currency_exponent),
        "currency": payin.currency,
        "callback_url": payin.callback_url,
        "transaction_type": "payin",
        "paymentData": {
            "reference": payin.reference,
            **({} if payin.payment_link is None else {"payment_link": payin.payment_link}),
        },
        **{name: details.get(name) for name in _TEXT_FIELDS},
        "metadata": details.get("metadata", {}),
        "failure": None if payin.failure_code is None else render_payin_failure(payin.failure_code),
        "provider_reference": payin.provider_reference,
        "created_at": render_time(payin.created_at),
        "updated_at": render_time(payin.updated_at),
        "expires_at": None if payin.expires_at is None else render_time(payin.expires_at),
        "finalization_date": None if payin.finalized_at is None else render_time(payin.finalized_at),
    }
    return {name: value for name, value in shown.items() if value is not None}


def render_history(payout: Payout, moves: Sequence[PastMove]) -> list[dict[str, Any]]:
    """Where a payout has been, from its creation on."""
    places = [PastMove(1, State.QUEUED, payout.created_at), *moves]
    return [
        {
            "sequence": move.version,
            "status": move.state.status,
            **({} if move.state.stage is None else {"stage": move.state.stage}),
            "at": render_time(move.at),
        }
        for move in places
    ]
