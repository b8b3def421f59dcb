"""The part of the machine that is about payins: payers that pay, wrong sums too, banks that give back, late workers."""

import random
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from uuid import UUID, uuid4

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from common.db.engine import Tx, in_transaction
from common.db.payins import Question, append_payin, claim_questions, find_payin
from common.db.rail_events import NewRailEvent, append_rail_events
from common.domain.ids import PAYIN, render_id
from tests.factories import Merchant, fetch, new_payin
from tests.flows import Desk
from worker.crediting import record_answer
from worker.rails import Answer, Outcome, PayinTerms
from worker.rails.sandbox import PAYIN_SCRIPTS

_T = TypeVar("_T")

EXTERNAL_IDS = tuple(f"IN-{number}" for number in range(20))
# Each story that the sandbox knows of a payer, by the last two digits; most pay.
AMOUNTS_MINOR = (1000, 1000, 1000, *(1000 + last for last in PAYIN_SCRIPTS))
LIFETIME = timedelta(days=1)

_seeds = st.integers(0, 2**32 - 1)
_positions = st.integers(0, 999)


@dataclass(slots=True)
class PausedQuestion:
    """A worker that has asked about a payin, and has not recorded the answer yet."""

    question: Question
    answer: Answer
    token: UUID


@dataclass(slots=True)
class Payins:
    """The payins that were made, the questions whose answers are still to be recorded, and how often the bank has spoken."""

    external_ids: dict[tuple[int, str], tuple[UUID, int]] = field(default_factory=dict)
    paused: list[PausedQuestion] = field(default_factory=list)
    words: int = 0


class PayinRules(RuleBasedStateMachine):
    """Rules about payins, for a machine that has a desk and merchants."""

    _desk: Desk
    _merchants: list[Merchant]

    def __init__(self) -> None:
        super().__init__()
        self._payins = Payins()

    def _run(self, work: Awaitable[_T]) -> _T:
        raise NotImplementedError

    @rule(seed=_seeds, count=st.integers(1, 4))
    def create_payins(self, seed: int, count: int) -> None:
        """Payins are stored once per external id, and credit nothing."""
        chance = random.Random(seed)
        before = self._run(fetch(self._desk.owner, "SELECT posted_minor FROM accounts ORDER BY id"))
        for _ in range(count):
            shop, external_id = chance.randrange(len(self._merchants)), chance.choice(EXTERNAL_IDS)
            made = new_payin(
                self._merchants[shop].shop,
                external_id=external_id,
                amount_minor=chance.choice(AMOUNTS_MINOR),
                expires_at=datetime.now(UTC) + LIFETIME if chance.random() < 0.3 else None,
            )

            async def create(tx: Tx, made=made) -> UUID:  # type: ignore[no-untyped-def]
                await append_payin(tx, made)
                stored = await find_payin(tx, made.shop_id, made.external_id)
                assert stored is not None
                return stored.id

            stored_id = self._run(in_transaction(self._desk.gateway, create))
            known = self._payins.external_ids.setdefault((shop, external_id), (made.id, made.amount_minor))
            assert stored_id == known[0]
        assert self._run(fetch(self._desk.owner, "SELECT posted_minor FROM accounts ORDER BY id")) == before

    @rule()
    def collect(self) -> None:
        """A worker asks about what is due."""
        self._run(self._desk.collect())

    @rule()
    def ask_and_pause(self) -> None:
        """A worker asks, and is stopped before it records."""
        token = uuid4()
        claimed = self._run(
            in_transaction(
                self._desk.worker,
                lambda tx: claim_questions(
                    tx, rail="sandbox", token=token, lease_seconds=60.0, claim_max=8, lag_seconds=0.0
                ),
            )
        )
        bank = self._desk.sandbox()
        for question in claimed:
            terms = PayinTerms(question.reference, question.amount_minor, question.currency)
            self._payins.paused.append(PausedQuestion(question, self._run(bank.look_up_payin(terms)), token))

    @rule(count=st.integers(1, 8), twice=st.booleans())
    def record_answers_late(self, count: int, twice: bool) -> None:
        """Workers that were stopped go on, however late, some for the second time."""
        awake, self._payins.paused = self._payins.paused[:count], self._payins.paused[count:]
        for item in awake * (2 if twice else 1):
            self._run(self._record(item))

    async def _record(self, item: PausedQuestion) -> None:
        async def work(tx: Tx) -> None:
            await record_answer(
                tx, item.question, item.answer, token=item.token, again_in_seconds=60.0, lag_seconds=0.0
            )

        await in_transaction(self._desk.worker, work)

    @rule(
        at=_positions, outcome=st.sampled_from((Outcome.PAID, Outcome.RETURNED, Outcome.DECLINED)), excess=st.booleans()
    )
    def say_of_a_payin(self, at: int, outcome: Outcome, excess: bool) -> None:
        """The bank speaks by itself of a payin: that it was paid, given back, declined; of another sum too."""
        if not self._payins.external_ids:
            return
        key = sorted(self._payins.external_ids)[at % len(self._payins.external_ids)]
        payin_id, amount_minor = self._payins.external_ids[key]
        self._payins.words += 1
        word = NewRailEvent(
            rail="sandbox",
            event_id=f"payin-{self._payins.words}",
            reference=render_id(PAYIN, payin_id),
            outcome=outcome,
            amount_minor=amount_minor + excess,
            currency="BDT",
        )
        self._run(in_transaction(self._desk.worker, lambda tx: append_rail_events(tx, [word])))

    @invariant()
    def every_account_is_what_its_payouts_and_payins_make_it(self) -> None:
        """Counted from their statuses alone, without an entry."""
        query = """
            SELECT a.id, a.posted_minor, (SELECT e.posted_after_minor FROM entries e WHERE e.account_id = a.id AND e.seq = 1)
                   - (SELECT coalesce(sum(amount_minor), 0) FROM payouts p WHERE p.account_id = a.id AND p.state = 'success')
                   + (SELECT coalesce(sum(amount_minor), 0) FROM payins p WHERE p.account_id = a.id AND p.state = 'success')
                   AS expected_minor
              FROM accounts a
        """
        for row in self._run(fetch(self._desk.owner, query)):
            assert row.posted_minor == row.expected_minor, row

    @invariant()
    def what_was_asked_for_is_there_once(self) -> None:
        rows = self._run(fetch(self._desk.owner, "SELECT id, amount_minor FROM payins ORDER BY id"))
        assert [tuple(row) for row in rows] == sorted(self._payins.external_ids.values())
