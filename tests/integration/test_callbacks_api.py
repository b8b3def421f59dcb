"""A payout's callbacks as its merchant sees them, and sending one again: shapes, what is not told, who may, and when not."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from common.db.callbacks import CallbackAttempt, append_callback_attempts, finish_callbacks
from common.db.engine import in_transaction
from common.db.lanes import Lease, Room, claim_told_of
from common.domain.ids import EVENT, PAYOUT, render_id
from ops.onboarding import add_key
from ops.ports import choose_port
from tests.factories import ACTOR, Merchant, execute, fetch
from tests.faults.receiver import Receiver, receiver
from tests.flows import Desk, desk
from tests.stack import eventually, http_status
from tests.wire import PAYOUTS, TIME, Answer, Gateway, Refusal, read_refusal
from worker.callbacks.deliver import Deliverer
from worker.callbacks.send import open_session
from worker.hearing import hear

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALLBACKS = f"{PAYOUTS}/PAY-1/callbacks"
RESEND = f"{CALLBACKS}/resend"
NOWHERE = "http://127.0.0.1:9/told"
PAYOUT_NOT_FOUND = Refusal(404, "not_found", "Payout not found", "payout_not_found")
EVENT_NOT_FOUND = Refusal(404, "not_found", "Not found", "event_not_found")
IN_PROGRESS = Refusal(
    422, "callback_in_progress", "The callback is being sent right now. Try again later.", "callback_in_progress"
)
MISSING = Refusal(422, "callback_missing", "There is no callback to send again", "callback_missing")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def working(gateway: Gateway) -> AsyncIterator[Desk]:
    """What settles, on the gateway's database."""
    async with desk(gateway.stack.database_url) as opened:
        yield opened


async def told(gateway: Gateway, working: Desk, url: str | None = NOWHERE, **fields: Any) -> tuple[Merchant, UUID]:
    """A merchant whose PAY-1 has come to its end, and the event of that."""
    merchant = await gateway.merchant()
    payout_id = await working.create(merchant, external_id="PAY-1", callback_url=url, **fields)
    await working.settle()
    event = await working.one("SELECT id FROM events WHERE payout_id = :id", id=payout_id)
    return merchant, event.id


async def show(gateway: Gateway, merchant: Merchant, target: str = CALLBACKS) -> list[dict[str, Any]]:
    """The callbacks of a payout."""
    answer = await gateway.ask(merchant, "GET", target)
    assert answer.status == 200, answer
    assert answer.json.keys() == {"data"}
    data: list[dict[str, Any]] = answer.json["data"]
    return data


async def resend(gateway: Gateway, merchant: Merchant, body: bytes = b"") -> Answer:
    """`POST …/callbacks/resend`."""
    return await gateway.ask(merchant, "POST", RESEND, body)


async def deliver(working: Desk) -> None:
    """Send what is due, everybody's, and wait until it is recorded."""
    async with open_session(private_allowed=True, ports=frozenset()) as session:
        deliverer = Deliverer(working.worker, working.settings.keyring, session, working.settings)
        while await deliverer.run_round():
            await deliverer.drain(20)


async def log(working: Desk, merchant: Merchant, event_id: UUID, *attempts: dict[str, Any]) -> None:
    """Attempts as a worker records them, ten seconds old."""
    fields = {
        "age_seconds": 10.0,
        "duration_ms": 5,
        "http_status": None,
        "error": None,
        "response_excerpt": b"",
        "address": "10.1.2.3",
        "late": False,
        "dns_ms": None,
        "connect_ms": None,
        "first_byte_ms": None,
        "reused": False,
        "retry_after_seconds": None,
    }
    rows = [
        CallbackAttempt(event_id=event_id, shop_id=merchant.shop.id, **{"attempt_no": number, **fields, **attempt})
        for number, attempt in enumerate(attempts, 1)
    ]
    await in_transaction(working.worker, lambda tx: append_callback_attempts(tx, rows))


