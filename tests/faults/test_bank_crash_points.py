"""Fault tests: a process of ours is killed, or put to sleep, at each point of a payout's way through a bank. Afterwards the
bank's own ledger and ours agree payout by payout: nothing paid twice, nothing paid and released, nothing held for ever.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from common.db.engine import in_transaction
from ops.reconciliation import compare, find_ours
from ops.simulator.moods import Behaviour, Fate, Manner
from tests.bank import RunningBank, add_rail, bank
from tests.conftest import Server
from tests.factories import Merchant, create_body, execute, fetch
from tests.faults.locks import Superuser, locked, until_waiting
from tests.faults.patience import LONG, SHORT, UNHURRIED_LOCKS
from tests.faults.proxy import CLAIM, RECORD, CommitFault, proxy, until_failed
from tests.flows import Desk, assert_sound, desk, forge
from tests.stack import Stack, client, eventually, stack

FUNDS_MINOR = 100_000_000
AMOUNT_MINOR = 1000
# How long the bank keeps whoever asks waiting, when it is slow: time enough for what a test does meanwhile.
SLOW_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Affair:
    """A merchant whose payouts go through a bank, and everybody who deals with them."""

    desk: Desk
    bank: RunningBank
    merchant: Merchant
    running: Stack
    superuser: Superuser

    async def payout(self, **fields: Any) -> Any:
        """A payout that is accepted and that no worker has seen."""
        return await self.desk.create(self.merchant, **fields)

    async def until_booked(self) -> None:
        """Return once the bank has booked a payment."""

        async def booked() -> bool:
            return any(payment.status != "asked" for payment in self.bank.ledger.payments())

        await eventually(booked, "the bank has booked it")

    async def expire_leases(self) -> None:
        """As if the leases' time had passed; whoever holds one is dead by now."""
        await execute(self.desk.owner, "UPDATE payout_due SET due_at = now() WHERE lease_token IS NOT NULL")

    async def until_settled(self) -> None:
        """Return once every payout has ended; time passes quickly for what nobody has leased."""

        async def settled() -> bool:
            # And long enough that no request of ours can be on its way to the bank any more.
            await execute(
                self.desk.owner,
                """
                WITH aged AS (
                  UPDATE payout_attempts SET started_at = started_at - interval '10 minutes'
                   WHERE finished_at IS NOT NULL AND started_at > now() - interval '5 minutes')
                UPDATE payout_due SET due_at = now() WHERE lease_token IS NULL
                """,
            )
            return await self.desk.count("payouts", "resolution_seq IS NULL") == 0

        await eventually(settled, "every payout has ended")

    async def assert_agreed(self, *states: str) -> None:
        """The two ledgers say the same, and every rule of ours holds."""
        ours = await in_transaction(self.desk.owner, lambda tx: find_ours(tx, "bank"))
        assert compare(ours, self.bank.ledger.payments()) == []
        assert [payout.state for payout in ours] == list(states)
        assert {payment.times_paid for payment in self.bank.ledger.payments()} <= {0, 1}
        await assert_sound(self.desk.owner)


@asynccontextmanager
async def affair(database_url: str, superuser: Superuser, tmp_path: Path, **overrides: str) -> AsyncIterator[Affair]:
    """Everybody but the processes, which the test starts."""
    async with AsyncExitStack() as resources:
        working = await resources.enter_async_context(desk(database_url, **UNHURRIED_LOCKS))
        there = await resources.enter_async_context(bank(tmp_path, slow_seconds=SLOW_SECONDS))
        await add_rail(working, "bank", there.base_url)
        merchant = await working.merchant(rail="bank")
        running = await resources.enter_async_context(stack(database_url, **overrides))
        yield Affair(working, there, merchant, running, superuser)


