"""What only the shop can tell of a create: whether the currency is its own, the amount's scale, where its callbacks may go, its
schema of payment data.
"""

import json
from typing import Any

from jsonschema import Draft202012Validator

from common.db.merchants import Shop
from common.domain.money import parse_amount
from common.errors import FieldError, InvalidRequest, ShopCurrencyMismatch
from common.sealing import Keyring
from common.settings import Settings
from gateway.schemas import AMOUNT_INVALID, CALLBACK_URL_INVALID, CreatePayin, CreatePayout


def judge_terms(shop: Shop, create: CreatePayout | CreatePayin, settings: Settings) -> int:
    """The amount in minor units.

    Raises: `ShopCurrencyMismatch`, `InvalidRequest` for the amount's scale, for a callback's scheme or port, and for payment
    data against the shop's schema.
    """
    if create.currency != shop.currency:
        raise ShopCurrencyMismatch(shop.currency)
    amount_minor = parse_amount(create.amount, shop.currency_exponent)
    errors = [
        *([AMOUNT_INVALID] if amount_minor is None else []),
        *([] if _callback_allowed(create.callback_url, shop, settings) else [CALLBACK_URL_INVALID]),
        *_payment_data_errors(create.payment_data, shop),
    ]
    if amount_minor is None or errors:
        raise InvalidRequest(*errors)
    return amount_minor


def _callback_allowed(url: str | None, shop: Shop, settings: Settings) -> bool:
    return url is None or settings.allows_callback(url, shop_http=shop.callback_http, shop_ports=shop.callback_ports)


def digest_payment_data(keyring: Keyring, shop: Shop, payment_data: dict[str, Any] | None) -> bytes | None:
    """What a repeat is compared by; None when there is none."""
    if payment_data is None:
        return None
    return keyring.digest(
        "payment data|" + json.dumps(payment_data, sort_keys=True, separators=(",", ":")), owner=shop.id
    )


def _payment_data_errors(payment_data: dict[str, Any] | None, shop: Shop) -> list[FieldError]:
    """The fields that break the shop's schema, by name; the validator's own words would repeat their values."""
    if shop.payment_data_schema is None:
        return []
    broken = Draft202012Validator(shop.payment_data_schema).iter_errors(payment_data or {})
    paths = {".".join(("paymentData", *map(str, error.absolute_path))) for error in broken}
    return [FieldError(path, "Invalid paymentData") for path in sorted(paths)]
