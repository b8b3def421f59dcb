"""`POST /payins` and one payin looked up. Creating one moves no money, so it needs no account and no batch."""

import json

from aiohttp import web

from common.db.engine import READ_ATTEMPTS_MAX, Tx, in_transaction
from common.db.merchants import Shop, find_standing
from common.db.payins import NewPayin, Payin, append_payin, find_payin
from common.domain.ids import PAYIN, new_id, render_id
from common.errors import ExternalIdReused, FieldError, InvalidRequest, PayinNotFound
from common.sealing import Keyring
from common.settings import Settings
from gateway.auth import Caller
from gateway.errors import json_response
from gateway.log import SUBJECT
from gateway.resources import RESOURCES
from gateway.schemas import CreatePayin, parse_create_payin, render_payin
from gateway.terms import digest_payment_data, judge_terms


async def create_payin(request: web.Request, caller: Caller, body: bytes) -> web.Response:
    """`POST /payins`: 201 when the payin is committed, with what its payer needs.

    Repeat: the same content answers 200 with the payin as it is now.
    """
    resources = request.app[RESOURCES]
    settings = resources.settings
    create = parse_create_payin(body, private_callbacks=settings.callback_private_addresses)
    shop = await resources.authenticator.resolve_shop(request, caller, create.shop_code)
    fresh = _new_payin(create, shop, settings, resources.keyring)

    async def work(tx: Tx) -> Payin:
        objection = (await find_standing(tx, shop.id)).objection(shop.code)
        if objection is not None:
            raise objection
        await append_payin(tx, fresh)
        stored = await find_payin(tx, shop.id, fresh.external_id)
        if stored is None:
            raise InvalidRequest(FieldError("expires_at", "expires_at must be a time in the future"))
        return stored

    payin = await in_transaction(resources.engine, work)
    differing = _differing_fields(fresh, payin)
    if differing:
        raise ExternalIdReused(differing)
    request[SUBJECT].payin_id = payin.id
    replayed = payin.id != fresh.id
    return json_response(
        render_payin(payin, shop),
        status=200 if replayed else 201,
        headers={"Idempotent-Replayed": "true"} if replayed else None,
    )


async def show_payin(request: web.Request, caller: Caller, _body: bytes) -> web.Response:
    """`GET /payins/{external_id}`: the payin as it is now, in the scope of the resolved shop."""
    shop, external_id = await request.app[RESOURCES].authenticator.resolve_subject(request, caller, PayinNotFound)
    payin = await in_transaction(
        request.app[RESOURCES].engine_of_one,
        lambda tx: find_payin(tx, shop.id, external_id),
        attempts_max=READ_ATTEMPTS_MAX,
    )
    if payin is None:
        raise PayinNotFound
    request[SUBJECT].payin_id = payin.id
    return json_response(render_payin(payin, shop))


def _new_payin(create: CreatePayin, shop: Shop, settings: Settings, keyring: Keyring) -> NewPayin:
    """Judge what only the shop can tell. Raises: as `judge_terms`."""
    amount_minor = judge_terms(shop, create, settings)
    payin_id = new_id()
    return NewPayin(
        id=payin_id,
        shop_id=shop.id,
        account_id=shop.account_id,
        external_id=create.external_id,
        amount_minor=amount_minor,
        currency=shop.currency,
        rail=shop.rail,
        reference=render_id(PAYIN, payin_id),
        payment_data_digest=digest_payment_data(keyring, shop, create.payment_data),
        callback_url=create.callback_url,
        details=json.dumps(create.details) if create.details else None,
        expires_at=create.expires_at,
        look_up_in_seconds=settings.payin_look_up_delays_seconds[0],
    )


def _differing_fields(ours: NewPayin, stored: Payin) -> list[str]:
    """The fields of the content in which a create differs from the payin that has its id."""
    pairs = {
        "amount": (ours.amount_minor, stored.amount_minor),
        "currency": (ours.currency, stored.currency),
        "paymentData": (ours.payment_data_digest, stored.payment_data_digest),
    }
    return [name for name, (wanted, found) in pairs.items() if wanted != found]
