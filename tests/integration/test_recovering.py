"""A database that was restored to an earlier moment: nothing happens in it before `payouts recover`, and afterwards nothing is
sent before its rail was asked.
"""

from datetime import datetime
from typing import Final

import pytest
from sqlalchemy.engine import make_url

from common.canceling import cancel
from common.db.engine import in_transaction
from common.db.recovering import awaits_recovery, begin_recovery, doubt_page
from common.domain.ids import PAYOUT, render_id
from common.errors import DatabaseUnavailable
from tests.conftest import Server
from tests.factories import engine, execute, order
from tests.flows import Desk, assert_sound
from tests.terminal import Terminal
from worker.rails import Answer, Outcome, PayinTerms, PaymentOrder
from worker.sweep import Sweeper

SILENT: Final = "01712300200"
SLOW: Final = "01712300001"
WHO: Final = ("--actor", "alice", "--reason", "the disk of db-1")


class Bank:
    """A rail of the sandbox's name that answers as it is told and remembers what it was asked. Times in seconds."""

    lag_seconds = 0.0
    calls_max = None

    def __init__(self, look_up: Outcome, *, denial_seconds: float = 0.0) -> None:
        self.denial_seconds = denial_seconds
        self.look_up_says = look_up
        self.submitted: list[str] = []
        self.looked_up: list[str] = []

    async def submit(self, order: PaymentOrder) -> Answer:
        self.submitted.append(order.reference)
        return Answer(Outcome.PAID)

    async def look_up(self, reference: str) -> Answer:
        self.looked_up.append(reference)
        return Answer(self.look_up_says)

    async def look_up_payin(self, payin: PayinTerms) -> Answer:
        raise NotImplementedError(payin.reference)


@pytest.fixture
def restore(server: Server, floor: Desk) -> "Restore":
    """Has the server say of the database that it was restored, as it does when `restore.sh` made its folder."""
    return Restore(server, floor)


class Restore:
    """Somebody who restores the database."""

    def __init__(self, server: Server, floor: Desk) -> None:
        self._server = server
        self._floor = floor

    async def __call__(self, mark: str) -> None:
        database = make_url(self._floor.url).database
        await self._server.run(f"ALTER DATABASE {database} SET payouts.restored = '{mark}'")
        for pool in (self._floor.owner, self._floor.gateway, self._floor.worker):
            await pool.dispose()


async def waits(floor: Desk) -> bool:
    return await in_transaction(floor.worker, awaits_recovery)


async def test_nothing_is_accepted_canceled_sent_or_paid_in_before_the_recovery(
    terminal: Terminal, floor: Desk, restore: Restore
) -> None:
    merchant = await floor.merchant()
    payout_id = await floor.create(merchant, external_id="PAY-1")
    await restore("monday")
    assert await waits(floor)

    with pytest.raises(DatabaseUnavailable):
        await floor.accept(order(floor.settings, merchant.shop))
    with pytest.raises(DatabaseUnavailable):
        await in_transaction(floor.gateway, lambda tx: cancel(tx, merchant.shop.id, "PAY-1", wait_seconds=1.0))
    with pytest.raises(DatabaseUnavailable):
        await floor.settler().run_round()
    top_up = await terminal.run("balance", "topup", merchant.code, merchant.shop.code, "1.00", *WHO)
    top_up.assert_refused("payouts recover", code=3)
    assert await floor.state(payout_id) == "queued"
    assert await floor.attempts(payout_id) == []

    (await terminal.run("recover", *WHO)).assert_shown("monday")
    assert not await waits(floor)
    await floor.settle()
    assert await floor.state(payout_id) == "success"
    await floor.create(merchant)
    await assert_sound(floor.owner)


async def test_what_the_rail_has_paid_is_never_sent_again(terminal: Terminal, floor: Desk, restore: Restore) -> None:
    payout_id = await floor.create(await floor.merchant())
    await restore("monday")
    await terminal.run("recover", *WHO)
    bank = Bank(Outcome.PAID)

    await floor.settle(floor.settler({"sandbox": bank}))

    assert (bank.submitted, bank.looked_up) == ([], [render_id(PAYOUT, payout_id)])
    assert await floor.attempts(payout_id) == [("restore", "unknown"), ("look_up", "paid")]
    assert await floor.state(payout_id) == "success"
    await assert_sound(floor.owner)


async def test_what_the_rail_does_not_know_is_sent_once_no_request_can_be_on_its_way_any_more(
    terminal: Terminal, floor: Desk, restore: Restore
) -> None:
    payout_id = await floor.create(await floor.merchant())
    await restore("monday")
    await terminal.run("recover", *WHO)
    bank = Bank(Outcome.NOT_FOUND, denial_seconds=3_600.0)
    await floor.settle(floor.settler({"sandbox": bank}))
    assert bank.submitted == []
    assert await floor.state(payout_id) == "verifying"

    # A claim is older than this by now, but its call may still begin.
    bank.denial_seconds = 1e-6
    await floor.make_due()
    await floor.settle(floor.settler({"sandbox": bank}))
    assert bank.submitted == []

    bank.denial_seconds = 0.0
    await floor.make_due()
    await floor.settle(floor.settler({"sandbox": bank}))

    assert bank.submitted == [render_id(PAYOUT, payout_id)]
    assert await floor.state(payout_id) == "success"
    await assert_sound(floor.owner)


