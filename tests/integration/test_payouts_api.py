"""Payouts and balances as merchants see them: shapes, masks, scales, shops, idempotency, and that all of it adds up."""

import asyncio
import json
import re
from decimal import Decimal
from typing import Any

import pytest

from common.db.invariants import verify
from ops.onboarding import add_shop, top_up
from tests.factories import ACTOR, Merchant, create_body, execute, fetch
from tests.stack import eventually
from tests.wire import BALANCE, PAYOUTS, TIME, Answer, Gateway, Refusal, plain_request, read_refusal

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAYOUT_ID = re.compile(r"po_[0-9a-hjkmnp-tv-z]{26}", re.ASCII)
ALWAYS_SHOWN = {
    *("id", "external_id", "shop_code", "status", "stage", "amount", "currency", "card_number", "transaction_type"),
    *("metadata", "created_at", "updated_at"),
}


async def add_second_shop(
    gateway: Gateway, merchant: Merchant, code: str, *, currency: str = "BDT", funds: str | None = None, **options: Any
) -> None:
    """One more shop of a merchant."""
    defaults: dict[str, Any] = {
        "rail": "sandbox",
        "is_default": False,
        "webhook_url": None,
        "payment_data_schema": None,
    }
    await add_shop(
        gateway.owner,
        gateway.settings.keyring,
        merchant=merchant.code,
        code=code,
        currency=currency,
        actor=ACTOR,
        **defaults | options,
    )
    if funds is not None:
        await top_up(gateway.owner, merchant=merchant.code, shop=code, amount=funds, reason="a test", actor=ACTOR)


async def create(gateway: Gateway, merchant: Merchant, **fields: Any) -> Answer:
    """`POST /payouts` of a fresh body with those fields."""
    return await gateway.create(merchant, create_body(**fields))


async def show(gateway: Gateway, merchant: Merchant, external_id: str, query: str = "") -> Answer:
    """`GET /payouts/{external_id}`."""
    return await gateway.ask(merchant, "GET", f"{PAYOUTS}/{external_id}" + (f"?{query}" if query else ""))


async def balance(gateway: Gateway, merchant: Merchant, query: str = "") -> dict[str, Any]:
    """`GET /balance`."""
    answer = await gateway.ask(merchant, "GET", BALANCE + (f"?{query}" if query else ""))
    assert answer.status == 200, answer
    body: dict[str, Any] = answer.json
    return body


async def count_payouts(gateway: Gateway, merchant: Merchant) -> int:
    """Payouts of the merchant's first shop."""
    rows = await fetch(gateway.owner, "SELECT count(*) FROM payouts WHERE shop_id = :id", id=merchant.shop.id)
    count: int = rows[0][0]
    return count


async def test_a_create_is_answered_with_exactly_what_the_contract_shows(gateway: Gateway) -> None:
    merchant, url = await gateway.merchant(), "https://merchant.example.com/webhooks/payout"
    answer = await create(
        gateway, merchant, external_id="PAY-1", amount="5000.00", shop_code="shop-001", callback_url=url
    )
    body = answer.json
    assert answer.status == 201
    assert "idempotent-replayed" not in answer.headers
    assert answer.headers["content-type"] == "application/json"
    assert PAYOUT_ID.fullmatch(body["id"])
    assert TIME.fullmatch(body["created_at"])
    assert body["updated_at"] == body["created_at"]
    assert body == {
        "id": body["id"],
        "external_id": "PAY-1",
        "shop_code": "shop-001",
        "status": "pending",
        "stage": "queued",
        "amount": "5000.00",
        "currency": "BDT",
        "card_number": "*******5678",
        "callback_url": url,
        "transaction_type": "payout",
        "metadata": {},
        "created_at": body["created_at"],
        "updated_at": body["created_at"],
    }
    assert (await show(gateway, merchant, "PAY-1")).json == body


