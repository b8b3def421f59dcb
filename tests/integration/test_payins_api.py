"""Payins as merchants see them: what a payer is told, shapes, idempotency, and the errors of the contract."""

import asyncio
import json
import re
from typing import Any

import pytest

from common.db.invariants import verify
from ops.onboarding import add_http_rail, change_rail
from tests.factories import ACTOR, Merchant, execute, fetch
from tests.stack import eventually
from tests.wire import TIME, Answer, Gateway, Refusal, read_refusal

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAYINS = "/api/v1/payins"
PAYIN_ID = re.compile(r"pi_[0-9a-hjkmnp-tv-z]{26}", re.ASCII)
URL = "https://merchant.example.com/webhooks/payin"


async def create(gateway: Gateway, merchant: Merchant, **fields: Any) -> Answer:
    """`POST /payins` with those fields; a field given as None is left out."""
    body = {"external_id": "IN-1", "amount": "50.00", "currency": "BDT"} | fields
    sent = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
    return await gateway.ask(merchant, "POST", PAYINS, sent)


async def show(gateway: Gateway, merchant: Merchant, external_id: str) -> Answer:
    """`GET /payins/{external_id}`."""
    return await gateway.ask(merchant, "GET", f"{PAYINS}/{external_id}")


async def test_a_create_is_answered_with_what_the_payer_needs(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    answer = await create(
        gateway, merchant, callback_url=URL, metadata={"a": "1"}, expires_at="2999-01-31T12:00:00Z", description="Books"
    )
    body = answer.json
    assert answer.status == 201, answer
    assert PAYIN_ID.fullmatch(body["id"])
    assert TIME.fullmatch(body["created_at"])
    assert body == {
        "id": body["id"],
        "external_id": "IN-1",
        "shop_code": "shop-001",
        "status": "pending",
        "amount": "50.00",
        "currency": "BDT",
        "callback_url": URL,
        "transaction_type": "payin",
        "paymentData": {"reference": body["id"]},
        "description": "Books",
        "metadata": {"a": "1"},
        "created_at": body["created_at"],
        "updated_at": body["created_at"],
        "expires_at": "2999-01-31T12:00:00.000000Z",
    }
    assert (await show(gateway, merchant, "IN-1")).json == body
    balance = (await gateway.ask(merchant, "GET", "/api/v1/balance")).json
    assert balance["total"] == "1000000.00", "nothing is credited yet"


async def test_a_rail_with_a_link_sends_the_payer_there(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    await add_http_rail(
        gateway.owner,
        gateway.settings.keyring,
        name="with-link",
        base_url="http://127.0.0.1:9",
        authoritative=True,
        payin_link="https://pay.example.com/{reference}?lang=en",
        actor=ACTOR,
    )
    await change_rail(
        gateway.owner, merchant=merchant.code, shop="shop-001", rail="with-link", reason="links", actor=ACTOR
    )
    await eventually(lambda: _link(gateway, merchant), "the shop's new rail is known")


async def _link(gateway: Gateway, merchant: Merchant) -> bool:
    await execute(gateway.owner, "SELECT 1")
    external_id = f"IN-{(await fetch(gateway.owner, 'SELECT count(*) AS n FROM payins'))[0].n}"
    body = (await create(gateway, merchant, external_id=external_id)).json
    return bool(
        body["paymentData"].get("payment_link") == f"https://pay.example.com/{body['paymentData']['reference']}?lang=en"
    )


async def test_the_same_content_again_answers_200_and_another_names_what_differs(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    first = await create(gateway, merchant, paymentData={"bank": "x"})
    again = await create(gateway, merchant, amount="50.0", paymentData={"bank": "x"}, callback_url=URL)
    assert (first.status, again.status) == (201, 200)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json == first.json

    for fields, named in (
        ({"amount": "51.00", "paymentData": {"bank": "x"}}, "amount"),
        ({"paymentData": {"bank": "y"}}, "paymentData"),
        ({"amount": "51.00"}, "amount, paymentData"),
    ):
        message = f"external_id was already used with different content: {named}"
        refused = read_refusal(await create(gateway, merchant, **fields))
        assert refused == Refusal(422, "external_id_reused", message, "external_id_reused")


async def test_concurrent_twins_are_one(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    answers = await asyncio.gather(*(create(gateway, merchant, external_id="TWIN") for _ in range(12)))
    assert sorted(answer.status for answer in answers) == [200] * 11 + [201]
    assert len({answer.json["id"] for answer in answers}) == 1
    rows = await fetch(gateway.owner, "SELECT count(*) AS n FROM payins WHERE shop_id = :id", id=merchant.shop.id)
    assert rows[0].n == 1


async def test_a_payout_and_a_payin_may_have_the_same_id(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    payout = {"external_id": "IN-1", "amount": "10.00", "currency": "BDT", "card_number": "01712345678"}
    assert (await gateway.create(merchant, json.dumps(payout).encode())).status == 201
    assert (await create(gateway, merchant)).status == 201
    assert (await show(gateway, merchant, "IN-1")).json["transaction_type"] == "payin"


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"external_id": None}, Refusal(422, "validation_error", "external_id is required", "field_invalid")),
        (
            {"amount": "5.001"},
            Refusal(422, "validation_error", "amount must be a positive decimal string", "field_invalid"),
        ),
        ({"amount": 5}, Refusal(422, "validation_error", "amount must be a positive decimal string", "field_invalid")),
        ({"currency": None}, Refusal(422, "validation_error", "currency is required", "field_invalid")),
        (
            {"callback_url": "ftp://x"},
            Refusal(422, "validation_error", "callback_url must be a valid URL", "field_invalid"),
        ),
        (
            {"currency": "USD"},
            Refusal(422, "shop_currency_mismatch", "Shop currency mismatch. Expected BDT.", "shop_currency_mismatch"),
        ),
        (
            {"shop_code": "nowhere"},
            Refusal(
                422,
                "shop_not_found",
                "Shop with code 'nowhere' not found or inactive for this merchant",
                "shop_not_found",
            ),
        ),
        (
            {"expires_at": "2020-01-31T12:00:00Z"},
            Refusal(422, "validation_error", "expires_at must be a time in the future", "field_invalid"),
        ),
        (
            {"expires_at": "tomorrow"},
            Refusal(
                422,
                "validation_error",
                "expires_at must be an RFC 3339 time such as 2026-01-31T12:00:00Z",
                "field_invalid",
            ),
        ),
    ],
)
async def test_bad_input_is_told_in_the_contracts_shape_and_stores_nothing(
    gateway: Gateway, fields: dict[str, Any], refusal: Refusal
) -> None:
    merchant = await gateway.merchant()
    assert read_refusal(await create(gateway, merchant, **fields)) == refusal
    rows = await fetch(gateway.owner, "SELECT count(*) AS n FROM payins WHERE shop_id = :id", id=merchant.shop.id)
    assert rows[0].n == 0


async def test_no_card_number_is_needed_and_one_that_is_sent_is_ignored(gateway: Gateway) -> None:
    answer = await create(gateway, await gateway.merchant(), card_number="4111111111111111")
    assert answer.status == 201
    assert "4111111111111111" not in answer.body.decode()


@pytest.mark.parametrize("external_id", ["IN-404", "%00", "a" * 200])
async def test_a_payin_that_is_not_there_is_not_found(gateway: Gateway, external_id: str) -> None:
    refused = read_refusal(await show(gateway, await gateway.merchant(), external_id))
    assert refused == Refusal(404, "not_found", "PayIn not found", "payin_not_found")


async def test_another_merchants_payin_is_not_found(gateway: Gateway) -> None:
    await create(gateway, await gateway.merchant(), external_id="MINE")
    assert (await show(gateway, await gateway.merchant(), "MINE")).status == 404


@pytest.mark.parametrize(
    ("status", "refusal"),
    [
        ("suspended", Refusal(403, "forbidden", "Access denied", "access_denied")),
        ("closed", Refusal(401, "unauthorized", "Invalid API key", "api_key_invalid")),
    ],
)
async def test_a_merchant_that_may_not_do_business_gets_no_payins(
    gateway: Gateway, status: str, refusal: Refusal
) -> None:
    merchant = await gateway.merchant()
    assert (await create(gateway, merchant, external_id="BEFORE")).status == 201
    await execute(gateway.owner, f"UPDATE merchants SET status = '{status}' WHERE code = '{merchant.code}'")
    assert read_refusal(await create(gateway, merchant)) == refusal


async def test_a_key_without_the_scope_is_denied(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    await execute(
        gateway.owner,
        "UPDATE api_keys SET scopes = '{payouts:write,payins:read}' WHERE public_id = :key",
        key=merchant.api_key,
    )
    assert read_refusal(await create(gateway, merchant)) == Refusal(403, "forbidden", "Access denied", "access_denied")
    assert (await show(gateway, merchant, "IN-1")).status == 404


async def test_all_of_it_adds_up(gateway: Gateway) -> None:
    assert [finding for finding in await verify(gateway.owner) if finding.count] == []
