"""Payouts and payins in any order that Hypothesis can think of, on real PostgreSQL: all rules hold after every step.

Two shops with little money, few external ids, every recipient of the sandbox; merchants that cancel; workers that are paused
before or after their call, speak late and twice; payers that pay, or pay another sum; a bank that speaks by itself, repeats
itself and names wrong sums; rivals on connections of their own; time that jumps. `LEDGER_EXAMPLES=2000` looks longer, and
elsewhere every time.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, TypeVar
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from common.canceling import cancel, expire_page
from common.db.due import FIRST_TO_EXPIRE
from common.db.engine import Tx, in_transaction
from common.db.rail_events import NewRailEvent, append_rail_events
from common.domain.ids import PAYOUT, render_id
from common.errors import ExternalIdReused, InsufficientBalance, NotCancelable
from common.recipients import Recipient
from gateway.deciding import Accepted, Order
from tests.conftest import Server
from tests.factories import Merchant, execute, fetch, order
from tests.flows import LOCK_WAIT_SECONDS, Desk, assert_sound, cloned, desk, forge, pass_callback_time, take_callbacks
from tests.properties.payin_rules import PayinRules
from worker.callbacks.recording import Ended as Delivered
from worker.callbacks.recording import record_attempts
from worker.callbacks.send import Attempt
from worker.conclusions import SUBMIT, Call, Ended
from worker.hearing import hear
from worker.rails import Answer, Outcome, PaymentOrder, Rail

EXAMPLES = int(os.environ.get("LEDGER_EXAMPLES", "200"))
STEPS = 16

FUNDS = ("60.00", "200.00")
# Long enough for a bank on this machine; those that keep silent cost it every time.
PATIENCE_SECONDS = 0.04

_T = TypeVar("_T")

# Each recipient of the sandbox that differs in more than the reason of a refusal; the first is the usual one.
NUMBERS = tuple(f"0171234{last}" for last in (
    "5678", "0001", "0105", "0120", "0200", "0201", "0202", "0203", "0300", "0301", "0400", "0401"
))  # fmt: skip
# It books "declined" and says "paid" later: which of them ends the payout is a matter of which arrives.
TWO_TONGUED = "0301"
EXTERNAL_IDS = tuple(f"PAY-{number}" for number in range(40))
AMOUNTS_MINOR = (100, 500, 1000)
# Some payouts have a time after which they must not be sent; it is over when the machine says so.
LIFETIME = timedelta(days=1)

# Chance decides what is ordered: Hypothesis would draw few orders, and mostly equal ones.
_seeds = st.integers(0, 2**32 - 1)
# Where in a list of whatever length: what is drawn never depends on how far things have come.
_positions = st.integers(0, 999)


@dataclass(slots=True)
class Paused:
    """A worker that holds a call, and what the bank has answered it if it got that far. `era`: how often time had jumped."""

    call: Call
    answer: Answer | None
    era: int


class LedgerMachine(PayinRules):
    """What we expect to be there: per shop and external id, whose create was accepted, and with which content."""

    server: ClassVar[Server]
    template: ClassVar[str]
    runner: ClassVar[asyncio.Runner]

    def __init__(self) -> None:
        super().__init__()
        self._resources = AsyncExitStack()
        self._accepted: dict[tuple[int, str], Order] = {}
        self._numbers: dict[UUID, str] = {}
        self._paused: list[Paused] = []
        self._recorded: list[Ended] = []
        self._told: list[Delivered] = []
        self._era = 0
        self._words = 0
        self._url: str
        self._desk: Desk
        self._merchants: list[Merchant]
        self._bank: Rail
        self._run(self._open())

    def _run(self, work: Awaitable[_T]) -> _T:
        async def awaited() -> _T:
            return await work

        return self.runner.run(awaited())

    async def _open(self) -> None:
        self._url = await self._resources.enter_async_context(cloned(self.server, self.template))
        self._desk = await self._resources.enter_async_context(desk(self._url))
        self._merchants = [await self._desk.merchant(funds=funds, webhook_url="http://127.0.0.1:9/") for funds in FUNDS]
        self._bank = self._desk.sandbox()

    def teardown(self) -> None:
        self._run(self._resources.aclose())

    # --- creates ---

    def _order(self, shop: int, external_id: str, amount_minor: int, number: str, *, expires: bool = False) -> Order:
        made = order(
            self._desk.settings,
            self._merchants[shop].shop,
            external_id=external_id,
            amount_minor=amount_minor,
            recipient=number,
            expires_at=datetime.now(UTC) + LIFETIME if expires else None,
        )
        self._numbers[made.id] = number
        return made

    def _twin(self, shop: int, made: Order) -> Order:
        """The same create once more, as another request."""
        return self._order(shop, made.external_id, made.amount_minor, self._numbers[made.id])

    def _wishes(self, seed: int, count: int) -> list[tuple[int, Order]]:
        """Orders with the shop they are for; some ask again for what was asked before, some for other content."""
        chance = random.Random(seed)
        wishes = []
        for _ in range(count):
            shop = chance.randrange(len(FUNDS))
            external_id, amount_minor = chance.choice(EXTERNAL_IDS), chance.choice(AMOUNTS_MINOR)
            expires = chance.random() < 0.2
            made = self._order(shop, external_id, amount_minor, chance.choice(NUMBERS), expires=expires)
            before = self._accepted.get((shop, external_id))
            wishes.append((shop, made if before is None or chance.random() < 0.5 else self._twin(shop, before)))
        return wishes

    @initialize(seed=_seeds)
    def begin(self, seed: int) -> None:
        """No life without payouts."""
        self.create(seed, 8)

    @rule(seed=_seeds, count=st.integers(1, 8))
    def create(self, seed: int, count: int) -> None:
        """A batch is decided as if its orders had come one by one."""
        wishes = self._wishes(seed, count)
        left = [self._run(self._spendable(shop)) for shop in range(len(FUNDS))]
        verdicts = self._run(self._desk.accept(*(made for _, made in wishes)))
        for (shop, made), verdict in zip(wishes, verdicts, strict=True):
            before = self._accepted.get((shop, made.external_id))
            if before is not None:
                self._check_repeat(before, made, verdict)
            elif made.amount_minor > left[shop]:
                assert isinstance(verdict, InsufficientBalance)
            else:
                assert isinstance(verdict, Accepted)
                assert not verdict.replayed
                left[shop] -= made.amount_minor
                self._accepted[shop, made.external_id] = made

    def _check_repeat(self, before: Order, made: Order, verdict: Any, *, replayed: bool | None = True) -> None:
        """What exists already is answered with what exists, or refused. `replayed` None: it may be the one that exists."""
        same = (before.amount_minor, before.recipient_digest) == (made.amount_minor, made.recipient_digest)
        if same:
            assert isinstance(verdict, Accepted)
            assert replayed is None or verdict.replayed is replayed
            assert verdict.payout.id == before.id
        else:
            assert isinstance(verdict, ExternalIdReused)

    @rule(seed=_seeds, count=st.integers(2, 6), twins=st.integers(1, 3))
    def create_as_rivals(self, seed: int, count: int, twins: int) -> None:
        """Orders and their twins, each in a transaction of its own, at the same time, for what money there is."""
        wishes = [
            (shop, self._twin(shop, made) if twin else made)
            for shop, made in self._wishes(seed, count)
            for twin in range(twins)
        ]
        left = [self._run(self._spendable(shop)) for shop in range(len(FUNDS))]
        verdicts = self._run(self._accept_at_once([made for _, made in wishes]))
        for (shop, made), verdict in zip(wishes, verdicts, strict=True):
            if isinstance(verdict, Accepted) and not verdict.replayed:
                assert (shop, made.external_id) not in self._accepted, "accepted twice"
                left[shop] -= made.amount_minor
                self._accepted[shop, made.external_id] = made
        assert min(left) >= 0
        for (shop, made), verdict in zip(wishes, verdicts, strict=True):
            if not isinstance(verdict, InsufficientBalance):
                self._check_repeat(self._accepted[shop, made.external_id], made, verdict, replayed=None)

    async def _accept_at_once(self, orders: list[Order]) -> list[Any]:
        return [verdict for (verdict,) in await asyncio.gather(*(self._desk.accept(made) for made in orders))]

    async def _spendable(self, shop: int) -> int:
        posted, held = await self._desk.balance(self._merchants[shop])
        return posted - held

    # --- settlement ---

    @rule(later=st.booleans())
    def settle(self, later: bool) -> None:
        """A worker that works, now or when everything that waits is due."""
        if later:
            self.jump()
        self._run(self._desk.settle(self._desk.settler(rail_timeout_seconds=PATIENCE_SECONDS)))

    @rule(reached=st.booleans())
    def claim_and_pause(self, reached: bool) -> None:
        """A worker that is stopped, before its calls or after them."""
        for call in self._run(self._desk.claim()):
            self._paused.append(Paused(call, self._run(self._ask(call)) if reached else None, self._era))

    async def _ask(self, call: Call) -> Answer:
        if call.action != SUBMIT:
            return await self._bank.look_up(call.reference)
        recipient = Recipient(self._numbers[call.payout.id], None)
        wanted = PaymentOrder(call.reference, call.payout.amount_minor, call.payout.currency, recipient, time.time())
        try:
            return await asyncio.wait_for(self._bank.submit(wanted), PATIENCE_SECONDS)
        except TimeoutError:
            return Answer(Outcome.UNKNOWN, detail="time-out")

    @rule(count=st.integers(1, 20), late=st.booleans())
    def wake(self, count: int, late: bool) -> None:
        """Some that were stopped go on, however late: they call if they had not, and record what they heard, together."""
        if not self._paused:
            self.claim_and_pause(reached=True)
        if late:
            self.jump()
            self._run(self._desk.claim())
        awake, self._paused = self._paused[:count], self._paused[count:]
        ended = [Ended(item.call, item.answer or self._go_on(item)) for item in awake]
        self._run(self._desk.record(*ended))
        self._recorded += ended

    def _go_on(self, item: Paused) -> Answer:
        """Who finds its lease gone makes no call any more."""
        if item.era == self._era:
            return self._run(self._ask(item.call))
        return Answer(Outcome.NOT_ACCEPTED if item.call.action == SUBMIT else Outcome.UNKNOWN)

    @rule(at=_positions)
    def record_again(self, at: int) -> None:
        """An answer is recorded for the second time; no money moves."""
        again = self._recorded[-(at % len(self._recorded)) :][:1] if self._recorded else []
        before = self._run(fetch(self._desk.owner, "SELECT * FROM entries ORDER BY account_id, seq"))
        self._run(self._desk.record(*again))
        assert self._run(fetch(self._desk.owner, "SELECT * FROM entries ORDER BY account_id, seq")) == before

    def jump(self) -> None:
        """Time goes on until everything that waits is due, leases and what the bank will say included."""
        self._era += 1
        self._run(self._desk.make_due())
        self._run(self._desk.make_payins_due())
        said = "UPDATE rail_events SET due_at = now() - interval '1 second' WHERE applied_at IS NULL"
        self._run(execute(self._desk.owner, said))

    # --- merchants change their mind, and time runs out ---

    @rule(at=_positions)
    def cancel(self, at: int) -> None:
        """A payout that nobody has sent yet is canceled, again too; any other is not, and nothing moves."""
        key = self._pick(at)
        state = self._run(self._desk.state(self._accepted[key].id))
        verdict = self._run(self._cancel(key))
        if state in ("queued", "canceled"):
            assert verdict == "canceled" or isinstance(verdict, NotCancelable)
        else:
            assert isinstance(verdict, NotCancelable)
            assert self._run(self._desk.state(self._accepted[key].id)) == state

    def _pick(self, at: int) -> tuple[int, str]:
        return sorted(self._accepted)[at % len(self._accepted)]

    async def _cancel(self, key: tuple[int, str]) -> str | NotCancelable:
        shop, external_id = key

        async def work(tx: Tx) -> str:
            shop_id = self._merchants[shop].shop.id
            payout, _ = await cancel(tx, shop_id, external_id, wait_seconds=LOCK_WAIT_SECONDS)
            return str(payout.state)

        try:
            return await in_transaction(self._desk.gateway, work)
        except NotCancelable as error:
            return error

    @rule()
    def expire(self) -> None:
        """Time is over for those that had some; the sweep ends what was not sent in time."""
        for table in ("payouts", "payout_due", "payins"):
            past = f"UPDATE {table} SET expires_at = now() - interval '1 second' WHERE expires_at IS NOT NULL"
            self._run(forge(self.server, self._url, past))
        self._run(self._expire())

    async def _expire(self) -> None:
        await expire_page(self._desk.worker, behind=FIRST_TO_EXPIRE, payouts_max=128)

    # --- the bank speaks by itself ---

    @rule()
    def hear(self) -> None:
        """What the bank has said so far is applied."""
        self._run(self._hear())

    async def _hear(self) -> None:
        while (await hear(self._desk.worker)).count:
            pass

    @rule(at=_positions, twice=st.booleans(), wrong_sum=st.booleans())
    def say(self, at: int, twice: bool, wrong_sum: bool) -> None:
        """The bank tells by itself what it knows of a payment, for another sum too, or for the second time."""
        known = (
            "SELECT reference, amount_minor, currency, state FROM sandbox.payments WHERE state <> 'absent' ORDER BY 1"
        )
        payments = self._run(fetch(self._desk.owner, known))
        if not payments:
            return
        payment = payments[at % len(payments)]
        self._words += 1
        word = NewRailEvent(
            rail="sandbox",
            event_id=f"word-{self._words}",
            reference=payment.reference,
            outcome=payment.state,
            amount_minor=payment.amount_minor + (1 if wrong_sum else 0),
            currency=payment.currency,
        )
        for _ in range(2 if twice else 1):
            self._run(in_transaction(self._desk.worker, lambda tx: append_rail_events(tx, [word])))
        self._run(self._hear())

    # --- all of it at once ---

    @rule(ats=st.lists(_positions, min_size=1, max_size=6), later=st.booleans())
    def everybody_at_once(self, ats: list[int], later: bool) -> None:
        """Two workers, a sweep and merchants that cancel, each on connections of their own."""
        if later:
            self.jump()
        self._run(self._rush([self._pick(at) for at in ats]))

    async def _rush(self, keys: list[tuple[int, str]]) -> None:
        workers = [self._desk.settler(rail_timeout_seconds=PATIENCE_SECONDS) for _ in range(2)]
        await asyncio.gather(
            *(self._desk.settle(worker) for worker in workers),
            *(self._desk.collect() for _ in range(2)),
            *(self._cancel(key) for key in keys),
            self._hear(),
            self._expire(),
        )

    # --- callbacks ---

    @rule(status=st.sampled_from((200, 410, 503)), recorded=st.booleans(), claim_max=st.integers(1, 5))
    def deliver(self, status: int, recorded: bool, claim_max: int) -> None:
        """Callbacks are claimed; the attempt is recorded, or its worker is paused."""
        token = uuid4()
        claimed = self._run(
            in_transaction(
                self._desk.worker,
                lambda tx: take_callbacks(tx, token, claim_max),
            )
        )
        attempt = Attempt(status, None if status == 200 else "http_error", b"", "127.0.0.1", 1, 0.0)
        ended = [Delivered(item, token, attempt, 0.0, 0.0) for item in claimed]
        self._told += ended
        if recorded:
            self._record_attempts(ended)

    @rule(first=_positions, count=st.integers(1, 3))
    def deliver_late(self, first: int, count: int) -> None:
        """Attempts are recorded late, or again; meanwhile everything has come due."""
        self._run(pass_callback_time(self._desk.owner))
        at = first % max(1, len(self._told))
        self._record_attempts(self._told[at : at + count])

    def _record_attempts(self, ended: list[Delivered]) -> None:
        self._run(in_transaction(self._desk.worker, lambda tx: record_attempts(tx, ended, now=0.0), attempts_max=1))

    # --- what always holds ---

    @invariant()
    def every_rule_holds(self) -> None:
        self._run(assert_sound(self._desk.owner))

    @invariant()
    def whoever_was_accepted_is_there_once(self) -> None:
        rows = self._run(fetch(self._desk.owner, "SELECT id, amount_minor, recipient_digest FROM payouts ORDER BY id"))
        expected = sorted((made.id, made.amount_minor, made.recipient_digest) for made in self._accepted.values())
        assert [tuple(row) for row in rows] == expected

    @invariant()
    def the_banks_memory_is_ours(self) -> None:
        """What the bank paid, we did not release; what we call paid, it paid, once and in full."""
        # What the bank has submitted it pays when its time has come, whether somebody looks or not.
        query = """
            SELECT reference, amount_minor,
                   CASE WHEN state = 'submitted' AND settles_at <= now() THEN 'paid' ELSE state END AS state
              FROM sandbox.payments
        """
        bank = {row.reference: row for row in self._run(fetch(self._desk.owner, query))}
        for row in self._run(fetch(self._desk.owner, "SELECT id, amount_minor, state FROM payouts")):
            payment = bank.pop(render_id(PAYOUT, row.id), None)
            if self._numbers[row.id].endswith(TWO_TONGUED):
                continue
            if row.state in ("success", "refunded"):
                assert payment is not None
                assert (payment.state, payment.amount_minor) == ("paid", row.amount_minor)
            if row.state in ("canceled", "expired"):
                assert payment is None or payment.state == "absent"
            if row.state == "failed":
                assert payment is not None
                assert payment.state == "declined"
        assert bank == {}, "the bank was asked for what we know nothing of"


@pytest.mark.timeout(60 + 4 * EXAMPLES)
def test_the_ledger_holds_whatever_happens_in_whatever_order(server: Server, template: str) -> None:
    looking = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        derandomize="LEDGER_EXAMPLES" not in os.environ,
        # A smaller example costs as much as this one did, and may take another course: workers and banks have their own pace.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with asyncio.Runner() as runner:
        LedgerMachine.server, LedgerMachine.template, LedgerMachine.runner = server, template, runner
        run_state_machine_as_test(LedgerMachine, settings=looking)
