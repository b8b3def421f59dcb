"""Who is let in: the order of the checks, both formulas, the window, keys in every state, networks, scopes and shops."""

import itertools
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gateway.auth import _within
from ops.onboarding import IssuedKey, add_key, add_shop, revoke_key
from tests.factories import ACTOR, Merchant, create_body, execute
from tests.stack import eventually
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

SHOW = f"{PAYOUTS}/PAY-1"
CACHE_SECONDS = 5.0
WINDOW_SECONDS = 60

INVALID_KEY = Refusal(401, "unauthorized", "Invalid API key", "api_key_invalid")
INVALID_SIGNATURE = Refusal(401, "unauthorized", "Invalid signature", "signature_invalid")
ACCESS_DENIED = Refusal(403, "forbidden", "Access denied", "access_denied")


def holder(merchant: Merchant, key: IssuedKey) -> Merchant:
    """The merchant as one who holds another of its keys."""
    return Merchant(merchant.code, merchant.shop, key.public_id, key.secret, merchant.webhook_secret)


async def with_key(gateway: Gateway, merchant: Merchant | None = None, **options: Any) -> Merchant:
    """A merchant with a key of those options."""
    merchant = merchant or await gateway.merchant()
    key = await add_key(gateway.owner, gateway.settings.keyring, merchant=merchant.code, actor=ACTOR, **options)
    return holder(merchant, key)


async def with_shop(gateway: Gateway, merchant: Merchant, code: str, currency: str = "BDT") -> None:
    """One more shop of a merchant, without money."""
    await add_shop(
        gateway.owner,
        gateway.settings.keyring,
        merchant=merchant.code,
        code=code,
        currency=currency,
        rail="sandbox",
        is_default=False,
        webhook_url=None,
        payment_data_schema=None,
        actor=ACTOR,
    )


# What is wrong with a request, in the order of the contract's checks, and what is answered. None: the header is left out.
CHECKS: list[tuple[str, dict[str, str | None]]] = [
    ("API key required", {"X-API-Key": None}),
    ("Timestamp required", {"X-Timestamp": None}),
    ("Signature required", {"X-Signature": None}),
    ("Invalid timestamp format", {"X-Timestamp": "yesterday"}),
    ("Timestamp window exceeded", {"X-Timestamp": "1764928800"}),
    ("Invalid API key", {"X-API-Key": "pk_of_nobody_at_all"}),
    ("Invalid signature", {"X-Signature": "v1=" + "0" * 64}),
]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pair
        for pair in itertools.combinations(CHECKS, 2)
        # One header cannot be wrong in two ways.
        if not pair[0][1].keys() & pair[1][1].keys()
    ],
    ids=lambda check: check[0],
)
async def test_the_first_check_that_fails_answers(
    gateway: Gateway, first: tuple[str, dict[str, str | None]], second: tuple[str, dict[str, str | None]]
) -> None:
    merchant = await gateway.merchant()
    headers: dict[str, str | None] = {**signed_headers(merchant, "GET", BALANCE), **second[1], **first[1]}
    sent = {name: value for name, value in headers.items() if value is not None}
    answer = await gateway.send(plain_request("GET", BALANCE.encode(), headers=sent))
    assert (read_refusal(answer).status, read_refusal(answer).message) == (401, first[0])


async def test_a_401_comes_before_the_403_and_the_403_before_what_is_wrong_with_the_request(gateway: Gateway) -> None:
    merchant = await with_key(gateway, scopes=["balance:read"])
    wrong = await gateway.create(merchant, b"{", headers={"X-Signature": "v1=0"})
    denied = await gateway.create(merchant, b"{", content_type="text/plain")
    assert (read_refusal(wrong), read_refusal(denied)) == (INVALID_SIGNATURE, ACCESS_DENIED)


@pytest.mark.parametrize("header", ["X-API-Key", "X-Timestamp", "X-Signature"])
async def test_an_empty_header_is_a_missing_one(gateway: Gateway, header: str) -> None:
    answer = await gateway.ask(await gateway.merchant(), "GET", BALANCE, headers={header: ""})
    assert read_refusal(answer).message in {"API key required", "Timestamp required", "Signature required"}


