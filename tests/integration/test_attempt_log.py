"""The log of attempts: its weeks come and go, and nothing that happens to them loses an attempt."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from alembic import command
from sqlalchemy import text

from common.db.attempts import add_attempt_weeks, drop_attempt_weeks
from common.db.callbacks import CallbackAttempt, append_callback_attempts
from common.db.engine import Engine, in_transaction
from common.domain.ids import new_id
from common.errors import Transient
from migrations.run import upgrade
from tests.conftest import Server
from tests.factories import engine, execute, fetch
from tests.flows import cloned, desk
from worker.keeping import Keeper

WEEK = timedelta(days=7)


def monday_of(moment: datetime) -> datetime:
    day = moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return day - timedelta(days=day.weekday())


def name_of(moment: datetime) -> str:
    return f"callback_attempts_{monday_of(moment):%Y%m%d}"


async def weeks(owner: Engine) -> set[str]:
    rows = await fetch(
        owner,
        "SELECT c.relname AS name FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
        " WHERE i.inhparent = 'callback_attempts'::regclass",
    )
    return {row.name for row in rows} - {"callback_attempts_default"}


async def now(owner: Engine) -> datetime:
    (row,) = await fetch(owner, "SELECT now() AS now")
    assert isinstance(row.now, datetime)
    return row.now


def attempt(**fields: Any) -> CallbackAttempt:
    logged: dict[str, Any] = {
        "event_id": new_id(),
        "shop_id": new_id(),
        "attempt_no": 1,
        "age_seconds": 1.0,
        "duration_ms": 900,
        "http_status": 503,
        "error": "http_5xx",
        "response_excerpt": b"",
        "address": "192.0.2.1",
        "late": False,
        "dns_ms": 1,
        "connect_ms": 2,
        "first_byte_ms": 3,
        "reused": False,
        "retry_after_seconds": 120,
    }
    return CallbackAttempt(**(logged | fields))


async def log(worker: Engine, *attempts: CallbackAttempt) -> None:
    await in_transaction(worker, lambda tx: append_callback_attempts(tx, attempts))


async def where(owner: Engine) -> dict[UUID, str]:
    rows = await fetch(owner, "SELECT event_id, tableoid::regclass::text AS week FROM callback_attempts")
    return {row.event_id: row.week for row in rows}


async def test_this_week_and_the_four_after_it_are_there_and_stay_when_they_are_asked_for_again(
    database_url: str,
) -> None:
    async with desk(database_url) as working:
        today = await now(working.owner)
        ahead = {name_of(today + n * WEEK) for n in range(5)}
        assert await weeks(working.owner) == ahead
        await in_transaction(working.worker, add_attempt_weeks)
        assert await weeks(working.owner) == ahead


async def test_two_that_keep_the_log_at_the_same_time_make_each_week_once(database_url: str) -> None:
    async with desk(database_url) as working:
        ahead = await weeks(working.owner)
        await execute(working.owner, "DROP TABLE " + ", ".join(sorted(ahead)))
        keepers = [Keeper(working.worker, keep_days=90) for _ in range(4)]
        assert await asyncio.gather(*(keeper.run_round() for keeper in keepers)) == [False] * 4
        assert await weeks(working.owner) == ahead


async def test_an_attempt_says_its_phases_and_what_it_was_asked(database_url: str) -> None:
    async with desk(database_url) as working:
        await log(working.worker, attempt(reused=True, dns_ms=None, connect_ms=None))
        (row,) = await fetch(working.owner, "SELECT * FROM callback_attempts")
        assert (row.dns_ms, row.connect_ms, row.first_byte_ms, row.duration_ms) == (None, None, 3, 900)
        assert (row.reused, row.retry_after_seconds, row.error) == (True, 120, "http_5xx")


async def test_the_same_attempt_is_logged_once_and_another_of_its_callback_beside_it(database_url: str) -> None:
    async with desk(database_url) as working:
        first = attempt()
        second = attempt(event_id=first.event_id, shop_id=first.shop_id, attempt_no=2, age_seconds=0.1)
        for attempts in ([first], [first], [first, second], [second, attempt()]):
            await log(working.worker, *attempts)
        numbers = await fetch(
            working.owner, "SELECT attempt_no FROM callback_attempts WHERE event_id = :id ORDER BY 1", id=first.event_id
        )
        assert [row.attempt_no for row in numbers] == [1, 2]
        assert len(await where(working.owner)) == 2


async def test_an_attempt_of_a_week_that_nobody_made_is_logged_and_moves_to_its_week_when_it_is_made(
    database_url: str,
) -> None:
    async with desk(database_url) as working:
        today = await now(working.owner)
        week = name_of(today)
        await execute(working.owner, f"DROP TABLE {week}")
        now_logged, long_ago = attempt(), attempt(age_seconds=60 * 86_400.0)
        await log(working.worker, now_logged, long_ago)
        await log(working.worker, now_logged)
        assert set((await where(working.owner)).values()) == {"callback_attempts_default"}
        assert not await Keeper(working.worker, keep_days=90).run_round()
        assert await where(working.owner) == {
            now_logged.event_id: week,
            long_ago.event_id: "callback_attempts_default",
        }
        await log(working.worker, now_logged)
        assert len(await where(working.owner)) == 2


async def test_weeks_are_dropped_when_all_of_them_is_over_and_never_within_thirty_days(database_url: str) -> None:
    async with desk(database_url) as working:
        today = await now(working.owner)
        made = [today - n * WEEK for n in range(1, 20)]
        for moment in made:
            await execute(working.owner, "SELECT add_callback_attempts_week(:moment)", moment=moment)
        await log(working.worker, attempt(age_seconds=400 * 86_400.0), attempt())
        for keep_days, kept_days in ((90, 90), (40, 40), (1, 30), (-5, 30)):
            await in_transaction(working.worker, lambda tx, days=keep_days: drop_attempt_weeks(tx, keep_days=days))  # type: ignore[misc]
            past = {name for name in await weeks(working.owner) if name < name_of(today)}
            horizon = today - timedelta(days=kept_days)
            assert past == {name_of(moment) for moment in made if monday_of(moment) + WEEK > horizon}
        assert list((await where(working.owner)).values()) == [name_of(today)]


async def test_keeping_the_log_gives_way_to_whoever_reads_it_and_comes_again(
    database_url: str,
) -> None:
    async with desk(database_url) as working:
        today = await now(working.owner)
        await execute(working.owner, "SELECT add_callback_attempts_week(:moment)", moment=today - 30 * WEEK)
        await execute(working.owner, f"DROP TABLE {name_of(today + 4 * WEEK)}")
        before = await weeks(working.owner)
        reader = engine(database_url, role="payouts_readonly")
        async with reader.connect() as reading:
            await reading.execute(text("SELECT count(*) FROM callback_attempts"))
            for work in (add_attempt_weeks, lambda tx: drop_attempt_weeks(tx, keep_days=90)):
                with pytest.raises(Transient):
                    await in_transaction(working.worker, work, attempts_max=1)
            await log(working.worker, attempt())
        await reader.dispose()
        assert await weeks(working.owner) == before
        await Keeper(working.worker, keep_days=90).run_round()
        assert await weeks(working.owner) == before - {name_of(today - 30 * WEEK)} | {name_of(today + 4 * WEEK)}


async def test_a_question_of_one_callback_looks_at_the_weeks_since_it_was_made(database_url: str) -> None:
    async with desk(database_url) as working:
        today = await now(working.owner)
        for n in range(1, 10):
            await execute(working.owner, "SELECT add_callback_attempts_week(:moment)", moment=today - n * WEEK)
        plan = await fetch(
            working.owner,
            "EXPLAIN (ANALYZE, COSTS OFF) SELECT 1 FROM callback_attempts WHERE event_id = :id"
            " AND started_at > now() - interval '1 hour' AND started_at <= now()",
            id=uuid4(),
        )
        looked_at = {word for row in plan for word in row[0].split() if word.startswith("callback_attempts_2")}
        assert {name.removesuffix("_pkey") for name in looked_at} <= {
            name_of(today),
            name_of(today - timedelta(hours=1)),
        }


async def test_what_was_logged_before_the_weeks_moves_into_them(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The migration, over a log that reaches back."""
    to = command.upgrade
    async with cloned(server, "template0") as url:
        with monkeypatch.context() as then:
            then.setattr(command, "upgrade", lambda config, _: to(config, "0008"))
            await upgrade(url)
        owner = engine(url)
        today = await now(owner)
        for n in range(3):
            await execute(
                owner,
                "INSERT INTO callback_attempts (event_id, shop_id, attempt_no, started_at, duration_ms, http_status)"
                " VALUES (:id, :id, 1, :started_at, 5, 200)",
                id=UUID(int=n),
                started_at=today - 10 * n * WEEK,
            )
        await owner.dispose()
        await upgrade(url)
        owner = engine(url)
        assert await where(owner) == {UUID(int=n): name_of(today - 10 * n * WEEK) for n in range(3)}
        await owner.dispose()
