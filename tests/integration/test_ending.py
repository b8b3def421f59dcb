"""The end of payouts whose rail has the last word: at once where nothing speaks against it, and no otherwise than carefully."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import pytest

from common.db.ending import end_unopposed
from common.db.engine import each_alone, in_transaction
from common.domain.times import render_time
from common.errors import AccountBusy
from tests.factories import Merchant, execute, fetch
from tests.faults.locks import Superuser, locked, until_waiting
from tests.faults.merchants import account_locked
from tests.flows import LOCK_WAIT_SECONDS, Desk, assert_sound, desk
from worker.conclusions import LOOK_UP, Ended
from worker.rails import Answer, Outcome
from worker.recording import Recorded, find_endings, record, record_answers

URL = "http://127.0.0.1:9/told"
PAID = Answer(Outcome.PAID, provider_reference="R-1")
DECLINED = Answer(Outcome.DECLINED, failure_code="account_closed", provider_reference="R-2")


async def _end_at_once(working: Desk, *ended: Ended, wait_seconds: float = LOCK_WAIT_SECONDS) -> set[UUID]:
    endings = find_endings(ended)
    return await in_transaction(
        each_alone(working.worker),
        lambda tx: end_unopposed(tx, endings, wait_seconds=wait_seconds),
        attempts_max=1,
    )


async def _end_carefully(working: Desk, *ended: Ended) -> set[UUID]:
    recorded = await in_transaction(
        working.worker, lambda tx: record_answers(tx, ended, wait_seconds=LOCK_WAIT_SECONDS), attempts_max=1
    )
    return {event.payout_id for event in recorded.events if event.payout_id is not None}


async def _left_behind(working: Desk, payout_id: UUID) -> list[Any]:
    """All that is stored of a payout, but for ids and times."""
    queries = (
        "SELECT state, version, failure_code, provider_reference, return_seq FROM payouts WHERE id = :id",
        "SELECT p.resolution_seq - p.hold_seq, p.updated_at = p.finalized_at, count(d.*) FROM payouts p"
        " LEFT JOIN payout_due d ON d.payout_id = p.id WHERE p.id = :id GROUP BY p.id, p.shop_id",
        "SELECT kind, contra, amount_minor, posted_delta_minor, held_delta_minor, posted_after_minor, held_after_minor,"
        " shop_id = (SELECT shop_id FROM payouts WHERE id = :id) FROM entries WHERE payout_id = :id ORDER BY seq",
        "SELECT attempt_no, action, outcome, detail, finished_at IS NOT NULL FROM payout_attempts WHERE payout_id = :id",
        "SELECT sequence, type, payin_id, txid IS NOT NULL FROM events WHERE payout_id = :id",
        "SELECT c.url, c.state, c.payin_id, c.traceparent, d.step, d.in_lane, l.origin FROM callbacks c"
        " JOIN callback_due d ON d.event_id = c.event_id AND d.shop_id = c.shop_id"
        " JOIN callback_lanes l ON l.id = d.lane_id WHERE c.payout_id = :id",
    )
    found = [[tuple(row) for row in await fetch(working.owner, query, id=payout_id)] for query in queries]
    told = await working.one(
        "SELECT e.body, p.updated_at FROM events e JOIN payouts p ON p.id = e.payout_id WHERE p.id = :id", id=payout_id
    )
    body = json.loads(told.body)
    assert body.pop("updated_at") == render_time(told.updated_at)
    assert list(json.loads(told.body))[-1] == "updated_at"
    assert body.pop("id") is not None
    assert body.pop("external_id") is not None
    return [*found, list(body.items())]


@pytest.mark.parametrize("answer", [PAID, DECLINED], ids=["paid", "declined"])
@pytest.mark.parametrize("url", [URL, None])
async def test_both_ways_leave_the_same_behind(database_url: str, answer: Answer, url: str | None) -> None:
    async with desk(database_url) as working:
        behind = []
        for end in (_end_at_once, _end_carefully):
            # Each of a merchant of its own, so that balances are alike.
            payout_id = await working.create(await working.merchant(), callback_url=url)
            (call,) = await working.claim()
            assert await end(working, Ended(call, answer)) == {payout_id}
            behind.append(await _left_behind(working, payout_id))
        assert behind[0] == behind[1]
        await assert_sound(working.owner)


async def test_running_balances_follow_the_order_of_the_answers(database_url: str) -> None:
    async with desk(database_url) as working:
        merchants = [await working.merchant() for _ in range(2)]
        for number in range(12):
            await working.create(merchants[number % 2])
        calls = await working.claim()
        answers = [Ended(call, PAID if number % 3 else DECLINED) for number, call in enumerate(calls)]
        assert len(await _end_at_once(working, *answers)) == 12
        for merchant in merchants:
            kinds = await fetch(
                working.owner,
                "SELECT kind, count(*) AS n FROM entries WHERE account_id = :id GROUP BY kind",
                id=merchant.shop.account_id,
            )
            counts = {row.kind: row.n for row in kinds}
            assert counts["capture"] + counts["release"] == 6
            assert await working.balance(merchant) == (100_000_000 - 1000 * counts["capture"], 0)
        await assert_sound(working.owner)


async def _lease_passes(working: Desk, _merchant: Merchant) -> None:
    await execute(working.owner, "UPDATE payout_due SET lease_token = :token", token=uuid4())


async def _another_takes_over(working: Desk, _merchant: Merchant) -> None:
    await working.make_due()
    await working.claim()


async def _callback_goes_elsewhere(working: Desk, merchant: Merchant) -> None:
    await execute(
        working.owner, "UPDATE shops SET webhook_url = 'http://127.0.0.1:9/new' WHERE id = :id", id=merchant.shop.id
    )


async def _it_is_in_doubt(working: Desk, _merchant: Merchant) -> None:
    await execute(working.owner, "UPDATE payouts SET state = 'verifying', version = version + 1")


async def _it_was_in_doubt(working: Desk, merchant: Merchant) -> None:
    await _it_is_in_doubt(working, merchant)
    for state in ("queued", "sending"):
        await execute(working.owner, "UPDATE payouts SET state = :state, version = version + 1", state=state)


OBSTACLES: dict[str, Callable[[Desk, Merchant], Awaitable[None]]] = {
    "lease passed": _lease_passes,
    "another took over": _another_takes_over,
    "in doubt": _it_is_in_doubt,
    "in doubt in between": _it_was_in_doubt,
    "callback goes elsewhere": _callback_goes_elsewhere,
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
async def test_what_has_met_something_since_is_left_to_the_careful_way(database_url: str, obstacle: str) -> None:
    async with desk(database_url) as working:
        merchant = await working.merchant(webhook_url=URL)
        payout_id = await working.create(merchant)
        (call,) = await working.claim()
        await OBSTACLES[obstacle](working, merchant)
        before = await working.state(payout_id)
        assert await _end_at_once(working, Ended(call, PAID)) == set()
        assert await working.state(payout_id) == before
        assert await working.attempts(payout_id) != [("submit", "paid")]
        await working.record(Ended(call, PAID))
        assert await working.state(payout_id) == "success"
        if obstacle == "callback goes elsewhere":
            assert (await working.one("SELECT url FROM callbacks")).url == "http://127.0.0.1:9/new"
        await assert_sound(working.owner)


@pytest.mark.parametrize("outcome", [Outcome.PAID, Outcome.DECLINED])
async def test_what_has_ended_is_not_ended_again(database_url: str, outcome: Outcome) -> None:
    """Its answer was lost, and it is said again."""
    async with desk(database_url) as working:
        payout_id = await working.create(await working.merchant())
        (call,) = await working.claim()
        ended = Ended(call, Answer(outcome))
        assert await _end_at_once(working, ended) == {payout_id}
        assert await _end_at_once(working, ended) == set()
        await working.record(ended)
        assert await working.count("events") == await working.count("entries", "kind <> 'hold'") - 1 == 1
        assert await working.count("discrepancies") == 0
        await assert_sound(working.owner)


async def test_a_due_row_that_passes_to_another_while_it_is_waited_for_ends_nothing(
    database_url: str, superuser: Superuser
) -> None:
    async with desk(database_url) as working:
        payout_id = await working.create(await working.merchant())
        (call,) = await working.claim()
        async with locked(working.owner, "UPDATE payout_due SET lease_token = $1", uuid4()):
            ending = asyncio.create_task(_end_at_once(working, Ended(call, PAID)))
            await until_waiting(superuser, "tests", "end_unopposed")
        assert await ending == set()
        assert await working.state(payout_id) == "sending"


@pytest.mark.parametrize("table", ["payout_due", "payouts"])
@pytest.mark.parametrize("shops", [1, 8])
async def test_rows_are_locked_in_the_order_of_their_ids(
    database_url: str, superuser: Superuser, table: str, shops: int
) -> None:
    """However few shops the planner has been told of, and in whatever order the answers came."""
    key = "payout_id" if table == "payout_due" else "id"
    async with desk(database_url) as working:
        merchants = [await working.merchant()]
        await superuser.execute("ANALYZE shops, merchants, accounts")
        merchants += [await working.merchant() for _ in range(shops - 1)]
        payout_ids = [await working.create(merchants[-1 - number % shops]) for number in range(8)]
        calls = sorted(await working.claim(), key=lambda call: call.payout.id, reverse=True)
        first, *others = sorted(payout_ids)
        async with locked(working.owner, f"SELECT FROM {table} WHERE {key} = $1 FOR UPDATE", first):
            ending = asyncio.create_task(_end_at_once(working, *(Ended(call, PAID) for call in calls)))
            await until_waiting(superuser, "tests", "end_unopposed")
            free = await fetch(
                working.owner,
                f"SELECT {key} AS id FROM {table} WHERE {key} = ANY (:others) FOR UPDATE SKIP LOCKED",
                others=others,
            )
            assert {row.id for row in free} == set(others)
        assert await ending == set(payout_ids)


async def test_what_ended_at_once_is_told_though_the_rest_was_not_recorded(database_url: str) -> None:
    async with desk(database_url) as working:
        held, free = [await working.merchant() for _ in range(2)]
        await working.create(held)
        for _ in range(2):
            # Nobody hears of the first claim; whoever comes next has to ask.
            await working.claim()
            await working.make_due()
        payout_id = await working.create(free)
        ended = [Ended(call, PAID) for call in await working.claim()]
        noted: list[Recorded] = []
        async with account_locked(working.owner, held.shop.id):
            with pytest.raises(AccountBusy):
                await record(working.worker, ended, wait_seconds=0.05, note=noted.append)
        assert [event.payout_id for recorded in noted for event in recorded.events] == [payout_id]
        await working.record(*ended)
        assert await working.count("events") == 2
        await assert_sound(working.owner)


async def test_more_than_a_claim_takes_ends_in_batches(database_url: str) -> None:
    async with desk(database_url) as working:
        merchant = await working.merchant()
        await working.create_many(merchant, 600)
        await working.settle()
        assert await working.count("payouts", "state = 'success'") == 600
        assert await working.balance(merchant) == (100_000_000 - 600 * 1000, 0)
        await assert_sound(working.owner)


async def test_an_account_that_somebody_holds_keeps_only_its_own_waiting(database_url: str) -> None:
    async with desk(database_url) as working:
        held, free = [await working.merchant() for _ in range(2)]
        payout_ids = [await working.create(merchant) for merchant in (held, free)]
        ended = [Ended(call, PAID) for call in await working.claim()]
        async with account_locked(working.owner, held.shop.id):
            with pytest.raises(AccountBusy):
                await _end_at_once(working, *ended, wait_seconds=0.05)
            assert await working.count("payouts", "state = 'sending'") == 2
            assert await _end_at_once(working, *ended, wait_seconds=0) == {payout_ids[1]}
        assert await _end_at_once(working, *ended) == {payout_ids[0]}
        await assert_sound(working.owner)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(Outcome.SUBMITTED),
        Answer(Outcome.NOT_ACCEPTED),
        Answer(Outcome.UNKNOWN),
        Answer(Outcome.PAID, amount_minor=999),
        Answer(Outcome.DECLINED, currency="EUR"),
    ],
    ids=str,
)
async def test_a_word_that_is_not_the_last_or_of_another_sum_ends_nothing_at_once(
    database_url: str, answer: Answer
) -> None:
    async with desk(database_url) as working:
        await working.create(await working.merchant())
        (call,) = await working.claim()
        assert find_endings([Ended(call, answer)]) == []


async def test_the_answer_to_a_look_up_ends_nothing_at_once(database_url: str) -> None:
    async with desk(database_url) as working:
        await working.create(await working.merchant())
        for _ in range(2):
            await working.claim()
            await working.make_due()
        (call,) = await working.claim()
        assert call.action == LOOK_UP
        assert find_endings([Ended(call, PAID)]) == []


async def test_of_two_answers_for_one_payout_none_ends_it_at_once(database_url: str) -> None:
    """Which of them is the last word is for those who decide."""
    async with desk(database_url) as working:
        payout_id = await working.create(await working.merchant())
        (first,) = await working.claim()
        # Whoever takes it over has it verified before anything else.
        await working.make_due()
        assert await working.claim() == []
        await working.make_due()
        (second,) = await working.claim()
        ended = [Ended(first, PAID), Ended(second, DECLINED)]
        assert find_endings(ended) == []
        await working.record(*ended)
        assert await working.state(payout_id) == "success"
        await assert_sound(working.owner)
