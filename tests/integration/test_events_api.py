"""The feed as merchants poll it: shapes, cursors, scopes, shops, and that it tells what a callback would have said."""

import base64
import hashlib
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from ops.onboarding import add_key, add_shop
from tests.factories import ACTOR, Merchant, execute
from tests.flows import Desk, desk
from tests.stack import eventually
from tests.wire import TIME, Answer, Gateway, Refusal, read_refusal
from worker.hearing import hear

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVENTS = "/api/v1/events"
ACCESS_DENIED = Refusal(403, "forbidden", "Access denied", "access_denied")
CURSOR_INVALID = "after must be the next_cursor of an answer about the same shop"
LIMIT_INVALID = "limit must be a whole number from 1 to 200"
QUERY_INVALID = "the query may have shop_code, after, limit and nothing else"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def working(gateway: Gateway) -> AsyncIterator[Desk]:
    """What settles, on the gateway's database."""
    async with desk(gateway.stack.database_url) as opened:
        yield opened


async def poll(gateway: Gateway, merchant: Merchant, query: str = "") -> Answer:
    """`GET /events`."""
    return await gateway.ask(merchant, "GET", EVENTS + (f"?{query}" if query else ""))


async def page(gateway: Gateway, merchant: Merchant, query: str = "") -> dict[str, Any]:
    """The same, answered."""
    answer = await poll(gateway, merchant, query)
    assert answer.status == 200, answer
    body: dict[str, Any] = answer.json
    assert body.keys() == {"data", "has_more", "next_cursor"}
    return body


async def walk(gateway: Gateway, merchant: Merchant, *, limit: int = 50, more: str = "") -> list[dict[str, Any]]:
    """The whole feed, page by page."""
    told: list[dict[str, Any]] = []
    query = f"limit={limit}{more}"
    while True:
        answer = await page(gateway, merchant, query)
        assert len(answer["data"]) <= limit
        told += answer["data"]
        if not answer["has_more"]:
            return told
        query = f"limit={limit}&after={answer['next_cursor']}{more}"


async def told(gateway: Gateway, merchant: Merchant, count: int) -> list[dict[str, Any]]:
    """The feed, once it tells so many events: other transactions of the server may be older."""

    async def enough() -> list[dict[str, Any]] | None:
        events = await walk(gateway, merchant)
        return events if len(events) >= count else None

    events: list[dict[str, Any]] = await eventually(enough, f"{count} events are told")
    assert len(events) == count
    return events


async def with_key(gateway: Gateway, merchant: Merchant, *scopes: str) -> Merchant:
    """The merchant with a key of those scopes."""
    key = await add_key(
        gateway.owner, gateway.settings.keyring, merchant=merchant.code, actor=ACTOR, scopes=list(scopes)
    )
    return Merchant(merchant.code, merchant.shop, key.public_id, key.secret, merchant.webhook_secret)


async def test_the_feed_tells_what_a_callback_would_have_said_though_nobody_is_called(
    gateway: Gateway, working: Desk
) -> None:
    merchant = await gateway.merchant()
    payout_id = await working.create(merchant, external_id="PAY-1")
    await working.settle()

    (event,) = await told(gateway, merchant, 1)

    stored = await working.one("SELECT body FROM events WHERE payout_id = :id", id=payout_id)
    assert event.keys() == {"id", "type", "created_at", "data"}
    assert event["id"].startswith("evt_")
    assert event["type"] == "payout.success"
    assert TIME.fullmatch(event["created_at"])
    assert event["data"] == json.loads(stored.body)
    assert (event["data"]["external_id"], event["data"]["sequence"]) == ("PAY-1", 3)
    assert await working.count("callbacks", "payout_id = :id", id=payout_id) == 0


async def test_an_event_of_the_feed_has_the_id_that_its_callback_carries(gateway: Gateway, working: Desk) -> None:
    merchant = await gateway.merchant()
    await working.create(merchant, external_id="PAY-1", callback_url="http://127.0.0.1:9/")
    await working.settle()
    (event,) = await told(gateway, merchant, 1)

    callbacks = (await gateway.ask(merchant, "GET", "/api/v1/payouts/PAY-1/callbacks")).json["data"]

    assert [each["event_id"] for each in callbacks] == [event["id"]]