def timestamps(moment: float) -> list[str]:
    """A moment in every format that `X-Timestamp` may have."""
    at = datetime.fromtimestamp(moment, UTC)
    return [str(int(moment)), at.strftime("%Y-%m-%dT%H:%M:%SZ"), at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")]


@pytest.mark.parametrize("formula", ["v1", "body"])
@pytest.mark.parametrize("form", range(3))
async def test_both_formulas_open_with_every_format_of_the_time(gateway: Gateway, formula: str, form: int) -> None:
    merchant, body = await gateway.merchant(), create_body(external_id="PAY-1")
    options: dict[str, Any] = {"formula": formula, "timestamp": timestamps(time.time())[form]}
    assert (await gateway.create(merchant, body, **options)).status == 201
    assert (await gateway.ask(merchant, "GET", SHOW, **options)).status == 200
    assert (await gateway.ask(merchant, "GET", BALANCE, **options)).status == 200


@pytest.mark.parametrize(
    "form",
    [
        *(
            "%Y-%m-%dT%H:%M:%S",
            "%Y-%m-%dT%H:%M:%S+00:00",
            "%Y-%m-%d %H:%M:%SZ",
            "%Y-%m-%dT%H:%M:%Sz",
            "%Y-%m-%dT%H:%MZ",
        ),
        *(
            "%Y%m%dT%H%M%SZ",
            "%Y-%m-%dT%H:%M:%S,5Z",
            "%a, %d %b %Y %H:%M:%S GMT",
            "%s.5",
            "+%s",
            "%s000",
            "%Y-%m-%dT%H:%M:%S.1234567890Z",
        ),
    ],
)
async def test_a_time_in_any_other_format_is_refused(gateway: Gateway, form: str) -> None:
    timestamp = datetime.now(UTC).strftime(form.replace("%s", str(int(time.time()))))
    answer = await gateway.ask(await gateway.merchant(), "GET", BALANCE, timestamp=timestamp)
    expected = {"Invalid timestamp format"} | ({"Timestamp window exceeded"} if form == "%s000" else set())
    assert read_refusal(answer).message in expected


@pytest.mark.parametrize("sign", [1, -1])
async def test_the_window_is_open_up_to_its_edge_and_closed_beyond_it_on_both_sides(
    gateway: Gateway, sign: int
) -> None:
    merchant = await gateway.merchant()
    inside = timestamp_now(sign * (WINDOW_SECONDS - 10))
    outside = timestamp_now(sign * (WINDOW_SECONDS + 10))
    assert (await gateway.ask(merchant, "GET", BALANCE, timestamp=inside)).status == 200
    answer = await gateway.ask(merchant, "GET", BALANCE, timestamp=outside)
    assert read_refusal(answer).message == "Timestamp window exceeded"


async def test_the_window_is_as_wide_as_the_setting_says(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    async with gateway.beside(PAYOUTS_SIGNATURE_WINDOW_SECONDS="300") as patient:
        assert (await patient.ask(merchant, "GET", BALANCE, timestamp=timestamp_now(-290))).status == 200
        refused = await patient.ask(merchant, "GET", BALANCE, timestamp=timestamp_now(-310))
        assert read_refusal(refused).message == "Timestamp window exceeded"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda signature: signature.upper(),
        lambda signature: signature[:-1],
        lambda signature: signature + "0",
        lambda signature: signature.removeprefix("v1="),
        lambda signature: "v1=" + signature,
        lambda signature: "V1=" + signature.removeprefix("v1="),
        lambda signature: "v1:" + signature.removeprefix("v1="),
        lambda signature: signature + "," + signature,
        lambda signature: "v1=",
        lambda signature: "0",
    ],
)
async def test_a_signature_that_is_not_exactly_right_is_refused(gateway: Gateway, spoil: Any) -> None:
    merchant = await gateway.merchant()
    headers = signed_headers(merchant, "GET", BALANCE)
    headers["X-Signature"] = spoil(headers["X-Signature"])
    answer = await gateway.send(plain_request("GET", BALANCE.encode(), headers=headers))
    assert read_refusal(answer) == INVALID_SIGNATURE


async def test_a_key_that_takes_v1_only_refuses_the_body_formula(gateway: Gateway) -> None:
    merchant, body = await with_key(gateway, v1_only=True), create_body(external_id="PAY-1")
    assert read_refusal(await gateway.create(merchant, body, formula="body")) == INVALID_SIGNATURE
    assert (await gateway.create(merchant, body)).status == 201
    assert read_refusal(await gateway.ask(merchant, "GET", SHOW, formula="body")) == INVALID_SIGNATURE
    assert (await gateway.ask(merchant, "GET", SHOW)).status == 200


