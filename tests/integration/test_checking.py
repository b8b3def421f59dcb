"""The checker in steps: a pass looks at everything once, whoever makes the steps, and raises no alarm over work under way.

That every rule finds in steps what it finds in one go is proven with the forgeries of test_invariants.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from common.db.checks import Step, begin_checks, check_step, find_progress
from common.db.engine import Engine, in_transaction
from common.db.invariants import OFFENDERS_SHOWN, WALKS
from tests.conftest import Server
from tests.factories import engine, execute
from tests.flows import Desk, assert_sound, desk, forge, pass_over
from worker.checking import Checker
from worker.hearing import hear

URL = "http://127.0.0.1:9/told"
PAYOUTS = 30
PAGE = 7
DAY_SECONDS = 86_400


@pytest.fixture
async def working(database_url: str) -> AsyncIterator[Desk]:
    async with desk(database_url) as opened:
        yield opened


async def step(worker: Engine) -> Step | None:
    return await in_transaction(worker, lambda tx: check_step(tx, rows_max=PAGE))


async def rest_is_over(working: Desk) -> None:
    """Travel to the time of the next pass."""
    await execute(working.owner, "UPDATE checks SET due_at = now()")


async def settled(working: Desk) -> None:
    """Payouts of two merchants, some ended, some not."""
    for recipient in ("01712345678", "017000000100", "017000000001"):
        await working.create_many(await working.merchant(), PAYOUTS // 3, recipient=recipient, callback_url=URL)
    await working.settle()


async def sizes(working: Desk) -> Counter[str]:
    return Counter({walk.table: n for walk in WALKS if (n := await working.count(walk.table))})


def offenders(rule: str) -> float | None:
    return REGISTRY.get_sample_value("payouts_invariant_offenders", {"rule": rule})


def pass_age_seconds(table: str) -> float | None:
    return REGISTRY.get_sample_value("payouts_invariant_checked_pass_age_seconds", {"table": table})


async def check_everything(checker: Checker, working: Desk) -> None:
    """Rounds until every walk rests."""
    await rest_is_over(working)
    while True:
        await checker.run_round()
        if not await working.count("checks", "due_at <= now()"):
            return


async def test_a_pass_looks_at_every_row_once_whoever_makes_its_steps(working: Desk, database_url: str) -> None:
    await settled(working)
    await in_transaction(working.worker, begin_checks)
    seen: Counter[str] = Counter()
    for _ in range(5):
        # A process that ends after a step; the next one goes on where it stood.
        pool = engine(database_url, role="payouts_worker")
        made = await step(pool)
        await pool.dispose()
        assert made is not None
        seen[made.table] += made.rows
    await in_transaction(working.worker, begin_checks)

    async def go_on() -> None:
        while made := await step(working.worker):
            seen[made.table] += made.rows

    await asyncio.gather(go_on(), go_on())
    # Of two that come at the same time to the last walk one may leave before the other is at its end.
    await go_on()

    assert seen == await sizes(working)


async def test_two_sweeps_are_never_at_the_same_walk_and_wait_for_nothing(working: Desk) -> None:
    await settled(working)
    await in_transaction(working.worker, begin_checks)
    tables = []
    opened = [await working.worker.connect() for _ in range(len(WALKS) + 1)]
    for connection in opened:
        made = await check_step(connection, rows_max=PAGE)
        tables.append(None if made is None else made.table)
    for connection in opened:
        await connection.close()
    assert sorted(filter(None, tables)) == sorted(walk.table for walk in WALKS)
    assert tables[-1] is None


async def test_a_step_that_is_rolled_back_is_made_again(working: Desk) -> None:
    await settled(working)
    await in_transaction(working.worker, begin_checks)
    async with working.worker.connect() as tx:
        assert await check_step(tx, rows_max=PAGE) is not None
    seen: Counter[str] = Counter()
    while made := await step(working.worker):
        seen[made.table] += made.rows
    assert seen == await sizes(working)


async def test_when_a_pass_is_complete_the_walk_rests_and_begins_anew(working: Desk) -> None:
    await settled(working)
    await pass_over(working.worker, rows_max=PAGE)
    assert await step(working.worker) is None
    await rest_is_over(working)
    seen: Counter[str] = Counter()
    while made := await step(working.worker):
        seen[made.table] += made.rows
    assert seen == await sizes(working)


@pytest.mark.parametrize("walk", [walk.table for walk in WALKS if walk.table not in ("accounts", "callback_due")])
async def test_a_pass_ends_however_much_comes_meanwhile(working: Desk, walk: str) -> None:
    busy, calm = await working.merchant(), await working.merchant()
    for merchant in (busy, calm):
        await working.create_many(merchant, PAYOUTS, callback_url=URL)
    await working.settle()
    await in_transaction(working.worker, begin_checks)
    await execute(working.owner, f"UPDATE checks SET due_at = 'infinity' WHERE walk <> '{walk}'")
    before, steps = (await sizes(working))[walk], 0
    while await step(working.worker):
        steps += 1
        # As many rows come as a step looks at, and more.
        await working.create_many(busy, 2 * PAGE, callback_url=URL)
        await working.settle()
        assert steps <= before // PAGE + 4
    assert await pass_over(working.worker, rows_max=PAGE) == {}


async def test_work_under_way_raises_no_alarm(working: Desk) -> None:
    """Creates, calls, refunds and checks at the same time, pass after pass."""
    merchants = [await working.merchant() for _ in range(2)]
    await in_transaction(working.worker, begin_checks)
    done = asyncio.Event()

    async def create() -> None:
        for recipient in ("01712345678", "017000000100", "017000000300", "017000000001", "017000000400") * 6:
            for merchant in merchants:
                await working.create_many(merchant, 10, recipient=recipient, callback_url=URL)

    async def settle() -> None:
        while not done.is_set():
            await working.settle()
            await hear(working.worker)

    async def check() -> Counter[str]:
        found: Counter[str] = Counter()
        passes = 0
        while not done.is_set() or passes < 3:
            broken = await pass_over(working.worker, rows_max=50)
            found.update({rule: len(named) for rule, named in broken.items()})
            passes += 1
            await rest_is_over(working)
        return found

    checking = [asyncio.create_task(check()) for _ in range(2)]
    settling = asyncio.create_task(settle())
    await create()
    done.set()
    await settling
    assert await asyncio.gather(*checking) == [Counter(), Counter()]
    await assert_sound(working.owner)


async def test_what_is_broken_is_told_once_in_a_pass_and_stays_on_the_gauge_until_it_is_not(
    server: Server, working: Desk, database_url: str
) -> None:
    many = OFFENDERS_SHOWN + 5
    ids = await working.create_many(await working.merchant(), many)
    checker = Checker(working.worker, rows_max=4)
    with capture_logs() as lines:
        await check_everything(checker, working)
    assert lines == []
    assert offenders("payout_has_its_hold") == 0

    await forge(server, database_url, "UPDATE payouts SET hold_seq = hold_seq + 1000")
    for _ in range(2):
        with capture_logs() as lines:
            await check_everything(checker, working)
        told = [line for line in lines if line["rule"] == "payout_has_its_hold"]
        named = [offender for line in told for offender in line["offenders"]]
        assert sorted(named) == sorted(map(str, ids[:OFFENDERS_SHOWN]))
        assert {(line["event"], line["log_level"], line["guards"]) for line in told} == {
            ("invariant.broken", "error", "Every payout points at the one entry that held exactly its amount.")
        }
        assert offenders("payout_has_its_hold") == many

    await forge(server, database_url, "UPDATE payouts SET hold_seq = hold_seq - 1000")
    with capture_logs() as lines:
        await check_everything(checker, working)
    assert lines == []
    assert offenders("payout_has_its_hold") == 0


async def test_a_first_pass_that_never_ends_grows_old_and_says_nothing_of_rules(working: Desk) -> None:
    await settled(working)
    checker = Checker(working.worker, rows_max=PAGE)
    await in_transaction(working.worker, begin_checks)
    await execute(working.owner, "UPDATE checks SET due_at = 'infinity' WHERE walk <> 'entries'")
    await checker.run_round()
    assert await working.count("checks", "walk = 'entries' AND behind IS NOT NULL AND finished_at IS NULL") == 1

    await execute(working.owner, "UPDATE checks SET began_at = now() - interval '2 days' WHERE walk = 'entries'")
    await checker.run_round()

    assert (pass_age_seconds("entries") or 0) > DAY_SECONDS
    (entries,) = [each for each in await in_transaction(working.worker, find_progress) if each.table == "entries"]
    assert entries.offenders == {}

    await check_everything(checker, working)
    assert (pass_age_seconds("entries") or DAY_SECONDS) < DAY_SECONDS