async def test_every_open_payout_is_in_doubt_wherever_it_stood_and_none_that_has_ended(
    terminal: Terminal, floor: Desk, restore: Restore
) -> None:
    merchant = await floor.merchant()
    ended = await floor.create(merchant)
    await floor.settle()
    silent = await floor.create(merchant, recipient=SILENT)
    submitted = await floor.create(merchant, recipient=SLOW)
    await floor.settle(floor.settler({"sandbox": floor.sandbox(settle_seconds=3_600.0)}, rail_timeout_seconds=1.0))
    sending = await floor.create(merchant)
    await floor.claim()
    queued = await floor.create(merchant)
    stood = {silent: "verifying", submitted: "submitted", sending: "sending", queued: "queued", ended: "success"}
    assert {payout_id: await floor.state(payout_id) for payout_id in stood} == stood
    await restore("monday")

    recovered = (await terminal.run("recover", *WHO, "--json")).document

    assert recovered == {"restored": "monday", "payouts_in_doubt": 4, "payins_asked_about": 0}
    now = {**dict.fromkeys(stood, "verifying"), submitted: "submitted", ended: "success"}
    assert {payout_id: await floor.state(payout_id) for payout_id in stood} == now
    last = {payout_id: (await floor.attempts(payout_id))[-1] for payout_id in stood}
    assert last == {**dict.fromkeys(stood, ("restore", "unknown")), ended: ("submit", "paid")}
    assert await floor.attempts(sending) == [("submit", "unknown"), ("restore", "unknown")]
    assert await floor.count("payout_due", "due_at <= now() AND lease_token IS NULL") == 4
    await assert_sound(floor.owner)


async def test_what_has_expired_meanwhile_ends_when_its_rail_does_not_know_it_and_not_before(
    terminal: Terminal, floor: Desk, restore: Restore
) -> None:
    payout_id = await floor.create(await floor.merchant(), expires_at=await soon(floor))
    await floor.one("SELECT pg_sleep(greatest(0, extract(epoch FROM max(expires_at) - now()))) FROM payout_due")
    await restore("monday")
    await terminal.run("recover", *WHO)
    await Sweeper(floor.worker).run_round()
    assert await floor.state(payout_id) == "verifying"

    bank = Bank(Outcome.NOT_FOUND)
    await floor.settle(floor.settler({"sandbox": bank}))
    await Sweeper(floor.worker).run_round()

    assert (bank.submitted, await floor.state(payout_id)) == ([], "expired")
    await assert_sound(floor.owner)


async def test_pending_payins_are_asked_about_soon(terminal: Terminal, floor: Desk, restore: Restore) -> None:
    payin_id = await floor.create_payin(await floor.merchant())
    await execute(floor.owner, "UPDATE payin_due SET due_at = now() + interval '1 day'")
    await restore("monday")
    assert (await terminal.run("recover", *WHO, "--json")).document["payins_asked_about"] == 1
    await floor.collect()
    assert await floor.payin_state(payin_id) == "success"


async def test_a_recovery_that_was_interrupted_goes_on_where_it_ended(
    terminal: Terminal, floor: Desk, restore: Restore
) -> None:
    await floor.create_many(await floor.merchant(), 5)
    await restore("monday")
    audit = "INSERT INTO audit (actor, action, subject, reason) VALUES ('bob', 'recovery.begin', 'monday', 'x') RETURNING id"
    ops = engine(floor.url, role="payouts_ops")
    async with ops.begin() as tx:
        audit_id = (await tx.exec_driver_sql(audit)).scalar_one()
        recovery_id = await begin_recovery(tx, restored="monday", audit_id=audit_id)
    for _ in range(2):
        assert await in_transaction(ops, lambda tx: doubt_page(tx, recovery_id, rows_max=2))
    await ops.dispose()
    assert await waits(floor)

    shown = await terminal.run("recover", *WHO, "--json")

    assert shown.document["payouts_in_doubt"] == 5
    assert await floor.count("payout_attempts") == 5
    assert not await waits(floor)
    actions = (
        "SELECT string_agg(actor || ' ' || action, ', ' ORDER BY id) AS all FROM audit WHERE action LIKE 'recovery%'"
    )
    assert (await floor.one(actions)).all == "bob recovery.begin, alice recovery.resume"


async def test_a_dry_run_says_how_it_stands_and_changes_nothing(
    terminal: Terminal, floor: Desk, restore: Restore
) -> None:
    payout_id = await floor.create(await floor.merchant())
    await restore("monday")
    assert (await terminal.run("recover", "--dry-run", *WHO, "--json")).document == {
        "restored": "monday",
        "waits": True,
        "begun": False,
        "would_be_doubted": [{"rail": "sandbox", "authoritative": True, "stage": "queued", "payouts": 1}],
    }
    assert await floor.state(payout_id) == "queued"
    assert await floor.count("recoveries") == 0
    assert await waits(floor)


async def test_a_recovery_is_for_one_restore_and_the_next_one_needs_its_own(
    terminal: Terminal, floor: Desk, restore: Restore
) -> None:
    await restore("monday")
    (await terminal.run("recover", *WHO)).assert_shown("monday")
    (await terminal.run("recover", *WHO)).assert_refused("does not say")
    await restore("tuesday")
    assert await waits(floor)
    (await terminal.run("recover", *WHO)).assert_shown("tuesday")
    assert not await waits(floor)


async def test_a_server_that_says_nothing_is_recovered_when_operators_know_better(
    terminal: Terminal, floor: Desk
) -> None:
    payout_id = await floor.create(await floor.merchant())
    (await terminal.run("recover", *WHO)).assert_refused("does not say", "--unmarked")
    assert await floor.state(payout_id) == "queued"
    (await terminal.run("recover", "--unmarked", *WHO)).assert_shown("unmarked")
    assert await floor.state(payout_id) == "verifying"
    assert not await waits(floor)


async def soon(floor: Desk) -> datetime:
    at: datetime = (await floor.one("SELECT now() + interval '1 second' AS at")).at
    return at