async def with_key(gateway: Gateway, merchant: Merchant, *scopes: str) -> Merchant:
    """The merchant with a key of those scopes."""
    key = await add_key(
        gateway.owner, gateway.settings.keyring, merchant=merchant.code, actor=ACTOR, scopes=list(scopes)
    )
    return Merchant(merchant.code, merchant.shop, key.public_id, key.secret, merchant.webhook_secret)


# Looking


async def test_a_callback_that_waits_says_until_when(gateway: Gateway, working: Desk) -> None:
    merchant, event_id = await told(gateway, working)

    (callback,) = await show(gateway, merchant)

    assert TIME.fullmatch(callback["created_at"])
    assert TIME.fullmatch(callback["next_attempt_at"])
    assert callback == {
        "event_id": render_id(EVENT, event_id),
        "type": "payout.success",
        "sequence": 3,
        "url": NOWHERE,
        "state": "pending",
        "created_at": callback["created_at"],
        "next_attempt_at": callback["next_attempt_at"],
        "attempts": [],
    }


async def test_a_delivered_callback_shows_what_its_receiver_said(gateway: Gateway, working: Desk) -> None:
    async with receiver() as merchants_server:
        merchant, _ = await told(gateway, working, merchants_server.url)
        await deliver(working)

    (callback,) = await show(gateway, merchant)

    assert (callback["state"], "next_attempt_at" in callback) == ("delivered", False)
    assert TIME.fullmatch(callback["finished_at"])
    (attempt,) = callback["attempts"]
    assert TIME.fullmatch(attempt["started_at"])
    assert attempt == {
        "attempt": 1,
        "started_at": attempt["started_at"],
        "duration_ms": attempt["duration_ms"],
        "http_status": 200,
        "late": False,
        "response_excerpt": "thank you",
    }


async def test_callbacks_come_in_the_order_of_what_they_tell_and_the_newest_is_sent_again(
    gateway: Gateway, working: Desk
) -> None:
    merchant, _ = await told(gateway, working, recipient="01700000300")
    await execute(gateway.owner, "UPDATE rail_events SET due_at = now() WHERE applied_at IS NULL")
    while (await hear(working.worker)).count:
        pass

    callbacks = await show(gateway, merchant)

    assert [(callback["type"], callback["sequence"]) for callback in callbacks] == [
        ("payout.success", 3),
        ("payout.refunded", 4),
    ]
    assert (await resend(gateway, merchant)).json["event_id"] == callbacks[1]["event_id"]
    named = await resend(gateway, merchant, json.dumps({"event_id": callbacks[0]["event_id"]}).encode())
    assert named.json["event_id"] == callbacks[0]["event_id"]


async def test_neither_an_address_nor_why_a_connection_failed_is_told(gateway: Gateway, working: Desk) -> None:
    merchant, event_id = await told(gateway, working)
    errors = ["address_blocked", "dns_failed", "connection_refused", "connection_failed"]
    await log(working, merchant, event_id, *({"error": error} for error in errors))

    answer = await gateway.ask(merchant, "GET", CALLBACKS)

    (callback,) = answer.json["data"]
    assert [attempt["error"] for attempt in callback["attempts"]] == ["connection_failed"] * 4
    assert not [attempt for attempt in callback["attempts"] if "response_excerpt" in attempt]
    assert b"10.1.2.3" not in answer.body
    assert b"blocked" not in answer.body


async def test_a_guarded_attempt_shows_nothing_of_whom_it_did_not_call(gateway: Gateway, working: Desk) -> None:
    merchant, event_id = await told(gateway, working)
    await log(working, merchant, event_id, {"error": "address_blocked", "response_excerpt": b"of somebody else"})

    assert b"of somebody else" not in (await gateway.ask(merchant, "GET", CALLBACKS)).body


async def test_an_excerpt_is_a_short_text_whatever_was_answered(gateway: Gateway, working: Desk) -> None:
    merchant, event_id = await told(gateway, working)
    await log(
        working,
        merchant,
        event_id,
        {"http_status": 500, "error": "http_5xx", "response_excerpt": b"\x00\xff" + b"x" * 4000},
    )

    (callback,) = await show(gateway, merchant)

    (attempt,) = callback["attempts"]
    assert (attempt["http_status"], attempt["error"]) == (500, "http_5xx")
    assert attempt["response_excerpt"] == "\ufffd\ufffd" + "x" * 1018