async def test_what_is_null_or_was_not_sent_is_left_out_of_the_answer(gateway: Gateway) -> None:
    body = json.loads(create_body()) | dict.fromkeys(
        ("callback_url", "description", "metadata", "merchant_user_id", "paymentData")
    )
    answer = await gateway.create(await gateway.merchant(), json.dumps(body).encode())
    assert answer.status == 201
    assert answer.json.keys() == ALWAYS_SHOWN
    assert None not in answer.json.values()


async def test_what_a_merchant_adds_for_itself_is_shown_again_and_payment_data_never(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    kept: dict[str, Any] = {
        "description": "Wages 🦆",
        "merchant_user_id": "user-7",
        "merchant_user_ip": "2001:db8::7",
        "metadata": {"b": "2", "a": "1"},
    }
    answers = [
        await create(gateway, merchant, external_id="PAY-1", paymentData={"pin": "998877"}, unknown={"x": 1}, **kept),
        await show(gateway, merchant, "PAY-1"),
    ]
    for answer in answers:
        assert {name: answer.json[name] for name in kept} == kept
        assert answer.json.keys() == ALWAYS_SHOWN | kept.keys()
        assert b"998877" not in answer.body


@pytest.mark.parametrize(
    ("recipient", "masked"),
    [
        ("01712345678", "*******5678"),
        ("0171 2345 678", "*******5678"),
        ("12345678", "****5678"),
        ("1234567", "*******"),
        ("1234", "****"),
        ("4111111111111111", "411111******1111"),
        ("4111 1111 1111 1111", "411111******1111"),
        ("4111111111111112", "************1112"),
        ("378282246310005", "378282*****0005"),
        ("6304000000000000000", "630400" + "*" * 9 + "0000"),
        ("6304000000000000001", "*" * 15 + "0001"),
        ("42222222222224", "*" * 10 + "2224"),
        ("4222222222222", "422222***2222"),
        ("422222222222", "*" * 8 + "2222"),
        ("user@bank.example", "*" * 13 + "mple"),
    ],
)
async def test_a_recipient_is_shown_only_masked(gateway: Gateway, recipient: str, masked: str) -> None:
    merchant = await gateway.merchant()
    created = await create(gateway, merchant, external_id="PAY-1", card_number=recipient)
    replayed = await create(gateway, merchant, external_id="PAY-1", card_number=recipient)
    shown = await show(gateway, merchant, "PAY-1")
    assert [answer.json["card_number"] for answer in (created, replayed, shown)] == [masked] * 3


@pytest.mark.parametrize(
    ("currency", "funds", "amount", "shown", "left"),
    [
        ("JPY", "100000", "5000", "5000", "95000"),
        ("KWD", "100.000", "5.000", "5.000", "95.000"),
        ("KWD", "100.000", "0.001", "0.001", "99.999"),
        ("BDT", "100.00", "0.5", "0.50", "99.50"),
        ("CLF", "1.0000", "0.0001", "0.0001", "0.9999"),
        ("BDT", "9000000000000.00", "9000000000000", "9000000000000.00", "0.00"),
    ],
)
async def test_money_is_written_at_the_scale_of_the_shops_currency(
    gateway: Gateway, currency: str, funds: str, amount: str, shown: str, left: str
) -> None:
    merchant = await gateway.merchant(currency=currency, funds=funds)
    answer = await create(gateway, merchant, currency=currency, amount=amount)
    assert (answer.status, answer.json["amount"]) == (201, shown)
    told = await balance(gateway, merchant)
    assert (told["currency"], told["available"], told["pending"]) == (currency, left, shown)


@pytest.mark.parametrize(
    ("currency", "amount"), [("JPY", "5000.0"), ("JPY", "0.5"), ("KWD", "1.0001"), ("BDT", "1.001")]
)
async def test_an_amount_finer_than_the_currency_is_refused(gateway: Gateway, currency: str, amount: str) -> None:
    merchant = await gateway.merchant(currency=currency, funds=None)
    answer = await create(gateway, merchant, currency=currency, amount=amount)
    assert answer.json["errors"] == [{"field": "amount", "message": "amount must be a positive decimal string"}]


# Shops.


def no_such_shop(code: str) -> Refusal:
    message = f"Shop with code '{code}' not found or inactive for this merchant"
    return Refusal(422, "shop_not_found", message, "shop_not_found")


async def test_a_shop_that_is_unknown_inactive_or_another_merchants_is_not_found(gateway: Gateway) -> None:
    merchant, other = await gateway.merchant(), await gateway.merchant()
    await add_second_shop(gateway, merchant, "closed-shop")
    await add_second_shop(gateway, other, "others-shop")
    await execute(gateway.owner, "UPDATE shops SET status = 'inactive' WHERE code = 'closed-shop'")
    for code in ("nobodys-shop", "closed-shop", "others-shop", "SHOP-001", "shop-001 ", "Läden", "'; --"):
        assert read_refusal(await create(gateway, merchant, shop_code=code)) == no_such_shop(code)
    for code in ("nobodys-shop", "closed-shop", "others-shop", "SHOP-001"):
        assert read_refusal(await show(gateway, merchant, "PAY-1", f"shop_code={code}")) == no_such_shop(code)
        assert read_refusal(await gateway.ask(merchant, "GET", f"{BALANCE}?shop_code={code}")) == no_such_shop(code)


async def test_without_a_shop_code_the_default_shop_is_meant_and_without_one_none(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    await add_second_shop(gateway, merchant, "shop-002", funds="100.00")
    assert (await create(gateway, merchant)).json["shop_code"] == "shop-001"
    assert (await create(gateway, merchant, shop_code="shop-002")).json["shop_code"] == "shop-002"
    orphan = await gateway.merchant()
    await execute(gateway.owner, "UPDATE shops SET is_default = false WHERE id = :id", id=orphan.shop.id)
    for answer in (
        await create(gateway, orphan),
        await show(gateway, orphan, "PAY"),
        await gateway.ask(orphan, "GET", BALANCE),
    ):
        assert (read_refusal(answer).status, read_refusal(answer).reason) == (422, "default_shop_missing")
    assert (await create(gateway, orphan, shop_code="shop-001")).status == 201


async def test_a_currency_other_than_the_shops_is_refused_whatever_its_spelling(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    expected = Refusal(422, "shop_currency_mismatch", "Shop currency mismatch. Expected BDT.", "shop_currency_mismatch")
    for currency in ("USD", "bdt", "BDT ", "৳", "XXX", "B" * 1000):
        assert read_refusal(await create(gateway, merchant, currency=currency)) == expected


async def test_look_ups_see_the_payouts_of_the_resolved_shop_only(gateway: Gateway) -> None:
    merchant, other = await gateway.merchant(), await gateway.merchant()
    await add_second_shop(gateway, merchant, "shop-002", funds="100.00")
    assert (await create(gateway, merchant, external_id="PAY-1", shop_code="shop-002")).status == 201
    assert (await show(gateway, merchant, "PAY-1", "shop_code=shop-002")).json["shop_code"] == "shop-002"
    for asker, query in ((merchant, ""), (merchant, "shop_code=shop-001"), (other, "")):
        assert read_refusal(await show(gateway, asker, "PAY-1", query)).message == "Payout not found"


async def test_a_payout_is_found_by_its_external_id_in_its_exact_spelling_and_not_by_ours(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    created = await create(gateway, merchant, external_id="Pay-1")
    for name in ("PAY-1", "pay-1", "Pay-1%20", "Pay-", "Pay-1.", created.json["id"]):
        assert read_refusal(await show(gateway, merchant, name)).message == "Payout not found"


async def test_the_same_external_id_in_two_shops_is_two_payouts(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    await add_second_shop(gateway, merchant, "shop-002", funds="100.00")
    answers = [
        await create(gateway, merchant, external_id="PAY-1", shop_code=code) for code in ("shop-001", "shop-002")
    ]
    assert [answer.status for answer in answers] == [201, 201]
    assert answers[0].json["id"] != answers[1].json["id"]


# Idempotency, rules 1 to 5.


SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # The fields of the first create, and of the second one that says the same.
    ("equal", {}, {}),
    ("fewer digits", {"amount": "5000.00"}, {"amount": "5000.0"}),
    ("no point", {"amount": "5000.00"}, {"amount": "5000"}),
    ("leading zeros", {"amount": "5000.00"}, {"amount": "0005000.00"}),
    ("spaces in the recipient", {"card_number": "4111111111111111"}, {"card_number": " 4111 1111 1111  1111 "}),
    (
        "payment data in another order",
        {"paymentData": {"a": 1, "b": [{"c": 1, "d": 2}]}},
        {"paymentData": {"b": [{"d": 2, "c": 1}], "a": 1}},
    ),
    ("no payment data", {"paymentData": {}}, {}),
    ("the default shop by name", {}, {"shop_code": "shop-001"}),
    ("another description", {"description": "one"}, {"description": "two"}),
    ("other metadata", {"metadata": {"a": "1"}}, {"metadata": {"a": "2"}}),
    ("another callback URL", {"callback_url": "https://a.example/"}, {"callback_url": "https://b.example/"}),
    ("another unknown field", {"x": 1}, {"x": 2}),
]


@pytest.mark.parametrize(("first", "second"), [row[1:] for row in SAME], ids=[row[0] for row in SAME])
async def test_the_same_create_again_is_answered_with_200_and_the_payout_that_exists(
    gateway: Gateway, first: dict[str, Any], second: dict[str, Any]
) -> None:
    merchant = await gateway.merchant()
    created = await create(gateway, merchant, external_id="PAY-1", **first)
    replayed = await create(gateway, merchant, external_id="PAY-1", **second)
    assert (created.status, replayed.status) == (201, 200)
    assert replayed.headers["idempotent-replayed"] == "true"
    assert replayed.json == created.json
    assert await count_payouts(gateway, merchant) == 1
    assert (await balance(gateway, merchant))["pending"] == created.json["amount"]


OTHER: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    # The fields of the first create, of the second one that says something else, and the fields that are named.
    ({"amount": "10.00"}, {"amount": "10.01"}, ["amount"]),
    ({"card_number": "01712345678"}, {"card_number": "01712345679"}, ["card_number"]),
    ({"card_number": "abcdefgh"}, {"card_number": "ABCDEFGH"}, ["card_number"]),
    ({}, {"paymentData": {"a": 1}}, ["paymentData"]),
    ({"paymentData": {"a": 1}}, {}, ["paymentData"]),
    ({"paymentData": {"a": [1, 2]}}, {"paymentData": {"a": [2, 1]}}, ["paymentData"]),
    ({"paymentData": {"a": "1"}}, {"paymentData": {"a": 1}}, ["paymentData"]),
    ({"paymentData": {"a": "é"}}, {"paymentData": {"a": "e\u0301"}}, ["paymentData"]),
    (
        {"amount": "10.00", "card_number": "01712345678", "paymentData": {"pin": "1111"}},
        {"amount": "77.77", "card_number": "01799999999", "paymentData": {"pin": "998877"}},
        ["amount", "card_number", "paymentData"],
    ),
]


@pytest.mark.parametrize(("first", "second", "named"), OTHER)
async def test_a_reused_id_with_other_content_is_refused_and_names_the_fields_but_never_their_values(
    gateway: Gateway, first: dict[str, Any], second: dict[str, Any], named: list[str]
) -> None:
    merchant = await gateway.merchant()
    created = await create(gateway, merchant, external_id="PAY-1", **first)
    refused = await create(gateway, merchant, external_id="PAY-1", **second)
    message = f"external_id was already used with different content: {', '.join(named)}"
    assert read_refusal(refused) == Refusal(422, "external_id_reused", message, "external_id_reused")
    assert refused.json["error"]["fields"] == named
    for fields in (first, second):
        for value in (fields.get("amount"), fields.get("card_number"), (fields.get("paymentData") or {}).get("pin")):
            assert value is None or value.encode() not in refused.body
    assert (await show(gateway, merchant, "PAY-1")).json == created.json
    assert await count_payouts(gateway, merchant) == 1


async def test_a_replay_shows_the_payout_as_it_is_now(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    body = create_body(external_id="PAY-1", card_number="01712340101")
    created = await gateway.create(merchant, body)
    worker = await gateway.stack.start("worker", "settle")

    async def failed() -> Answer | None:
        answer = await gateway.create(merchant, body)
        return answer if answer.json["status"] == "failed" else None

    replayed = await eventually(failed, "the payout has failed")
    await worker.stop()
    now = replayed.json
    assert (replayed.status, replayed.headers["idempotent-replayed"]) == (200, "true")
    assert now["id"] == created.json["id"]
    assert now["failure"].keys() == {"code", "message", "source", "retryable"}
    assert (now["failure"]["code"], now["failure"]["source"]) == ("recipient_not_found", "recipient")
    assert "stage" not in now
    assert TIME.fullmatch(now["finalization_date"])
    assert now["created_at"] == created.json["created_at"] < now["updated_at"]
    assert (await show(gateway, merchant, "PAY-1")).json == now
    assert (await balance(gateway, merchant))["available"] == "1000000.00"


async def test_an_id_stays_taken_when_its_payout_has_ended(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    await create(gateway, merchant, external_id="PAY-1", card_number="01712345678")
    worker = await gateway.stack.start("worker", "settle")

    async def succeeded() -> bool:
        return bool((await show(gateway, merchant, "PAY-1")).json["status"] == "success")

    await eventually(succeeded, "the payout has succeeded")
    await worker.stop()
    assert (await create(gateway, merchant, external_id="PAY-1")).status == 200
    assert (
        read_refusal(await create(gateway, merchant, external_id="PAY-1", amount="1.00")).code == "external_id_reused"
    )


async def test_concurrent_twins_are_one_201_and_the_rest_200_with_one_hold(gateway: Gateway) -> None:
    merchant, body = await gateway.merchant(), create_body(amount="7.00")
    answers = await asyncio.gather(*(gateway.create(merchant, body) for _ in range(16)))
    assert sorted(answer.status for answer in answers) == [200] * 15 + [201]
    assert len({answer.json["id"] for answer in answers}) == 1
    assert (await balance(gateway, merchant))["on_hold"] == "7.00"


REFUSED: list[dict[str, Any]] = [
    {"amount": "1000000.01"},
    {"amount": "x"},
    {"amount": "1.001"},
    {"currency": "USD"},
    {"shop_code": "nobodys-shop"},
    {"card_number": "1"},
    {"callback_url": "x"},
    {"metadata": 1},
]


@pytest.mark.parametrize("wrong", REFUSED, ids=str)
async def test_a_refused_create_stores_nothing_and_leaves_its_id_free(gateway: Gateway, wrong: dict[str, Any]) -> None:
    merchant = await gateway.merchant()
    tables = ("payouts", "payout_due", "events", "callbacks")
    before = [await fetch(gateway.owner, f"SELECT count(*) FROM {table}") for table in tables]
    told = await balance(gateway, merchant)
    assert (await create(gateway, merchant, external_id="PAY-1", **wrong)).status == 422
    assert [await fetch(gateway.owner, f"SELECT count(*) FROM {table}") for table in tables] == before
    assert await balance(gateway, merchant) | {"as_of": ""} == told | {"as_of": ""}
    assert read_refusal(await show(gateway, merchant, "PAY-1")).status == 404
    assert (await create(gateway, merchant, external_id="PAY-1", amount="20.00")).status == 201


async def test_more_than_the_balance_is_refused_with_both_amounts_and_all_of_it_accepted(gateway: Gateway) -> None:
    merchant = await gateway.merchant(funds="100.00")
    assert (await create(gateway, merchant, amount="40.00")).status == 201
    message = "Insufficient balance. Required 60.01, available 60.00."
    refused = await create(gateway, merchant, amount="60.01")
    assert read_refusal(refused) == Refusal(422, "insufficient_balance", message, "insufficient_balance")
    assert (await create(gateway, merchant, amount="60.00")).status == 201
    message = "Insufficient balance. Required 0.01, available 0.00."
    assert read_refusal(await create(gateway, merchant, amount="0.01")).message == message


async def test_a_payout_that_exists_is_told_before_the_balance_is_looked_at(gateway: Gateway) -> None:
    merchant = await gateway.merchant(funds="10.00")
    assert (await create(gateway, merchant, external_id="PAY-1", amount="10.00")).status == 201
    assert (await create(gateway, merchant, external_id="PAY-1", amount="10.00")).status == 200
    assert (
        read_refusal(await create(gateway, merchant, external_id="PAY-1", amount="10.01")).code == "external_id_reused"
    )


# The JSON Schema that a shop may carry.

SCHEMA = {
    "type": "object",
    "required": ["bank"],
    "properties": {
        "bank": {
            "type": "object",
            "required": ["code"],
            "properties": {"code": {"type": "string", "pattern": "^[0-9]{3}$"}},
        },
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("payment_data", "fields"),
    [
        (None, ["paymentData"]),
        ({}, ["paymentData"]),
        ({"bank": {}}, ["paymentData.bank"]),
        ({"bank": {"code": "s3cr3t"}}, ["paymentData.bank.code"]),
        ({"bank": {"code": 998}}, ["paymentData.bank.code"]),
        ({"bank": {"code": "998"}, "more": "s3cr3t"}, ["paymentData"]),
        ({"bank": {"code": "s3cr3t"}, "tags": ["a", 7]}, ["paymentData.bank.code", "paymentData.tags.1"]),
    ],
)
async def test_payment_data_against_the_shops_schema_is_refused_by_its_path_and_never_by_its_value(
    gateway: Gateway, payment_data: dict[str, Any] | None, fields: list[str]
) -> None:
    merchant = await gateway.merchant(payment_data_schema=SCHEMA)
    answer = await create(gateway, merchant, paymentData=payment_data)
    assert read_refusal(answer) == Refusal(422, "validation_error", "Invalid paymentData", "field_invalid")
    assert [error["field"] for error in answer.json["errors"]] == fields
    assert b"s3cr3t" not in answer.body
    assert await count_payouts(gateway, merchant) == 0


async def test_payment_data_that_fits_the_shops_schema_is_accepted(gateway: Gateway) -> None:
    merchant = await gateway.merchant(payment_data_schema=SCHEMA)
    answer = await create(gateway, merchant, paymentData={"bank": {"code": "998"}, "tags": ["a"]})
    assert answer.status == 201


async def test_the_amounts_scale_and_payment_data_are_named_at_once_when_both_are_wrong(gateway: Gateway) -> None:
    merchant = await gateway.merchant(payment_data_schema=SCHEMA)
    answer = await create(gateway, merchant, amount="1.001", paymentData={"bank": {}})
    assert [error["field"] for error in answer.json["errors"]] == ["amount", "paymentData.bank"]


# The balance.


async def test_the_balance_has_exactly_the_fields_of_the_contract_and_adds_up(gateway: Gateway) -> None:
    merchant = await gateway.merchant(funds="100000.00")
    assert (await create(gateway, merchant, amount="1500.00")).status == 201
    told = await balance(gateway, merchant)
    assert TIME.fullmatch(told["as_of"])
    assert told == {
        "currency": "BDT",
        "shop": {"code": "shop-001"},
        "as_of": told["as_of"],
        "balance": "98500.00",
        "available": "98500.00",
        "pending": "1500.00",
        "frozen": "0.00",
        "credit": "0.00",
        "total": "100000.00",
        "on_hold": "1500.00",
    }


async def test_a_shop_without_money_is_told_zeros(gateway: Gateway) -> None:
    told = await balance(gateway, await gateway.merchant(currency="JPY", funds=None))
    amounts = {name: told[name] for name in ("balance", "available", "pending", "frozen", "credit", "total", "on_hold")}
    assert set(amounts.values()) == {"0"}


async def test_the_balance_equals_the_ledger_after_creates_refusals_and_settlements(gateway: Gateway) -> None:
    merchant = await gateway.merchant(funds="500.00")
    recipients = ["01712345678", "0171230100", "0171230200", "01712345679"]
    creates = [create_body(amount="33.33", card_number=recipients[number % 4]) for number in range(20)]
    answers = await asyncio.gather(*(gateway.create(merchant, body) for body in creates))
    assert sorted(answer.status for answer in answers) == [201] * 15 + [422] * 5
    worker = await gateway.stack.start("worker", "settle", PAYOUTS_RAIL_TIMEOUT_SECONDS="0.3")
    query = "SELECT count(*) FROM payouts WHERE shop_id = :id AND state NOT IN ('success', 'failed', 'verifying')"

    async def settled() -> bool:
        return bool((await fetch(gateway.owner, query, id=merchant.shop.id))[0][0] == 0)

    await eventually(settled, "every payout has ended or waits for the rail")
    await worker.stop()
    told = await balance(gateway, merchant)
    query = "SELECT sum(posted_delta_minor), sum(held_delta_minor) FROM entries WHERE shop_id = :id"
    posted, held = (await fetch(gateway.owner, query, id=merchant.shop.id))[0]
    assert Decimal(told["total"]) == Decimal(posted) / 100
    assert Decimal(told["pending"]) == Decimal(held) / 100
    assert Decimal(told["available"]) == Decimal(posted - held) / 100
    assert held > 0
    assert [finding for finding in await verify(gateway.owner) if finding.count] == []


async def test_credit_is_shown_and_may_be_spent_but_no_more(gateway: Gateway) -> None:
    merchant = await gateway.merchant(funds="10.00")
    query = "UPDATE accounts SET credit_limit_minor = 500 WHERE shop_id = :id"
    await execute(gateway.owner, query, id=merchant.shop.id)
    told = await balance(gateway, merchant)
    assert (told["available"], told["credit"], told["total"]) == ("10.00", "5.00", "15.00")
    assert (await create(gateway, merchant, amount="12.00")).status == 201
    told = await balance(gateway, merchant)
    assert (told["available"], told["pending"], told["credit"], told["total"]) == ("0.00", "12.00", "3.00", "15.00")
    message = "Insufficient balance. Required 3.01, available 3.00."
    assert read_refusal(await create(gateway, merchant, amount="3.01")).message == message


# The id of a request.


@pytest.mark.parametrize("request_id", ["abcdefgh", "A-Z.a_z-09", "a" * 64])
async def test_a_callers_own_request_id_is_kept_on_every_answer(gateway: Gateway, request_id: str) -> None:
    merchant, headers = await gateway.merchant(), {"X-Request-Id": request_id}
    for answer in (
        await gateway.create(merchant, create_body(), headers=headers),
        await gateway.create(merchant, b"{}", headers=headers),
        await gateway.ask(merchant, "GET", BALANCE, headers=headers),
        await gateway.send(plain_request("GET", b"/nothing", headers=headers)),
        await gateway.send(plain_request("PUT", BALANCE.encode(), headers=headers)),
        await gateway.send(plain_request("GET", b"/livez", headers=headers)),
    ):
        assert answer.headers["x-request-id"] == request_id
        assert answer.json.get("request_id", request_id) == request_id


async def test_every_answer_has_a_request_id_of_its_own_when_the_caller_sends_none(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    answers = [await gateway.ask(merchant, "GET", BALANCE) for _ in range(3)]
    answers += [await gateway.create(merchant, b"{}") for _ in range(3)]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 6