async def test_a_gateway_killed_before_its_commit_has_promised_nothing(
    database_url: str, superuser: Superuser, tmp_path: Path
) -> None:
    async with affair(database_url, superuser, tmp_path, **LONG) as on:
        gateway = await on.running.start("gateway")
        body = create_body(external_id="PAY-1")
        async with client(on.running.base_url, on.merchant) as sender:
            account = on.merchant.shop.account_id
            async with locked(on.desk.owner, "SELECT FROM accounts WHERE id = $1 FOR UPDATE", account):
                asking = asyncio.create_task(sender.create(body))
                await until_waiting(on.superuser, "gateway-accept", "lock_accounts")
                await gateway.kill()
                with pytest.raises(aiohttp.ClientError):
                    await asking
            assert await on.desk.count("payouts") == 0
            await on.running.start("gateway")
            assert (await sender.create(body))[0] == 201
        await on.running.start("worker", "settle")
        await on.until_settled()
        await on.assert_agreed("success")


async def test_a_gateway_killed_after_its_commit_and_before_it_published_has_promised_all(
    database_url: str, superuser: Superuser, tmp_path: Path
) -> None:
    async with affair(database_url, superuser, tmp_path, **LONG) as on, proxy(database_url) as network:
        network.fail_commits(CommitFault.HOLD_ANSWER)
        gateway = await on.running.start("gateway", DATABASE_URL=network.url)
        body = create_body(external_id="PAY-1")
        async with client(on.running.base_url, on.merchant) as sender:
            asking = asyncio.create_task(sender.create(body))
            await until_failed(network)
            await gateway.kill()
            with pytest.raises(aiohttp.ClientError):
                await asking
            assert await on.desk.count("payouts") == 1
            await on.running.start("gateway")
            assert (await sender.create(body))[0] == 200
        await on.running.start("worker", "settle")
        await on.until_settled()
        await on.assert_agreed("success")


async def test_a_worker_killed_between_claim_and_call_has_paid_nothing_and_the_next_one_pays(
    database_url: str, superuser: Superuser, tmp_path: Path
) -> None:
    async with affair(database_url, superuser, tmp_path, **LONG) as on, proxy(database_url) as network:
        payout_id = await on.payout()
        network.fail_commits(CommitFault.HOLD_ANSWER, of=CLAIM)
        worker = await on.running.start("worker", "settle", DATABASE_URL=network.url)
        await until_failed(network)
        await worker.kill()
        assert (await on.desk.state(payout_id), on.bank.ledger.payments()) == ("sending", [])
        await on.expire_leases()
        await on.running.start("worker", "settle")
        await on.until_settled()
        assert await on.desk.attempts(payout_id) == [
            ("submit", "unknown"),
            ("look_up", "not_found"),
            ("submit", "paid"),
        ]
        await on.assert_agreed("success")


@pytest.mark.parametrize("fate", [Fate.PAID, Fate.DECLINED])
async def test_a_worker_killed_in_the_call_leaves_the_word_to_the_bank(
    database_url: str, superuser: Superuser, tmp_path: Path, fate: Fate
) -> None:
    async with affair(database_url, superuser, tmp_path, **LONG) as on:
        payout_id = await on.payout()
        on.bank.script.submits.append(Behaviour(Manner.SLOW, fate))
        worker = await on.running.start("worker", "settle")
        await on.until_booked()
        await worker.kill()
        assert await on.desk.state(payout_id) == "sending"
        await on.expire_leases()
        await on.running.start("worker", "settle")
        await on.until_settled()
        assert len(await on.desk.attempts(payout_id)) == 2
        await on.assert_agreed("success" if fate is Fate.PAID else "failed")


async def test_a_worker_killed_between_call_and_record_costs_a_look_up(
    database_url: str, superuser: Superuser, tmp_path: Path
) -> None:
    async with affair(database_url, superuser, tmp_path, **LONG) as on, proxy(database_url) as network:
        payout_id = await on.payout()
        network.fail_commits(CommitFault.HOLD_COMMIT, of=RECORD)
        worker = await on.running.start("worker", "settle", DATABASE_URL=network.url)
        await until_failed(network)
        await on.until_booked()
        await worker.kill()
        await on.expire_leases()
        await on.running.start("worker", "settle")
        await on.until_settled()
        assert await on.desk.attempts(payout_id) == [("submit", "unknown"), ("look_up", "paid")]
        await on.assert_agreed("success")


