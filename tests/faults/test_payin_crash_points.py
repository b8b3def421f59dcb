"""Fault tests: processes are killed while payers pay in. Afterwards each payin is credited once, for exactly what was paid."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from common.domain.ids import PAYIN, render_id
from ops.simulator.moods import Manner
from tests.bank import RunningBank, add_rail, bank
from tests.factories import Merchant, execute
from tests.faults.locks import Superuser, locked, until_waiting
from tests.faults.patience import LONG, UNHURRIED_LOCKS
from tests.faults.proxy import CAREFUL_RECORD, CLAIM_OF_PAYIN, CommitFault, proxy, until_failed
from tests.flows import Desk, assert_sound, desk
from tests.stack import Stack, eventually, stack

FUNDS_MINOR = 100_000_000
AMOUNT_MINOR = 1000


@dataclass(frozen=True, slots=True)
class Counter:
    """A merchant whose payers pay in at a bank that tells a gateway of ours, and everybody who deals with them."""

    desk: Desk
    bank: RunningBank
    merchant: Merchant
    running: Stack
    superuser: Superuser

    async def payin(self, **fields: Any) -> UUID:
        """A payin that waits for its payer."""
        return await self.desk.create_payin(self.merchant, amount_minor=AMOUNT_MINOR, **fields)

    async def pay(self, payin_id: UUID, amount_minor: int = AMOUNT_MINOR) -> None:
        """A payer pays."""
        url = f"{self.bank.base_url}/counter/{render_id(PAYIN, payin_id)}"
        async with aiohttp.ClientSession() as payer:
            answered = await payer.post(url, json={"amount_minor": amount_minor, "currency": "BDT"})
            assert answered.status == 200

    async def until(self, payin_id: UUID, state: str) -> None:
        """Return once a payin stands so; time passes quickly for what nobody has leased."""

        async def reached() -> bool:
            await execute(self.desk.owner, "UPDATE payin_due SET due_at = now() WHERE lease_token IS NULL")
            return await self.desk.payin_state(payin_id) == state

        await eventually(reached, f"the payin is {state}")

    async def expire_leases(self) -> None:
        """As if the leases' time had passed; whoever holds one is dead by now."""
        await execute(self.desk.owner, "UPDATE payin_due SET due_at = now() WHERE lease_token IS NOT NULL")

    async def assert_credited_once(self) -> None:
        """The account has exactly what was paid in, by one entry, and every rule holds."""
        assert await self.desk.balance(self.merchant) == (FUNDS_MINOR + AMOUNT_MINOR, 0)
        assert await self.desk.count("entries", "payin_id IS NOT NULL") == 1
        assert await self.desk.count("events", "type = 'payin.success'") == 1
        await assert_sound(self.desk.owner)


@pytest.fixture
async def counter(database_url: str, superuser: Superuser, tmp_path: Path) -> AsyncIterator[Counter]:
    async with AsyncExitStack() as resources:
        working = await resources.enter_async_context(desk(database_url, **UNHURRIED_LOCKS))
        running = await resources.enter_async_context(stack(database_url, **LONG))
        events_url = f"{running.base_url}/api/v1/rails/bank/events"
        there = await resources.enter_async_context(
            bank(tmp_path, events_url=events_url, pace_seconds=0.1, slow_seconds=1.0)
        )
        await add_rail(working, "bank", there.base_url)
        yield Counter(working, there, await working.merchant(rail="bank"), running, superuser)


async def test_a_bank_tells_again_until_a_gateway_has_stored_its_event(counter: Counter) -> None:
    payin_id = await counter.payin(look_up_in_seconds=3600.0)
    gateway = await counter.running.start("gateway")
    async with locked(counter.desk.owner, "LOCK TABLE rail_events IN ACCESS EXCLUSIVE MODE"):
        await counter.pay(payin_id)
        await until_waiting(counter.superuser, "gateway-read", "rail_events")
        await gateway.kill()
    assert await counter.desk.count("rail_events") == 0
    await counter.running.start("gateway")
    await counter.running.start("worker", "settle")

    async def credited() -> bool:
        return await counter.desk.payin_state(payin_id) == "success"

    await eventually(credited, "the bank's event is heard")
    await counter.assert_credited_once()


