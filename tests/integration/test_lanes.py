"""Lanes: whatever becomes of one receiver, and however much waits for it, nobody else is told later for that.

Time is driven through the database. Where something is sent, the merchants are real servers that answer, fail or hang.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from common.db.callbacks import resend_callback
from common.db.engine import Tx, in_transaction
from common.db.lane_upkeep import hold_lane, release_lane
from common.db.lanes import (
    FIRST_LANE,
    LANES_MAX,
    LOST_LEASES_MAX,
    ClaimedCallback,
    Lease,
    Room,
    claim_in_turn,
    claim_told_of,
    release_lapsed,
    wake_lanes,
)
from common.domain.ids import EVENT, render_id
from common.domain.lane import CAP_UNKNOWN, MERCHANT_UNPROVEN_MAX
from common.messaging.codec import WorkMessage
from common.messaging.topology import Work
from tests.conftest import Server
from tests.endpoint import Endpoint, endpoint
from tests.factories import Merchant, engine, execute, fetch
from tests.faults.locks import locked
from tests.flows import Desk, assert_sound, desk, pass_callback_time, take_callbacks
from tests.stack import eventually
from tests.waiting import add_waiting, assert_lanes_sound, lane_of, room, rows_read
from worker.callbacks import deliver
from worker.callbacks.deliver import Deliverer
from worker.callbacks.recording import Ended, record_attempts
from worker.callbacks.send import Attempt, open_session
from worker.callbacks.upkeep import LaneKeeper

PATIENCE_SECONDS = 60.0
HOUR = 3600


@dataclass(frozen=True, slots=True)
class Yard:
    """A database whose lanes a test fills as it likes."""

    desk: Desk
    server: Server

    async def wait(self, merchant: Merchant, *origins: str, **options: Any) -> None:
        """Callbacks that wait for some origins of a merchant."""
        await add_waiting(self.server, self.desk.url, merchant, origins, **options)

    async def claim(self, space: Room | None = None) -> tuple[UUID, list[ClaimedCallback]]:
        """One claim in turn, and the token of its leases."""
        lease = Lease(uuid4(), 60.0)
        claimed = await in_transaction(self.desk.worker, lambda tx: claim_in_turn(tx, lease, space or room()))
        return lease.token, claimed

    async def claim_of(self, event_ids: Sequence[UUID], space: Room | None = None) -> list[ClaimedCallback]:
        """One claim of what somebody told of."""
        lease = Lease(uuid4(), 60.0)
        return await in_transaction(
            self.desk.worker, lambda tx: claim_told_of(tx, lease, space or room(), list(event_ids))
        )

    async def record(self, token: UUID, claimed: Sequence[ClaimedCallback], status: int, asked: float = 0.0) -> None:
        """Every one of these was answered so, at once."""
        error = None if status < 300 else "http_5xx"
        attempt = Attempt(status, error, b"", "127.0.0.1", 5, asked)
        ended = [Ended(callback, token, attempt, 0.0, 0.0) for callback in claimed]
        await in_transaction(self.desk.worker, lambda tx: record_attempts(tx, ended, now=0.0), attempts_max=1)

    async def due(self, where: str = "true") -> list[Any]:
        """What is due."""
        return await fetch(self.desk.owner, f"SELECT * FROM callback_due WHERE {where} ORDER BY event_id")


@asynccontextmanager
async def counting(yard: Yard) -> AsyncIterator[Tx]:
    """A transaction of a worker on a session of its own, which has read nothing before; rolled back."""
    pool = engine(yard.desk.url, role="payouts_worker")
    try:
        async with pool.connect() as tx:
            yield tx
    finally:
        await pool.dispose()


@pytest.fixture
async def yard(server: Server, database_url: str) -> AsyncIterator[Yard]:
    async with desk(database_url) as working:
        yield Yard(working, server)


@asynccontextmanager
async def delivering(yard: Yard, **overrides: Any) -> AsyncIterator[Deliverer]:
    """Somebody who delivers, and whose attempts end with the context."""
    async with open_session(private_allowed=True, ports=frozenset()) as session:
        config = replace(yard.desk.settings, **overrides)
        deliverer = Deliverer(yard.desk.worker, config.keyring, session, config)
        try:
            yield deliverer
        finally:
            deliverer.leave()
            await deliverer.drain(0.0)


@asynccontextmanager
async def hanging() -> AsyncIterator[int]:
    """The port of a server, on every address of this machine, that takes what it is sent and never answers."""

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while await reader.read(65_536):
                pass
        writer.close()

    server = await asyncio.start_server(hang, "0.0.0.0", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def origin_of(receiver: Endpoint) -> str:
    return f"http://127.0.0.1:{receiver.port}"


async def rounds_until(deliverer: Deliverer, condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Rounds, one after the other, until something is so."""

    async def looked() -> bool:
        await deliverer.run_round()
        return await condition()

    await eventually(looked, what, PATIENCE_SECONDS)


# A lane's pace.