async def test_the_newest_hundred_attempts_are_shown(gateway: Gateway, working: Desk) -> None:
    merchant, event_id = await told(gateway, working)
    await log(working, merchant, event_id, *([{"error": "timeout"}] * 130))

    (callback,) = await show(gateway, merchant)

    assert [attempt["attempt"] for attempt in callback["attempts"]] == list(range(31, 131))


async def test_while_it_is_being_sent_no_next_attempt_is_promised(gateway: Gateway, working: Desk) -> None:
    merchant, event_id = await told(gateway, working)
    await claim(working, event_id)

    (callback,) = await show(gateway, merchant)

    assert (callback["state"], "next_attempt_at" in callback) == ("pending", False)


async def test_of_what_was_put_aside_for_people_no_next_attempt_is_promised(gateway: Gateway, working: Desk) -> None:
    merchant, event_id = await told(gateway, working)
    put_aside = "UPDATE callback_due SET due_at = 'infinity', in_lane = true WHERE event_id = :id"
    await execute(working.owner, put_aside, id=event_id)

    (callback,) = await show(gateway, merchant)

    assert (callback["state"], "next_attempt_at" in callback) == ("pending", False)


async def claim(working: Desk, event_id: UUID) -> None:
    """Take one callback as a worker does, and do nothing more."""
    (taken,) = await in_transaction(
        working.worker, lambda tx: claim_told_of(tx, Lease(uuid4(), 60.0), Room(1, 1, 1, 1, {}), [event_id])
    )
    assert taken.event_id == event_id


async def test_a_payout_that_nobody_is_called_about_has_none(gateway: Gateway, working: Desk) -> None:
    merchant, _ = await told(gateway, working, None)
    assert await show(gateway, merchant) == []


async def test_a_payins_callbacks_are_shown_as_well(gateway: Gateway, working: Desk) -> None:
    merchant = await gateway.merchant()
    await working.create_payin(merchant, external_id="IN-1", callback_url=NOWHERE)
    await working.collect()

    (callback,) = await show(gateway, merchant, "/api/v1/payins/IN-1/callbacks")

    assert (callback["type"], callback["state"], callback["url"]) == ("payin.success", "pending", NOWHERE)
    unknown = await gateway.ask(merchant, "GET", "/api/v1/payins/IN-404/callbacks")
    assert read_refusal(unknown) == Refusal(404, "not_found", "PayIn not found", "payin_not_found")
    reader = await with_key(gateway, merchant, "payouts:read")
    denied = await gateway.ask(reader, "GET", "/api/v1/payins/IN-1/callbacks")
    assert read_refusal(denied).reason == "access_denied"


# Who may


@pytest.mark.parametrize(("method", "target"), [("GET", CALLBACKS), ("POST", RESEND)])
async def test_what_is_not_there_or_not_ours_is_answered_with_404(
    gateway: Gateway, working: Desk, method: str, target: str
) -> None:
    await told(gateway, working)
    other = await gateway.merchant()
    for path in (target, target.replace("PAY-1", "PAY-404"), target.replace("PAY-1", "PAY%00")):
        assert read_refusal(await gateway.ask(other, method, path)) == PAYOUT_NOT_FOUND


@pytest.mark.parametrize(
    ("method", "target", "scope", "others"),
    [
        ("GET", CALLBACKS, "payouts:read", ("payouts:write", "payins:read", "balance:read")),
        ("POST", RESEND, "payouts:write", ("payouts:read", "payins:write", "balance:read")),
    ],
)
async def test_looking_needs_reading_and_sending_again_needs_writing(
    gateway: Gateway, working: Desk, method: str, target: str, scope: str, others: Sequence[str]
) -> None:
    merchant, _ = await told(gateway, working)
    denied = await gateway.ask(await with_key(gateway, merchant, *others), method, target)
    assert read_refusal(denied) == Refusal(403, "forbidden", "Access denied", "access_denied")
    assert (await gateway.ask(await with_key(gateway, merchant, scope), method, target)).status == 200