async def test_a_gateway_killed_after_it_stored_an_event_and_before_it_answered_doubles_nothing(
    counter: Counter, database_url: str
) -> None:
    payin_id = await counter.payin(look_up_in_seconds=3600.0)
    async with proxy(database_url) as network:
        network.fail_commits(CommitFault.HOLD_ANSWER)
        gateway = await counter.running.start("gateway", DATABASE_URL=network.url)
        await counter.pay(payin_id)
        await until_failed(network)
        await gateway.kill()
    assert await counter.desk.count("rail_events") == 1
    await counter.running.start("gateway")
    await counter.running.start("worker", "settle")
    await counter.until(payin_id, "success")

    async def told() -> bool:
        return counter.bank.ledger.count_untold() == 0

    await eventually(told, "the bank's event is confirmed")
    await counter.assert_credited_once()


async def test_a_worker_killed_while_it_asks_leaves_the_question_to_the_next(counter: Counter) -> None:
    payin_id = await counter.payin()
    await counter.pay(payin_id)
    counter.bank.script.look_ups.append(Manner.SLOW)
    worker = await counter.running.start("worker", "settle")

    async def asked() -> bool:
        return not counter.bank.script.look_ups

    await eventually(asked, "the bank is asked")
    await worker.kill()
    assert await counter.desk.payin_state(payin_id) == "pending"
    await counter.expire_leases()
    await counter.running.start("worker", "settle")
    await counter.until(payin_id, "success")
    await counter.assert_credited_once()


async def test_a_worker_killed_in_the_middle_of_a_credit_has_credited_nothing_and_the_next_one_does(
    counter: Counter,
) -> None:
    payin_id = await counter.payin()
    await counter.pay(payin_id)
    account = counter.merchant.shop.account_id
    async with locked(counter.desk.owner, "SELECT FROM accounts WHERE id = $1 FOR UPDATE", account):
        worker = await counter.running.start("worker", "settle")
        await until_waiting(counter.superuser, "settle", "lock_accounts")
        await worker.kill()
    assert await counter.desk.balance(counter.merchant) == (FUNDS_MINOR, 0)
    await counter.expire_leases()
    await counter.running.start("worker", "settle")
    await counter.until(payin_id, "success")
    await counter.assert_credited_once()


@pytest.mark.parametrize("point", [CLAIM_OF_PAYIN, CAREFUL_RECORD])
async def test_a_worker_killed_after_a_commit_and_before_it_knows_credits_once(
    counter: Counter, database_url: str, point: str
) -> None:
    payin_id = await counter.payin()
    await counter.pay(payin_id)
    async with proxy(database_url) as network:
        network.fail_commits(CommitFault.HOLD_ANSWER, of=point)
        worker = await counter.running.start("worker", "settle", DATABASE_URL=network.url)
        await until_failed(network)
        assert await counter.desk.count("payin_due", "lease_token IS NOT NULL") == (point == CLAIM_OF_PAYIN)
        await worker.kill()
    await counter.expire_leases()
    await counter.running.start("worker", "settle")
    await counter.until(payin_id, "success")
    await counter.assert_credited_once()


async def test_look_ups_and_events_of_many_workers_that_are_killed_credit_each_payin_once(counter: Counter) -> None:
    ids = [await counter.payin() for _ in range(20)]
    await counter.running.start("gateway")
    workers = [await counter.running.start("worker", "settle") for _ in range(3)]
    await asyncio.gather(*(counter.pay(payin_id) for payin_id in ids))
    for worker in workers:
        await worker.kill()
    await counter.expire_leases()
    await counter.running.start("worker", "settle")
    for payin_id in ids:
        await counter.until(payin_id, "success")
    assert await counter.desk.balance(counter.merchant) == (FUNDS_MINOR + 20 * AMOUNT_MINOR, 0)
    await assert_sound(counter.desk.owner)