async def test_a_lane_that_comes_back_is_given_one_then_two_then_four_then_eight(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", count=100)
    await execute(
        yard.desk.owner,
        "UPDATE callback_lanes SET opened = 3, cap = 1, trouble = 0.7, failing_since = now() - interval '1 hour'",
    )
    sizes = []
    while (await lane_of(yard.desk, merchant)).opened:
        token, claimed = await yard.claim()
        assert (await yard.claim())[1] == [], "it is full"
        sizes.append(len(claimed))
        await yard.record(token, claimed, 200)
        await assert_lanes_sound(yard.desk)
    assert sizes == [1, 1, 1, 1, 1, 2, 2, 2, 4]
    lane = await lane_of(yard.desk, merchant)
    assert (lane.cap, lane.in_flight, lane.failing_since, lane.trouble) == (8, 0, None, 0.0)
    assert len((await yard.claim())[1]) == 8


async def test_a_503_while_it_comes_back_opens_it_again_for_twice_as_long(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", count=20)
    await execute(yard.desk.owner, "UPDATE callback_lanes SET opened = 1, cap = 1, trouble = 0.7")
    for _ in range(6):
        token, claimed = await yard.claim()
        await yard.record(token, claimed, 200)
    token, claimed = await yard.claim()
    assert len(claimed) == 2
    await yard.record(token, claimed, 503)
    lane = await lane_of(yard.desk, merchant)
    assert (lane.opened, lane.cap, lane.in_flight) == (2, 1, 0), "once, though both failed"
    (resting,) = await fetch(
        yard.desk.owner, "SELECT extract(epoch FROM ready_at - now())::float8 AS seconds FROM callback_lanes"
    )
    assert 0 < resting.seconds <= 60
    assert (await yard.claim())[1] == []
    await assert_lanes_sound(yard.desk)


async def test_twelve_failures_in_a_row_open_it_and_the_first_good_answer_ends_the_failing(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", count=30)
    for size in (8, 4):
        token, claimed = await yard.claim(room(size))
        assert len(claimed) == size
        await yard.record(token, claimed, 500)
    lane = await lane_of(yard.desk, merchant)
    assert (lane.opened, lane.cap, lane.failing_since is None) == (1, 1, False)
    assert (await yard.claim())[1] == []
    await execute(yard.desk.owner, "UPDATE callback_lanes SET blocked_until = now(), ready_at = now() - interval '1 s'")
    token, claimed = await yard.claim()
    assert len(claimed) == 1
    await yard.record(token, claimed, 200)
    lane = await lane_of(yard.desk, merchant)
    assert (lane.opened, lane.cap, lane.failing_since) == (1, 1, None)


async def test_an_open_lane_makes_no_attempt_and_uses_no_step_and_moves_no_time(yard: Yard) -> None:
    async with endpoint() as receiver, delivering(yard) as deliverer:
        merchant = await yard.desk.merchant()
        await yard.wait(merchant, origin_of(receiver), count=50)
        await yard.wait(merchant, origin_of(receiver), count=5, step=3)
        await execute(
            yard.desk.owner,
            "UPDATE callback_lanes SET opened = 1, cap = 1, blocked_until = now() + interval '10 minutes',"
            " ready_at = now() + interval '10 minutes'",
        )
        before = await yard.due()
        fresh = await yard.desk.one("SELECT event_id FROM callback_due LIMIT 1")
        for _ in range(5):
            await deliverer.run_round()
        assert await yard.claim_of([fresh.event_id]) == [], "nor by a message"
        assert await yard.due() == before
        assert receiver.received == []
        await execute(yard.desk.owner, "UPDATE callback_lanes SET blocked_until = now(), ready_at = now()")
        await deliverer.run_round()
        await deliverer.drain(PATIENCE_SECONDS)
        assert len(receiver.received) == 1, "one tries"


async def test_what_a_receiver_asks_for_holds_up_all_that_goes_to_it_and_nothing_else(yard: Yard) -> None:
    merchant, other = [await yard.desk.merchant() for _ in range(2)]
    await yard.wait(merchant, "http://a", count=5)
    token, claimed = await yard.claim(room(1))
    await yard.record(token, claimed, 429, asked=1e9)
    lane = await lane_of(yard.desk, merchant)
    assert (lane.opened, lane.cap, lane.trouble) == (0, 8, 0.0), "it is well"
    (asked,) = await fetch(
        yard.desk.owner, "SELECT extract(epoch FROM ready_at - now())::float8 AS seconds FROM callback_lanes"
    )
    assert 0 < asked.seconds <= 600
    await yard.wait(other, "http://a", count=1)
    _, claimed = await yard.claim()
    assert [callback.shop_id for callback in claimed] == [other.shop.id]


# Isolation.


async def test_a_dead_receiver_with_thousands_waiting_delays_nobody_and_never_has_more_than_its_cap(yard: Yard) -> None:
    async with (
        hanging() as port,
        endpoint() as receiver,
        delivering(yard, callback_concurrency=64, callback_timeout_seconds=5.0) as deliverer,
    ):
        dead = await yard.desk.merchant()
        await yard.wait(dead, f"http://127.0.0.1:{port}", count=3_000, latency_ms=None)
        for _ in range(50):
            await yard.wait(await yard.desk.merchant(), origin_of(receiver), count=3, in_lane=False, latency_ms=None)
        samples = []

        async def all_told() -> bool:
            samples.append(await lane_of(yard.desk, dead))
            return await yard.desk.count("callback_attempts", "http_status = 200") == 150

        await rounds_until(deliverer, all_told, "everybody who listens is told")
        assert max(lane.leases for lane in samples) <= CAP_UNKNOWN
        assert all(lane.in_flight == lane.leases for lane in samples)
        assert len(receiver.received) == 150

        async def opened() -> bool:
            samples.append(await lane_of(yard.desk, dead))
            return bool(samples[-1].opened) and samples[-1].leases == 0

        await rounds_until(deliverer, opened, "the dead one is left in peace")
        assert max(lane.leases for lane in samples) <= CAP_UNKNOWN
        assert await yard.desk.count("callback_due", "attempts_made = 0") >= 3_000 - 3 * CAP_UNKNOWN
        await assert_lanes_sound(yard.desk)


async def test_fifty_who_hang_take_no_more_than_their_share_and_those_known_to_be_well_notice_nothing(
    yard: Yard,
) -> None:
    async with (
        hanging() as port,
        endpoint() as receiver,
        delivering(yard, callback_concurrency=40, callback_slow_share=0.3) as deliverer,
    ):
        for latency_ms in (None, 9_000) * 25:
            await yard.wait(await yard.desk.merchant(), f"http://127.0.0.1:{port}", count=8, latency_ms=latency_ms)
        slow = "SELECT count(*) AS n FROM callback_due d JOIN callback_lanes l ON l.id = d.lane_id"
        slow += " WHERE d.lease_token IS NOT NULL AND coalesce(l.latency_ms > 2000, true)"
        most: list[int] = []

        async def full() -> bool:
            most.append((await yard.desk.one(slow)).n)
            return most[-1] == 12

        await rounds_until(deliverer, full, "the share of the slow is used up")
        for _ in range(10):
            await yard.wait(await yard.desk.merchant(), origin_of(receiver), count=20, overdue_seconds=1)

        async def all_told() -> bool:
            most.append((await yard.desk.one(slow)).n)
            return len(receiver.received) == 200

        await rounds_until(deliverer, all_told, "those who are well are told while the others hang")
        assert max(most) == 12
        await deliverer.drain(0.0)


async def test_a_merchant_with_many_origins_that_hang_has_no_more_than_a_merchant_may(yard: Yard) -> None:
    async with (
        hanging() as port,
        endpoint() as receiver,
        delivering(yard, callback_slow_share=1.0) as deliverer,
    ):
        merchant, other = [await yard.desk.merchant() for _ in range(2)]
        origins = [f"http://127.0.0.{n}:{port}" for n in range(2, 202)]
        await yard.wait(merchant, *origins, count=2, latency_ms=None)
        await yard.wait(merchant, *origins, count=1, latency_ms=None, in_lane=False)
        leases: list[int] = []

        async def looked() -> int:
            leases.append(await yard.desk.count("callback_due", "lease_token IS NOT NULL"))
            return leases[-1]

        for _ in range(12):
            await deliverer.run_round()
            await looked()
        assert max(leases) == MERCHANT_UNPROVEN_MAX
        await assert_lanes_sound(yard.desk)
        await yard.wait(other, origin_of(receiver), count=3, latency_ms=None)

        async def told() -> bool:
            return len(receiver.received) == 3

        await rounds_until(deliverer, told, "somebody else whom nobody knows either is told meanwhile")


async def test_a_worker_that_is_full_all_the_time_still_finds_what_nobody_told_of(yard: Yard) -> None:
    async with (
        endpoint() as receiver,
        delivering(yard, callback_concurrency=4, scan_interval_seconds=0.0) as deliverer,
    ):
        for _ in range(3):
            await yard.wait(await yard.desk.merchant(), origin_of(receiver), count=300, cap=256)

        async def work() -> None:
            while True:
                await deliverer.run_round()

        async def full() -> bool:
            return len(receiver.received) >= 20

        working = asyncio.create_task(work())
        await eventually(full, "the flood is under way", PATIENCE_SECONDS)
        other = await yard.desk.merchant()
        await yard.wait(other, origin_of(receiver), in_lane=False)
        (fresh,) = await yard.due(f"shop_id = '{other.shop.id}'")

        async def all_told() -> bool:
            return await yard.desk.count("callback_due") == 0

        await eventually(all_told, "everybody is told", PATIENCE_SECONDS)
        working.cancel()
        heard = [request.headers["webhook-id"] for request in receiver.received]
        assert heard.index(render_id(EVENT, fresh.event_id)) < 600, "it did not wait for the end of the flood"


async def test_a_merchants_part_of_a_worker_is_one_for_all_of_his_lanes(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, *(f"http://{name}" for name in "abcd"), count=50, cap=256)
    _, claimed = await yard.claim(room(lane=64, busy_merchants={merchant.shop.merchant_id: 54}))
    assert len(claimed) == 10, "of 64, 54 are busy"
    assert len({callback.lane_id for callback in claimed}) == 4, "and the rest is taken from all"


async def test_a_receiver_that_was_fast_and_falls_silent_leaves_those_whom_nobody_knows_their_share(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliver, "SLOW_MILLISECONDS", 0)
    async with hanging() as port, endpoint() as receiver, delivering(yard, callback_concurrency=256) as deliverer:
        silent, unknown = [await yard.desk.merchant() for _ in range(2)]
        await yard.wait(silent, f"http://127.0.0.1:{port}", count=300, cap=256)
        await deliverer.run_round()
        assert await yard.desk.count("callback_due", "lease_token IS NOT NULL") == 128
        await yard.wait(unknown, origin_of(receiver), count=3, latency_ms=None)

        async def told() -> bool:
            return len(receiver.received) == 3

        await rounds_until(deliverer, told, "who is new is told meanwhile")


async def test_large_receivers_that_fall_silent_together_leave_the_others_a_reserve(yard: Yard) -> None:
    async with hanging() as port, endpoint() as receiver, delivering(yard, callback_concurrency=256) as deliverer:
        *silent, other = [await yard.desk.merchant() for _ in range(4)]
        for merchant in silent:
            await yard.wait(merchant, f"http://127.0.0.1:{port}", count=300, cap=256)
        while await deliverer.run_round():
            pass
        taken = await yard.desk.count("callback_due", "lease_token IS NOT NULL")
        assert 256 * 3 // 4 <= taken <= 256 - MERCHANT_UNPROVEN_MAX
        await yard.wait(other, origin_of(receiver), count=3)

        async def told() -> bool:
            return len(receiver.received) == 3

        await rounds_until(deliverer, told, "who answers is told meanwhile")


async def test_lanes_of_a_merchant_who_has_all_that_he_may_take_no_room_of_others(yard: Yard) -> None:
    """What a claim passes over counts for nothing, neither as slow nor as failed before."""
    merchant, *others = [await yard.desk.merchant() for _ in range(9)]
    await yard.wait(merchant, *[f"http://a{n}" for n in range(40)], latency_ms=None, step=1, overdue_seconds=600)
    _, claimed = await yard.claim()
    assert len(claimed) == MERCHANT_UNPROVEN_MAX
    for other in others:
        await yard.wait(other, "http://b", latency_ms=None, step=1)
    await execute(yard.desk.owner, "UPDATE callback_lanes SET ready_at = now() WHERE ready_at < 'infinity'")
    _, claimed = await yard.claim(room(slow=8, retries=8))
    assert {callback.shop_id for callback in claimed} == {other.shop.id for other in others}


async def test_a_merchant_with_one_callback_is_served_in_the_very_next_claim_whatever_others_have(yard: Yard) -> None:
    flood, one = [await yard.desk.merchant() for _ in range(2)]
    await yard.wait(flood, "http://a", count=300_000, bare=True, cap=256, overdue_seconds=7_200)
    await yard.claim(room(64))
    await yard.wait(one, "http://b")
    _, claimed = await yard.claim(room(64))
    assert len(claimed) == 64
    assert [callback.url for callback in claimed if callback.shop_id == one.shop.id] == ["http://b/told"]


async def test_lanes_with_much_waiting_take_turns_however_little_room_there_is(yard: Yard) -> None:
    merchants = [await yard.desk.merchant() for _ in range(10)]
    for merchant in merchants:
        await yard.wait(merchant, "http://a", count=100, bare=True, cap=256, latency_ms=None)
    for space in (room(2), room(40, slow=2)):
        served: Counter[UUID] = Counter()

        async def all_served(space: Room = space, served: Counter[UUID] = served) -> bool:
            served.update(callback.shop_id for callback in (await yard.claim(space))[1])
            return len(served) == 10

        await eventually(all_served, "every lane has had its turn", PATIENCE_SECONDS)
        # Some lead is possible while lanes that were passed over rest for a moment; none of them is forgotten.
        assert max(served.values()) <= 20


async def test_whoever_records_takes_what_there_is_room_for_in_the_same_transaction(yard: Yard) -> None:
    async with endpoint() as receiver, delivering(yard, callback_concurrency=4) as deliverer:
        merchant = await yard.desk.merchant()
        await yard.wait(merchant, origin_of(receiver), count=60)
        assert await deliverer.run_round()

        async def delivered() -> bool:
            return await yard.desk.count("callbacks", "state = 'delivered'") == 60

        await eventually(delivered, "one claim was followed by all the others")
        assert len(receiver.received) == 60
        await assert_lanes_sound(yard.desk)


async def test_a_record_stands_when_the_claim_beside_it_fails(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> list[ClaimedCallback]:
        raise RuntimeError("no claim")

    async with (
        endpoint() as receiver,
        delivering(yard, callback_concurrency=4, callback_reserve_share=0.0) as deliverer,
    ):
        merchant = await yard.desk.merchant()
        await yard.wait(merchant, origin_of(receiver), count=60)
        assert await deliverer.run_round()
        monkeypatch.setattr(deliver, "claim_in_turn", fail)

        async def delivered() -> bool:
            return await yard.desk.count("callbacks", "state = 'delivered'") == 4

        await eventually(delivered, "what was sent is recorded")
        assert len(receiver.received) == 4
        await assert_lanes_sound(yard.desk)


async def test_what_found_no_room_in_the_whole_of_a_claim_keeps_its_turn(yard: Yard) -> None:
    merchants = [await yard.desk.merchant() for _ in range(10)]
    for merchant in merchants:
        await yard.wait(merchant, "http://a", bare=True)
    served = [callback.shop_id for _ in range(5) for callback in (await yard.claim(room(2)))[1]]
    assert sorted(served) == sorted(merchant.shop.id for merchant in merchants), "without a moment's rest in between"


async def test_a_worker_that_is_told_while_it_is_full_holds_up_no_lane_for_others(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", count=3)
    await yard.wait(merchant, "http://a", count=2, in_lane=False)
    fresh = [row.event_id for row in await yard.due("NOT in_lane")]
    assert await yard.claim_of(fresh, room(0)) == []
    assert len((await yard.claim())[1]) == 5


async def test_two_merchants_whose_callbacks_somebody_holds_delay_no_others(yard: Yard) -> None:
    """Whatever state their rows are in: waiting, fresh or with a lease that ran out."""
    async with endpoint() as receiver, delivering(yard, callback_concurrency=32) as deliverer:
        held = [await yard.desk.merchant() for _ in range(2)]
        for merchant in held:
            await yard.wait(merchant, origin_of(receiver), count=3)
        await yard.claim(room(2))
        await execute(
            yard.desk.owner, "UPDATE callback_due SET due_at = now() - interval '1 s' WHERE lease_token IS NOT NULL"
        )
        for merchant in held:
            await yard.wait(merchant, origin_of(receiver), count=2, in_lane=False)
        async with locked(yard.desk.owner, "SELECT FROM callback_due FOR UPDATE"):
            for fresh in (True, False):
                await yard.wait(await yard.desk.merchant(), origin_of(receiver), count=4, in_lane=not fresh)

            async def told() -> bool:
                return len(receiver.received) == 8

            await rounds_until(deliverer, told, "the others are told")

        async def all_told() -> bool:
            return len(receiver.received) == 8 + 10

        await rounds_until(deliverer, all_told, "those who were held are told as well")
        await deliverer.drain(PATIENCE_SECONDS)
        await assert_lanes_sound(yard.desk)


async def test_a_merchant_whose_lanes_somebody_holds_delays_no_others(yard: Yard) -> None:
    async with endpoint() as receiver, delivering(yard, callback_concurrency=32) as deliverer:
        held, other = [await yard.desk.merchant() for _ in range(2)]
        await yard.wait(held, origin_of(receiver), count=3)
        await yard.claim(room(1))
        await execute(
            yard.desk.owner, "UPDATE callback_due SET due_at = now() - interval '1 s' WHERE lease_token IS NOT NULL"
        )
        async with locked(yard.desk.owner, "SELECT FROM callback_shares FOR UPDATE"):
            await yard.wait(other, origin_of(receiver), count=4)

            async def told() -> bool:
                return len(receiver.received) == 4

            await rounds_until(deliverer, told, "the other is told")

        async def all_told() -> bool:
            return len(receiver.received) == 7

        await rounds_until(deliverer, all_told, "who was held is told as well")
        await deliverer.drain(PATIENCE_SECONDS)
        await assert_lanes_sound(yard.desk)


async def test_a_message_about_a_merchant_whose_lanes_somebody_holds_brings_all_others_at_once(yard: Yard) -> None:
    async with endpoint() as receiver, delivering(yard, callback_concurrency=32) as deliverer:
        merchants = [await yard.desk.merchant() for _ in range(4)]
        for merchant in merchants:
            await yard.wait(merchant, origin_of(receiver), in_lane=False)
        ids = [row.event_id for row in await yard.due()]
        share = "SELECT FROM callback_shares WHERE merchant_id = $1 FOR UPDATE"
        async with locked(yard.desk.owner, share, merchants[0].shop.merchant_id):
            message = WorkMessage(Work.CALLBACK, tuple(ids))
            assert await deliverer.claim_messages([message])
            await deliverer.drain(PATIENCE_SECONDS)
            assert len(receiver.received) == 3

        async def told() -> bool:
            return len(receiver.received) == 4

        await rounds_until(deliverer, told, "his are found as soon as he is let go")


async def test_first_attempts_have_a_half_that_no_retry_takes(yard: Yard) -> None:
    async with (
        hanging() as port,
        endpoint() as receiver,
        delivering(yard, callback_concurrency=16, callback_retry_share=0.5) as deliverer,
    ):
        for _ in range(4):
            await yard.wait(await yard.desk.merchant(), f"http://127.0.0.1:{port}", count=20, step=2)

        async def full() -> bool:
            return await yard.desk.count("callback_due", "lease_token IS NOT NULL") == 8

        await rounds_until(deliverer, full, "retries have their half")
        await deliverer.run_round()
        assert await full()
        merchant = await yard.desk.merchant()
        await yard.wait(merchant, origin_of(receiver), in_lane=False)
        await deliverer.run_round()
        fresh = await yard.due(f"shop_id = '{merchant.shop.id}' AND lease_token IS NULL")
        assert fresh == [], "it leaves in the next round"

        async def told() -> bool:
            return len(receiver.received) == 1

        await rounds_until(deliverer, told, "it is told while retries wait")


# Claims beside claims.


async def test_four_who_claim_at_once_never_take_more_of_a_lane_or_of_a_merchant_than_they_may(yard: Yard) -> None:
    merchants = [await yard.desk.merchant() for _ in range(20)]
    for number, merchant in enumerate(merchants):
        origins = [f"http://m{number}-{n}" for n in range(50)]
        await yard.wait(merchant, *origins, count=12, bare=True, cap=(1, 2, 8, 10)[number % 4])
    taken: list[ClaimedCallback] = []

    async def claim_on() -> None:
        idle = 0
        while idle < 20:
            _, claimed = await yard.claim(room(40))
            taken.extend(claimed)
            idle = 0 if claimed else idle + 1

    await asyncio.gather(*[claim_on() for _ in range(4)])
    assert len({callback.event_id for callback in taken}) == len(taken)
    of_lane = Counter(callback.lane_id for callback in taken)
    caps = {row.id: (row.cap, row.merchant_id) for row in await fetch(yard.desk.owner, "SELECT * FROM callback_lanes")}
    assert len(caps) == 1_000
    assert [lane for lane, count in of_lane.items() if count > caps[lane][0]] == []
    of_merchant = Counter(caps[callback.lane_id][1] for callback in taken)
    expected = [MERCHANT_UNPROVEN_MAX + (100 if number % 4 == 3 else 0) for number in range(20)]
    assert [of_merchant[merchant.shop.merchant_id] for merchant in merchants] == expected, "nor any less"
    leases = await fetch(
        yard.desk.owner, "SELECT lane_id, count(*) AS n FROM callback_due WHERE lease_token IS NOT NULL GROUP BY 1"
    )
    assert {row.lane_id: row.n for row in leases} == of_lane
    await assert_lanes_sound(yard.desk, bare=True)


async def test_claims_by_message_and_in_turn_at_once_take_nothing_twice(yard: Yard) -> None:
    merchants = [await yard.desk.merchant() for _ in range(6)]
    for merchant in merchants:
        await yard.wait(merchant, "http://a", "http://b", count=40, cap=256)
        await yard.wait(merchant, "http://a", "http://b", count=40, cap=256, in_lane=False)
    ids = [row.event_id for row in await yard.due()]
    taken: list[UUID] = []

    async def told_of(first: int) -> None:
        for at in range(first, len(ids), 64):
            taken.extend(callback.event_id for callback in await yard.claim_of(ids[at : at + 128]))

    async def in_turn() -> None:
        for _ in range(20):
            taken.extend(callback.event_id for callback in (await yard.claim())[1])

    await asyncio.gather(told_of(0), told_of(32), in_turn(), in_turn())
    # What was told of while somebody else held its merchant, and found nobody to take it afterwards.
    await in_transaction(yard.desk.worker, wake_all)
    await in_turn()
    assert len(taken) == len(set(taken))
    assert sorted(taken) == ids
    assert {row.attempts_made for row in await yard.due()} == {1}
    await assert_lanes_sound(yard.desk)


async def test_what_is_fresh_and_does_not_fit_is_neither_written_nor_looked_for_again(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", count=20, in_lane=False)
    versions = "SELECT event_id, xmin::text::bigint AS version FROM callback_due WHERE NOT in_lane ORDER BY event_id"
    before = await fetch(yard.desk.owner, versions)
    ids = [row.event_id for row in await yard.due()]
    claimed = {callback.event_id for callback in await yard.claim_of(ids, room(8))}
    assert len(claimed) == 8
    left = [row for row in before if row.event_id not in claimed]
    assert await fetch(yard.desk.owner, versions) == left
    assert await in_transaction(yard.desk.worker, wake_all) == 0, "the lane is full"
    assert await yard.claim_of(ids) == []
    assert await fetch(yard.desk.owner, versions) == left
    await assert_lanes_sound(yard.desk)


async def wake_all(tx: Tx) -> int:
    """Wake every lane that sleeps; how many did."""
    behind, woken = await wake_lanes(tx, behind=FIRST_LANE, overdue_seconds=0.0, lanes_max=10_000)
    assert behind is None
    return woken


async def test_a_flood_for_one_receiver_keeps_no_other_callback_from_being_found(yard: Yard) -> None:
    flooded, other = await yard.desk.merchant(), await yard.desk.merchant()
    await yard.wait(flooded, "http://flooded", count=20_000, bare=True, in_lane=False)
    await yard.wait(other, "http://other", in_lane=False)
    assert await in_transaction(yard.desk.worker, wake_all) == 2
    _, claimed = await yard.claim()
    assert Counter(callback.shop_id for callback in claimed) == {flooded.shop.id: 8, other.shop.id: 1}


async def test_a_claim_reads_next_to_nothing_of_what_waits_in_lanes_that_may_not_be_called(yard: Yard) -> None:
    held, full, resting, well = [await yard.desk.merchant() for _ in range(4)]
    origins = [f"http://o{n}" for n in range(20)]
    await yard.wait(full, *origins, count=1_500, bare=True, cap=1)
    while (await yard.claim())[1]:
        await execute(yard.desk.owner, "UPDATE callback_lanes SET ready_at = now() WHERE ready_at < 'infinity'")
    # A merchant may have no more than sixteen; the last lanes are left to the ones that have it.
    await execute(yard.desk.owner, "UPDATE callback_lanes SET ready_at = 'infinity'")
    await yard.wait(held, *origins, count=2_000, bare=True)
    await yard.wait(held, "http://fresh", count=1_000, bare=True, in_lane=False)
    await yard.wait(resting, *origins, count=1_500, bare=True)
    await execute(
        yard.desk.owner,
        "UPDATE callback_lanes SET held_at = now(), held_reason = 'a test', ready_at = 'infinity' WHERE merchant_id = :id",
        id=held.shop.merchant_id,
    )
    await execute(
        yard.desk.owner,
        "UPDATE callback_lanes SET blocked_until = now() + interval '1 hour', ready_at = now() + interval '1 hour'"
        " WHERE merchant_id = :id",
        id=resting.shop.merchant_id,
    )
    fresh = [row.event_id for row in await yard.due("NOT in_lane")]
    for at in range(0, len(fresh), 128):
        assert await yard.claim_of(fresh[at : at + 128]) == []
    assert await yard.desk.count("callback_due") >= 100_000
    await yard.wait(well, "http://well", count=3)
    async with counting(yard) as tx:
        assert await release_lapsed(tx) == []
        assert await wake_all(tx) == 0
        claimed = await claim_in_turn(tx, Lease(uuid4(), 60.0), room())
        assert {callback.shop_id for callback in claimed} == {well.shop.id}
        read = await rows_read(tx, "callback_due", "callback_lanes", "callback_shares")
        assert max(read.values()) <= 30, read
        await tx.commit()
    async with counting(yard) as tx:
        assert await claim_in_turn(tx, Lease(uuid4(), 60.0), room()) == []
        assert max((await rows_read(tx, "callback_due", "callback_lanes")).values()) == 0


async def test_a_claim_over_many_full_lanes_locks_few_rows_for_each_that_it_takes(yard: Yard) -> None:
    merchants = [await yard.desk.merchant() for _ in range(4)]
    for number, merchant in enumerate(merchants):
        await yard.wait(
            merchant, *[f"http://m{number}-{n}" for n in range(LANES_MAX // 4)], count=200, bare=True, cap=256
        )
    async with counting(yard) as tx:
        claimed = await claim_in_turn(tx, Lease(uuid4(), 60.0), room())
        assert len(claimed) == 128
        assert len({callback.lane_id for callback in claimed}) == LANES_MAX
        read = await rows_read(tx, "callback_due")
        assert read["callback_due"] <= 10 * 128, read


# Leases that nobody keeps.


async def test_a_lease_of_a_worker_that_was_killed_is_given_back_and_counted_right(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", count=3, step=4)
    await yard.claim()
    lane = await lane_of(yard.desk, merchant)
    assert (lane.in_flight, lane.leases) == (3, 3)
    assert await in_transaction(yard.desk.worker, release_lapsed) == [], "the lease still stands"
    await execute(yard.desk.owner, "UPDATE callback_due SET due_at = now() - interval '1 s'")
    lapsed = await in_transaction(yard.desk.worker, release_lapsed)
    assert [(each.lost_leases, each.put_aside) for each in lapsed] == [(1, False)] * 3
    lane = await lane_of(yard.desk, merchant)
    assert (lane.in_flight, lane.leases, lane.opened, lane.trouble) == (0, 0, 0, 0.0)
    assert {(row.step, row.attempts_made, row.in_lane) for row in await yard.due()} == {(4, 1, True)}
    await assert_lanes_sound(yard.desk)
    assert len((await yard.claim())[1]) == 3


async def test_a_late_2xx_delivers_what_was_given_back_and_counts_no_lease(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", count=2)
    late, claimed = await yard.claim()
    await execute(yard.desk.owner, "UPDATE callback_due SET due_at = now() - interval '1 s'")
    await in_transaction(yard.desk.worker, release_lapsed)
    await yard.record(late, claimed[:1], 200)
    lane = await lane_of(yard.desk, merchant)
    assert (lane.in_flight, lane.leases) == (0, 0)
    assert await yard.desk.count("callbacks", "state = 'delivered'") == 1
    current, again = await yard.claim()
    assert [callback.event_id for callback in again] == [claimed[1].event_id], "what was delivered is not sent again"
    await yard.record(late, claimed[1:], 200)
    lane = await lane_of(yard.desk, merchant)
    assert (lane.in_flight, lane.leases) == (0, 0), "the lease of who has it now ends with it"
    await yard.record(current, again, 503)
    assert (await lane_of(yard.desk, merchant)).in_flight == 0
    assert await yard.desk.count("callbacks", "state = 'delivered'") == 2
    await assert_lanes_sound(yard.desk)


async def test_a_record_that_is_repeated_teaches_nothing_twice_and_ends_nothing_that_came_after_it(yard: Yard) -> None:
    """Its COMMIT counted and nobody heard of it; meanwhile somebody has the callback sent again."""
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a")
    token, claimed = await yard.claim()
    await yard.record(token, claimed, 200)
    lane = await lane_of(yard.desk, merchant)
    await yard.record(token, claimed, 200)
    assert (await lane_of(yard.desk, merchant)).streak == lane.streak == 1
    assert await in_transaction(yard.desk.worker, lambda tx: resend_callback(tx, claimed[0].event_id))
    await yard.record(token, claimed, 200)
    assert await yard.desk.count("callback_due", "lease_token IS NULL") == 1, "it is still to be sent"
    assert await yard.desk.count("callbacks", "state = 'pending'") == 1
    assert await yard.desk.count("callback_attempts") == 1
    await assert_lanes_sound(yard.desk)


async def test_a_callback_over_which_five_workers_were_lost_is_put_aside_until_somebody_sends_it_again(
    yard: Yard,
) -> None:
    async with endpoint() as receiver, delivering(yard) as deliverer:
        merchant = await yard.desk.merchant()
        await yard.desk.create(merchant, callback_url=receiver.url)
        await yard.desk.settle()
        (poison,) = [row.event_id for row in await yard.due()]
        with capture_logs() as lines:
            for lost in range(LOST_LEASES_MAX):
                await pass_callback_time(yard.desk.owner)
                assert [row.lost_leases for row in await yard.due()] == [lost]
                (claimed,) = await in_transaction(yard.desk.worker, lambda tx: take_callbacks(tx, uuid4(), 10))
                assert (claimed.event_id, claimed.step, claimed.attempt_no) == (poison, 0, lost + 1)
                await pass_callback_time(yard.desk.owner)
                if lost < LOST_LEASES_MAX - 1:
                    await in_transaction(yard.desk.worker, release_lapsed)
            await deliverer.run_round()
        asides = [line for line in lines if line["event"] == "callback.put_aside"]
        assert [(line["log_level"], line["event_id"], line["leases_lost"]) for line in asides] == [
            ("error", render_id(EVENT, poison), LOST_LEASES_MAX)
        ]
        assert receiver.received == []
        assert await yard.desk.count("callbacks", "state = 'pending'") == 1
        await assert_sound(yard.desk.owner)

        await yard.desk.create_many(merchant, 3, callback_url=receiver.url)
        await yard.desk.settle()

        async def told() -> bool:
            return len(receiver.received) == 3

        await rounds_until(deliverer, told, "others to the same origin go on")
        assert await in_transaction(yard.desk.worker, lambda tx: resend_callback(tx, poison))

        async def all_told() -> bool:
            return len(receiver.received) == 4

        await rounds_until(deliverer, all_told, "somebody has sent it again")
        await deliverer.drain(PATIENCE_SECONDS)
        assert await yard.desk.count("callbacks", "state = 'delivered'") == 4
        await assert_sound(yard.desk.owner)


async def test_those_who_were_in_flight_beside_the_one_that_kills_workers_are_not_put_aside_with_it(yard: Yard) -> None:
    """What was lost more than once comes back at times of its own, so that it is lost alone in the end."""
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, *[f"http://a{n}" for n in range(4)], count=25, cap=256)
    for lost in (1, 2, 3):
        await execute(
            yard.desk.owner, "UPDATE callback_due SET due_at = now() - interval '1 s' WHERE due_at < 'infinity'"
        )
        await execute(yard.desk.owner, "UPDATE callback_lanes SET ready_at = now()")
        _, claimed = await yard.claim()
        assert len(claimed) == 100
        await execute(yard.desk.owner, "UPDATE callback_due SET due_at = now() - interval '1 s'")
        await in_transaction(yard.desk.worker, release_lapsed)
        spread = await yard.desk.one(
            "SELECT extract(epoch FROM max(due_at) - min(due_at))::float8 AS seconds,"
            " extract(epoch FROM min(due_at) - now())::float8 AS soonest FROM callback_due"
        )
        assert spread.soonest <= 15
        assert (spread.seconds > 20) is (lost > 1)


async def test_a_secret_that_does_not_open_for_hours_puts_nothing_aside(yard: Yard) -> None:
    """It is our fault, whatever we lack; as soon as we have it all goes on by itself."""
    async with endpoint() as receiver, delivering(yard) as deliverer:
        merchant = await yard.desk.merchant()
        await yard.desk.create_many(merchant, 3, callback_url=receiver.url)
        await yard.desk.settle()
        sealed = await yard.desk.one("SELECT sealed FROM webhook_secrets")
        await execute(yard.desk.owner, "UPDATE webhook_secrets SET sealed = ''")
        for _ in range(2 * LOST_LEASES_MAX):
            await deliverer.run_round()
            await deliverer.drain(PATIENCE_SECONDS)
            await execute(
                yard.desk.owner,
                "UPDATE callback_due SET due_at = now() - interval '1 s' WHERE due_at < 'infinity'",
            )
            await execute(yard.desk.owner, "UPDATE callback_lanes SET ready_at = now()")
        assert {(row.step, row.lost_leases) for row in await yard.due()} == {(0, 0)}
        assert await yard.desk.count("callback_attempts") == 0
        await execute(yard.desk.owner, "UPDATE webhook_secrets SET sealed = :sealed", sealed=sealed.sealed)

        async def told() -> bool:
            return len(receiver.received) == 3

        await rounds_until(deliverer, told, "they are told")
        await deliverer.drain(PATIENCE_SECONDS)
        await assert_sound(yard.desk.owner)


async def test_who_is_told_to_leave_uses_no_step_of_what_it_cannot_finish_and_the_next_one_does_it(yard: Yard) -> None:
    async with hanging() as port, delivering(yard, callback_concurrency=32) as deliverer:
        merchants = [await yard.desk.merchant() for _ in range(4)]
        for merchant in merchants:
            await yard.wait(merchant, f"http://127.0.0.1:{port}", count=8, step=3)
        await eventually(lambda: _all_leased(yard, deliverer), "as many as may are under way", PATIENCE_SECONDS)
        leased = len(await yard.due("lease_token IS NOT NULL"))
        deliverer.leave()
        assert not await deliverer.run_round()
        await deliverer.drain(0.1)
        assert {row.step for row in await yard.due()} == {3}
        assert await yard.desk.count("callback_attempts") == 0
        await execute(yard.desk.owner, "UPDATE callback_due SET due_at = now() - interval '1 s'")
        assert len(await in_transaction(yard.desk.worker, release_lapsed)) == leased
        assert {(row.step, row.lease_token) for row in await yard.due()} == {(3, None)}
        await assert_lanes_sound(yard.desk)


async def _all_leased(yard: Yard, deliverer: Deliverer) -> bool:
    await deliverer.run_round()
    return len(await yard.due("lease_token IS NOT NULL")) == 16


@pytest.mark.parametrize("skew_seconds", [-600, 600])
async def test_a_workers_clock_decides_nothing_but_what_it_signs(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, skew_seconds: int
) -> None:
    async with endpoint() as receiver, delivering(yard) as deliverer:
        merchant = await yard.desk.merchant()
        await yard.wait(merchant, origin_of(receiver), count=2)
        await yard.wait(merchant, origin_of(receiver), count=2, overdue_seconds=-300)
        receiver.answer = "503 Not Now"
        clock = time.time
        monkeypatch.setattr("worker.callbacks.deliver.time.time", lambda: clock() + skew_seconds)
        for _ in range(3):
            await deliverer.run_round()
            await deliverer.drain(PATIENCE_SECONDS)
        monkeypatch.undo()
        assert len(receiver.received) == 2, "nothing is sent before its time"
        retries = await fetch(
            yard.desk.owner,
            "SELECT extract(epoch FROM due_at - now())::float8 AS seconds FROM callback_due WHERE step = 1",
        )
        assert len(retries) == 2
        assert all(row.seconds <= 11 for row in retries), "and its next time is the database's"


async def test_attempts_that_failed_together_come_back_apart_and_never_before_their_delay(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", count=100, cap=256, step=5)
    lease = Lease(uuid4(), 60.0)
    claimed = await in_transaction(yard.desk.worker, lambda tx: claim_in_turn(tx, lease, room()))
    attempt = Attempt(503, "http_5xx", b"", "127.0.0.1", 5, 0.0)
    ended = [Ended(callback, lease.token, attempt, 0.0, place / 100) for place, callback in enumerate(claimed)]
    await in_transaction(yard.desk.worker, lambda tx: record_attempts(tx, ended, now=0.0))
    (spread,) = await fetch(
        yard.desk.owner,
        "SELECT count(DISTINCT due_at) AS times, extract(epoch FROM max(due_at) - min(due_at))::float8 AS seconds"
        " FROM callback_due",
    )
    assert (spread.times, round(spread.seconds)) == (100, round(0.99 * 0.1 * HOUR)), "over a tenth of the delay"
    assert await yard.desk.count("callback_due", "due_at < now() + interval '55 minutes'") == 0


# Lanes that are held, and lanes whose row says what is not.


async def test_a_lane_that_has_only_failed_for_days_is_held_and_keeps_everything_until_it_is_released(
    yard: Yard,
) -> None:
    async with endpoint() as receiver, delivering(yard) as deliverer:
        keeper = LaneKeeper(yard.desk.worker, hold_seconds=120 * HOUR)
        merchant, other = [await yard.desk.merchant() for _ in range(2)]
        await yard.wait(merchant, origin_of(receiver), count=4, step=14, overdue_seconds=80 * HOUR)
        await yard.wait(other, origin_of(receiver), count=1, step=14)
        failing = (
            "UPDATE callback_lanes SET failing_since = now() - make_interval(hours => :hours), opened = 9, cap = 1,"
            " blocked_until = now()"
        )
        await execute(yard.desk.owner, failing, hours=119)
        with capture_logs() as lines:
            await keeper.run_round()
        assert [line for line in lines if line["event"] == "lane.held"] == []
        await execute(yard.desk.owner, failing + " WHERE merchant_id = :id", hours=121, id=merchant.shop.merchant_id)
        lane = await lane_of(yard.desk, merchant)
        with capture_logs() as lines:
            await keeper.run_round()
            await keeper.run_round()
        assert [(line["log_level"], line["lane"]) for line in lines if line["event"] == "lane.held"] == [
            ("error", str(lane.id))
        ]
        lane = await lane_of(yard.desk, merchant)
        assert "120 hours" in lane.held_reason
        before = await yard.due(f"shop_id = '{merchant.shop.id}'")

        await yard.wait(merchant, origin_of(receiver), count=2, in_lane=False)
        for _ in range(3):
            await deliverer.run_round()
        await deliverer.drain(PATIENCE_SECONDS)
        assert len(receiver.received) == 1, "the other one's"
        waiting = await yard.due(f"shop_id = '{merchant.shop.id}'")
        assert [row for row in waiting if row in before] == before
        assert len(waiting) == 6
        await assert_lanes_sound(yard.desk)

        assert await in_transaction(yard.desk.worker, lambda tx: release_lane(tx, lane.id))

        async def told() -> bool:
            return len(receiver.received) == 7

        await rounds_until(deliverer, told, "all that was kept")
        await deliverer.drain(PATIENCE_SECONDS)
        assert await yard.desk.count("callbacks", "state = 'delivered'") == 7
        await assert_lanes_sound(yard.desk)


async def test_what_waits_in_a_lane_that_is_held_for_longer_than_the_schedule_is_neither_dropped_nor_exhausted(
    yard: Yard,
) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", count=3, step=14, overdue_seconds=80 * HOUR)
    lane = await lane_of(yard.desk, merchant)
    assert await in_transaction(yard.desk.worker, lambda tx: hold_lane(tx, lane.id, reason="a test"))
    assert not await in_transaction(yard.desk.worker, lambda tx: hold_lane(tx, lane.id, reason="again"))
    keeper = LaneKeeper(yard.desk.worker, hold_seconds=120 * HOUR)
    before = await yard.due()
    async with delivering(yard) as deliverer:
        for _ in range(3):
            await deliverer.run_round()
            await keeper.run_round()
    assert await yard.due() == before
    assert await yard.desk.count("callbacks", "state = 'pending'") == 3
    assert await in_transaction(yard.desk.worker, lambda tx: release_lane(tx, lane.id))
    assert len((await yard.claim())[1]) == 3, "each has its attempt"


async def test_what_is_in_flight_when_a_lane_is_held_ends_by_itself_and_nothing_follows(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", count=20)
    token, claimed = await yard.claim()
    lane = await lane_of(yard.desk, merchant)
    await in_transaction(yard.desk.worker, lambda tx: hold_lane(tx, lane.id, reason="a test"))
    await yard.record(token, claimed[:4], 200)
    await yard.record(token, claimed[4:], 503)
    assert (await lane_of(yard.desk, merchant)).in_flight == 0
    assert (await yard.claim())[1] == []
    await assert_lanes_sound(yard.desk)


@pytest.mark.parametrize(
    "wrong",
    [
        "ready_at = 'infinity'",
        "ready_at = now() + interval '1 day'",
        "in_flight = 7",
        "in_flight = 8, ready_at = 'infinity'",
        "in_flight = 0",
    ],
)
async def test_what_a_lane_says_wrongly_is_put_right_and_told(yard: Yard, wrong: str) -> None:
    merchant, other = [await yard.desk.merchant() for _ in range(2)]
    await yard.wait(merchant, "http://a", count=5)
    await yard.wait(other, "http://a", count=1)
    token, claimed = await yard.claim(room(3, lane=2))
    await assert_lanes_sound(yard.desk)
    lane = await lane_of(yard.desk, merchant)
    await execute(yard.desk.owner, f"UPDATE callback_lanes SET {wrong} WHERE id = :id", id=lane.id)
    with pytest.raises(AssertionError):
        await assert_lanes_sound(yard.desk)
    keeper = LaneKeeper(yard.desk.worker, hold_seconds=120 * HOUR)
    with capture_logs() as lines:
        await keeper.run_round()
        await keeper.run_round()
    told = [(line["log_level"], line["lane"]) for line in lines if line["event"] == "lane.mended"]
    assert told == [("error", str(lane.id))]
    await assert_lanes_sound(yard.desk)
    await yard.record(token, claimed, 200)
    assert len((await yard.claim())[1]) == 3
    await assert_lanes_sound(yard.desk)


async def test_a_lane_that_counts_too_few_leases_is_no_harm_to_others(yard: Yard) -> None:
    """Until it is put right: what ends is recorded, and what ran out is given back."""
    merchant, other = [await yard.desk.merchant() for _ in range(2)]
    for each in (merchant, other):
        await yard.wait(each, "http://a", count=3)
    token, claimed = await yard.claim()
    lane = await lane_of(yard.desk, merchant)
    await execute(yard.desk.owner, "UPDATE callback_lanes SET in_flight = 0 WHERE id = :id", id=lane.id)
    of_both = [next(item for item in claimed if item.shop_id == each.shop.id) for each in (merchant, other)]
    await yard.record(token, of_both, 200)
    await execute(yard.desk.owner, "UPDATE callback_due SET due_at = now() - interval '1 s'")
    assert len(await in_transaction(yard.desk.worker, release_lapsed)) == 4
    await LaneKeeper(yard.desk.worker, hold_seconds=120 * HOUR).run_round()
    assert (await lane_of(yard.desk, other)).in_flight == 0
    await assert_lanes_sound(yard.desk)


async def test_a_keeper_sees_every_lane_page_by_page_and_begins_anew(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.callbacks.upkeep._LANES_MAX", 7)
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, *[f"http://a{n}" for n in range(30)])
    keeper = LaneKeeper(yard.desk.worker, hold_seconds=120 * HOUR)
    for _ in range(2):
        await execute(yard.desk.owner, "UPDATE callback_lanes SET ready_at = 'infinity'")
        for _ in range(5):
            await keeper.run_round()
        await assert_lanes_sound(yard.desk)


async def test_a_lane_that_somebody_is_at_or_that_nobody_has_called_for_long_is_not_held(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", count=2)
    failing = (
        "UPDATE callback_lanes SET failing_since = now() - interval '121 hours', opened = 9, cap = 1, blocked_until ="
    )
    keeper = LaneKeeper(yard.desk.worker, hold_seconds=120 * HOUR)
    await execute(yard.desk.owner, f"{failing} now()")
    async with locked(yard.desk.owner, "SELECT FROM callback_shares FOR UPDATE"):
        await keeper.run_round()
    assert (await lane_of(yard.desk, merchant)).held_at is None, "it may be answering at this moment"
    await execute(yard.desk.owner, f"{failing} now() - interval '2 days'")
    await keeper.run_round()
    assert (await lane_of(yard.desk, merchant)).held_at is None, "what failed was long ago"
    await execute(yard.desk.owner, f"{failing} now()")
    await keeper.run_round()
    assert (await lane_of(yard.desk, merchant)).held_at is not None


# Sent out of turn.


async def test_what_is_sent_out_of_turn_and_fails_waits_for_its_own_turn_as_before(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", step=9, overdue_seconds=-3 * HOUR)
    (before,) = await yard.due()
    assert await in_transaction(yard.desk.worker, lambda tx: resend_callback(tx, before.event_id))
    claimed = await yard.claim_of([before.event_id])
    assert [(callback.step, callback.resume_at) for callback in claimed] == [(9, before.due_at)]
    token = (await yard.due())[0].lease_token
    assert not await in_transaction(yard.desk.worker, lambda tx: resend_callback(tx, before.event_id)), (
        "it is under way"
    )
    await yard.record(token, claimed, 503)
    (after,) = await yard.due()
    assert (after.step, after.due_at, after.resume_at, after.attempts_made) == (9, before.due_at, None, 1)
    await assert_lanes_sound(yard.desk)


async def test_the_last_step_is_not_used_up_by_what_is_sent_out_of_turn(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", step=14, overdue_seconds=-3 * HOUR)
    (before,) = await yard.due()
    for _ in range(3):
        assert await in_transaction(yard.desk.worker, lambda tx: resend_callback(tx, before.event_id))
        assert await in_transaction(yard.desk.worker, lambda tx: resend_callback(tx, before.event_id)), "again at once"
        claimed = await yard.claim_of([before.event_id])
        await yard.record((await yard.due())[0].lease_token, claimed, 503)
    (after,) = await yard.due()
    assert (after.step, after.due_at, after.attempts_made) == (14, before.due_at, 3)
    assert await yard.desk.count("callbacks", "state = 'pending'") == 1


async def test_what_is_sent_out_of_turn_and_succeeds_is_not_sent_again(yard: Yard) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", step=9, overdue_seconds=-3 * HOUR)
    (before,) = await yard.due()
    assert await in_transaction(yard.desk.worker, lambda tx: resend_callback(tx, before.event_id))
    claimed = await yard.claim_of([before.event_id])
    await yard.record((await yard.due())[0].lease_token, claimed, 200)
    assert await yard.due() == []
    assert await yard.desk.count("callbacks", "state = 'delivered'") == 1


@pytest.mark.parametrize("state", ["delivered", "exhausted", "rejected"])
async def test_what_has_ended_is_sent_again_from_the_start_of_the_schedule(yard: Yard, state: str) -> None:
    merchant = await yard.desk.merchant()
    await yard.wait(merchant, "http://a", step=14)
    token, claimed = await yard.claim()
    await yard.record(token, claimed, {"delivered": 200, "exhausted": 503, "rejected": 410}[state])
    assert await yard.desk.count("callbacks", "state = :state", state=state) == 1
    assert await in_transaction(yard.desk.worker, lambda tx: resend_callback(tx, claimed[0].event_id))
    (due,) = await yard.due()
    assert (due.step, due.in_lane, due.attempts_made, due.lost_leases) == (0, False, 1, 0)
    (again,) = await yard.claim_of([due.event_id])
    assert again.attempt_no == 2
    await assert_lanes_sound(yard.desk)


async def test_an_outage_of_ours_is_made_up_for_lane_by_lane_and_exhausts_nothing_without_an_attempt(
    yard: Yard,
) -> None:
    async with endpoint() as receiver, delivering(yard, callback_concurrency=32) as deliverer:
        merchants = [await yard.desk.merchant() for _ in range(5)]
        for merchant in merchants:
            await yard.wait(merchant, origin_of(receiver), count=6, in_lane=False, overdue_seconds=24 * HOUR)
            await yard.wait(merchant, origin_of(receiver), count=6, step=14, overdue_seconds=24 * HOUR)
        await deliverer.run_round()
        leases = await fetch(
            yard.desk.owner, "SELECT shop_id, count(*) AS n FROM callback_due WHERE lease_token IS NOT NULL GROUP BY 1"
        )
        assert max((row.n for row in leases), default=0) <= CAP_UNKNOWN

        async def told() -> bool:
            return len(receiver.received) == 60

        await rounds_until(deliverer, told, "everything is made up for")
        await deliverer.drain(PATIENCE_SECONDS)
        assert await yard.desk.count("callbacks", "state = 'delivered'") == 60
        await assert_lanes_sound(yard.desk)
