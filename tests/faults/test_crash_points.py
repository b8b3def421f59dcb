"""Fault tests: a worker is killed, or paused until its lease is gone, at each point where that could cost or double something.

A worker is brought to its point from outside: the rail waits for a table that the test has locked, or keeps silent because
the recipient says so; a record waits for a row that the test holds; the receiver stalls; the network swallows an answer.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest

from common.db.engine import Engine, in_transaction
from common.log import LogEvent
from common.settings import Settings
from gateway.deciding import Accepted, decide_batch
from tests.factories import Merchant, add_funded_merchant, execute, fetch, order
from tests.faults.endings import EXIT_SECONDS, exit_code, leave
from tests.faults.locks import Superuser, locked, until_waiting
from tests.faults.merchants import assert_invariants
from tests.faults.patience import LONG, SHORT, UNHURRIED_STATEMENTS
from tests.faults.proxy import (
    BOOKING,
    CAREFUL_RECORD,
    CLAIM,
    CLAIM_OF_CALLBACK,
    RECORD,
    RECORD_OF_CALLBACK,
    CommitFault,
    Proxy,
    proxy,
    until_failed,
)
from tests.faults.receiver import Receiver, receiver
from tests.stack import Process, Stack, eventually, stack

USUAL, SILENT_FOR_EVER, PAID_IN_SILENCE, DECLINED_IN_SILENCE = (
    "01712345678",
    "01700000200",
    "01700000201",
    "01700000203",
)


@dataclass(frozen=True, slots=True)
class Scene:
    """One payout of one merchant, and everybody who deals with it."""

    owner: Engine
    superuser: Superuser
    running: Stack
    receiver: Receiver
    merchant: Merchant
    payout_id: UUID

    async def row(self) -> Any:
        """The payout, what the rail knows of it, and what was told, in one row."""
        (row,) = await fetch(
            self.owner,
            """
            SELECT p.state, a.posted_minor, a.held_minor,
                   (SELECT count(*) FROM entries WHERE payout_id = p.id AND kind IN ('capture', 'release')) AS resolutions,
                   (SELECT count(*) FROM events WHERE payout_id = p.id) AS events,
                   (SELECT array_agg(t.action || ' ' || coalesce(t.outcome, '-') ORDER BY t.attempt_no)
                      FROM payout_attempts t WHERE t.payout_id = p.id) AS attempts,
                   (SELECT count(DISTINCT t.reference) FROM payout_attempts t WHERE t.payout_id = p.id) AS refs,
                   s.state AS rail_state, s.submits, d.lease_token,
                   c.state AS callback_state,
                   (SELECT array_agg(coalesce(t.http_status::text, t.error) || CASE WHEN t.late THEN ' late' ELSE '' END
                                     ORDER BY t.attempt_no)
                      FROM callback_attempts t WHERE t.event_id = c.event_id) AS callback_attempts
              FROM payouts p JOIN accounts a ON a.id = p.account_id
              LEFT JOIN payout_due d ON d.payout_id = p.id
              LEFT JOIN callbacks c ON c.payout_id = p.id
              LEFT JOIN sandbox.payments s
                     ON s.reference = (SELECT min(t.reference) FROM payout_attempts t WHERE t.payout_id = p.id)
             WHERE p.id = :id
            """,
            id=self.payout_id,
        )
        return row

    async def help_time(self) -> None:
        """Make due now what nobody has leased."""
        await execute(
            self.owner,
            "UPDATE payout_due d SET due_at = now() FROM payouts p WHERE p.id = d.payout_id"
            " AND d.lease_token IS NULL AND p.state IN ('queued', 'verifying', 'submitted')",
        )

    async def until(self, state: str) -> Any:
        """Return the row once the payout is in that state. Time is helped along for rows that nobody has leased."""

        async def reached() -> Any:
            await self.help_time()
            row = await self.row()
            return row if row.state == state else None

        return await eventually(reached, f"the payout is {state}", 20)

    async def until_told(self) -> Any:
        """Return the row once the callback is delivered."""

        async def told() -> Any:
            await execute(
                self.owner, "UPDATE callback_due SET due_at = now(), in_lane = false WHERE lease_token IS NULL"
            )
            row = await self.row()
            return row if row.callback_state == "delivered" else None

        return await eventually(told, "the callback is delivered", 20)

    async def until_received(self, count: int) -> None:
        """Return once so many deliveries have come to the receiver, answered or not."""

        async def received() -> bool:
            return len(self.receiver.deliveries) == count

        await eventually(received, f"{count} deliveries have come")

    async def expire_leases(self) -> None:
        """As if the leases' time had passed; whoever holds one is dead by now."""
        await execute(self.owner, "UPDATE payout_due SET due_at = now() WHERE lease_token IS NOT NULL")
        await execute(self.owner, "UPDATE callback_due SET due_at = now() WHERE lease_token IS NOT NULL")

    async def until_waiting(self, role: str, table: str) -> None:
        """Return once a worker's statement on a table waits for a lock."""
        await until_waiting(self.superuser, role, table)

    async def until_disconnected(self, role: str) -> None:
        """Return once the server has noticed that the workers of a role are gone."""

        async def gone() -> bool:
            query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1"
            return bool(await self.superuser.fetchval(query, f"payouts-{role}") == 0)

        await eventually(gone, f"the sessions of {role} are gone")

    def rail_closed(self) -> Any:
        """The rail books nothing for the length of the context: its callers wait."""
        return locked(self.owner, "LOCK TABLE sandbox.payments IN SHARE MODE")

    def due_row_held(self) -> Any:
        """Somebody holds the payout's due row for the length of the context."""
        return locked(self.owner, "SELECT FROM payout_due WHERE payout_id = $1 FOR UPDATE", self.payout_id)

    def callback_row_held(self) -> Any:
        """Somebody holds the callback's due row for the length of the context."""
        return locked(self.owner, "SELECT FROM callback_due FOR UPDATE")

    async def assert_settled_once(self, state: str = "success") -> None:
        """Ended once, told once, agreeing with the rail, under one reference."""
        row = await self.row()
        assert (row.state, row.resolutions, row.events, row.held_minor, row.refs) == (state, 1, 1, 0, 1)
        assert row.rail_state == {"success": "paid", "failed": "declined"}[state]
        assert row.posted_minor == 100_000 - (1000 if state == "success" else 0)
        await assert_invariants(self.owner)

    async def assert_callback_leased(self) -> None:
        """A worker has claimed the callback, and nothing was sent yet."""
        assert await fetch(self.owner, "SELECT event_id FROM callback_due WHERE lease_token IS NOT NULL")
        assert not self.receiver.deliveries

    async def assert_told_once(self, attempts: list[str]) -> None:
        """Delivered; the log of attempts; whatever the receiver got was one event, signed."""
        row = await self.row()
        assert (row.callback_state, row.callback_attempts) == ("delivered", attempts)
        assert len({(delivery.webhook_id, delivery.body) for delivery in self.receiver.deliveries}) == 1
        for delivery in self.receiver.deliveries:
            delivery.assert_signed(self.merchant.webhook_secret)
        await assert_invariants(self.owner)


