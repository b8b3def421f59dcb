"""Delivery: what each attempt does to a callback, on the contract's schedule, whatever happens to the worker.

The merchant is a real server that answers what a test tells it to.
"""

import asyncio
import hashlib
import hmac
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any
from uuid import UUID, uuid4

import pytest
from standardwebhooks import Webhook

from common.db.callbacks import resend_callback
from common.db.engine import in_transaction
from common.db.invariants import verify
from common.db.lanes import ClaimedCallback
from common.domain.ids import EVENT, render_id
from ops.onboarding import change_callbacks
from tests.factories import Merchant, engine, execute, fetch
from tests.flows import Desk, assert_sound, desk, heal_lanes, pass_callback_time, take_callbacks
from tests.names import NO_SUCH_NAME, name_server
from worker.callbacks.deliver import Deliverer
from worker.callbacks.guard import Resolver
from worker.callbacks.recording import Ended, record_attempts
from worker.callbacks.send import Attempt, open_session

MINUTE, HOUR = 60, 3600
# The contract, "Callbacks", and architecture, "Callbacks": seconds after the attempt before.
DELAYS = (
    10, 30, 2 * MINUTE, 10 * MINUTE, 30 * MINUTE, 1 * HOUR, 2 * HOUR, 4 * HOUR, 6 * HOUR, 8 * HOUR, 10 * HOUR,
    12 * HOUR, 12 * HOUR, 16 * HOUR,
)  # fmt: skip
SLACK_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it came in; header names in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Receiver:
    """A merchant's server. `answer` is the status line and headers of every answer from now on."""

    port: int
    answer: str = "200 OK"
    calls: list[Call] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/told"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
                headers = {name.lower(): value for name, _, value in (item.partition(": ") for item in lines)}
                body = await reader.readexactly(int(headers["content-length"]))
                self.calls.append(Call(line.split(" ")[1], headers, body))
                content = "" if self.answer.startswith("204") else "Content-Length: 2\r\n\r\nok"
                writer.write(f"HTTP/1.1 {self.answer}\r\n{content or chr(13) + chr(10)}".encode())
                await writer.drain()
        writer.close()


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver(0)
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    async with server:
        yield receiver


@dataclass(frozen=True, slots=True)
class Stage:
    """A merchant, its server, and somebody who delivers."""

    desk: Desk
    merchant: Merchant
    receiver: Receiver
    deliverer: Deliverer

    async def tell(self, count: int = 1, url: str | None = None) -> list[UUID]:
        """Payouts that came to an end; the ids of their events."""
        await self.desk.create_many(self.merchant, count, callback_url=url or self.receiver.url)
        await self.desk.settle()
        return [row.id for row in await fetch(self.desk.owner, "SELECT id FROM events ORDER BY id")]

    async def deliver(self) -> None:
        """One round, to its end."""
        await self.deliverer.run_round()
        await self.deliverer.drain(20)

    async def travel(self) -> None:
        """To the time when everything is due, leases included."""
        await pass_callback_time(self.desk.owner)

    async def callback(self) -> Any:
        """The only callback, and what is due of it."""
        return await self.desk.one(
            "SELECT c.state, c.finished_at, d.step, d.attempts_made, d.lease_token,"
            " extract(epoch FROM d.due_at - now())::float8 AS due_in"
            " FROM callbacks c LEFT JOIN callback_due d USING (event_id, shop_id)"
        )

    async def attempts(self) -> list[Any]:
        """The log of attempts."""
        return await fetch(self.desk.owner, "SELECT * FROM callback_attempts ORDER BY event_id, attempt_no")

    async def claim(self, token: UUID) -> ClaimedCallback:
        """Take the only callback and do nothing: as if killed or paused before the call."""
        (claimed,) = await in_transaction(self.desk.worker, lambda tx: take_callbacks(tx, token, 10))
        return claimed

    async def record(self, *ended: Ended) -> None:
        await in_transaction(self.desk.worker, lambda tx: record_attempts(tx, ended, now=0.0), attempts_max=1)