@pytest.mark.parametrize("point", [CLAIM, RECORD])
async def test_a_worker_killed_after_a_commit_and_before_it_could_acknowledge_or_know_doubles_nothing(
    database_url: str, superuser: Superuser, tmp_path: Path, point: str
) -> None:
    async with affair(database_url, superuser, tmp_path, **LONG) as on, proxy(database_url) as network:
        await on.payout()
        network.fail_commits(CommitFault.HOLD_ANSWER, of=point)
        worker = await on.running.start("worker", "settle", DATABASE_URL=network.url)
        await until_failed(network)
        await worker.kill()
        await on.expire_leases()
        await on.running.start("worker", "settle")
        await on.until_settled()
        await on.assert_agreed("success")


async def test_a_sweep_that_is_killed_has_ended_nothing_by_half(
    server: Server, database_url: str, superuser: Superuser, tmp_path: Path
) -> None:
    async with affair(database_url, superuser, tmp_path, **LONG) as on:
        soon = datetime.now(UTC) + timedelta(hours=1)
        expiring = await on.payout(expires_at=soon)
        for table in ("payouts", "payout_due"):
            await forge(server, database_url, f"UPDATE {table} SET expires_at = now() - interval '1 second'")
        async with locked(on.desk.owner, "SELECT FROM payouts WHERE id = $1 FOR UPDATE", expiring):
            sweep = await on.running.start("worker", "sweep")
            await until_waiting(on.superuser, "sweep", "payouts")
            await sweep.kill()
        assert await on.desk.state(expiring) == "queued"
        await on.running.start("worker", "sweep")
        await on.running.start("worker", "settle")
        await on.until_settled()
        await on.assert_agreed("expired")
        assert await on.desk.balance(on.merchant) == (FUNDS_MINOR, 0)


async def test_a_worker_killed_in_a_look_up_costs_another_look_up(
    database_url: str, superuser: Superuser, tmp_path: Path
) -> None:
    async with affair(database_url, superuser, tmp_path, **LONG) as on:
        payout_id = await on.payout()
        on.bank.script.submits.append(Behaviour(Manner.DROP_AFTER))
        first = await on.running.start("worker", "settle")

        async def verifying() -> bool:
            return await on.desk.state(payout_id) == "verifying"

        await eventually(verifying, "its fate is unknown")
        assert await first.stop() == 0
        on.bank.script.look_ups.append(Manner.SLOW)
        await on.desk.make_due()
        second = await on.running.start("worker", "settle")

        async def asked() -> bool:
            return not on.bank.script.look_ups

        await eventually(asked, "the bank is asked what became of it")
        await second.kill()
        await on.expire_leases()
        await on.running.start("worker", "settle")
        await on.until_settled()
        assert await on.desk.attempts(payout_id) == [("submit", "unknown"), ("look_up", "unknown"), ("look_up", "paid")]
        await on.assert_agreed("success")


@pytest.mark.parametrize("manner", [Manner.ANSWER, Manner.SLOW], ids=["before its call", "in its call"])
async def test_a_worker_that_sleeps_from_its_claim_until_long_after_its_lease_pays_nothing_twice(
    database_url: str, superuser: Superuser, tmp_path: Path, manner: Manner
) -> None:
    async with affair(database_url, superuser, tmp_path, **SHORT) as on, proxy(database_url) as network:
        payout_id = await on.payout()
        on.bank.script.submits.append(Behaviour(manner))
        if manner is Manner.ANSWER:
            network.fail_commits(CommitFault.HOLD_ANSWER, of=CLAIM)
        sleeper = await on.running.start("worker", "settle", DATABASE_URL=network.url)
        await (until_failed(network) if manner is Manner.ANSWER else on.until_booked())
        sleeper.send(signal.SIGSTOP)
        # The lease passes by itself: this is about the clock of the one who sleeps.
        await on.running.start("worker", "settle")
        await on.until_settled()
        network.release()
        sleeper.send(signal.SIGCONT)
        assert await sleeper.stop() == 0
        rows = await fetch(on.desk.owner, "SELECT DISTINCT reference FROM payout_attempts")
        assert len(rows) == 1
        assert await on.desk.entries(payout_id) == ["hold", "capture"]
        await on.assert_agreed("success")