@pytest.mark.parametrize(("method", "target", "body"), [("GET", CALLBACKS, b""), ("POST", RESEND, b"{}")])
async def test_the_older_formula_opens_neither(
    gateway: Gateway, working: Desk, method: str, target: str, body: bytes
) -> None:
    merchant, _ = await told(gateway, working)
    answer = await gateway.ask(merchant, method, target, body, formula="body")
    assert read_refusal(answer).message == "Invalid signature"


async def test_wrong_methods_are_told_the_right_ones(gateway: Gateway) -> None:
    merchant = await gateway.merchant()
    assert (await gateway.ask(merchant, "POST", CALLBACKS)).headers["allow"] == "GET"
    assert (await gateway.ask(merchant, "GET", RESEND)).headers["allow"] == "POST"


# Sending again


async def called(gateway: Gateway, working: Desk, server: Receiver) -> tuple[Merchant, UUID]:
    """A merchant whose PAY-1 was told, more than a second ago."""
    merchant, event_id = await told(gateway, working, server.url)
    await deliver(working)
    await execute(
        gateway.owner,
        "UPDATE callback_attempts SET started_at = started_at - interval '10 s' WHERE event_id = :id",
        id=event_id,
    )
    return merchant, event_id


@pytest.mark.parametrize("named", [False, True])
async def test_a_delivered_callback_is_sent_again_with_the_same_bytes_and_id(
    gateway: Gateway, working: Desk, named: bool
) -> None:
    async with receiver() as server:
        merchant, event_id = await called(gateway, working, server)
        body = b'{"event_id":"%s"}' % render_id(EVENT, event_id).encode() if named else b""

        answer = await resend(gateway, merchant, body)

        assert answer.status == 200
        callback = answer.json
        assert (callback["event_id"], callback["state"]) == (render_id(EVENT, event_id), "pending")
        assert "finished_at" not in callback
        assert len(callback["attempts"]) == 1
        assert await show(gateway, merchant) == [callback]
        await deliver(working)
        first, second = server.deliveries
        second.assert_signed(merchant.webhook_secret)
        assert (first.webhook_id, first.body) == (second.webhook_id, second.body)
    (callback,) = await show(gateway, merchant)
    assert (callback["state"], [each["attempt"] for each in callback["attempts"]]) == ("delivered", [1, 2])


@pytest.mark.parametrize("body", [b"", b"{}", b'{"event_id":null}', b'{"unknown":1}'])
async def test_without_an_event_the_newest_one_is_meant(gateway: Gateway, working: Desk, body: bytes) -> None:
    merchant, event_id = await told(gateway, working)
    answer = await resend(gateway, merchant, body)
    assert (answer.status, answer.json["event_id"]) == (200, render_id(EVENT, event_id))


@pytest.mark.parametrize("state", ["exhausted", "rejected"])
async def test_a_callback_that_was_given_up_is_sent_again(gateway: Gateway, working: Desk, state: str) -> None:
    merchant, event_id = await told(gateway, working)
    await in_transaction(working.worker, lambda tx: finish_callbacks(tx, {(event_id, merchant.shop.id): state}))
    assert [callback["state"] for callback in await show(gateway, merchant)] == [state]

    answer = await resend(gateway, merchant)

    assert (answer.status, answer.json["state"]) == (200, "pending")


async def test_a_callback_that_waits_for_its_next_attempt_is_sent_now(gateway: Gateway, working: Desk) -> None:
    merchant, event_id = await told(gateway, working)
    await execute(
        gateway.owner, "UPDATE callback_due SET due_at = now() + interval '1 h' WHERE event_id = :id", id=event_id
    )

    answer = await resend(gateway, merchant)

    assert answer.status == 200
    due = "SELECT due_at <= now() AS now FROM callback_due WHERE event_id = :id"
    assert (await working.one(due, id=event_id)).now