@asynccontextmanager
async def scene(
    owner: Engine, config: Settings, superuser: Superuser, *, recipient: str = USUAL, **overrides: str
) -> AsyncIterator[Scene]:
    """An accepted payout of 10.00 out of 1000.00 that no worker has seen yet."""
    async with AsyncExitStack() as resources:
        endpoint = await resources.enter_async_context(receiver())
        merchant = await add_funded_merchant(owner, config, funds="1000.00", webhook_url=endpoint.url)
        placed = order(config, merchant.shop, recipient=recipient)
        (verdict,) = await in_transaction(owner, lambda tx: decide_batch(tx, [placed], wait_seconds=2))
        assert isinstance(verdict, Accepted)
        running = await resources.enter_async_context(stack(config.database_url, **overrides))
        yield Scene(owner, superuser, running, endpoint, merchant, placed.id)


@asynccontextmanager
async def settled_scene(
    owner: Engine, config: Settings, superuser: Superuser, **overrides: str
) -> AsyncIterator[Scene]:
    """A settled payout whose callback no worker has seen yet."""
    async with scene(owner, config, superuser, **overrides) as on:
        worker = await on.running.start("worker", "settle")
        await on.until("success")
        assert await worker.stop() == 0
        yield on


async def until_round_failed(worker: Process) -> None:
    """Return once a worker has said that it could not do a round: it has waited for its database as long as it may."""

    async def failed() -> bool:
        return LogEvent.ROUND_FAILED in worker.output

    await eventually(failed, "the worker says that its database does not answer")


