"""`POST /payouts`, and one payout: looked up, canceled, its history."""

import time

from aiohttp import web

from common.db.engine import READ_ATTEMPTS_MAX, Tx, in_transaction
from common.db.merchants import Shop
from common.db.payouts import PastMove, Payout, find_moves, find_payout
from common.domain.ids import new_payout_id
from common.domain.payout import mask_recipient
from common.errors import PayoutNotFound
from common.recipients import Recipient, seal_recipient
from common.sealing import Keyring
from common.settings import Settings
from gateway.auth import Caller
from gateway.deciding import Order
from gateway.errors import json_response
from gateway.log import SUBJECT
from gateway.resources import RESOURCES, SPAN
from gateway.schemas import CreatePayout, parse_create_payout, render_history, render_payout
from gateway.terms import digest_payment_data, judge_terms


async def create_payout(request: web.Request, caller: Caller, body: bytes) -> web.Response:
    """`POST /payouts`: 201 when the payout, the hold of its money and the order to send it are committed.

    Repeat: the same content answers 200 with the payout as it is now.
    """
    resources = request.app[RESOURCES]
    settings = resources.settings
    create = parse_create_payout(body, private_callbacks=settings.callback_private_addresses)
    shop = await resources.authenticator.resolve_shop(request, caller, create.shop_code)
    order = place_order(
        create, shop, settings, resources.keyring, now=time.time(), traceparent=request[SPAN].traceparent
    )
    accepted = await resources.acceptor.accept(order)
    request[SUBJECT].payout_id = accepted.payout.id
    return json_response(
        render_payout(accepted.payout, shop),
        status=200 if accepted.replayed else 201,
        headers={"Idempotent-Replayed": "true"} if accepted.replayed else None,
    )


async def show_payout(request: web.Request, caller: Caller, _body: bytes) -> web.Response:
    """`GET /payouts/{external_id}`: the payout as it is now, in the scope of the resolved shop."""
    shop, external_id = await request.app[RESOURCES].authenticator.resolve_subject(request, caller, PayoutNotFound)
    payout = await in_transaction(
        request.app[RESOURCES].engine_of_one,
        lambda tx: find_payout(tx, shop.id, external_id),
        attempts_max=READ_ATTEMPTS_MAX,
    )
    if payout is None:
        raise PayoutNotFound
    request[SUBJECT].payout_id = payout.id
    return json_response(render_payout(payout, shop))


async def cancel_payout(request: web.Request, caller: Caller, _body: bytes) -> web.Response:
    """`POST /payouts/{external_id}/cancel`: 200 when it is canceled and its money is available again.

    Repeat: 200 again. Raises: `NotCancelable` from the moment on that a worker has taken it.
    """
    shop, external_id = await request.app[RESOURCES].authenticator.resolve_subject(request, caller, PayoutNotFound)
    payout = await request.app[RESOURCES].canceler.cancel(shop.id, external_id)
    request[SUBJECT].payout_id = payout.id
    return json_response(render_payout(payout, shop))


async def list_payout_events(request: web.Request, caller: Caller, _body: bytes) -> web.Response:
    """`GET /payouts/{external_id}/events`: what became of it, oldest first; `sequence` as callbacks carry it."""

    async def work(tx: Tx) -> tuple[Payout, list[PastMove]]:
        payout = await find_payout(tx, shop.id, external_id)
        if payout is None:
            raise PayoutNotFound
        return payout, await find_moves(tx, payout.id, shop.id)

    shop, external_id = await request.app[RESOURCES].authenticator.resolve_subject(request, caller, PayoutNotFound)
    payout, moves = await in_transaction(request.app[RESOURCES].engine, work, attempts_max=READ_ATTEMPTS_MAX)
    request[SUBJECT].payout_id = payout.id
    return json_response({"data": render_history(payout, moves)})


def place_order(
    create: CreatePayout,
    shop: Shop,
    settings: Settings,
    keyring: Keyring,
    *,
    now: float,
    traceparent: str | None = None,
) -> Order:
    """Judge what only the shop can tell, and seal the recipient. `now` is Unix seconds.

    Raises: as `judge_terms`.
    """
    amount_minor = judge_terms(shop, create, settings)
    payout_id = new_payout_id()
    recipient = Recipient(create.recipient, create.payment_data)
    return Order(
        id=payout_id,
        shop=shop,
        shop_id=shop.id,
        account_id=shop.account_id,
        external_id=create.external_id,
        amount_minor=amount_minor,
        currency=shop.currency,
        recipient_sealed=seal_recipient(keyring, recipient, shop_id=shop.id, payout_id=payout_id, now=now),
        recipient_masked=mask_recipient(create.recipient),
        recipient_digest=keyring.digest(f"recipient|{create.recipient}", owner=shop.id),
        payment_data_digest=digest_payment_data(keyring, shop, create.payment_data),
        callback_url=create.callback_url,
        details=create.details or None,
        rail=shop.rail,
        expires_at=create.expires_at,
        traceparent=traceparent,
    )