@pytest.mark.parametrize("limit", [1, 2, 7, 200])
async def test_pages_of_any_size_tell_everything_once_and_each_payout_in_its_order(
    gateway: Gateway, working: Desk, limit: int
) -> None:
    merchant = await gateway.merchant()
    # Success, then returned: two events each.
    await working.create_many(merchant, 7, recipient="01700000300")
    await working.settle()
    await execute(gateway.owner, "UPDATE rail_events SET due_at = now() WHERE applied_at IS NULL")
    while (await hear(working.worker)).count:
        pass
    await told(gateway, merchant, 14)

    events = await walk(gateway, merchant, limit=limit)

    assert len({event["id"] for event in events}) == len(events) == 14
    types: dict[str, list[str]] = {}
    for event in events:
        types.setdefault(event["data"]["id"], []).append(event["type"])
    assert list(types.values()) == [["payout.success", "payout.refunded"]] * 7


async def test_a_poller_goes_on_with_the_cursor_it_has_until_there_is_something_new(
    gateway: Gateway, working: Desk
) -> None:
    merchant = await gateway.merchant()
    begin = await page(gateway, merchant)
    assert (begin["data"], begin["has_more"]) == ([], False)
    assert await page(gateway, merchant, f"after={begin['next_cursor']}") == begin

    await working.create(merchant)
    await working.settle()
    await told(gateway, merchant, 1)
    first = await page(gateway, merchant, f"after={begin['next_cursor']}")
    assert (len(first["data"]), first["has_more"]) == (1, False)
    assert first["next_cursor"] != begin["next_cursor"]
    again = await page(gateway, merchant, f"after={first['next_cursor']}")
    assert again == {"data": [], "has_more": False, "next_cursor": first["next_cursor"]}

    await working.create(merchant)
    await working.settle()
    await told(gateway, merchant, 2)
    second = await page(gateway, merchant, f"after={first['next_cursor']}")
    assert len(second["data"]) == 1
    assert second["data"] != first["data"]


@pytest.mark.parametrize("txid", [0, 2**63, 2**64 - 1])
@pytest.mark.parametrize("sequence", [2**31 - 1, 2**31, 2**32 - 1])
async def test_a_cursor_that_somebody_computed_is_judged_like_any_other(
    gateway: Gateway, txid: int, sequence: int
) -> None:
    merchant = await gateway.merchant()
    place = struct.pack(">QI16s", txid, sequence, b"\xff" * 16)
    check = hashlib.sha256(merchant.shop.id.bytes + place).digest()[:5]

    answer = await poll(gateway, merchant, f"after={base64.urlsafe_b64encode(place + check).decode()}")

    if txid == 0:
        assert answer.status == 200
    else:
        assert CURSOR_INVALID in read_refusal(answer).message


async def test_a_page_that_is_exactly_full_and_the_last_says_so(gateway: Gateway, working: Desk) -> None:
    merchant = await gateway.merchant()
    await working.create_many(merchant, 2)
    await working.settle()
    await told(gateway, merchant, 2)

    assert (await page(gateway, merchant, "limit=2"))["has_more"] is False
    assert (await page(gateway, merchant, "limit=1"))["has_more"] is True


async def test_payins_are_told_to_those_who_may_read_payins(gateway: Gateway, working: Desk) -> None:
    merchant = await gateway.merchant()
    for _ in range(3):
        await working.create_payin(merchant)
    await working.collect()
    await working.create(merchant)
    await working.settle()
    everything = await told(gateway, merchant, 4)
    assert [event["type"] for event in everything] == ["payin.success"] * 3 + ["payout.success"]

    reader = await with_key(gateway, merchant, "payouts:read")

    assert [event["type"] for event in await walk(gateway, reader)] == ["payout.success"]
    first = await page(gateway, reader, "limit=2")
    assert (first["data"], first["has_more"]) == ([], True), "the page is one of the whole feed"
    assert await walk(gateway, reader, limit=1) == everything[3:]