async def start_behind(on: Scene, network: Proxy, role: str, **overrides: str) -> Process:
    """A worker whose only way to the database is the proxy."""
    return await on.running.start("worker", role, DATABASE_URL=network.url, **overrides)


# Settlement: killed.


async def test_a_worker_killed_between_claim_and_call_costs_a_look_up_and_pays_once(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with scene(owner, config, superuser, **LONG) as on:
        async with on.rail_closed():
            worker = await on.running.start("worker", "settle")
            await on.until_waiting("settle", "sandbox.payments")
            await worker.kill()
        await on.until_disconnected("settle")
        assert (await on.row()).rail_state is None
        await on.running.start("worker", "settle")
        await on.expire_leases()
        await on.until("success")
        row = await on.row()
        assert row.attempts == ["submit unknown", "look_up not_found", "submit paid"]
        assert row.submits == 1
        await on.assert_settled_once()


@pytest.mark.parametrize(
    ("recipient", "state", "heard"), [(PAID_IN_SILENCE, "success", "paid"), (DECLINED_IN_SILENCE, "failed", "declined")]
)
async def test_a_worker_killed_in_the_call_leaves_the_word_to_the_rail(
    owner: Engine, config: Settings, superuser: Superuser, recipient: str, state: str, heard: str
) -> None:
    async with scene(owner, config, superuser, recipient=recipient, **LONG) as on:
        worker = await on.running.start("worker", "settle")

        async def booked() -> bool:
            return bool((await on.row()).rail_state == heard)

        await eventually(booked, "the rail has booked it and keeps silent")
        assert (await on.row()).state == "sending"
        await worker.kill()
        await on.running.start("worker", "settle")
        await on.expire_leases()
        await on.until(state)
        row = await on.row()
        assert (row.attempts, row.submits) == (["submit unknown", f"look_up {heard}"], 1)
        await on.assert_settled_once(state)


async def test_a_worker_killed_before_it_recorded_the_answer_costs_a_look_up_and_pays_once(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with scene(owner, config, superuser, **LONG) as on, proxy(config.database_url) as network:
        network.fail_commits(CommitFault.HOLD_COMMIT, of=RECORD)
        worker = await start_behind(on, network, "settle")
        await until_failed(network)
        assert (await on.row()).rail_state == "paid"
        await worker.kill()
        await on.running.start("worker", "settle")
        await on.expire_leases()
        await on.until("success")
        row = await on.row()
        assert (row.attempts, row.submits) == (["submit unknown", "look_up paid"], 1)
        await on.assert_settled_once()


async def test_the_last_word_of_a_worker_that_was_killed_counts_under_its_lease(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    """The server carries out what it was told, whoever is there to hear of it."""
    async with scene(owner, config, superuser, **LONG) as on:
        async with AsyncExitStack() as held:
            async with on.rail_closed():
                worker = await on.running.start("worker", "settle")
                await on.until_waiting("settle", "sandbox.payments")
                await held.enter_async_context(on.due_row_held())
            await on.until_waiting("settle", "end_unopposed")
            await worker.kill()
        await on.until("success")
        row = await on.row()
        assert (row.attempts, row.submits) == (["submit paid"], 1)
        await on.assert_settled_once()


@pytest.mark.parametrize("fault", [CommitFault.LOSE_ANSWER, CommitFault.LOSE_COMMIT])
@pytest.mark.parametrize("point", [CLAIM, BOOKING, RECORD])
async def test_a_settlement_whose_connection_breaks_at_commit_pays_once(
    owner: Engine, config: Settings, superuser: Superuser, point: str, fault: CommitFault
) -> None:
    async with scene(owner, config, superuser, **LONG) as on, proxy(config.database_url) as network:
        network.fail_commits(fault, of=point)
        await start_behind(on, network, "settle")
        await until_failed(network)
        await on.until("success")
        assert (await on.row()).attempts == ["submit paid"], "what it had claimed it found again, and called once"
        await on.assert_settled_once()


async def test_a_claim_to_settle_of_which_nobody_heard_is_called_as_soon_as_the_database_is_back(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    """Not looked up when its lease is over: a bank that cannot tell would leave it in doubt for ever."""
    patient = {"PAYOUTS_RAIL_TIMEOUT_SECONDS": "10", "PAYOUTS_SETTLE_LEASE_SECONDS": "60"}
    async with scene(owner, config, superuser, **patient) as on, proxy(config.database_url) as network:
        network.fail_commits(CommitFault.LOSE_ANSWER, of=CLAIM, then_refuse=True)
        worker = await start_behind(on, network, "settle")
        await until_failed(network)
        await until_round_failed(worker)
        assert (await on.row()).attempts == ["submit -"]
        await network.listen()
        await on.until("success")
        assert (await on.row()).attempts == ["submit paid"]
        await on.assert_settled_once()


@pytest.mark.parametrize("fault", [CommitFault.LOSE_ANSWER, CommitFault.LOSE_COMMIT])
async def test_a_look_up_whose_connection_breaks_as_it_is_recorded_ends_the_payout_once(
    owner: Engine, config: Settings, superuser: Superuser, fault: CommitFault
) -> None:
    async with (
        scene(owner, config, superuser, recipient=PAID_IN_SILENCE, **SHORT) as on,
        proxy(config.database_url) as network,
    ):
        network.fail_commits(fault, of=CAREFUL_RECORD)
        await start_behind(on, network, "settle")
        await on.until("success")
        assert network.faults_done == 1
        assert (await on.row()).attempts == ["submit unknown", "look_up paid"]
        await on.assert_settled_once()


# Settlement: paused until its lease is gone.


async def test_a_worker_paused_until_its_lease_ran_out_records_nothing_over_the_one_who_took_over(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with scene(owner, config, superuser, recipient=PAID_IN_SILENCE, **SHORT) as on:
        worker = await on.running.start("worker", "settle")

        async def booked() -> bool:
            return bool((await on.row()).rail_state == "paid")

        await eventually(booked, "the rail has booked it and keeps silent")
        worker.send(signal.SIGSTOP)
        await on.running.start("worker", "settle")
        await on.until("success")
        worker.send(signal.SIGCONT)
        assert await worker.stop() == 0
        await on.assert_settled_once()


async def test_a_worker_paused_with_an_answer_in_hand_ends_the_payout_once(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with scene(owner, config, superuser, **SHORT) as on, proxy(config.database_url) as network:
        network.fail_commits(CommitFault.HOLD_COMMIT, of=RECORD)
        worker = await start_behind(on, network, "settle", **LONG)
        await until_failed(network)
        worker.send(signal.SIGSTOP)
        await on.expire_leases()
        await on.running.start("worker", "settle")
        await on.until("success")
        # What it has to say comes when another has the last word.
        network.release()
        worker.send(signal.SIGCONT)
        assert await worker.stop() == 0
        row = await on.row()
        assert (row.attempts, row.submits) == (["submit paid", "look_up paid"], 1)
        await on.assert_settled_once()


async def test_a_claim_that_answers_after_its_lease_makes_no_call(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with scene(owner, config, superuser, **SHORT) as on, proxy(config.database_url) as network:
        network.fail_commits(CommitFault.HOLD_ANSWER, of=CLAIM)
        late = await start_behind(on, network, "settle", **UNHURRIED_STATEMENTS)
        await until_failed(network)
        # The lease passes by itself: this is about the clock of the one who is late.
        await on.running.start("worker", "settle", **LONG)
        await on.until("success")
        network.release()
        assert await late.stop() == 0
        row = await on.row()
        assert (row.submits, row.attempts[1:]) == (1, ["look_up not_found", "submit paid"])
        assert "lease ran out before the call" not in row.attempts
        await on.assert_settled_once()


async def test_a_late_word_that_nothing_was_sent_does_not_send_again_what_another_has_sent(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with (
        scene(owner, config, superuser, recipient=SILENT_FOR_EVER, **SHORT) as on,
        proxy(config.database_url) as network,
    ):
        network.fail_commits(CommitFault.HOLD_ANSWER, of=CLAIM)
        late = await start_behind(on, network, "settle", **UNHURRIED_STATEMENTS)
        await until_failed(network)
        worker = await on.running.start("worker", "settle")

        async def sent_by_another() -> bool:
            await on.help_time()
            row = await on.row()
            return bool(row.rail_state == "absent" and row.state == "verifying")

        await eventually(sent_by_another, "the other worker has sent it and does not know", 20)
        assert await worker.stop() == 0
        before = await on.row()
        network.release()
        # It makes no call, records that, and that changes nothing: its lease is gone.
        assert await late.stop() == 0
        after = await on.row()
        assert "payout.lease_lost" in late.output
        assert (after.state, after.submits, after.resolutions) == ("verifying", 1, 0)
        assert after.attempts[1:] == before.attempts[1:]
        assert after.held_minor == 1000
        await assert_invariants(owner)


# Callbacks: killed and paused.


async def test_a_worker_killed_between_claim_and_send_delivers_when_the_lease_is_gone(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with settled_scene(owner, config, superuser, **LONG) as on, proxy(config.database_url) as network:
        network.fail_commits(CommitFault.HOLD_ANSWER, of=CLAIM_OF_CALLBACK)
        worker = await start_behind(on, network, "callbacks")
        await until_failed(network)
        await on.assert_callback_leased()
        await worker.kill()
        assert not on.receiver.deliveries
        await on.running.start("worker", "callbacks")
        await on.expire_leases()
        await on.until_told()
        assert len(on.receiver.deliveries) == 1
        await on.assert_told_once(["200"])


async def test_a_worker_killed_while_the_receiver_stalls_sends_the_same_event_again(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with settled_scene(owner, config, superuser, **LONG) as on:
        on.receiver.answering.clear()
        worker = await on.running.start("worker", "callbacks")
        await on.until_received(1)
        await worker.kill()
        on.receiver.answering.set()
        await on.running.start("worker", "callbacks")
        await on.expire_leases()
        await on.until_told()
        assert len(on.receiver.deliveries) == 2
        await on.assert_told_once(["200"])


async def test_a_worker_killed_before_it_recorded_a_delivery_sends_the_same_event_again(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with settled_scene(owner, config, superuser, **LONG) as on:
        on.receiver.answering.clear()
        worker = await on.running.start("worker", "callbacks")
        await on.until_received(1)
        async with on.callback_row_held():
            on.receiver.answering.set()
            await on.until_waiting("callbacks", "callback_due")
            await worker.kill()
        await on.until_disconnected("callbacks")
        await on.running.start("worker", "callbacks")
        await on.expire_leases()
        await on.until_told()
        assert len(on.receiver.deliveries) == 2
        await on.assert_told_once(["200"])


async def test_a_worker_paused_in_a_delivery_changes_nothing_when_it_wakes_up(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with settled_scene(owner, config, superuser, **SHORT) as on:
        on.receiver.answering.clear()
        # Time enough to be paused while it waits.
        patience = {"PAYOUTS_CALLBACK_TIMEOUT_SECONDS": "5", "PAYOUTS_CALLBACK_LEASE_SECONDS": "10"}
        worker = await on.running.start("worker", "callbacks", **patience)
        await on.until_received(1)
        worker.send(signal.SIGSTOP)
        on.receiver.answering.set()
        await on.running.start("worker", "callbacks", **LONG)
        await on.until_told()
        finished = await fetch(owner, "SELECT finished_at FROM callbacks")
        worker.send(signal.SIGCONT)
        assert await worker.stop() == 0
        row = await on.row()
        # What the late one heard is in the log, marked; it had heard 200, or nothing in time.
        assert row.callback_attempts in (["200 late", "200"], ["timeout late", "200"]), row
        assert await fetch(owner, "SELECT finished_at FROM callbacks") == finished
        assert len(on.receiver.deliveries) == 2
        await on.assert_told_once(row.callback_attempts)


@pytest.mark.parametrize("point", [CLAIM_OF_CALLBACK, RECORD_OF_CALLBACK])
@pytest.mark.parametrize("fault", [CommitFault.LOSE_ANSWER, CommitFault.LOSE_COMMIT])
async def test_a_delivery_whose_connection_breaks_at_commit_is_recorded_once(
    owner: Engine, config: Settings, superuser: Superuser, fault: CommitFault, point: str
) -> None:
    async with settled_scene(owner, config, superuser, **LONG) as on, proxy(config.database_url) as network:
        network.fail_commits(fault, of=point)
        await start_behind(on, network, "callbacks")
        await until_failed(network)
        await on.until_told()
        assert len(on.receiver.deliveries) == 1
        await on.assert_told_once(["200"])


async def test_a_claim_of_which_nobody_heard_is_sent_as_soon_as_the_database_is_back(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    """Not when its lease is over: that is longer than this test waits."""
    async with settled_scene(owner, config, superuser, **LONG) as on, proxy(config.database_url) as network:
        network.fail_commits(CommitFault.LOSE_ANSWER, of=CLAIM_OF_CALLBACK, then_refuse=True)
        worker = await start_behind(on, network, "callbacks")
        await until_failed(network)
        await on.assert_callback_leased()
        await until_round_failed(worker)
        assert not on.receiver.deliveries
        await network.listen()
        await on.until_received(1)
        await on.until_told()
        await on.assert_told_once(["200"])


async def test_a_database_that_falls_silent_before_a_delivery_is_recorded_costs_no_second_call(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    impatient = LONG | {"PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS": "1"}
    async with settled_scene(owner, config, superuser, **impatient) as on, proxy(config.database_url) as network:
        on.receiver.answering.clear()
        worker = await start_behind(on, network, "callbacks")
        await on.until_received(1)
        network.black_hole()
        on.receiver.answering.set()
        await until_round_failed(worker)
        network.flow()
        await on.until_told()
        assert len(on.receiver.deliveries) == 1
        await on.assert_told_once(["200"])


async def test_a_database_that_is_silent_for_longer_than_the_lease_costs_one_call_and_loses_nothing(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    impatient = SHORT | {
        "PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS": "1",
        "PAYOUTS_CALLBACK_TIMEOUT_SECONDS": "5",
        "PAYOUTS_CALLBACK_LEASE_SECONDS": "10",
    }
    async with settled_scene(owner, config, superuser, **impatient) as on, proxy(config.database_url) as network:
        on.receiver.answering.clear()
        worker = await start_behind(on, network, "callbacks")
        await on.until_received(1)
        network.black_hole()
        on.receiver.answering.set()
        await until_round_failed(worker)
        # Another, whose way is free, takes it over when the lease is gone.
        await on.running.start("worker", "callbacks", **LONG)
        await on.until_told()
        finished = await fetch(owner, "SELECT finished_at FROM callbacks")
        network.flow()
        assert await worker.stop() == 0
        row = await on.row()
        assert row.callback_attempts in (["200"], ["200 late", "200"], ["timeout late", "200"]), row
        assert await fetch(owner, "SELECT finished_at FROM callbacks") == finished
        assert len(on.receiver.deliveries) == 2
        await on.assert_told_once(row.callback_attempts)


# Signals.


async def test_one_sigterm_lets_a_settlement_end_and_exits_with_0(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with scene(owner, config, superuser, **LONG) as on:
        async with on.rail_closed():
            worker = await on.running.start("worker", "settle")
            await on.until_waiting("settle", "sandbox.payments")
            await leave(worker)
            assert (await on.row()).state == "sending"
        assert await exit_code(worker) == 0
        assert (await on.row()).attempts == ["submit paid"]
        await on.assert_settled_once()


async def test_one_sigterm_lets_a_delivery_end_and_exits_with_0(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    async with settled_scene(owner, config, superuser, **LONG) as on:
        on.receiver.answering.clear()
        worker = await on.running.start("worker", "callbacks")
        await on.until_received(1)
        await leave(worker)
        on.receiver.answering.set()
        assert await exit_code(worker) == 0
        await on.assert_told_once(["200"])


async def test_one_sigterm_waits_no_longer_than_the_drain_and_what_was_lost_is_taken_up(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    overrides = LONG | {"PAYOUTS_DRAIN_SECONDS": "1"}
    async with scene(owner, config, superuser, recipient=PAID_IN_SILENCE, **overrides) as on:
        worker = await on.running.start("worker", "settle")

        async def booked() -> bool:
            return bool((await on.row()).rail_state == "paid")

        await eventually(booked, "the rail has booked it and keeps silent")
        assert await asyncio.wait_for(worker.stop(), EXIT_SECONDS) == 0
        await on.running.start("worker", "settle")
        await on.expire_leases()
        await on.until("success")
        await on.assert_settled_once()


async def test_one_sigterm_waits_no_longer_than_the_drain_and_a_delivery_that_was_cut_uses_no_step(
    owner: Engine, config: Settings, superuser: Superuser
) -> None:
    overrides = LONG | {"PAYOUTS_DRAIN_SECONDS": "1"}
    async with settled_scene(owner, config, superuser, **overrides) as on:
        on.receiver.answering.clear()
        worker = await on.running.start("worker", "callbacks")
        await on.until_received(1)
        assert await asyncio.wait_for(worker.stop(), EXIT_SECONDS) == 0
        (due,) = await fetch(owner, "SELECT step, attempts_made FROM callback_due")
        assert (due.step, due.attempts_made) == (0, 1)
        on.receiver.answering.set()
        await on.running.start("worker", "callbacks")
        await on.expire_leases()
        await on.until_told()
        assert len(on.receiver.deliveries) == 2
        await on.assert_told_once(["200"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_a_worker_at_once(
    owner: Engine, config: Settings, superuser: Superuser, number: signal.Signals
) -> None:
    async with scene(owner, config, superuser, **LONG) as on:
        async with on.rail_closed():
            worker = await on.running.start("worker", "settle")
            await on.until_waiting("settle", "sandbox.payments")
            await leave(worker)
            worker.send(number)
            assert await exit_code(worker) == -number
        await on.until_disconnected("settle")
        await on.running.start("worker", "settle")
        await on.expire_leases()
        await on.until("success")
        await on.assert_settled_once()


async def test_idle_workers_of_every_role_leave_at_once(owner: Engine, config: Settings, superuser: Superuser) -> None:
    async with settled_scene(owner, config, superuser) as on:
        workers = await asyncio.gather(
            *(on.running.start("worker", role) for role in ("settle", "callbacks", "sweep", "all"))
        )
        await on.until_told()
        assert await asyncio.wait_for(asyncio.gather(*(worker.stop() for worker in workers)), EXIT_SECONDS) == [0] * 4
        assert "round.failed" not in "".join(worker.output for worker in workers)
