"""What two transactions do to one payout at the same time, where the rule is not a lock or a key that PostgreSQL keeps."""

import asyncio
from collections.abc import Sequence
from typing import Final
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from common.db.due import FinishedAttempt, NewAttempt, append_attempts, finish_attempts
from common.db.engine import Tx, constraint_name, in_transaction, sqlstate
from common.db.ledger import lock_accounts
from common.db.payouts import Move, lock_payouts, save_moves
from common.domain.payout import State
from common.errors import InvariantViolated
from common.moving import Conclusion, carry_out
from tests.factories import execute, fetch
from tests.faults.locks import locked
from tests.flows import Desk, assert_sound, desk
from tests.stack import eventually
from worker.conclusions import Call, Ended
from worker.rails import Answer, Outcome

ISOLATIONS: Final = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
ONE_OPEN, IN_ORDER, ONE_NUMBER = (
    "payout_attempts_one_open_per_payout",
    "payout_attempts_submit_once",
    "payout_attempts_pkey",
)
UNKNOWN_FOREVER: Final = "01712340200"

_WAITING: Final = (
    "SELECT 1 FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted AND datname = current_database()"
)


async def _verifying(working: Desk) -> NewAttempt:
    """A payout with one attempt, whose end nobody knows; the look-up that comes next."""
    payout_id = await working.create(await working.merchant(), recipient=UNKNOWN_FOREVER)
    (call,) = await working.claim()
    await working.record(Ended(call, Answer(Outcome.UNKNOWN)))
    assert await working.attempts(payout_id) == [("submit", "unknown")]
    return NewAttempt(payout_id, call.payout.shop_id, 2, "look_up", call.rail, call.reference)


def _numbered(attempt: NewAttempt, number: int) -> NewAttempt:
    return NewAttempt(attempt.payout_id, attempt.shop_id, number, attempt.action, attempt.rail, attempt.reference)


async def _look(tx: Tx, isolation: str) -> None:
    """Begin; above READ COMMITTED, what is committed from now on is not seen."""
    await tx.execute(text(f"SET TRANSACTION ISOLATION LEVEL {isolation}"))
    await tx.execute(text("SELECT count(*) FROM payout_attempts"))


async def _refusal(tx: Tx, attempt: NewAttempt) -> str | None:
    """Add an attempt and commit; the constraint that refused it, else the SQLSTATE, and None when it was taken."""
    try:
        await append_attempts(tx, [attempt])
        await tx.commit()
    except DBAPIError as error:
        await tx.rollback()
        return constraint_name(error) or sqlstate(error)
    return None


async def _open_numbers(working: Desk) -> list[int]:
    rows = await fetch(working.owner, "SELECT attempt_no FROM payout_attempts WHERE finished_at IS NULL ORDER BY 1")
    return [row.attempt_no for row in rows]


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("keeps", [True, False], ids=["commits", "rolls back"])
@pytest.mark.parametrize("number", [2, 3])
async def test_of_two_that_open_an_attempt_at_once_one_does(
    database_url: str, isolation: str, keeps: bool, number: int
) -> None:
    """Nobody locks the payout here, and both looked before either wrote."""
    async with desk(database_url) as working:
        attempt = await _verifying(working)
        async with working.worker.connect() as one, working.worker.connect() as other:
            for tx in (one, other):
                await _look(tx, isolation)
            await append_attempts(one, [attempt])
            racing = asyncio.create_task(_refusal(other, _numbered(attempt, number)))
            if number == attempt.attempt_no:
                await eventually(lambda: fetch(working.owner, _WAITING), "the second waits for the first")
            else:
                assert await racing == IN_ORDER
            await (one.commit() if keeps else one.rollback())
            refused_by = await racing
        if number == attempt.attempt_no:
            assert refused_by in ((ONE_NUMBER, "40001") if keeps else (None,))
        assert await _open_numbers(working) == ([2] if keeps or number == 2 else [])


@pytest.mark.parametrize("isolation", ISOLATIONS)
async def test_an_attempt_is_not_opened_beside_one_whose_end_may_still_be_taken_back(
    database_url: str, isolation: str
) -> None:
    async with desk(database_url) as working:
        attempt = await _verifying(working)
        ended = FinishedAttempt(attempt.payout_id, attempt.shop_id, 2, Outcome.UNKNOWN, None)
        async with working.worker.connect() as one, working.worker.connect() as other:
            assert await _refusal(one, attempt) is None
            for end in (one.rollback, one.commit):
                await _look(other, isolation)
                await finish_attempts(one, [ended])
                assert await _refusal(other, _numbered(attempt, 3)) == ONE_OPEN
                await _look(other, isolation)
                await end()
                expected = None if end == one.commit and isolation == ISOLATIONS[0] else ONE_OPEN
                assert await _refusal(other, _numbered(attempt, 3)) == expected
            if isolation != ISOLATIONS[0]:
                assert await _refusal(other, _numbered(attempt, 3)) is None
        assert await _open_numbers(working) == [3]


@pytest.mark.parametrize("isolation", ISOLATIONS[1:])
@pytest.mark.parametrize("number", [2, 3])
async def test_an_attempt_that_was_opened_since_one_looked_counts_all_the_same(
    database_url: str, isolation: str, number: int
) -> None:
    """A snapshot does not show it, nor may anything be built on it."""
    async with desk(database_url) as working:
        attempt = await _verifying(working)
        async with working.worker.connect() as one, working.worker.connect() as other:
            await _look(other, isolation)
            assert await _refusal(one, attempt) is None
            assert await _refusal(other, _numbered(attempt, number)) in (
                (ONE_NUMBER, "40001") if number == 2 else (IN_ORDER,)
            )
        assert await _open_numbers(working) == [2]