async def test_while_it_is_being_sent_it_is_not_sent_again(gateway: Gateway, working: Desk) -> None:
    merchant, event_id = await told(gateway, working)
    await claim(working, event_id)

    assert read_refusal(await resend(gateway, merchant)) == IN_PROGRESS


async def test_what_was_sent_within_the_last_second_is_not_sent_again(gateway: Gateway, working: Desk) -> None:
    merchant, event_id = await told(gateway, working)
    await log(working, merchant, event_id, {"error": "timeout", "age_seconds": -3600.0})

    assert read_refusal(await resend(gateway, merchant)) == IN_PROGRESS


async def test_many_who_send_it_again_at_once_send_it_once(gateway: Gateway, working: Desk) -> None:
    async with receiver() as server:
        merchant, _ = await called(gateway, working, server)
        answers = await asyncio.gather(*(resend(gateway, merchant) for _ in range(12)))
        await deliver(working)
        assert {answer.status for answer in answers} <= {200, 422}
        assert 200 in {answer.status for answer in answers}
        assert len(server.deliveries) == 2


async def test_without_a_callback_there_is_nothing_to_send_again(gateway: Gateway, working: Desk) -> None:
    merchant, _ = await told(gateway, working, None)
    assert read_refusal(await resend(gateway, merchant)) == MISSING
    pending = await gateway.merchant()
    await working.create(pending, external_id="PAY-1", callback_url=NOWHERE)
    assert read_refusal(await resend(gateway, pending)) == MISSING


async def test_an_event_of_somebody_else_or_of_nobody_is_not_found(gateway: Gateway, working: Desk) -> None:
    merchant, event_id = await told(gateway, working)
    _, foreign = await told(gateway, working)
    unknown = [
        render_id(EVENT, foreign),
        render_id(EVENT, uuid4()),
        render_id(PAYOUT, event_id),
        "",
        "evt_",
        "🦆",
    ]
    before = await fetch(gateway.owner, "SELECT event_id, due_at FROM callback_due ORDER BY 1")
    for event in unknown:
        body = json.dumps({"event_id": event}).encode()
        assert read_refusal(await resend(gateway, merchant, body)) == EVENT_NOT_FOUND, event
    assert await fetch(gateway.owner, "SELECT event_id, due_at FROM callback_due ORDER BY 1") == before


@pytest.mark.parametrize(
    ("body", "field"),
    [(b"[]", "body"), (b"{", "body"), (b'{"event_id":7}', "event_id"), (b'{"event_id":{}}', "event_id")],
)
async def test_a_body_that_is_none_is_refused_by_its_field(
    gateway: Gateway, working: Desk, body: bytes, field: str
) -> None:
    merchant, _ = await told(gateway, working)
    answer = await resend(gateway, merchant, body)
    assert read_refusal(answer).code == "validation_error"
    assert [error["field"] for error in answer.json["errors"]] == [field]


async def test_workers_are_told_so_that_it_leaves_at_once(gateway: Gateway, working: Desk) -> None:
    """Seen at a gateway whose broker is away: it counts what it would have said."""
    merchant, event_id = await told(gateway, working)
    port = choose_port()
    amqp_url = f"amqp://guest:guest@127.0.0.1:{choose_port()}/"
    process = await gateway.stack.launch("gateway", PORT=str(port), AMQP_URL=amqp_url)

    async def lives() -> bool:
        return await http_status(f"http://127.0.0.1:{port}/livez") == 200

    await eventually(lives, "the gateway answers without a broker")
    beside = Gateway(gateway.stack, port, gateway.owner)
    assert (await beside.ask(merchant, "POST", RESEND)).json["event_id"] == render_id(EVENT, event_id)
    metrics = await Gateway(gateway.stack, process.admin_port, gateway.owner).send(
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    )
    assert b'payouts_messages_published_total{outcome="dropped",work="callback"} 1.0' in metrics.body
    await process.stop()
