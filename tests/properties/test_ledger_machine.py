"""The life of payouts in any order that Hypothesis can think of, on real PostgreSQL: after every step each rule holds.

Two shops with little money, few external ids, every recipient of the sandbox; workers that are paused before or after their
call, speak late and twice; time that jumps. `LEDGER_EXAMPLES=500` looks longer, and elsewhere every time.
"""

import asyncio
import os
import random
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from common.db.callbacks import claim_callbacks
from common.db.engine import in_transaction
from common.domain.ids import PAYOUT, render_id
from common.errors import ExternalIdReused, InsufficientBalance
from common.recipients import Recipient
from gateway.accept import Accepted, Order
from tests.conftest import Server
from tests.factories import Merchant, execute, fetch, order
from tests.flows import Desk, assert_sound, cloned, desk
from worker.callbacks.deliver import Ended as Delivered
from worker.callbacks.deliver import record_attempts
from worker.callbacks.send import Attempt
from worker.conclusions import SUBMIT, Call, Ended
from worker.rails import Answer, Outcome, PaymentOrder, Rail

EXAMPLES = int(os.environ.get("LEDGER_EXAMPLES", "30"))
STEPS = 16

FUNDS = ("60.00", "200.00")
# Long enough for a bank on this machine; those that keep silent cost it every time.
PATIENCE_SECONDS = 0.04

_T = TypeVar("_T")

# Each recipient of the sandbox that differs in more than the reason of a refusal; the first is the usual one.
NUMBERS = tuple(f"0171234{last}" for last in ("5678", "0001", "0105", "0120", "0200", "0201", "0202", "0203"))
EXTERNAL_IDS = tuple(f"PAY-{number}" for number in range(40))
AMOUNTS_MINOR = (100, 500, 1000)

# Chance decides what is ordered: Hypothesis would draw few orders, and mostly equal ones.
_seeds = st.integers(0, 2**32 - 1)
# Where in a list of whatever length: what is drawn never depends on how far things have come.
_positions = st.integers(0, 999)


@dataclass(slots=True)
class Paused:
    """A worker that holds a call, and what the bank has answered it if it got that far."""

    call: Call
    answer: Answer | None


class LedgerMachine(RuleBasedStateMachine):
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
        self._desk: Desk
        self._merchants: list[Merchant]
        self._bank: Rail
        self._run(self._open())

    def _run(self, work: Awaitable[_T]) -> _T:
        async def awaited() -> _T:
            return await work

        return self.runner.run(awaited())

    async def _open(self) -> None:
        url = await self._resources.enter_async_context(cloned(self.server, self.template))
        self._desk = await self._resources.enter_async_context(desk(url))
        self._merchants = [await self._desk.merchant(funds=funds, webhook_url="http://127.0.0.1:9/") for funds in FUNDS]
        self._bank = self._desk.sandbox()

    def teardown(self) -> None:
        self._run(self._resources.aclose())

    # --- creates ---

    def _order(self, shop: int, external_id: str, amount_minor: int, number: str) -> Order:
        made = order(
            self._desk.settings,
            self._merchants[shop].shop,
            external_id=external_id,
            amount_minor=amount_minor,
            recipient=number,
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
            made = self._order(shop, external_id, amount_minor, chance.choice(NUMBERS))
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
            self._paused.append(Paused(call, self._run(self._ask(call)) if reached else None))

    async def _ask(self, call: Call) -> Answer:
        if call.action != SUBMIT:
            return await self._bank.look_up(call.reference)
        recipient = Recipient(self._numbers[call.payout.id], None)
        wanted = PaymentOrder(call.reference, call.payout.amount_minor, call.payout.currency, recipient)
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
        ended = [Ended(item.call, item.answer or self._run(self._ask(item.call))) for item in awake]
        self._run(self._desk.record(*ended))
        self._recorded += ended

    @rule(at=_positions)
    def record_again(self, at: int) -> None:
        """An answer is recorded for the second time; no money moves."""
        again = self._recorded[-(at % len(self._recorded)) :][:1] if self._recorded else []
        before = self._run(fetch(self._desk.owner, "SELECT * FROM entries ORDER BY account_id, seq"))
        self._run(self._desk.record(*again))
        assert self._run(fetch(self._desk.owner, "SELECT * FROM entries ORDER BY account_id, seq")) == before

    def jump(self) -> None:
        """Time goes on until everything that waits is due, leases included."""
        self._run(self._desk.make_due())

    # --- callbacks ---

    @rule(status=st.sampled_from((200, 410, 503)), recorded=st.booleans(), claim_max=st.integers(1, 5))
    def deliver(self, status: int, recorded: bool, claim_max: int) -> None:
        """Callbacks are claimed; the attempt is recorded, or its worker is paused."""
        token = uuid4()
        claimed = self._run(
            in_transaction(
                self._desk.worker,
                lambda tx: claim_callbacks(tx, token=token, lease_seconds=60.0, claim_max=claim_max),
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
        due = "UPDATE callback_due SET due_at = now() - interval '1 second'"
        self._run(execute(self._desk.owner, due))
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
        query = "SELECT reference, amount_minor, state FROM sandbox.payments"
        bank = {row.reference: row for row in self._run(fetch(self._desk.owner, query))}
        for row in self._run(fetch(self._desk.owner, "SELECT id, amount_minor, state FROM payouts")):
            payment = bank.pop(render_id(PAYOUT, row.id), None)
            if row.state == "success":
                assert payment is not None
                assert (payment.state, payment.amount_minor) == ("paid", row.amount_minor)
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