async def test_the_secret_of_another_key_opens_nothing(gateway: Gateway) -> None:
    first, second = await gateway.merchant(), await gateway.merchant()
    mixed = Merchant(first.code, first.shop, first.api_key, second.api_secret, first.webhook_secret)
    assert read_refusal(await gateway.ask(mixed, "GET", BALANCE)) == INVALID_SIGNATURE
    assert read_refusal(await gateway.ask(mixed, "GET", BALANCE, formula="body")) == INVALID_SIGNATURE


async def test_a_secret_that_our_keys_do_not_open_is_our_fault_and_says_nothing_of_the_caller(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    sealed = "UPDATE api_keys SET secret_sealed = secret_sealed || 'x' WHERE public_id = :public_id"
    await execute(gateway.owner, sealed, public_id=merchant.api_key)
    answer = await gateway.create(merchant, create_body())
    message = "Service unavailable. Repeat the same request."
    assert read_refusal(answer) == Refusal(503, "unavailable", message, "secret_unreadable")
    assert answer.headers["retry-after"] == "1"

    gone = await with_key(gateway)
    await revoke_key(gateway.owner, public_id=gone.api_key, actor=ACTOR)
    await execute(gateway.owner, sealed, public_id=gone.api_key)
    assert read_refusal(await gateway.ask(gone, "GET", BALANCE)) == INVALID_KEY


async def test_two_live_keys_of_a_merchant_see_the_same_payouts(gateway: Gateway) -> None:
    old = await gateway.merchant()
    new = await with_key(gateway, old)
    assert (await gateway.create(old, create_body(external_id="PAY-1"))).status == 201
    assert (await gateway.ask(new, "GET", SHOW)).status == 200


async def test_a_key_that_has_expired_or_was_revoked_is_as_unknown_as_one_that_never_was(gateway: Gateway) -> None:
    expired = await with_key(gateway, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    revoked = await with_key(gateway)
    await revoke_key(gateway.owner, public_id=revoked.api_key, actor=ACTOR)
    for merchant in (expired, revoked):
        assert read_refusal(await gateway.ask(merchant, "GET", BALANCE)) == INVALID_KEY
        assert read_refusal(await gateway.ask(merchant, "GET", BALANCE, headers={"X-Signature": "0"})) == INVALID_KEY


async def test_a_key_expires_at_its_time_although_it_is_remembered(gateway: Gateway) -> None:
    expires_at = datetime.now(UTC) + timedelta(seconds=6)
    merchant = await with_key(gateway, expires_at=expires_at)
    assert (await gateway.ask(merchant, "GET", BALANCE)).status == 200

    async def refused() -> bool:
        return (await gateway.ask(merchant, "GET", BALANCE)).status == 401

    await eventually(refused, "the key has expired")
    # It is looked up anew every 5 s: just before it expires, and then not for a while.
    assert datetime.now(UTC) < expires_at + timedelta(seconds=3.5)


async def test_a_revocation_holds_once_the_key_is_no_longer_remembered(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    assert (await gateway.ask(merchant, "GET", BALANCE)).status == 200
    await revoke_key(gateway.owner, public_id=merchant.api_key, actor=ACTOR)

    async def refused() -> Answer | None:
        answer = await gateway.ask(merchant, "GET", BALANCE)
        return answer if answer.status == 401 else None

    assert read_refusal(await eventually(refused, "the key is refused", seconds=CACHE_SECONDS + 2)) == INVALID_KEY


async def test_an_unknown_key_that_is_added_later_opens(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    await execute(
        gateway.owner, "UPDATE api_keys SET public_id = 'pk_not_yet_there' WHERE public_id = :id", id=merchant.api_key
    )
    async with gateway.beside(PAYOUTS_KEY_CACHE_SECONDS="0.2") as forgetful:
        assert read_refusal(await forgetful.ask(merchant, "GET", BALANCE)) == INVALID_KEY
        query = "UPDATE api_keys SET public_id = :id WHERE public_id = 'pk_not_yet_there'"
        await execute(gateway.owner, query, id=merchant.api_key)

        async def opened() -> bool:
            return (await forgetful.ask(merchant, "GET", BALANCE)).status == 200

        await eventually(opened, "the key opens")


async def test_a_closed_merchant_has_no_keys_and_a_suspended_one_no_access(gateway: Gateway) -> None:
    for status, expected in (("closed", INVALID_KEY), ("suspended", ACCESS_DENIED)):
        merchant = await gateway.merchant()
        await execute(
            gateway.owner, "UPDATE merchants SET status = :status WHERE code = :code", status=status, code=merchant.code
        )
        for answer in (await gateway.create(merchant, create_body()), await gateway.ask(merchant, "GET", BALANCE)):
            assert read_refusal(answer) == expected
        wrong = await gateway.ask(merchant, "GET", BALANCE, headers={"X-Signature": "v1=0"})
        assert read_refusal(wrong) == (INVALID_KEY if status == "closed" else INVALID_SIGNATURE)


async def test_a_merchant_that_is_stopped_creates_nothing_from_then_on_although_its_key_is_remembered(
    gateway: Gateway,
) -> None:
    for status, expected in (("closed", INVALID_KEY), ("suspended", ACCESS_DENIED)):
        merchant = await gateway.merchant()
        assert (await gateway.create(merchant, create_body())).status == 201
        await execute(
            gateway.owner, "UPDATE merchants SET status = :status WHERE code = :code", status=status, code=merchant.code
        )
        assert read_refusal(await gateway.create(merchant, create_body())) == expected


async def test_a_shop_that_is_switched_off_creates_nothing_from_then_on_although_it_is_remembered(
    gateway: Gateway,
) -> None:
    merchant = await gateway.merchant()
    assert (await gateway.create(merchant, create_body())).status == 201
    await execute(gateway.owner, "UPDATE shops SET status = 'inactive' WHERE id = :id", id=merchant.shop.id)
    assert read_refusal(await gateway.create(merchant, create_body())).reason == "shop_not_found"


REQUESTS = {
    "payouts:write": ("POST", PAYOUTS),
    "payouts:read": ("GET", SHOW),
    "balance:read": ("GET", BALANCE),
}


@pytest.mark.parametrize("scope", [*REQUESTS, "payins:read", "payins:write"])
async def test_a_scope_opens_its_own_route_and_no_other(gateway: Gateway, scope: str) -> None:
    merchant = await with_key(gateway, scopes=[scope])
    body = create_body(external_id="PAY-1")
    for needed, (method, target) in REQUESTS.items():
        answer = await gateway.ask(merchant, method, target, body if method == "POST" else b"")
        if needed == scope:
            assert answer.status in {200, 201, 404}
        else:
            assert read_refusal(answer) == ACCESS_DENIED


@pytest.mark.parametrize(
    ("networks", "opens"),
    [
        (["127.0.0.1/32"], True),
        (["10.0.0.0/8", "127.0.0.0/8"], True),
        (["0.0.0.0/0"], True),
        (["10.0.0.0/8"], False),
        (["127.0.0.2/32"], False),
        (["::/0"], False),
        (["::1/128", "2001:db8::/32"], False),
    ],
)
async def test_a_key_opens_only_from_its_networks(gateway: Gateway, networks: list[str], *, opens: bool) -> None:
    merchant = await with_key(gateway, networks=networks)
    answer = await gateway.ask(
        merchant, "GET", BALANCE, headers={"X-Forwarded-For": "127.0.0.2", "Forwarded": "for=10.0.0.1"}
    )
    assert answer.status == 200 if opens else read_refusal(answer) == ACCESS_DENIED


@pytest.mark.parametrize(
    ("remote", "network", "within"),
    [
        ("::ffff:127.0.0.1", "127.0.0.0/8", True),
        ("::ffff:10.1.2.3", "127.0.0.0/8", False),
        ("::ffff:127.0.0.1", "::/0", False),
        ("2001:db8::1", "2001:db8::/32", True),
        ("fe80::1%eth0", "fe80::/10", True),
        ("127.0.0.1", "::ffff:127.0.0.1/128", False),
        (None, "0.0.0.0/0", False),
    ],
)
async def test_an_address_of_version_4_is_judged_as_itself_when_it_comes_in_one_of_version_6(
    remote: str | None, network: str, *, within: bool
) -> None:
    assert _within(remote, (network,)) is within


async def test_a_key_for_some_shops_opens_those_and_no_others(gateway: Gateway) -> None:
    everything = await gateway.merchant()
    await with_shop(gateway, everything, "shop-002")
    limited = await with_key(gateway, everything, shops=["shop-002"])
    allowed = await gateway.ask(limited, "GET", f"{BALANCE}?shop_code=shop-002")
    assert (allowed.status, allowed.json["shop"]) == (200, {"code": "shop-002"})
    message = "Shop with code 'shop-001' not found or inactive for this merchant"
    other = await gateway.ask(limited, "GET", f"{BALANCE}?shop_code=shop-001")
    assert read_refusal(other) == Refusal(422, "shop_not_found", message, "shop_not_found")
    assert read_refusal(await gateway.ask(limited, "GET", BALANCE)).status == 422
    assert read_refusal(await gateway.create(limited, create_body())).status == 422
    assert read_refusal(await gateway.create(limited, create_body(shop_code="shop-001"))).reason == "shop_not_found"
    assert (await gateway.ask(everything, "GET", BALANCE)).status == 200


# What a v1 signature binds.


@pytest.mark.parametrize(
    ("signed", "sent"),
    [
        ("b=2&a=1", "a=1&b=2"),
        ("a=1&b=2", "b=2&a=1"),
        ("x=b&x=a", "x=a&x=b"),
        ("x=&x", "x&x="),
        ("a=%2f&a=%2F", "a=%2F&a=%2f"),
        ("shop_code=shop-001&z=%D9%A3", "z=%D9%A3&shop_code=shop-001"),
    ],
)
async def test_query_pairs_are_signed_in_their_sorted_order(gateway: Gateway, signed: str, sent: str) -> None:
    merchant = await gateway.merchant()
    headers = signed_headers(merchant, "GET", f"{BALANCE}?{signed}")
    answer = await gateway.send(plain_request("GET", f"{BALANCE}?{sent}".encode(), headers=headers))
    assert answer.status == 200


@pytest.mark.parametrize(
    ("signed", "sent"),
    [
        (BALANCE, f"{BALANCE}?shop_code=shop-001"),
        (f"{BALANCE}?shop_code=shop-001", BALANCE),
        (f"{BALANCE}?shop_code=shop-001", f"{BALANCE}?shop_code=shop-002"),
        (f"{BALANCE}?a=%2f", f"{BALANCE}?a=%2F"),
        (f"{BALANCE}?a=+", f"{BALANCE}?a=%20"),
        (f"{BALANCE}?a=1", f"{BALANCE}?a=1&a=1"),
        (SHOW, SHOW.replace("PAY", "%50AY")),
        (SHOW.replace("PAY", "%50AY"), SHOW),
        (f"{PAYOUTS}/%3a", f"{PAYOUTS}/%3A"),
        (BALANCE, SHOW),
    ],
)
async def test_the_target_is_signed_as_it_is_sent(gateway: Gateway, signed: str, sent: str) -> None:
    merchant = await gateway.merchant()
    headers = signed_headers(merchant, "GET", signed)
    assert read_refusal(await gateway.send(plain_request("GET", sent.encode(), headers=headers))) == INVALID_SIGNATURE


async def test_a_percent_encoded_path_finds_the_payout_it_spells(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    assert (await gateway.create(merchant, create_body(external_id="PAY:1"))).status == 201
    for name in ("PAY:1", "PAY%3A1", "PAY%3a1", "%50AY%3a%31"):
        answer = await gateway.ask(merchant, "GET", f"{PAYOUTS}/{name}")
        assert (answer.status, answer.json["external_id"]) == (200, "PAY:1")


async def test_a_captured_v1_create_opens_no_other_route_method_query_body_or_time(gateway: Gateway) -> None:
    merchant, body = await gateway.merchant(), create_body(external_id="PAY-1")
    captured = signed_headers(merchant, "POST", PAYOUTS, body) | {"Content-Type": "application/json"}
    assert (await gateway.send(plain_request("POST", PAYOUTS.encode(), body, captured))).status == 201
    later = timestamp_now(1)
    for method, target, sent, changed in (
        ("GET", SHOW, body, {}),
        ("GET", SHOW, b"", {}),
        ("GET", BALANCE, body, {}),
        ("GET", BALANCE, b"", {}),
        ("POST", f"{PAYOUTS}?a=1", body, {}),
        ("POST", f"{PAYOUTS}?", body + b" ", {}),
        ("POST", PAYOUTS, body + b" ", {}),
        ("POST", PAYOUTS, create_body(external_id="PAY-2"), {}),
        ("POST", PAYOUTS, body, {"X-Timestamp": later}),
        ("POST", PAYOUTS.replace("payouts", "%70ayouts"), body, {}),
    ):
        answer = await gateway.send(plain_request(method, target.encode(), sent, captured | changed))
        assert read_refusal(answer) == INVALID_SIGNATURE, (method, target)


async def test_a_captured_body_formula_create_opens_no_other_route_or_method(gateway: Gateway) -> None:
    merchant, body = await gateway.merchant(), create_body(external_id="PAY-1")
    captured = signed_headers(merchant, "POST", PAYOUTS, body, formula="body") | {"Content-Type": "application/json"}
    assert (await gateway.send(plain_request("POST", PAYOUTS.encode(), body, captured))).status == 201
    for target in (SHOW, BALANCE, f"{BALANCE}?shop_code=shop-001"):
        for sent in (body, b""):
            answer = await gateway.send(plain_request("GET", target.encode(), sent, captured))
            assert read_refusal(answer) == INVALID_SIGNATURE, (target, sent)


async def test_a_captured_body_formula_look_up_creates_nothing(gateway: Gateway) -> None:
    merchant, body = await gateway.merchant(), create_body()
    captured = signed_headers(merchant, "GET", BALANCE, formula="body") | {"Content-Type": "application/json"}
    answer = await gateway.send(plain_request("POST", PAYOUTS.encode(), body, captured))
    assert read_refusal(answer) == INVALID_SIGNATURE
    assert read_refusal(await gateway.send(plain_request("POST", PAYOUTS.encode(), b"", captured))).status == 422


async def test_digits_do_not_move_between_time_and_body_in_the_body_formula(gateway: Gateway) -> None:
    merchant, now = await gateway.merchant(), timestamp_now()
    body = json.dumps({"external_id": "PAY-1"}).encode()
    headers = signed_headers(merchant, "POST", PAYOUTS, body, formula="body", timestamp=now)
    # The same bytes, cut elsewhere: the time alone is then another one, far outside of the window or no time at all.
    moved = headers | {"X-Timestamp": now[:-1], "Content-Type": "application/json"}
    answer = await gateway.send(plain_request("POST", PAYOUTS.encode(), now[-1:].encode() + body, moved))
    assert read_refusal(answer).message == "Timestamp window exceeded"


async def test_the_body_formula_with_a_v1_prefix_and_v1_without_it_open_nothing(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    body_formula = signed_headers(merchant, "GET", BALANCE, formula="body")
    v1 = signed_headers(merchant, "GET", BALANCE)
    for headers in (
        body_formula | {"X-Signature": "v1=" + body_formula["X-Signature"]},
        v1 | {"X-Signature": v1["X-Signature"].removeprefix("v1=")},
    ):
        answer = await gateway.send(plain_request("GET", BALANCE.encode(), headers=headers))
        assert read_refusal(answer) == INVALID_SIGNATURE


async def test_an_unknown_key_is_answered_like_a_known_one_but_for_the_message(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    unknown = await gateway.ask(merchant, "GET", BALANCE, headers={"X-API-Key": "pk_" + "0" * 32})
    known = await gateway.ask(merchant, "GET", BALANCE, headers={"X-Signature": "v1=" + "0" * 64})
    assert (read_refusal(unknown), read_refusal(known)) == (INVALID_KEY, INVALID_SIGNATURE)
    assert unknown.headers.keys() == known.headers.keys()
    assert unknown.json.keys() == known.json.keys()
    assert unknown.json["error"].keys() == known.json["error"].keys()


async def test_health_is_told_to_whoever_asks(gateway: Gateway) -> None:
    for target in ("/livez", "/readyz"):
        answer = await gateway.send(plain_request("GET", target.encode()))
        assert answer.status == 200
        assert answer.headers["x-request-id"]


async def test_a_request_signed_once_may_be_sent_again_within_the_window(gateway: Gateway) -> None:
    merchant, body = await gateway.merchant(), create_body()
    request = signed_request(merchant, "POST", PAYOUTS, body)
    assert [(await gateway.send(request)).status for _ in range(3)] == [201, 200, 200]