@asynccontextmanager
async def staging(
    database_url: str,
    *,
    private_allowed: bool = True,
    resolver: Resolver | None = None,
    https_only: bool = False,
    **overrides: Any,
) -> AsyncIterator[Stage]:
    async with (
        desk(database_url) as working,
        receiving() as receiver,
        open_session(
            private_allowed=private_allowed, https_only=https_only, ports=frozenset(), resolver=resolver
        ) as session,
    ):
        config = replace(working.settings, scan_interval_seconds=0.0, **overrides)
        deliverer = Deliverer(working.worker, config.keyring, session, config)
        yield Stage(working, await working.merchant(), receiver, deliverer)


def _ended(callback: ClaimedCallback, token: UUID, status: int) -> Ended:
    error = None if status < 300 else "http_5xx"
    return Ended(callback, token, Attempt(status, error, b"", "127.0.0.1", 5, 0.0), ended_at=0.0, luck=0.0)


async def test_a_2xx_delivers_the_stored_bytes_under_both_signatures(database_url: str) -> None:
    async with staging(database_url) as stage:
        (event_id,) = await stage.tell()
        await stage.deliver()
        (call,) = stage.receiver.calls
        stored = await stage.desk.one("SELECT body FROM events")
        assert call.body == stored.body
        assert call.path == "/told"
        assert call.headers["content-type"] == "application/json"
        assert call.headers["webhook-id"] == render_id(EVENT, event_id)
        verified = Webhook(stage.merchant.webhook_secret).verify(call.body, call.headers)
        assert verified == json.loads(stored.body)
        signed = call.headers["x-timestamp"].encode() + call.body
        key = stage.merchant.webhook_secret.encode()
        assert call.headers["x-signature"] == hmac.new(key, signed, hashlib.sha256).hexdigest()

        callback = await stage.callback()
        assert (callback.state, callback.step) == ("delivered", None)
        (attempt,) = await stage.attempts()
        assert (attempt.attempt_no, attempt.http_status, attempt.error, attempt.late) == (1, 200, None, False)
        assert (attempt.response_excerpt, str(attempt.address)) == (b"ok", "127.0.0.1")
        await assert_sound(stage.desk.owner)


async def test_a_callback_whose_attempts_are_no_longer_kept_is_sound(database_url: str) -> None:
    async with staging(database_url) as stage:
        await stage.tell()
        await stage.deliver()
        await execute(stage.desk.owner, "DELETE FROM callback_attempts")
        broken = {finding.rule.name for finding in await verify(stage.desk.owner) if finding.count}
        assert broken == {"delivered_callback_has_a_2xx"}
        await execute(stage.desk.owner, "UPDATE callbacks SET finished_at = now() - interval '30 days'")
        await assert_sound(stage.desk.owner)


@pytest.mark.parametrize("status", ["200 OK", "201 Created", "202 Accepted", "204 No Content", "299 Fine"])
async def test_any_2xx_delivers(database_url: str, status: str) -> None:
    async with staging(database_url) as stage:
        await stage.tell()
        stage.receiver.answer = status
        await stage.deliver()
        assert (await stage.callback()).state == "delivered"


async def test_failures_are_repeated_at_the_contracts_delays_until_the_schedule_is_exhausted(database_url: str) -> None:
    async with staging(database_url) as stage:
        (event_id,) = await stage.tell()
        stage.receiver.answer = "503 Not Now"
        for step, delay in enumerate(DELAYS, 1):
            await stage.deliver()
            callback = await stage.callback()
            assert (callback.state, callback.step, callback.attempts_made) == ("pending", step, step)
            assert callback.lease_token is None
            jitter = min(max(delay * 0.1, 1.0), 15.0 * MINUTE)
            assert delay - SLACK_SECONDS < callback.due_in <= delay + jitter
            await stage.travel()
        await stage.deliver()
        callback = await stage.callback()
        assert (callback.state, callback.step) == ("exhausted", None)

        attempts = await stage.attempts()
        assert [row.attempt_no for row in attempts] == list(range(1, len(DELAYS) + 2))
        assert {(row.http_status, row.error, row.late) for row in attempts} == {(503, "http_5xx", False)}
        assert len(stage.receiver.calls) == len(DELAYS) + 1
        assert len({call.body for call in stage.receiver.calls}) == 1
        assert {call.headers["webhook-id"] for call in stage.receiver.calls} == {render_id(EVENT, event_id)}
        for call in stage.receiver.calls:
            Webhook(stage.merchant.webhook_secret).verify(call.body, call.headers)
        await assert_sound(stage.desk.owner)

        await stage.travel()
        await stage.deliver()
        assert len(stage.receiver.calls) == len(DELAYS) + 1, "nothing is due any more"