async def test_only_the_resolved_shop_is_told_of(gateway: Gateway, working: Desk) -> None:
    merchant, other = await gateway.merchant(), await gateway.merchant()
    await add_shop(
        gateway.owner,
        gateway.settings.keyring,
        merchant=merchant.code,
        code="second",
        currency="BDT",
        rail="sandbox",
        is_default=False,
        webhook_url=None,
        payment_data_schema=None,
        actor=ACTOR,
    )
    await working.create(merchant)
    await working.create(other)
    await working.settle()
    (ours,), (theirs,) = await told(gateway, merchant, 1), await told(gateway, other, 1)
    assert ours["id"] != theirs["id"]

    assert await walk(gateway, merchant, more="&shop_code=second") == []
    assert await walk(gateway, merchant, more="&shop_code=shop-001") == [ours]
    unknown = await poll(gateway, merchant, "shop_code=elsewhere")
    assert read_refusal(unknown).reason == "shop_not_found"


async def test_a_cursor_of_another_shop_is_refused_and_passes_over_nothing(gateway: Gateway) -> None:
    merchant, other = await gateway.merchant(), await gateway.merchant()
    cursor = (await page(gateway, other))["next_cursor"]

    answer = await poll(gateway, merchant, f"after={cursor}")

    assert read_refusal(answer) == Refusal(422, "validation_error", CURSOR_INVALID, "field_invalid")
    assert answer.json["errors"] == [{"field": "after", "message": CURSOR_INVALID}]


@pytest.mark.parametrize(
    ("query", "errors"),
    [
        ("after=", [("after", CURSOR_INVALID)]),
        ("after=x", [("after", CURSOR_INVALID)]),
        ("after=%00", [("after", CURSOR_INVALID)]),
        ("after=%F0%9F%A6%86", [("after", CURSOR_INVALID)]),
        ("after=evt_01jeb7a0000000000000000000", [("after", CURSOR_INVALID)]),
        ("after=a&after=b", [("after", "after must be given once")]),
        *(
            (f"limit={limit}", [("limit", LIMIT_INVALID)])
            for limit in ("", "0", "-1", "201", "1.5", "1e2", "010", "%2B5", "%D9%A3", "x", "9" * 5000)
        ),
        ("limit=5&limit=5", [("limit", "limit must be given once")]),
        ("shop_code=a&shop_code=b", [("shop_code", "shop_code must be given once")]),
        ("cursor=x", [("query", QUERY_INVALID)]),
        ("After=x", [("query", QUERY_INVALID)]),
        ("limit=0&offset=7", [("limit", LIMIT_INVALID), ("query", QUERY_INVALID)]),
        ("order=desc&order=asc", [("query", QUERY_INVALID)]),
    ],
)
async def test_nothing_of_the_query_is_ignored(gateway: Gateway, query: str, errors: list[tuple[str, str]]) -> None:
    answer = await poll(gateway, await gateway.merchant(), query)
    assert read_refusal(answer) == Refusal(422, "validation_error", errors[0][1], "field_invalid")
    assert answer.json["errors"] == [{"field": field, "message": message} for field, message in errors]


@pytest.mark.parametrize("limit", ["1", "200"])
async def test_a_limit_at_its_bounds_is_taken(gateway: Gateway, limit: str) -> None:
    assert (await poll(gateway, await gateway.merchant(), f"limit={limit}")).status == 200


async def test_the_feed_needs_the_scope_to_read_payouts_and_the_newer_formula(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    reader = await with_key(gateway, merchant, "payins:read", "payouts:write", "balance:read")
    assert read_refusal(await poll(gateway, reader)) == ACCESS_DENIED
    older = await gateway.ask(merchant, "GET", EVENTS, formula="body")
    assert read_refusal(older).message == "Invalid signature"
    assert (await gateway.ask(merchant, "POST", EVENTS)).headers["allow"] == "GET"