_MOVED_MEANWHILE: Final = {
    "due": "UPDATE payout_due SET rail = rail",
    "payout": "UPDATE payouts SET updated_at = now()",
    "all": "WITH a AS (UPDATE payouts SET updated_at = now()), b AS (UPDATE payout_due SET rail = rail)"
    " UPDATE payout_attempts SET started_at = started_at",
}


@pytest.mark.parametrize("moved", _MOVED_MEANWHILE)
@pytest.mark.parametrize(("outcome", "state"), [(Outcome.PAID, "success"), (Outcome.UNKNOWN, "verifying")])
async def test_what_is_recorded_reaches_rows_that_others_wrote_while_it_waited(
    database_url: str, moved: str, outcome: Outcome, state: str
) -> None:
    """They stand elsewhere by then than when the record began."""
    async with desk(database_url) as working:
        payout_id = await working.create(await working.merchant())
        (call,) = await working.claim()
        async with locked(working.owner, _MOVED_MEANWHILE[moved]):
            recording = asyncio.create_task(working.record(Ended(call, Answer(outcome))))
            await eventually(lambda: fetch(working.owner, _WAITING), "the record waits")
        await recording
        assert await working.state(payout_id) == state
        assert await working.attempts(payout_id) == [("submit", outcome)]
        assert await working.count("payout_due", "lease_token IS NULL") == (outcome is Outcome.UNKNOWN)
        assert await working.count("payout_due", "lease_token IS NOT NULL") == 0
        await assert_sound(working.owner)


async def test_a_move_by_somebody_who_no_longer_holds_the_payout_is_refused_aloud(database_url: str) -> None:
    """It finds the payout where it was, waits, and the payout has gone from there."""
    async with desk(database_url) as working:
        payout_id = await working.create(await working.merchant())
        async with working.worker.connect() as one, working.worker.connect() as other:
            (payout,) = await lock_payouts(other, [payout_id])
            await other.rollback()
            await save_moves(one, [Move(payout, State.SENDING)])
            moving = asyncio.create_task(save_moves(other, [Move(payout, State.SENDING)]))
            await eventually(lambda: fetch(working.owner, _WAITING), "the second waits for the first")
            await one.commit()
            # Releases of PostgreSQL differ in whether the row is reached where it has gone: then its version refuses.
            with pytest.raises((InvariantViolated, DBAPIError)):
                await moving
        assert await working.one("SELECT state, version FROM payouts") == ("sending", 2)


async def test_what_ends_is_due_no_more_though_somebody_was_writing_to_its_due_row(database_url: str) -> None:
    """Whoever ends a payout holds its due row; a row that was left behind would spoil every claim that meets it."""
    async with desk(database_url) as working:
        payout_id = await working.create(await working.merchant())

        async def end(tx: Tx) -> None:
            (payout,) = await lock_payouts(tx, [payout_id])
            accounts = await lock_accounts(tx, [payout.account_id], wait_seconds=0)
            await carry_out(tx, [(payout, Conclusion(State.CANCELED, None))], accounts, {})

        async with locked(working.owner, "UPDATE payout_due SET due_at = now()"):
            ending = asyncio.create_task(in_transaction(working.gateway, end))
            await eventually(lambda: fetch(working.owner, _WAITING), "it waits for who writes")
        await ending
        assert await working.state(payout_id) == "canceled"
        assert await working.count("payout_due") == 0
        await assert_sound(working.owner)


_DUE: Final = "UPDATE payout_due SET {} WHERE payout_id = :id"
_PAUSE: Final = (
    "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS"
    " $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END $$",
    "CREATE TRIGGER pause BEFORE UPDATE ON payout_due FOR EACH ROW WHEN (OLD.payout_id = '{}') EXECUTE FUNCTION pause()",
)


@pytest.mark.parametrize(
    ("meanwhile", "left"),
    [
        ("due_at = now() - interval '1 hour'", True),
        ("due_at = now() + interval '1 hour', lease_token = gen_random_uuid()", False),
    ],
    ids=["made due again", "claimed"],
)
async def test_a_claim_leaves_what_others_wrote_while_it_was_under_way_and_the_next_one_takes_what_is_due(
    database_url: str, meanwhile: str, left: bool
) -> None:
    """The claim has begun, its snapshot is taken, and it has not come to the second payout yet."""
    async with desk(database_url) as working:
        first, second = await working.create_many(await working.merchant(), 2)
        await execute(working.owner, _DUE.format("due_at = now() - interval '2 hours'"), id=first)
        for statement in _PAUSE:
            await execute(working.owner, statement.format(first))
        async with locked(working.owner, "SELECT pg_advisory_xact_lock(1)"):
            claiming = asyncio.create_task(working.claim())
            await eventually(lambda: fetch(working.owner, _WAITING), "the claim is at the first")
            await execute(working.owner, _DUE.format(meanwhile), id=second)
        assert _ids(await claiming) == [first]
        assert _ids(await working.claim()) == ([second] if left else [])
        assert await working.count("payout_due", "lease_token IS NULL") == 0


def _ids(calls: Sequence[Call]) -> list[UUID]:
    return [call.payout.id for call in calls]