async def test_what_is_exhausted_can_be_sent_again(database_url: str) -> None:
    async with staging(database_url) as stage:
        (event_id,) = await stage.tell()
        stage.receiver.answer = "500 No"
        await execute(stage.desk.owner, "UPDATE callback_due SET step = :last", last=len(DELAYS))
        await stage.deliver()
        assert (await stage.callback()).state == "exhausted"
        ops = engine(database_url, role="payouts_ops")
        assert await in_transaction(ops, lambda tx: resend_callback(tx, event_id))
        await ops.dispose()
        assert (await stage.callback()).state == "pending"
        stage.receiver.answer = "200 OK"
        await stage.deliver()
        assert (await stage.callback()).state == "delivered"
        assert [row.attempt_no for row in await stage.attempts()] == [1, 2]
        assert len({(call.body, call.headers["webhook-id"]) for call in stage.receiver.calls}) == 1
        await assert_sound(stage.desk.owner)


async def test_what_is_being_sent_is_not_sent_again_beside_it(database_url: str) -> None:
    async with staging(database_url) as stage:
        (event_id,) = await stage.tell()
        token = uuid4()
        await stage.claim(token)
        ops = engine(database_url, role="payouts_ops")
        assert not await in_transaction(ops, lambda tx: resend_callback(tx, event_id))
        await ops.dispose()
        callback = await stage.callback()
        assert callback.lease_token == token
        assert callback.due_in > 50


@pytest.mark.parametrize(
    ("asked", "least", "most", "logged"),
    [
        ("120", 120, 121, 120),
        ("1", 10, 11, 1),
        ("999999", 6 * HOUR, 6 * HOUR + 1, 999_999),
        ("soon", 10, 11, None),
    ],
)
async def test_retry_after_lengthens_a_delay_within_bounds(
    database_url: str, asked: str, least: float, most: float, logged: int | None
) -> None:
    async with staging(database_url) as stage:
        await stage.tell()
        stage.receiver.answer = f"429 Slower\r\nRetry-After: {asked}"
        await stage.deliver()
        assert least - SLACK_SECONDS < (await stage.callback()).due_in <= most
        assert [row.retry_after_seconds for row in await stage.attempts()] == [logged]


async def test_410_rejects_for_good(database_url: str) -> None:
    async with staging(database_url) as stage:
        await stage.tell()
        stage.receiver.answer = "410 Gone"
        await stage.deliver()
        callback = await stage.callback()
        assert (callback.state, callback.step) == ("rejected", None)
        await stage.travel()
        await stage.deliver()
        assert len(stage.receiver.calls) == 1
        await assert_sound(stage.desk.owner)


@pytest.mark.parametrize(
    ("status", "error"),
    [("302 Found\r\nLocation: /told", "redirect"), ("404 No", "http_4xx"), ("500 No", "http_5xx"), ("101 Up", None)],
)
async def test_anything_else_is_a_failure(database_url: str, status: str, error: str | None) -> None:
    async with staging(database_url, callback_timeout_seconds=1.0) as stage:
        await stage.tell()
        stage.receiver.answer = status
        await stage.deliver()
        assert ((await stage.callback()).state, (await stage.callback()).step) == ("pending", 1)
        (attempt,) = await stage.attempts()
        assert attempt.error == error or error is None
        assert len(stage.receiver.calls) == 1, "no redirect is followed"


@pytest.mark.parametrize("status", ["600 Odd", "999 Blocked", "099 Odd"])
async def test_a_status_that_http_does_not_know_is_a_failure_like_others(database_url: str, status: str) -> None:
    async with staging(database_url) as stage:
        await stage.tell()
        stage.receiver.answer = status
        await stage.deliver()
        callback = await stage.callback()
        assert (callback.state, callback.step, callback.lease_token) == ("pending", 1, None)
        assert [row.error for row in await stage.attempts()] == ["response_invalid"]


