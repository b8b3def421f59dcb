"""What a bank posts is stored before it is answered, once; what it has not signed, or not written as agreed, is not stored."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from common.domain.signing import sign_v1
from tests.bank import SECRET, add_rail
from tests.factories import execute, fetch
from tests.flows import Desk, assert_sound, desk
from tests.stack import Stack, eventually, stack

PATH = "/api/v1/rails/bank/events"
EVENT: dict[str, Any] = {
    "id": "E-1",
    "reference": "po_x",
    "status": "paid",
    "amount_minor": 1000,
    "currency": "BDT",
    "provider_reference": "B-1",
}


@dataclass(frozen=True, slots=True)
class Branch:
    """A gateway, and a bank that may post to it."""

    working: Desk
    running: Stack

    async def post(
        self, event: object, *, path: str = PATH, secret: str = SECRET, body: bytes | None = None, **headers: str | None
    ) -> tuple[int, dict[str, Any]]:
        """Post an event, signed; `headers` replace some, or leave them out."""
        body = json.dumps(event).encode() if body is None else body
        timestamp = str(int(time.time()))
        signed = {
            "Content-Type": "application/json",
            "X-Timestamp": timestamp,
            "X-Signature": sign_v1(secret, timestamp, "POST", path, "", body),
        }
        changed = {f"X-{name.capitalize()}": value for name, value in headers.items()}
        sent = {name: value for name in signed if (value := changed.get(name, signed[name])) is not None}
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.running.base_url + path, data=body, headers=sent) as response,
        ):
            return response.status, await response.json()


@pytest.fixture
async def branch(database_url: str) -> AsyncIterator[Branch]:
    async with desk(database_url) as working, stack(database_url) as running:
        await add_rail(working, "bank", "http://127.0.0.1:9")
        await running.start("gateway")
        yield Branch(working, running)
        await assert_sound(working.owner)


async def stored(branch: Branch) -> list[tuple[Any, ...]]:
    query = "SELECT rail, event_id, reference, outcome, amount_minor, currency, provider_reference FROM rail_events"
    return [tuple(row) for row in await fetch(branch.working.owner, query)]


async def test_an_event_is_stored_once_however_often_it_is_posted(branch: Branch) -> None:
    for _ in range(3):
        assert await branch.post(EVENT) == (200, {"id": "E-1"})
    assert await stored(branch) == [("bank", "E-1", "po_x", "paid", 1000, "BDT", "B-1")]


async def test_a_secret_that_our_keys_do_not_open_has_the_bank_say_it_again(branch: Branch) -> None:
    await execute(branch.working.owner, "UPDATE rails SET secret_sealed = secret_sealed || 'x' WHERE name = 'bank'")
    status, body = await branch.post(EVENT)
    assert (status, body["error"]["reason"]) == (503, "secret_unreadable")
    assert await stored(branch) == []


async def test_another_event_under_the_same_id_is_refused(branch: Branch) -> None:
    await branch.post(EVENT)
    status, body = await branch.post(EVENT | {"amount_minor": 999})
    assert (status, body["code"], body["message"]) == (
        422,
        "event_id_reused",
        "An event of this id said something else",
    )
    assert [row[4] for row in await stored(branch)] == [1000]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestamp": None}, "Timestamp required"),
        ({"signature": None}, "Signature required"),
        ({"timestamp": "yesterday"}, "Invalid timestamp format"),
        ({"timestamp": "1700000000"}, "Timestamp window exceeded"),
        ({"signature": "v1=" + "0" * 64}, "Invalid signature"),
        ({"secret": "another"}, "Invalid signature"),
        ({"path": "/api/v1/rails/nobody/events"}, "Invalid signature"),
        # It has no secret, so nobody can sign for it.
        ({"path": "/api/v1/rails/sandbox/events"}, "Invalid signature"),
    ],
    ids=str,
)
async def test_what_the_bank_has_not_signed_is_not_stored(
    branch: Branch, changes: dict[str, Any], message: str
) -> None:
    status, body = await branch.post(EVENT, **changes)
    assert (status, body["message"], body["code"]) == (401, message, "unauthorized")
    assert await stored(branch) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": ""}, "id"),
        ({"id": "x" * 201}, "id"),
        ({"id": 7}, "id"),
        ({"reference": None}, "reference"),
        ({"status": "done"}, "status"),
        ({"status": ["paid"]}, "status"),
        ({"amount_minor": "1000"}, "amount_minor"),
        ({"amount_minor": 10.5}, "amount_minor"),
        ({"amount_minor": True}, "amount_minor"),
        ({"amount_minor": 0}, "amount_minor"),
        ({"amount_minor": 10**15 + 1}, "amount_minor"),
        ({"currency": "bdt"}, "currency"),
        ({"currency": None}, "currency"),
        ({"provider_reference": "x" * 201}, "provider_reference"),
        ({"failure_code": 5}, "failure_code"),
    ],
    ids=str,
)
async def test_a_field_that_does_not_follow_the_protocol_is_named(
    branch: Branch, change: dict[str, Any], field: str
) -> None:
    status, body = await branch.post(EVENT | change)
    assert (status, [error["field"] for error in body["errors"]]) == (422, [field])
    assert await stored(branch) == []


async def test_a_body_that_is_no_object_is_refused(branch: Branch) -> None:
    for body in (b"", b"[]", b"{", b"\xff", b'{"id":"a","id":"b"}'):
        status, answer = await branch.post(None, body=body)
        assert (status, answer["errors"][0]["field"]) == (422, "body"), body


async def test_a_banks_word_ends_a_payout_of_its_rail(branch: Branch) -> None:
    working = branch.working
    merchant = await working.merchant(rail="bank")
    payout_id = await working.create(merchant)
    (call,) = await working.claim("bank")
    await branch.running.start("worker", "settle")
    assert (await branch.post(EVENT | {"reference": call.reference}))[0] == 200

    async def paid() -> bool:
        return await working.state(payout_id) == "success"

    await eventually(paid, "the word has ended the payout")
