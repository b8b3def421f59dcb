"""Every message of `api-errors.txt` and every row of the contract's error table: exact text, status and JSON shape."""

import json
from typing import Any
from uuid import uuid4

import pytest

from ops.ports import choose_port
from tests.factories import create_body, execute
from tests.stack import eventually, http_status
from tests.wire import (
    BALANCE,
    PAYOUTS,
    Answer,
    Gateway,
    Refusal,
    plain_request,
    read_refusal,
    signed_headers,
    signed_request,
    timestamp_now,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY_BYTES_MAX = 64 * 1024


def unauthorized(message: str, reason: str) -> Refusal:
    return Refusal(401, "unauthorized", message, reason)


def invalid(message: str) -> Refusal:
    return Refusal(422, "validation_error", message, "field_invalid")


AUTHENTICATION = [
    # What is changed of the headers of a good request (None: left out), and what is answered.
    ({"X-API-Key": None}, unauthorized("API key required", "api_key_required")),
    ({"X-API-Key": "pk_of_nobody"}, unauthorized("Invalid API key", "api_key_invalid")),
    ({"X-Timestamp": None}, unauthorized("Timestamp required", "timestamp_required")),
    ({"X-Timestamp": "yesterday"}, unauthorized("Invalid timestamp format", "timestamp_format_invalid")),
    ({"X-Timestamp": "1764928800"}, unauthorized("Timestamp window exceeded", "timestamp_window_exceeded")),
    ({"X-Signature": None}, unauthorized("Signature required", "signature_required")),
    ({"X-Signature": "v1=" + "0" * 64}, unauthorized("Invalid signature", "signature_invalid")),
]

FIELDS: list[tuple[dict[str, Any], str, str]] = [
    # What is changed of the fields of a good create (None: left out), the field that is named, and the message.
    ({"external_id": None}, "external_id", "external_id is required"),
    ({"external_id": ""}, "external_id", "external_id is required"),
    ({"external_id": 7}, "external_id", "external_id is required"),
    ({"external_id": "a b"}, "external_id", "external_id must be 1 to 128 characters of A-Z a-z 0-9 . _ : -"),
    ({"amount": None}, "amount", "amount must be a positive decimal string"),
    ({"amount": 5000}, "amount", "amount must be a positive decimal string"),
    ({"amount": "five"}, "amount", "amount must be a positive decimal string"),
    ({"amount": "0.00"}, "amount", "amount must be a positive decimal string"),
    ({"amount": "1.005"}, "amount", "amount must be a positive decimal string"),
    ({"currency": None}, "currency", "currency is required"),
    ({"currency": ""}, "currency", "currency is required"),
    ({"currency": 50}, "currency", "currency is required"),
    ({"card_number": None}, "card_number", "card_number is required"),
    ({"card_number": "   "}, "card_number", "card_number is required"),
    ({"card_number": 1712345678}, "card_number", "card_number is required"),
    ({"card_number": "123"}, "card_number", "card_number is not valid"),
    ({"callback_url": "ftp://merchant.example.com/"}, "callback_url", "callback_url must be a valid URL"),
]

RULES = [
    ({"currency": "USD"}, "shop_currency_mismatch", "Shop currency mismatch. Expected BDT."),
    (
        {"amount": "1000000.01"},
        "insufficient_balance",
        "Insufficient balance. Required 1000000.01, available 1000000.00.",
    ),
    ({"shop_code": "X"}, "shop_not_found", "Shop with code 'X' not found or inactive for this merchant"),
]


def example(message: str, code: str, **more: Any) -> dict[str, Any]:
    return {"message": message, "code": code, **more, "error": {"code": code, "message": message}}


# Both bodies of `api-errors.txt`, copied.
STANDARD_EXAMPLE = json.loads(
    """
{
"message": "Invalid API key",
"code": "unauthorized",
"error": {
"code": "unauthorized",
"message": "Invalid API key"
}
}
"""
)
VALIDATION_EXAMPLE = json.loads(
    """
{
"message": "amount must be a positive decimal string",
"code": "validation_error",
"errors": [
{
"field": "amount",
"message": "amount must be a positive decimal string"
}
],
"error": {
"code": "validation_error",
"message": "amount must be a positive decimal string"
}
}
"""
)


def without_additions(body: dict[str, Any]) -> dict[str, Any]:
    """The body less what the contract adds to the given text: `error.reason`, `request_id`, `server_time`."""
    error = {name: value for name, value in body["error"].items() if name != "reason"}
    return {name: value for name, value in body.items() if name not in {"request_id", "server_time"}} | {"error": error}


@pytest.mark.parametrize(("changed", "expected"), AUTHENTICATION, ids=lambda value: str(getattr(value, "message", "")))
async def test_every_authentication_message_is_answered_with_401(
    gateway: Gateway, changed: dict[str, str | None], expected: Refusal
) -> None:
    merchant, body = await gateway.merchant(), create_body()
    headers = signed_headers(merchant, "POST", PAYOUTS, body) | {"Content-Type": "application/json"} | changed
    sent = {name: value for name, value in headers.items() if value is not None}
    assert read_refusal(await gateway.send(plain_request("POST", PAYOUTS.encode(), body, sent))) == expected


@pytest.mark.parametrize(("changed", "field", "message"), FIELDS)
async def test_every_field_message_is_answered_with_422_and_names_its_field(
    gateway: Gateway, changed: dict[str, Any], field: str, message: str
) -> None:
    answer = await gateway.create(await gateway.merchant(), create_body(**changed))
    assert read_refusal(answer) == invalid(message)
    assert answer.json["errors"] == [{"field": field, "message": message}]


@pytest.mark.parametrize(("changed", "code", "message"), RULES)
async def test_every_business_rule_is_answered_with_422_and_a_code_of_its_own(
    gateway: Gateway, changed: dict[str, Any], code: str, message: str
) -> None:
    answer = await gateway.create(await gateway.merchant(), create_body(**changed))
    assert read_refusal(answer) == Refusal(422, code, message, code)


async def test_the_standard_example_is_answered_as_it_is_printed(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    answer = await gateway.create(merchant, create_body(), headers={"X-API-Key": "pk_of_nobody"})
    assert answer.status == 401
    assert without_additions(answer.json) == STANDARD_EXAMPLE


async def test_the_validation_example_is_answered_as_it_is_printed(gateway: Gateway) -> None:
    answer = await gateway.create(await gateway.merchant(), create_body(amount=5000.00))
    assert answer.status == 422
    assert without_additions(answer.json) == VALIDATION_EXAMPLE


async def test_a_reused_external_id_is_answered_with_422_and_names_the_fields(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    assert (await gateway.create(merchant, create_body(external_id="PAY"))).status == 201
    answer = await gateway.create(merchant, create_body(external_id="PAY", amount="11.00"))
    message = "external_id was already used with different content: amount"
    assert read_refusal(answer) == Refusal(422, "external_id_reused", message, "external_id_reused")
    assert answer.json["error"]["fields"] == ["amount"]


async def test_a_merchant_without_a_default_shop_is_told_to_name_one(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    await execute(gateway.owner, "UPDATE shops SET is_default = false WHERE id = :id", id=merchant.shop.id)
    answer = await gateway.create(merchant, create_body())
    assert (answer.status, read_refusal(answer).reason) == (422, "default_shop_missing")


async def test_access_denied_is_answered_with_403(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    await execute(gateway.owner, "UPDATE merchants SET status = 'suspended' WHERE code = :code", code=merchant.code)
    answer = await gateway.create(merchant, create_body())
    assert read_refusal(answer) == Refusal(403, "forbidden", "Access denied", "access_denied")


async def test_an_unknown_payout_is_answered_with_404(gateway: Gateway) -> None:
    answer = await gateway.ask(await gateway.merchant(), "GET", f"{PAYOUTS}/PAY-UNKNOWN")
    assert read_refusal(answer) == Refusal(404, "not_found", "Payout not found", "payout_not_found")


@pytest.mark.parametrize(
    "target", ["/", "/api/v1", "/api/v1/", "/api/v1/nothing", f"{PAYOUTS}/", f"{PAYOUTS}/a/b", "/metrics"]
)
async def test_an_unknown_route_is_answered_with_404_to_whoever_asks(gateway: Gateway, target: str) -> None:
    expected = Refusal(404, "not_found", "Not found", "route_not_found")
    assert read_refusal(await gateway.send(plain_request("GET", target.encode()))) == expected
    assert read_refusal(await gateway.ask(await gateway.merchant(), "GET", target)) == expected


@pytest.mark.parametrize(
    ("method", "target", "allowed"),
    [
        ("DELETE", PAYOUTS, "POST"),
        ("PUT", PAYOUTS, "POST"),
        ("PATCH", f"{PAYOUTS}/PAY-1", "GET"),
        ("POST", f"{PAYOUTS}/PAY-1", "GET"),
        ("POST", BALANCE, "GET"),
        ("OPTIONS", BALANCE, "GET"),
        ("TRACE", BALANCE, "GET"),
    ],
)
async def test_a_wrong_method_is_answered_with_405_and_the_methods_that_are_allowed(
    gateway: Gateway, method: str, target: str, allowed: str
) -> None:
    answer = await gateway.ask(await gateway.merchant(), method, target)
    assert read_refusal(answer) == Refusal(405, "method_not_allowed", "Method not allowed", "method_not_allowed")
    assert answer.headers["allow"] == allowed


async def test_a_body_of_64_kib_is_read_and_one_byte_more_is_answered_with_413(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    fits, too_large = (create_body().ljust(size) for size in (BODY_BYTES_MAX, BODY_BYTES_MAX + 1))
    assert (await gateway.create(merchant, fits)).status == 201
    assert read_refusal(await gateway.create(merchant, too_large)) == Refusal(
        413, "payload_too_large", "Request body is larger than 64 KiB", "body_too_large"
    )


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "*/*"]
)
async def test_another_content_type_is_answered_with_415(gateway: Gateway, content_type: str | None) -> None:
    answer = await gateway.create(await gateway.merchant(), create_body(), content_type=content_type)
    expected = "Content-Type must be application/json"
    assert read_refusal(answer) == Refusal(415, "unsupported_media_type", expected, "content_type_unsupported")


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
async def test_json_is_read_however_its_content_type_is_spelled(gateway: Gateway, content_type: str) -> None:
    assert (await gateway.create(await gateway.merchant(), create_body(), content_type=content_type)).status == 201


async def test_a_key_that_asks_too_often_is_answered_with_429_and_others_are_not(gateway: Gateway) -> None:
    greedy, modest = await gateway.merchant(), await gateway.merchant()
    async with gateway.beside(PAYOUTS_KEY_REQUESTS_PER_SECOND_MAX="1") as limited, limited.connect() as wire:
        # More than one in at least one of the seconds that these take.
        await wire.send(signed_request(greedy, "GET", BALANCE) * 20)
        answers = [await wire.read_answer() for _ in range(20)]
        refused = [read_refusal(answer) for answer in answers if answer.status != 200]
        assert set(refused) == {Refusal(429, "rate_limited", "Too many requests", "rate_limited")}
        assert (await limited.ask(modest, "GET", BALANCE)).status == 200


UNAVAILABLE = "Service unavailable. Repeat the same request."


async def test_an_account_held_by_somebody_else_is_answered_with_503(gateway: Gateway) -> None:
    merchant, body = await gateway.merchant(), create_body()
    async with gateway.beside(PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS="0.1") as impatient:
        async with gateway.owner.begin() as tx:
            await tx.exec_driver_sql(f"SELECT FROM accounts WHERE id = {merchant.shop.account_id} FOR UPDATE")
            answer = await impatient.create(merchant, body)
        assert read_refusal(answer) == Refusal(503, "unavailable", UNAVAILABLE, "account_busy")
        assert (await impatient.create(merchant, body)).status == 201


async def test_a_create_that_waits_too_long_is_answered_with_503(gateway: Gateway) -> None:
    merchant, body = await gateway.merchant(), create_body()
    async with gateway.beside(PAYOUTS_ACCEPT_WAIT_SECONDS_MAX="0.1") as impatient:
        async with gateway.owner.begin() as tx:
            await tx.exec_driver_sql(f"SELECT FROM accounts WHERE id = {merchant.shop.account_id} FOR UPDATE")
            answer = await impatient.create(merchant, body)
        assert read_refusal(answer) == Refusal(503, "unavailable", UNAVAILABLE, "overloaded")


async def test_a_database_that_does_not_answer_in_time_is_answered_with_503(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    async with gateway.beside(PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS="0.2") as impatient:
        async with gateway.owner.begin() as tx:
            await tx.exec_driver_sql("LOCK TABLE payouts IN ACCESS EXCLUSIVE MODE")
            answer = await impatient.ask(merchant, "GET", f"{PAYOUTS}/PAY-1")
        assert read_refusal(answer) == Refusal(503, "unavailable", UNAVAILABLE, "database_slow")

        async def found_missing() -> bool:
            return (await impatient.ask(merchant, "GET", f"{PAYOUTS}/PAY-1")).status == 404

        await eventually(found_missing, "it answers in time again")


async def test_a_database_out_of_reach_is_answered_with_503_and_no_merchant_is_told_that_its_key_is_wrong(
    gateway: Gateway,
) -> None:
    merchant, port = await gateway.merchant(), choose_port()
    url = f"postgresql://payouts@127.0.0.1:{choose_port()}/payouts"
    process = await gateway.stack.launch("gateway", PORT=str(port), DATABASE_URL=url)

    async def lives() -> bool:
        return await http_status(f"http://127.0.0.1:{port}/livez") == 200

    await eventually(lives, "the gateway answers without a database")
    answer = await Gateway(gateway.stack, port, gateway.owner).create(merchant, create_body())
    assert read_refusal(answer) == Refusal(503, "unavailable", UNAVAILABLE, "database_unavailable")
    assert await http_status(f"http://127.0.0.1:{port}/readyz") == 503
    await process.kill()


def assert_bare_500(answer: Answer, *, words: list[str]) -> None:
    """The contract's answer to a fault of ours, and none of the words that would tell about it."""
    assert read_refusal(answer) == Refusal(500, "server_error", "Server error", "server_error")
    assert not [word for word in words if word in answer.body.decode().lower()]


async def test_a_fault_of_ours_is_answered_with_500_and_no_detail(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    words = ["permission", "payouts_gateway", "select", "asyncpg", "sqlalchemy", "exception", "error:"]
    await execute(gateway.owner, "REVOKE INSERT ON payouts FROM payouts_gateway")
    try:
        assert_bare_500(await gateway.create(merchant, create_body()), words=words)
    finally:
        await execute(gateway.owner, "GRANT INSERT ON payouts TO payouts_gateway")
    await execute(gateway.owner, "REVOKE SELECT ON accounts FROM payouts_gateway")
    try:
        assert_bare_500(await gateway.ask(merchant, "GET", BALANCE), words=words)
    finally:
        await execute(gateway.owner, "GRANT SELECT ON accounts TO payouts_gateway")
    assert (await gateway.create(merchant, create_body())).status == 201


async def test_what_could_not_be_stored_leaves_its_external_id_free(gateway: Gateway) -> None:
    merchant, external_id = await gateway.merchant(), f"PAY-{uuid4().hex}"
    body = create_body(external_id=external_id)
    await execute(gateway.owner, "REVOKE INSERT ON payout_due FROM payouts_gateway")
    try:
        assert (await gateway.create(merchant, body)).status == 500
    finally:
        await execute(gateway.owner, "GRANT INSERT ON payout_due TO payouts_gateway")
    assert (await gateway.create(merchant, body)).status == 201


async def test_a_request_that_is_older_than_the_window_is_told_the_time_of_the_server(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    answer = await gateway.ask(merchant, "GET", BALANCE, timestamp=timestamp_now(-3600))
    assert read_refusal(answer).reason == "timestamp_window_exceeded"
    assert answer.json["server_time"].endswith("Z")


async def test_the_table_has_every_message_of_the_given_text() -> None:
    """The messages of `api-errors.txt`, copied; `PayIn not found` comes with the payins."""
    given = {
        "API key required",
        "Invalid API key",
        "Timestamp required",
        "Invalid timestamp format",
        "Timestamp window exceeded",
        "Invalid signature",
        "external_id is required",
        "amount must be a positive decimal string",
        "currency is required",
        "card_number is required",
        "callback_url must be a valid URL",
        "Shop currency mismatch. Expected BDT.",
        "Insufficient balance. Required 1000000.01, available 1000000.00.",
    }
    tested = {expected.message for _, expected in AUTHENTICATION}
    tested |= {message for _, _, message in FIELDS} | {message for _, _, message in RULES}
    assert given <= tested