async def test_nobody_listening_is_a_failure(database_url: str) -> None:
    async with staging(database_url) as stage:
        await stage.tell(url="http://127.0.0.1:1/told")
        await stage.deliver()
        (attempt,) = await stage.attempts()
        assert (attempt.http_status, attempt.error) == (None, "connection_refused")
        assert (await stage.callback()).step == 1


async def test_a_fault_of_ours_uses_no_step_and_is_tried_again_soon(database_url: str) -> None:
    async with name_server(lambda _: NO_SUCH_NAME) as gone:
        pass
    async with staging(database_url, resolver=Resolver([gone.address])) as stage:
        await stage.tell(url=f"http://merchant.example:{stage.receiver.port}/told")
        await execute(stage.desk.owner, "UPDATE callback_due SET step = :last", last=len(DELAYS))
        for attempts in (1, 2):
            await stage.deliver()
            callback = await stage.callback()
            assert (callback.state, callback.step, callback.attempts_made) == ("pending", len(DELAYS), attempts)
            assert callback.lease_token is None
            assert 30 - SLACK_SECONDS < callback.due_in <= 30
            await stage.travel()
        assert [(row.attempt_no, row.error) for row in await stage.attempts()] == [
            (1, "dns_unreachable"),
            (2, "dns_unreachable"),
        ]
        await assert_sound(stage.desk.owner)


async def test_a_private_address_is_not_called_unless_it_is_allowed(database_url: str) -> None:
    async with staging(database_url, private_allowed=False) as stage:
        await stage.tell()
        await stage.deliver()
        assert stage.receiver.calls == []
        (attempt,) = await stage.attempts()
        assert (attempt.http_status, attempt.error, attempt.address) == (None, "address_blocked", None)


async def test_what_is_sent_again_passes_the_same_guard(database_url: str) -> None:
    async with staging(database_url, private_allowed=False) as stage:
        (event_id,) = await stage.tell(url="http://169.254.169.254/latest/meta-data")
        await execute(stage.desk.owner, "UPDATE callback_due SET step = :last", last=len(DELAYS))
        await stage.deliver()
        assert (await stage.callback()).state == "exhausted"
        ops = engine(database_url, role="payouts_ops")
        assert await in_transaction(ops, lambda tx: resend_callback(tx, event_id))
        await ops.dispose()
        await stage.deliver()
        assert [(row.error, row.address, row.connect_ms) for row in await stage.attempts()] == [
            ("address_blocked", None, None)
        ] * 2


async def test_a_callback_that_is_no_longer_allowed_is_blocked_until_its_shop_is_an_exception(
    database_url: str,
) -> None:
    async with staging(database_url, https_only=True) as stage:
        await stage.tell()
        await stage.deliver()
        assert [row.error for row in await stage.attempts()] == ["address_blocked"]
        await change_callbacks(
            stage.desk.owner,
            merchant=stage.merchant.code,
            shop="shop-001",
            http=True,
            ports=[stage.receiver.port],
            reason="a till of 2009",
            actor="tests",
        )
        await stage.travel()
        await stage.deliver()
        assert (await stage.callback()).state == "delivered"
        blocked, delivered = await stage.attempts()
        assert (blocked.dns_ms, blocked.connect_ms, blocked.first_byte_ms) == (None, None, None)
        assert None not in (delivered.dns_ms, delivered.connect_ms, delivered.first_byte_ms)
        await assert_sound(stage.desk.owner)


async def test_a_worker_that_died_leaves_the_callback_to_the_next_one(database_url: str) -> None:
    async with staging(database_url) as stage:
        await stage.tell()
        await stage.claim(uuid4())
        await stage.deliver()
        assert stage.receiver.calls == [], "the lease still stands"
        await stage.travel()
        await stage.deliver()
        assert (await stage.callback()).state == "delivered"
        assert [row.attempt_no for row in await stage.attempts()] == [2]


