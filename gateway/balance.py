"""`GET /balance`."""

from aiohttp import web

from common.db.engine import READ_ATTEMPTS_MAX, in_transaction
from common.db.ledger import find_balance
from common.domain.money import render_amount
from common.domain.times import render_time
from common.errors import InvariantViolated, ShopCurrencyMismatch
from gateway.auth import Caller
from gateway.errors import json_response
from gateway.resources import RESOURCES
from gateway.schemas import read_query


async def show_balance(request: web.Request, caller: Caller, _body: bytes) -> web.Response:
    """`GET /balance`: what the resolved shop may spend and what its unfinished payouts hold, of one moment."""
    shop = await request.app[RESOURCES].authenticator.resolve_shop(request, caller, read_query(request, "shop_code"))
    if (read_query(request, "currency") or shop.currency) != shop.currency:
        raise ShopCurrencyMismatch(shop.currency)
    balance = await in_transaction(
        request.app[RESOURCES].engine_of_one,
        lambda tx: find_balance(tx, shop.account_id),
        attempts_max=READ_ATTEMPTS_MAX,
    )
    if balance is None:
        raise InvariantViolated

    def money(amount_minor: int) -> str:
        return render_amount(amount_minor, shop.currency_exponent)

    return json_response(
        {
            "currency": shop.currency,
            "shop": {"code": shop.code},
            "as_of": render_time(balance.as_of),
            "balance": money(balance.available_minor),
            "available": money(balance.available_minor),
            "pending": money(balance.pending_minor),
            "frozen": money(0),
            "credit": money(balance.credit_minor),
            "total": money(balance.total_minor),
            "on_hold": money(balance.pending_minor),
        }
    )
