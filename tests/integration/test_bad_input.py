"""Whatever a hostile merchant sends is answered in the contract's shape: never a 500, and the next request is served."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.schemas import METADATA_KEY_CHARACTERS_MAX, METADATA_MAX, METADATA_VALUE_CHARACTERS_MAX
from ops.onboarding import change_callbacks
from tests.factories import Merchant, create_body, fetch
from tests.wire import (
    BALANCE,
    PAYOUTS,
    Answer,
    Gateway,
    Refusal,
    chunked,
    plain_request,
    read_refusal,
    sign_raw,
    signed_headers,
    signed_request,
    timestamp_now,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

AMOUNT_INVALID = "amount must be a positive decimal string"
DEPTH_MAX = 32


def nested(depth: int) -> Any:
    """An object that is that many levels deep, itself included."""
    value: Any = 0
    for _ in range(depth):
        value = {"a": value}
    return value


def with_raw(name: str, value: str) -> bytes:
    """A good create, and one more field whose value is given as JSON text."""
    return create_body()[:-1] + f', "{name}": {value}}}'.encode()


async def assert_serves(gateway: Gateway, merchant: Merchant) -> None:
    """The process still does its work."""
    assert (await gateway.create(merchant, create_body())).status == 201


async def assert_stores_nothing(gateway: Gateway, merchant: Merchant) -> None:
    """The merchant has no payout."""
    assert await fetch(gateway.owner, "SELECT 1 FROM payouts WHERE shop_id = :id", id=merchant.shop.id) == []


BODIES: dict[str, tuple[bytes, str]] = {
    # The body and what is said of it.
    "empty": (b"", "Request body must be valid JSON"),
    "blank": (b" \r\n\t ", "Request body must be valid JSON"),
    "no JSON": (b"external_id=PAY-1&amount=1.00", "Request body must be valid JSON"),
    "half a body": (create_body()[:-1], "Request body must be valid JSON"),
    "two bodies": (create_body() + create_body(), "Request body must be valid JSON"),
    "a tail": (create_body() + b"x", "Request body must be valid JSON"),
    "a NUL tail": (create_body() + b"\x00", "Request body must be valid JSON"),
    "single quotes": (b"{'external_id': 'PAY-1'}", "Request body must be valid JSON"),
    "a comma too many": (b'{"external_id": "PAY-1",}', "Request body must be valid JSON"),
    "a comment": (b"/**/" + create_body(), "Request body must be valid JSON"),
    "a line break in a string": (with_raw("description", '"a\nb"'), "Request body must be valid JSON"),
    "NUL, raw": (with_raw("description", '"a\x00b"'), "Request body must be valid JSON"),
    "NaN": (with_raw("x", "NaN"), "Request body must be valid JSON"),
    "Infinity": (with_raw("x", "Infinity"), "Request body must be valid JSON"),
    "-Infinity": (with_raw("x", "-Infinity"), "Request body must be valid JSON"),
    "a number beyond a double": (with_raw("x", "1e400"), "Request body must be valid JSON"),
    "NaN, deep": (with_raw("paymentData", '{"a": [NaN]}'), "Request body must be valid JSON"),
    "an integer of 5,000 digits": (with_raw("x", "9" * 5000), "Request body must be valid JSON"),
    "a negative integer of 60,000 digits": (with_raw("x", "-" + "9" * 60_000), "Request body must be valid JSON"),
    "leading zeros": (with_raw("x", "007"), "Request body must be valid JSON"),
    "hexadecimal": (with_raw("x", "0x7"), "Request body must be valid JSON"),
    "a plus": (with_raw("x", "+7"), "Request body must be valid JSON"),
    "other digits": (with_raw("x", "٣"), "Request body must be valid JSON"),
    "True": (with_raw("x", "True"), "Request body must be valid JSON"),
    "half an escape": (with_raw("x", r'"\u12"'), "Request body must be valid JSON"),
    "an escape that is none": (with_raw("x", r'"\x41"'), "Request body must be valid JSON"),
    "a byte order mark": (b"\xef\xbb\xbf" + create_body(), "Request body must be valid JSON"),
    "UTF-16": (create_body().decode().encode("utf-16"), "Request body must be UTF-8"),
    "UTF-16 without a mark": (create_body().decode().encode("utf-16-le"), "Request body must be valid JSON"),
    "bad UTF-8": (with_raw("description", '"@"').replace(b"@", b"\xff"), "Request body must be UTF-8"),
    "overlong UTF-8": (with_raw("description", '"@"').replace(b"@", b"\xc0\xaf"), "Request body must be UTF-8"),
    "a surrogate in UTF-8": (
        with_raw("description", '"@"').replace(b"@", b"\xed\xa0\x80"),
        "Request body must be UTF-8",
    ),
    "half a character": (b'{"a": "\xe2\x82', "Request body must be UTF-8"),
    "gzip": (gzip.compress(create_body()), "Request body must be UTF-8"),
    "null": (b"null", "Request body must be a JSON object"),
    "a list": (b"[" + create_body() + b"]", "Request body must be a JSON object"),
    "a string": (json.dumps(create_body().decode()).encode(), "Request body must be a JSON object"),
    "a number": (b"1", "Request body must be a JSON object"),
    "a key twice": (with_raw("amount", '"99.00"'), "Request body must not have a key twice"),
    "a key twice with one value": (with_raw("amount", '"10.00"'), "Request body must not have a key twice"),
    "a key twice by an escape": (with_raw(r"\u0061mount", '"99.00"'), "Request body must not have a key twice"),
    "an unknown key twice": (with_raw("x", '1, "x": 1'), "Request body must not have a key twice"),
    "an empty key twice": (with_raw("", '1, "": 1'), "Request body must not have a key twice"),
    "a key twice, nested": (with_raw("metadata", '{"a": "1", "a": "2"}'), "Request body must not have a key twice"),
    "a key twice in a list": (
        with_raw("paymentData", '{"l": [{"a": 1, "a": 1}]}'),
        "Request body must not have a key twice",
    ),
    "NUL, escaped": (with_raw("description", r'"a\u0000b"'), "Request body must not contain NUL or lone surrogates"),
    "NUL in the id": (create_body(external_id="PAY\x00"), "Request body must not contain NUL or lone surrogates"),
    "NUL in a key": (with_raw(r"a\u0000", "1"), "Request body must not contain NUL or lone surrogates"),
    "NUL, deep": (
        with_raw("paymentData", r'{"a": [[{"b": "\u0000"}]]}'),
        "Request body must not contain NUL or lone surrogates",
    ),
    "a high surrogate": (with_raw("description", r'"\ud800"'), "Request body must not contain NUL or lone surrogates"),
    "a low surrogate": (with_raw("description", r'"\udfff"'), "Request body must not contain NUL or lone surrogates"),
    "surrogates the wrong way": (
        with_raw("x", r'"\udc00\ud800"'),
        "Request body must not contain NUL or lone surrogates",
    ),
    "a surrogate in a key": (with_raw(r"\ud800", "1"), "Request body must not contain NUL or lone surrogates"),
    "a surrogate at the greatest depth": (
        with_raw("x", json.dumps(nested(DEPTH_MAX - 1)).replace("0", r'"\ud800"')),
        "Request body must not contain NUL or lone surrogates",
    ),
    "33 levels": (with_raw("x", json.dumps(nested(DEPTH_MAX))), "Request body must not be nested deeper than 32"),
    "33 lists": (with_raw("x", "[" * DEPTH_MAX + "]" * DEPTH_MAX), "Request body must not be nested deeper than 32"),
    "33 levels of which one is a list": (
        with_raw("x", json.dumps(nested(DEPTH_MAX - 1)).replace("0", "[]")),
        "Request body must not be nested deeper than 32",
    ),
    "60,000 brackets": (with_raw("x", "[" * 60_000), "Request body must be valid JSON"),
    "30,000 levels": (with_raw("x", "[" * 30_000 + "]" * 30_000), "Request body must be valid JSON"),
    "10,000 objects": (with_raw("x", '{"":' * 10_000 + "1" + "}" * 10_000), "Request body must be valid JSON"),
}


@pytest.mark.parametrize(("body", "message"), BODIES.values(), ids=BODIES)
async def test_a_body_that_is_not_one_plain_object_is_refused_as_the_field_body(
    gateway: Gateway, body: bytes, message: str
) -> None:
    merchant = await gateway.merchant()
    answer = await gateway.create(merchant, body)
    assert read_refusal(answer) == Refusal(422, "validation_error", message, "field_invalid")
    assert answer.json["errors"] == [{"field": "body", "message": message}]
    await assert_stores_nothing(gateway, merchant)


@pytest.mark.parametrize(
    "body",
    [
        with_raw("x", json.dumps(nested(DEPTH_MAX - 1))),
        with_raw("x", "[" * (DEPTH_MAX - 1) + "]" * (DEPTH_MAX - 1)),
        with_raw("x", json.dumps([[]] * 1000)),
        with_raw("description", '"' + "[" * 100 + '"'),
        with_raw("description", r'"\ud83d\ude00 \\u0000 ☃"'),
        with_raw("description", '"\u2028\x7f\ufeff\ufffd"'),
        with_raw("x", "9" * 4000),
        with_raw("x", "1e308"),
        with_raw("x", "-0.0"),
        with_raw("constructor", '{"__proto__": null}'),
        with_raw("Amount", '"99.00"'),
        b"\n\t " + create_body() + b" \r\n",
    ],
    ids=lambda body: body[-40:].decode(errors="replace"),
)
async def test_what_is_unusual_and_still_json_is_accepted(gateway: Gateway, body: bytes) -> None:
    answer = await gateway.create(await gateway.merchant(), body)
    assert answer.status == 201, answer
    assert answer.json["amount"] == "10.00"


AMOUNTS = [
    *("1e2", "1E2", "٣", "+1", "-1", " 1", "1 ", "1_0", "1,000.00", "NaN", "Infinity", "0x10", "", ".5", "5.", "1..0"),
    *(
        "1.001",
        "0",
        "0.00",
        "-0",
        "10.000",
        "\uff11",
        "1\n",
        "\t1",
        "1\u200b",
        "1\u066b5",
        "1.٣",
        "½",
        "10 BDT",
        "$10",
        "0.001",
        "1.0.0",
    ),
    *("10000000000000.01", "10000000000001", "9" * 40, "9" * 20_000, "0" * 200 + "1", "1." + "0" * 200),
    *(5000, 5000.0, 1e2, 0, -1, True, False, [], ["1"], {}, {"value": "1"}, 10**400),
]


@pytest.mark.parametrize("amount", AMOUNTS, ids=lambda amount: repr(amount)[:24])
async def test_an_amount_that_is_not_a_plain_positive_decimal_string_is_refused(
    gateway: Gateway, amount: object
) -> None:
    merchant = await gateway.merchant()
    answer = await gateway.create(merchant, create_body(amount=amount))
    assert read_refusal(answer) == Refusal(422, "validation_error", AMOUNT_INVALID, "field_invalid")
    assert answer.json["errors"] == [{"field": "amount", "message": AMOUNT_INVALID}]
    await assert_stores_nothing(gateway, merchant)


@pytest.mark.parametrize(("amount", "shown"), [("0.01", "0.01"), ("00010.5", "10.50"), ("7", "7.00"), ("1.0", "1.00")])
async def test_every_spelling_of_a_plain_decimal_is_accepted(gateway: Gateway, amount: str, shown: str) -> None:
    answer = await gateway.create(await gateway.merchant(), create_body(amount=amount))
    assert (answer.status, answer.json["amount"]) == (201, shown)


REQUIRED, NAMED = "external_id is required", "external_id must be 1 to 128 characters of A-Z a-z 0-9 . _ : -"
RECIPIENT_REQUIRED, RECIPIENT_INVALID = "card_number is required", "card_number is not valid"


def each(field: str, message: str, *values: object) -> list[tuple[str, object, str]]:
    """One row per value that the field refuses with that message."""
    return [(field, value, message) for value in values]


WRONG_FIELDS = [
    *each("external_id", REQUIRED, "", 1, 1.5, True, [], {}, ["PAY-1"]),
    *each(
        "external_id",
        NAMED,
        " ",
        ".",
        "..",
        "." * 128,
        "a" * 129,
        "a/b",
        "a b",
        "a\n",
        "ä",
        "٣",
        "a%2fb",
        "'; DROP TABLE--",
        "{a}",
    ),
    *each("currency", "currency is required", "", 1, [], {}, False),
    *each("card_number", RECIPIENT_REQUIRED, "", " ", "     ", 4111111111111111, [], {}),
    *each(
        "card_number",
        RECIPIENT_INVALID,
        "123",
        "1 2 3",
        "a" * 129,
        "0171\t2345678",
        "0171234567\n",
        "٠١٧١٢٣٤٥",
        "a/b/c/d",
        "12345\u00a0678",
    ),
    *each("shop_code", "shop_code must be a string of 1 to 64 characters", "", 1, "a" * 65, "a\nb", []),
    *each("paymentData", "paymentData must be an object", "", 1, [], [{}], "{}", False),
    *each("description", "description must be a string of at most 500 characters", "a" * 501, {}),
    *each("merchant_user_id", "merchant_user_id must be a string of at most 128 characters", "a" * 129, 7),
    *each("merchant_user_ip", "merchant_user_ip must be a string of at most 64 characters", "a" * 65, False),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG_FIELDS, ids=lambda value: repr(value)[:24])
async def test_a_field_that_breaks_its_rule_is_refused_by_name(
    gateway: Gateway, field: str, value: object, message: str
) -> None:
    merchant = await gateway.merchant()
    answer = await gateway.create(merchant, create_body(**{field: value}))
    assert read_refusal(answer) == Refusal(422, "validation_error", message, "field_invalid")
    assert answer.json["errors"] == [{"field": field, "message": message}]
    await assert_stores_nothing(gateway, merchant)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("external_id", "a" * 128),
        ("external_id", "A-Z.a_z:0-9"),
        ("external_id", "...a"),
        ("card_number", "a" * 128),
        ("card_number", "a@b.c"),
        ("card_number", "+880 1712 345 678"),
        ("description", "🦆" * 500),
        ("description", ""),
        ("merchant_user_id", "a" * 128),
        ("merchant_user_ip", "2001:db8::1"),
        ("paymentData", {}),
        *((name, None) for name in ("callback_url", "shop_code", "paymentData", "metadata", "description")),
    ],
)
async def test_a_field_at_its_limit_or_null_is_accepted(gateway: Gateway, field: str, value: object) -> None:
    body = json.dumps(json.loads(create_body()) | {field: value}).encode()
    assert (await gateway.create(await gateway.merchant(), body)).status == 201


METADATA_FITS: list[dict[str, str]] = [
    {},
    {f"key{number}": "" for number in range(METADATA_MAX)},
    {"k" * METADATA_KEY_CHARACTERS_MAX: "v" * METADATA_VALUE_CHARACTERS_MAX},
    {"": "🦆"},
]


@pytest.mark.parametrize("metadata", METADATA_FITS, ids=lambda value: str(value)[:20])
async def test_metadata_within_its_limits_is_kept_and_shown_again(gateway: Gateway, metadata: dict[str, str]) -> None:
    merchant = await gateway.merchant()
    created = await gateway.create(merchant, create_body(external_id="PAY", metadata=metadata))
    assert (created.status, created.json["metadata"]) == (201, metadata)
    assert (await gateway.ask(merchant, "GET", f"{PAYOUTS}/PAY")).json["metadata"] == metadata


@pytest.mark.parametrize(
    "metadata",
    [
        {f"key{number}": "" for number in range(METADATA_MAX + 1)},
        {"k": 1},
        {"k": None},
        {"k": {}},
        {"k": ["v"]},
        {"k": True},
        [],
        ["a"],
        "text",
        7,
        False,
    ],
    ids=lambda value: str(value)[:20],
)
async def test_metadata_beyond_its_limits_is_refused(gateway: Gateway, metadata: object) -> None:
    merchant, message = await gateway.merchant(), "metadata must be an object of at most 20 strings"
    answer = await gateway.create(merchant, create_body(metadata=metadata))
    assert answer.json["errors"] == [{"field": "metadata", "message": message}]
    assert read_refusal(answer).status == 422


@pytest.mark.parametrize(
    "metadata",
    [{"k" * (METADATA_KEY_CHARACTERS_MAX + 1): "v"}, {"k": "v" * (METADATA_VALUE_CHARACTERS_MAX + 1)}],
    ids=["key", "value"],
)
async def test_metadata_whose_texts_are_too_long_is_refused_by_their_limits(
    gateway: Gateway, metadata: dict[str, str]
) -> None:
    merchant = await gateway.merchant()
    message = "metadata must have keys of at most 64 characters and values of at most 500"
    answer = await gateway.create(merchant, create_body(metadata=metadata))
    assert answer.json["errors"] == [{"field": "metadata", "message": message}]


# The setting's default.
DEFAULT_PORTS = {80, 443, 8080, 8443}

CALLBACK_URLS_REFUSED: list[object] = [
    *("", " ", "merchant.example.com", "//merchant.example.com/", "/callbacks", "http://", "https://", "http:///path"),
    *(
        "ftp://merchant.example.com/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "gopher://a.example/",
        "http:merchant.example",
    ),
    *(
        "https://user@merchant.example.com/",
        "https://user:password@merchant.example.com/",
        "https://@merchant.example.com/",
    ),
    *("https://merchant.example.com:99999/", "https://merchant.example.com:0/", "https://merchant.example.com:x/"),
    *(
        "https://merchant.example.com/a b",
        "https://merchant.example.com/\n",
        "https://[::1",
        "https://a..example/",
        "https://.example/",
    ),
    "https://merchant.example.com/" + "a" * 2048,
    *(7, True, [], {}, ["https://merchant.example.com/"]),
]
CALLBACK_URLS_PRIVATE = [
    *(
        "http://127.0.0.1/",
        "http://localhost/",
        "http://[::1]/",
        "http://10.0.0.1/",
        "http://169.254.169.254/latest/meta-data",
    ),
    *(
        "http://2130706433/",
        "http://0x7f.1/",
        "http://127.1/",
        "http://0/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
    ),
    *(
        "http://example.com:22/",
        "http://LOCALHOST./",
        "http://a.localhost/",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://127.0.0.1./",
    ),
]


@pytest.mark.parametrize("url", CALLBACK_URLS_REFUSED, ids=lambda url: str(url)[:40])
async def test_a_callback_url_that_is_no_url_to_call_is_refused(gateway: Gateway, url: object) -> None:
    message = "callback_url must be a valid URL"
    answer = await gateway.create(await gateway.merchant(), create_body(callback_url=url))
    assert read_refusal(answer) == Refusal(422, "validation_error", message, "field_invalid")
    assert answer.json["errors"] == [{"field": "callback_url", "message": message}]


async def test_a_callback_url_into_our_own_network_or_to_another_port_is_refused_unless_the_settings_allow_it(
    gateway: Gateway,
) -> None:
    merchant = await gateway.merchant()
    ports = ",".join(map(str, sorted(DEFAULT_PORTS)))
    async with gateway.beside(PAYOUTS_CALLBACK_PRIVATE_ADDRESSES="0", PAYOUTS_CALLBACK_PORTS=ports) as strict:
        for url in CALLBACK_URLS_PRIVATE:
            answer = await strict.create(merchant, create_body(callback_url=url))
            assert read_refusal(answer).message == "callback_url must be a valid URL", url
        answer = await strict.create(merchant, create_body(callback_url="https://merchant.example.com:8443/a?b=c#d"))
        assert (answer.status, answer.json["callback_url"]) == (201, "https://merchant.example.com:8443/a?b=c#d")
    answer = await gateway.create(merchant, create_body(callback_url="http://127.0.0.1:9000/callbacks"))
    assert answer.status == 201


@pytest.mark.parametrize("target", ["/api/v1/payouts", "/api/v1/payins"])
async def test_scheme_and_port_of_a_callback_are_those_of_the_settings_unless_the_shop_is_an_exception(
    gateway: Gateway, target: str
) -> None:
    plain, excepted = await gateway.merchant(), await gateway.merchant()
    await change_callbacks(
        gateway.owner,
        merchant=excepted.code,
        shop="shop-001",
        http=True,
        ports=[9000],
        reason="a till of 2009",
        actor="tests",
    )
    cases = {
        "https://merchant.example.com/": (201, 422),
        "https://merchant.example.com:9000/": (422, 201),
        "http://merchant.example.com:9000/": (422, 201),
        "http://merchant.example.com/": (422, 422),
    }
    async with gateway.beside(PAYOUTS_CALLBACK_HTTPS_ONLY="1", PAYOUTS_CALLBACK_PORTS="80,443") as strict:
        for url, statuses in cases.items():
            for merchant, status in zip((plain, excepted), statuses, strict=True):
                answer = await strict.ask(merchant, "POST", target, create_body(callback_url=url))
                assert answer.status == status, (url, merchant.code)
                if status == 422:
                    assert read_refusal(answer).message == "callback_url must be a valid URL"
                    assert [error["field"] for error in answer.json["errors"]] == ["callback_url"]
        both = await strict.ask(plain, "POST", target, create_body(amount="1.001", callback_url="http://a.example/"))
        assert [error["field"] for error in both.json["errors"]] == ["amount", "callback_url"]


async def test_all_fields_that_are_wrong_are_named_at_once_in_the_order_of_the_contract(gateway: Gateway) -> None:
    fields = [
        *("external_id", "amount", "currency", "card_number", "callback_url", "shop_code"),
        *("description", "metadata", "merchant_user_id", "merchant_user_ip", "paymentData", "expires_at"),
    ]
    wrong = dict.fromkeys(reversed(fields), 7)
    answer = await gateway.create(await gateway.merchant(), json.dumps(wrong).encode())
    assert read_refusal(answer).message == "external_id is required"
    assert [error["field"] for error in answer.json["errors"]] == fields


async def test_an_empty_object_is_told_of_every_field_it_lacks(gateway: Gateway) -> None:
    answer = await gateway.create(await gateway.merchant(), b"{}")
    assert [error["message"] for error in answer.json["errors"]] == [
        "external_id is required",
        AMOUNT_INVALID,
        "currency is required",
        "card_number is required",
    ]


async def test_field_errors_come_before_the_shop_and_the_shop_before_its_currency(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    answers = [
        await gateway.create(merchant, create_body(amount="x", shop_code="nobodys", currency="XXX")),
        await gateway.create(merchant, create_body(amount="1.001", shop_code="nobodys", currency="XXX")),
        await gateway.create(merchant, create_body(amount="1.001", currency="XXX")),
        await gateway.create(merchant, create_body(amount="1.001")),
    ]
    reasons = [read_refusal(answer).reason for answer in answers]
    assert reasons == ["field_invalid", "shop_not_found", "shop_currency_mismatch", "field_invalid"]


# Bodies on the wire.


@pytest.mark.parametrize("size", [1, 7, 4096])
async def test_a_body_in_chunks_is_read_like_any_other(gateway: Gateway, size: int) -> None:
    merchant, body = await gateway.merchant(), create_body()
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    headers = signed_headers(merchant, "POST", PAYOUTS, body) | {
        "Content-Type": "application/json",
        "Transfer-Encoding": "chunked",
    }
    request = plain_request("POST", PAYOUTS.encode(), b"", headers)
    assert (await gateway.send(request + chunked(*chunks))).status == 201


async def test_chunks_that_never_end_are_refused_at_64_kib(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    headers = signed_headers(merchant, "POST", PAYOUTS) | {"Transfer-Encoding": "chunked"}
    async with gateway.connect() as wire:
        await wire.send(plain_request("POST", PAYOUTS.encode(), b"", headers))
        for _ in range(65):
            await wire.send(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert read_refusal(await wire.read_answer()).status == 413
    await assert_serves(gateway, merchant)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "identity", "nonsense"])
async def test_an_encoded_body_is_taken_as_the_bytes_that_were_signed_and_never_unpacked(
    gateway: Gateway, coding: str
) -> None:
    merchant = await gateway.merchant()
    packed = {"gzip": gzip.compress(create_body()), "deflate": zlib.compress(create_body())}.get(coding, b"\xff")
    answer = await gateway.create(merchant, packed, headers={"Content-Encoding": coding})
    assert read_refusal(answer).message == "Request body must be UTF-8"
    bomb = gzip.compress(b" " * 30_000_000)
    answer = await gateway.create(merchant, bomb, headers={"Content-Encoding": coding})
    assert read_refusal(answer).status == 422
    await assert_serves(gateway, merchant)


async def test_a_body_that_trickles_is_given_up_and_its_connection_closed(gateway: Gateway) -> None:
    merchant, body = await gateway.merchant(), create_body()
    request = signed_request(merchant, "POST", PAYOUTS, body)
    message = "Request body was not received in time"
    async with gateway.beside(PAYOUTS_BODY_TIMEOUT_SECONDS="0.2") as hasty:
        for cut in (len(body), len(body) // 2, 1):
            async with hasty.connect() as wire:
                await wire.send(request[:-cut])
                answer = await wire.read_answer()
                assert read_refusal(answer) == Refusal(422, "validation_error", message, "field_invalid")
                assert answer.headers["connection"] == "close"
        assert (await hasty.create(merchant, body)).status == 201


async def test_the_rest_of_a_body_that_was_given_up_is_never_taken_for_a_request(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    smuggled = signed_request(merchant, "POST", PAYOUTS, create_body())
    headers = signed_headers(merchant, "POST", PAYOUTS) | {"Content-Length": str(len(smuggled) + 1)}
    async with gateway.beside(PAYOUTS_BODY_TIMEOUT_SECONDS="0.2") as hasty, hasty.connect() as wire:
        await wire.send(plain_request("POST", PAYOUTS.encode(), b"", headers))
        assert read_refusal(await wire.read_answer()).status == 422
        await wire.send(smuggled + b"x")
        await wire.wait_closed()
    await assert_stores_nothing(gateway, merchant)


@pytest.mark.parametrize("cut", [1, 20, 60])
async def test_hanging_up_in_the_middle_of_a_body_harms_nobody(gateway: Gateway, cut: int) -> None:
    merchant = await gateway.merchant()
    for _ in range(20):
        async with gateway.connect() as wire:
            await wire.send(signed_request(merchant, "POST", PAYOUTS, create_body())[:-cut])
            wire.abort()
    await assert_stores_nothing(gateway, merchant)
    await assert_serves(gateway, merchant)


REFUSED_BODIES = {
    "no key": lambda _: plain_request("POST", PAYOUTS.encode(), b"x" * 1000),
    "wrong signature": lambda m: signed_request(m, "POST", PAYOUTS, b"x" * 1000, headers={"X-Signature": "v1=0"}),
    "no JSON": lambda m: signed_request(m, "POST", PAYOUTS, b"x" * 1000),
    "wrong type": lambda m: signed_request(m, "POST", PAYOUTS, b"x" * 1000, content_type="text/plain"),
    "too large": lambda m: signed_request(m, "POST", PAYOUTS, b" " * 65_537),
    "unknown route": lambda m: signed_request(m, "POST", "/api/v1/nothing", b"x" * 1000),
    "wrong method": lambda m: signed_request(m, "PUT", PAYOUTS, b"x" * 1000),
    "much too large": lambda m: signed_request(m, "POST", PAYOUTS, b" " * 2_000_000),
}


@pytest.mark.parametrize("make", REFUSED_BODIES.values(), ids=REFUSED_BODIES)
async def test_after_a_refused_body_the_next_request_is_served_or_the_connection_closed(
    gateway: Gateway, make: Any
) -> None:
    merchant = await gateway.merchant()
    async with gateway.connect() as wire:
        await wire.send(make(merchant) + signed_request(merchant, "GET", BALANCE))
        refused = await wire.read_answer()
        assert 400 <= read_refusal(refused).status < 500
        if refused.headers.get("connection") == "close":
            await wire.wait_closed()
        else:
            assert (await wire.read_answer()).status == 200
    await assert_serves(gateway, merchant)


async def test_pipelined_requests_are_answered_in_their_order(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    wanted = [f"PAY-{number}" for number in range(20)]
    requests = [
        signed_request(
            merchant, "POST", PAYOUTS, create_body(external_id=name if number % 2 else "a b", description=name)
        )
        for number, name in enumerate(wanted)
    ]
    async with gateway.connect() as wire:
        await wire.send(b"".join(requests))
        answers = [await wire.read_answer() for _ in wanted]
    assert [answer.status for answer in answers] == [422, 201] * 10
    assert [answer.json["external_id"] for answer in answers if answer.status == 201] == wanted[1::2]


# Targets, methods and headers.


@pytest.mark.parametrize("formula", ["v1", "body"])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "%00",
            "a%00b",
            "%ff",
            "a%ffb",
            "%ed%a0%80",
            "%c0%af",
            "%zz",
            "%",
            "%2",
            "a%2fb",
            "a%2Fb",
            "..",
            ".",
            "%2e%2e",
            "a%0d%0aX:%20y",
        ),
        *(
            "%D9%A3",
            "a%20b",
            "a+b",
            "'",
            "%27%3B--",
            "a" * 129,
            "a" * 7000,
            "a;b",
            "a,b",
            "~",
            "*",
            "$",
            "a%25",
            "a:b@c",
            "-",
            "{a}",
        ),
    ],
    ids=lambda name: name[:20],
)
async def test_a_look_up_of_any_name_is_answered_with_404(gateway: Gateway, name: str, formula: str) -> None:
    merchant = await gateway.merchant()
    answer = await gateway.ask(merchant, "GET", f"{PAYOUTS}/{name}", formula=formula)
    assert read_refusal(answer).status == 404
    assert read_refusal(answer).message in {"Payout not found", "Not found"}


@pytest.mark.parametrize("formula", ["v1", "body"])
@pytest.mark.parametrize(
    "query",
    [
        "shop_code=%00",
        "shop_code=%ff",
        "shop_code=%ed%a0%80",
        "shop_code=",
        "shop_code",
        "shop_code=%",
        "shop_code=%0a",
    ],
)
async def test_a_shop_code_of_any_bytes_is_answered_with_422(gateway: Gateway, query: str, formula: str) -> None:
    answer = await gateway.ask(await gateway.merchant(), "GET", f"{BALANCE}?{query}", formula=formula)
    assert (read_refusal(answer).status, read_refusal(answer).code) == (422, "shop_not_found")


@pytest.mark.parametrize(
    "query", ["&&&", "?", "a=b;c", "%00=1", "=", "a&a&a", "a=" + "x" * 6000, "%ff", "a[]=1&a[]=2", "x=%zz"]
)
async def test_a_query_of_unknown_fields_is_ignored(gateway: Gateway, query: str) -> None:
    assert (await gateway.ask(await gateway.merchant(), "GET", f"{BALANCE}?{query}")).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": "\xe9\xff"},
        {"X-API-Key": "a" * 7000},
        {"X-API-Key": "pk_%00"},
        {"X-API-Key": "' OR 1=1 --"},
        {"X-Timestamp": "\xd9\xa3"},
        {"X-Timestamp": "\xff"},
        {"X-Timestamp": "9" * 5000},
        {"X-Timestamp": "-1"},
        {"X-Timestamp": "1e9"},
        {"X-Timestamp": "NaN"},
        {"X-Timestamp": "9999-99-99T99:99:99Z"},
        {"X-Timestamp": "0000-01-01T00:00:00Z"},
        {"X-Timestamp": "9999-12-31T23:59:59.999999Z"},
        {"X-Signature": "\xff"},
        {"X-Signature": "v1=\xff\xe9"},
        {"X-Signature": "v1=" + "0" * 7000},
        {"X-Signature": "v1="},
        {"X-Signature": "v2=" + "0" * 64},
        {"X-Signature": ""},
        {"X-Timestamp": ""},
        {"X-API-Key": ""},
        {"X-API-Key": "", "X-Timestamp": "", "X-Signature": ""},
    ],
    ids=str,
)
async def test_credentials_of_any_bytes_are_answered_with_401(gateway: Gateway, headers: dict[str, str]) -> None:
    merchant = await gateway.merchant()
    assert read_refusal(await gateway.ask(merchant, "GET", BALANCE, headers=headers)).status == 401
    await assert_serves(gateway, merchant)


@pytest.mark.parametrize(
    "name", ["X-API-Key", "X-Timestamp", "X-Signature", "X-Request-Id", "Content-Type", "Host", "Accept"]
)
async def test_a_header_twice_is_answered_in_the_contracts_shape(gateway: Gateway, name: str) -> None:
    merchant = await gateway.merchant()
    request = signed_request(merchant, "POST", PAYOUTS, create_body(), headers={name.lower(): "first", "Accept": "*/*"})
    answer = await gateway.send(request)
    if answer.status != 201:
        assert 400 <= read_refusal(answer).status < 500
    await assert_serves(gateway, merchant)


@pytest.mark.parametrize(
    "content_type",
    [
        "\xff\xff/;;;",
        'application/json; charset="\\',
        "application/json, text/html",
        "=?utf-8?q?x?=/json",
        ";",
        "/",
        "json",
        "a" * 5000,
    ],
    ids=lambda value: value[:20],
)
async def test_a_content_type_of_any_bytes_is_answered_in_the_contracts_shape(
    gateway: Gateway, content_type: str
) -> None:
    answer = await gateway.create(await gateway.merchant(), create_body(), content_type=content_type)
    if answer.status != 201:
        assert read_refusal(answer).status == 415


@pytest.mark.parametrize(
    "request_id", ["short", "a" * 65, "has a blank", "\xff\xffaaaaaaaa", 'quo"te"quote', "", "new\tline\ttab"]
)
async def test_a_request_id_that_is_not_safe_is_replaced(gateway: Gateway, request_id: str) -> None:
    answer = await gateway.send(plain_request("GET", BALANCE.encode(), headers={"X-Request-Id": request_id}))
    assert read_refusal(answer).status == 401
    assert answer.headers["x-request-id"] != request_id


@pytest.mark.parametrize("target", [BALANCE, PAYOUTS, f"{PAYOUTS}/PAY-1", "/nothing"])
async def test_head_is_answered_without_a_body_and_leaves_the_connection_in_step(gateway: Gateway, target: str) -> None:
    merchant = await gateway.merchant()
    async with gateway.connect() as wire:
        await wire.send(plain_request("HEAD", target.encode()))
        assert (await wire.read_answer(bodiless=True)).status in {404, 405}
        await wire.send(signed_request(merchant, "GET", BALANCE))
        assert (await wire.read_answer()).status == 200


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "TLS/1.3"])
async def test_an_offer_to_upgrade_is_passed_over(gateway: Gateway, upgrade: str) -> None:
    merchant = await gateway.merchant()
    headers = {"Connection": "Upgrade", "Upgrade": upgrade}
    async with gateway.connect() as wire:
        for _ in range(2):
            await wire.send(signed_request(merchant, "POST", PAYOUTS, create_body(), headers=headers))
            assert (await wire.read_answer()).status == 201
            await wire.send(signed_request(merchant, "GET", BALANCE, headers=headers))
            assert (await wire.read_answer()).status == 200


async def test_a_client_that_waits_to_be_told_to_continue_is_told_so(gateway: Gateway) -> None:
    merchant, body = await gateway.merchant(), create_body()
    request = signed_request(merchant, "POST", PAYOUTS, body, headers={"Expect": "100-continue"})
    async with gateway.connect() as wire:
        await wire.send(request[: -len(body)])
        await wire.send(body)
        assert (await wire.read_answer()).status == 201


@pytest.mark.parametrize("target", [PAYOUTS, "/nothing"])
async def test_an_expectation_we_do_not_know_is_answered_in_the_contracts_shape(gateway: Gateway, target: str) -> None:
    answer = await gateway.ask(await gateway.merchant(), "POST", target, create_body(), headers={"Expect": "a miracle"})
    if answer.status != 201:
        assert 400 <= read_refusal(answer).status < 500


@pytest.mark.parametrize(
    "target", ["*", "http://elsewhere.example/api/v1/balance", "localhost:80", f"{BALANCE}#fragment"]
)
@pytest.mark.parametrize("method", ["OPTIONS", "GET", "CONNECT"])
async def test_a_target_in_another_form_is_answered_in_the_contracts_shape(
    gateway: Gateway, method: str, target: str
) -> None:
    answer = await gateway.send(plain_request(method, target.encode()))
    assert 400 <= read_refusal(answer).status < 500


# What is not HTTP.

SECRET_TEXT = "4111111111111111"


def unreadable() -> Iterator[tuple[str, bytes]]:
    """Bytes that no HTTP parser accepts, each with a card number where it can have one."""
    head = f"GET {BALANCE} HTTP/1.1\r\nHost: localhost\r\n".encode()
    post = f"POST {PAYOUTS} HTTP/1.1\r\nHost: localhost\r\n".encode()
    yield "garbage", b"GARBAGE\r\n\r\n"
    yield "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64
    yield "HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield "HTTP/3.0", head.replace(b"HTTP/1.1", b"HTTP/3.0") + b"\r\n"
    yield "NULs", b"\x00" * 100 + b"\r\n\r\n"
    yield "a method of our own", b"PAYOUT" + head[3:] + b"\r\n"
    yield "a method in lower case", b"get" + head[3:] + b"\r\n"
    yield "a blank in the target", head.replace(BALANCE.encode(), f"/{SECRET_TEXT} b".encode()) + b"\r\n"
    yield "a raw byte in the target", head.replace(BALANCE.encode(), f"/{SECRET_TEXT}".encode() + b"\xff") + b"\r\n"
    yield "raw UTF-8 in the target", head.replace(BALANCE.encode(), f"/{SECRET_TEXT}é".encode()) + b"\r\n"
    yield (
        "a raw byte in the query",
        head.replace(BALANCE.encode(), f"{BALANCE}?{SECRET_TEXT}".encode() + b"\xff") + b"\r\n",
    )
    yield "a target that is no URL", head.replace(BALANCE.encode(), f"http://[{SECRET_TEXT}".encode()) + b"\r\n"
    yield "a target of 9,000 bytes", head.replace(BALANCE.encode(), b"/" + SECRET_TEXT.encode() * 600) + b"\r\n"
    yield "a header without a colon", head + SECRET_TEXT.encode() + b"\r\n\r\n"
    yield "NUL in a header's name", head + f"X-Card\x00: {SECRET_TEXT}\r\n\r\n".encode()
    yield "NUL in a header's value", head + f"X-Signature: {SECRET_TEXT}\x00\r\n\r\n".encode()
    yield "a folded header", head + f"X-Card: 1\r\n {SECRET_TEXT}\r\n\r\n".encode()
    yield "a header of 9,000 bytes", head + b"X-Card: " + SECRET_TEXT.encode() * 600 + b"\r\n\r\n"
    yield "1,000 headers", head + b"".join(b"X-%d: a\r\n" % number for number in range(1000)) + b"\r\n"
    yield "bare line feeds", head.replace(b"\r\n", b"\n") + b"\n"
    yield "no host", f"GET {BALANCE} HTTP/1.1\r\n\r\n".encode()
    yield "two lengths", post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"
    yield "a length and chunks", post + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    yield "a negative length", post + b"Content-Length: -1\r\n\r\n"
    yield "a length with a plus", post + b"Content-Length: +2\r\n\r\n{}"
    yield "a length beyond 64 bits", post + b"Content-Length: 99999999999999999999999\r\n\r\n"
    yield "an unknown transfer coding", post + b"Transfer-Encoding: magic\r\n\r\n"
    yield "a chunk without a size", post + f"Transfer-Encoding: chunked\r\n\r\n{SECRET_TEXT}zz\r\n\r\n".encode()
    yield "two content types", post + b"Content-Type: text/plain\r\nContent-Type: application/json\r\n\r\n"


def assert_refused_without_echo(answer: Answer) -> None:
    assert 400 <= read_refusal(answer).status < 500
    assert SECRET_TEXT.encode() not in answer.body


@pytest.mark.parametrize("data", [data for _, data in unreadable()], ids=[name for name, _ in unreadable()])
async def test_what_is_not_http_is_answered_in_the_contracts_shape_and_not_repeated(
    gateway: Gateway, data: bytes
) -> None:
    assert_refused_without_echo(await gateway.send(data))
    await assert_serves(gateway, await gateway.merchant())


async def test_a_signature_over_raw_bytes_is_judged_or_its_request_refused_but_never_a_fault(gateway: Gateway) -> None:
    merchant, timestamp = await gateway.merchant(), timestamp_now()
    for target in (
        f"{PAYOUTS}/a".encode() + b"\xff",
        f"{BALANCE}?shop_code=".encode() + b"\xff\xfe",
        f"{PAYOUTS}/é".encode(),
    ):
        headers = {"X-API-Key": merchant.api_key, "X-Timestamp": timestamp}
        headers["X-Signature"] = sign_raw(merchant.api_secret, timestamp, "GET", target, b"")
        answer = await gateway.send(plain_request("GET", target, headers=headers))
        assert 400 <= answer.status < 500
    await assert_serves(gateway, merchant)