async def test_a_late_2xx_counts(database_url: str) -> None:
    async with staging(database_url) as stage:
        await stage.tell()
        late, current = uuid4(), uuid4()
        claimed = await stage.claim(late)
        await stage.travel()
        again = await stage.claim(current)
        await stage.record(_ended(claimed, late, 200))
        assert (await stage.callback()).state == "delivered"
        await stage.record(_ended(again, current, 503))
        assert (await stage.callback()).state == "delivered"
        log = [(row.attempt_no, row.http_status, row.late) for row in await stage.attempts()]
        assert log == [(1, 200, True), (2, 503, True)]
        await assert_sound(stage.desk.owner)


@pytest.mark.parametrize("status", [200, 410, 503])
async def test_an_attempt_from_before_its_end_ends_nothing_once_it_is_sent_again(
    database_url: str, status: int
) -> None:
    async with staging(database_url) as stage:
        (event_id,) = await stage.tell()
        late, current = uuid4(), uuid4()
        claimed = await stage.claim(late)
        await stage.travel()
        await stage.record(_ended(await stage.claim(current), current, 200))
        assert await in_transaction(stage.desk.worker, lambda tx: resend_callback(tx, event_id))

        await stage.record(_ended(claimed, late, status))

        assert (await stage.callback()).state == "pending", "somebody wants it once more"
        await stage.deliver()
        assert (await stage.callback()).state == "delivered"
        assert len(stage.receiver.calls) == 1
        log = [(row.attempt_no, row.late) for row in await stage.attempts()]
        assert log == [(1, True), (2, False), (3, False)]
        await assert_sound(stage.desk.owner)


async def test_what_is_sent_again_counts_the_attempt_that_is_still_under_way(database_url: str) -> None:
    async with staging(database_url) as stage:
        (event_id,) = await stage.tell()
        first, second = uuid4(), uuid4()
        claimed = await stage.claim(first)
        await stage.travel()
        again = await stage.claim(second)
        await stage.record(_ended(claimed, first, 200))
        assert await in_transaction(stage.desk.worker, lambda tx: resend_callback(tx, event_id))

        await stage.deliver()
        await stage.record(_ended(again, second, 503))

        log = sorted((row.attempt_no, row.http_status, row.late) for row in await stage.attempts())
        assert log == [(1, 200, True), (2, 503, True), (3, 200, False)]
        assert (await stage.callback()).state == "delivered"
        await assert_sound(stage.desk.owner)


async def test_what_ended_before_ends_were_counted_goes_on_from_the_log(database_url: str) -> None:
    async with staging(database_url) as stage:
        (event_id,) = await stage.tell()
        await stage.deliver()
        await execute(stage.desk.owner, "UPDATE callbacks SET attempts_made = 0")
        assert await in_transaction(stage.desk.worker, lambda tx: resend_callback(tx, event_id))
        await stage.deliver()
        assert [row.attempt_no for row in await stage.attempts()] == [1, 2]


@pytest.mark.parametrize("status", [503, 410])
async def test_a_late_failure_leaves_only_the_log_line(database_url: str, status: int) -> None:
    async with staging(database_url) as stage:
        await stage.tell()
        late, current = uuid4(), uuid4()
        claimed = await stage.claim(late)
        await stage.travel()
        await stage.claim(current)
        before = await fetch(stage.desk.owner, "SELECT * FROM callback_due")
        await stage.record(_ended(claimed, late, status))
        assert await fetch(stage.desk.owner, "SELECT * FROM callback_due") == before
        assert (await stage.callback()).state == "pending"
        assert [(row.attempt_no, row.late) for row in await stage.attempts()] == [(1, True)]


async def test_what_was_heard_before_a_stall_longer_than_the_lease_is_still_recorded(database_url: str) -> None:
    async with staging(database_url) as stage:
        await stage.tell()
        token = uuid4()
        ended = _ended(await stage.claim(token), token, 200)
        stalled_seconds = stage.desk.settings.callback_lease_seconds + 1

        await stage.deliverer._submit(replace(ended, ended_at=monotonic() - stalled_seconds))

        assert (await stage.callback()).state == "delivered"
        assert [(row.attempt_no, row.late) for row in await stage.attempts()] == [(1, False)]


@pytest.mark.parametrize("status", [200, 410, 503])
async def test_an_attempt_recorded_twice_changes_nothing_the_second_time(database_url: str, status: int) -> None:
    async with staging(database_url) as stage:
        await stage.tell()
        token = uuid4()
        ended = _ended(await stage.claim(token), token, status)
        tables = "callbacks", "callback_due", "callback_attempts"
        await stage.record(ended)
        before = [await fetch(stage.desk.owner, f"SELECT * FROM {table}") for table in tables]
        await stage.record(ended)
        assert [await fetch(stage.desk.owner, f"SELECT * FROM {table}") for table in tables] == before


async def test_both_answers_in_one_batch_deliver(database_url: str) -> None:
    """One worker may hear both: it was paused for longer than its lease and took the callback again."""
    for step in (1, -1):
        async with staging(database_url) as stage:
            await stage.tell()
            late, current = uuid4(), uuid4()
            claimed = await stage.claim(late)
            await stage.travel()
            again = await stage.claim(current)
            await stage.record(*[_ended(claimed, late, 200), _ended(again, current, 503)][::step])
            assert await stage.desk.count("callbacks", "state <> 'delivered'") == 0
            await assert_sound(stage.desk.owner)


async def test_a_secret_that_does_not_open_sends_nothing_and_gives_nothing_up(database_url: str) -> None:
    async with staging(database_url) as stage:
        await stage.tell()
        secret = await stage.desk.one("SELECT sealed FROM webhook_secrets")
        await execute(stage.desk.owner, "UPDATE webhook_secrets SET sealed = ''")
        await stage.deliver()
        row = await stage.callback()
        assert (stage.receiver.calls, await stage.attempts(), row.state, row.step) == ([], [], "pending", 0)
        await execute(stage.desk.owner, "UPDATE webhook_secrets SET sealed = :sealed", sealed=secret.sealed)
        await stage.travel()
        await stage.deliver()
        assert (await stage.callback()).state == "delivered"


async def test_four_deliverers_send_every_callback_once_per_attempt(database_url: str) -> None:
    async with staging(database_url) as stage, open_session(private_allowed=True, ports=frozenset()) as session:
        events = await stage.tell(300)
        config = replace(stage.desk.settings, scan_interval_seconds=0.0, callback_concurrency=16)
        deliverers = [Deliverer(stage.desk.worker, config.keyring, session, config) for _ in range(4)]
        wanted = {render_id(EVENT, event_id) for event_id in events}
        assert len(wanted) == 300

        async def deliver(deliverer: Deliverer) -> None:
            while await deliverer.run_round():
                await deliverer.drain(20)

        for attempt, status in enumerate(("503 Not Now", "200 OK"), 1):
            stage.receiver.answer = status
            while len(stage.receiver.calls) < 300 * attempt:
                # A breaker opens while there is nothing but failures; and this may take longer than the first delay.
                later = "UPDATE callback_due SET due_at = now() + interval '1 hour' WHERE attempts_made = :attempt"
                await execute(stage.desk.owner, later, attempt=attempt)
                await heal_lanes(stage.desk.owner)
                await asyncio.gather(*map(deliver, deliverers))
            told = Counter(call.headers["webhook-id"] for call in stage.receiver.calls)
            assert told == dict.fromkeys(wanted, attempt)
            await stage.travel()
        assert await stage.desk.count("callbacks", "state = 'delivered'") == 300
        assert await stage.desk.count("callback_attempts") == 600
        await assert_sound(stage.desk.owner)


async def test_callbacks_of_one_payout_tell_one_story(database_url: str) -> None:
    """A failed payout's body carries the failure, and nothing of who was to be paid."""
    async with staging(database_url) as stage:
        recipient = "017123450102"
        await stage.desk.create(stage.merchant, recipient=recipient, callback_url=stage.receiver.url)
        await stage.desk.settle()
        await stage.deliver()
        (call,) = stage.receiver.calls
        body = json.loads(call.body)
        assert (body["type"], body["status"]) == ("payout.failed", "failed")
        assert body["failure"]["code"] == "recipient_account_closed"
        assert recipient.encode() not in call.body
