"""Hearing: what a rail says by itself is applied like the answer to a call, whatever comes twice, late or out of order.

An event tells the rail's final word, so it may end a payout in whatever stage it is. A word against a status that is final,
or about another amount, moves no money: it opens a discrepancy.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from common.db.callbacks import Event
from common.db.due import History, NewWord, append_words, find_histories, lock_due
from common.db.engine import Tx
from common.db.ledger import LockedAccount, lock_accounts
from common.db.payouts import LockedPayout, lock_payouts
from common.db.rail_events import (
    NewDiscrepancy,
    RailEvent,
    finish_rail_events,
    lock_rail_events,
    open_discrepancies,
    postpone_rail_events,
)
from common.domain.ids import PAYOUT, new_id, render_id
from common.domain.payout import FAILURES, State
from common.domain.schedule import look_up_delay
from common.log import LogEvent, get_logger
from common.moving import Conclusion, carry_out
from worker.rails import Outcome

EVENTS_MAX: Final = 64
# How long a word waits for an account that somebody else holds before it is its turn again.
_BUSY_SECONDS: Final = 0.2

# Words that say again, or too late, what is known of a payout that has ended.
_KNOWN: Final[Mapping[State, frozenset[Outcome]]] = {
    State.SUCCESS: frozenset({Outcome.PAID, Outcome.SUBMITTED}),
    State.FAILED: frozenset({Outcome.DECLINED, Outcome.SUBMITTED}),
    State.CANCELED: frozenset({Outcome.DECLINED}),
    State.EXPIRED: frozenset({Outcome.DECLINED}),
    State.REFUNDED: frozenset({Outcome.PAID, Outcome.SUBMITTED, Outcome.RETURNED}),
}


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of listening: how many words were applied, and the events to tell of."""

    count: int
    events: list[Event]


@dataclass(frozen=True, slots=True)
class _Step:
    """The states that a word leads a payout through, and the word as it is written down. No states: nothing moves."""

    states: tuple[State, ...]
    outcome: Outcome
    failure_code: str | None = None


async def hear(tx: Tx) -> Heard:
    """Apply the oldest words, one for each payout. What waits for an account that somebody else holds is left for later.

    Locks: the words, due rows, payouts, accounts.
    """
    heard = await lock_rail_events(tx, events_max=EVENTS_MAX)
    first = {event.payout_id: event for event in reversed(heard) if event.payout_id is not None}
    words = [event for event in heard if event.payout_id is None or first[event.payout_id] is event]
    await lock_due(tx, first.keys())
    payouts = {payout.id: payout for payout in await lock_payouts(tx, first.keys())}
    accounts = await lock_accounts(tx, {payout.account_id for payout in payouts.values()}, wait_seconds=0)
    histories = await find_histories(tx, first.keys())
    effects: list[tuple[RailEvent, str]] = []
    waiting: list[RailEvent] = []
    steps: list[tuple[LockedPayout, RailEvent, _Step]] = []
    found: list[NewDiscrepancy] = []
    for event in words:
        payout = None if event.payout_id is None else payouts[event.payout_id]
        if payout is not None and payout.account_id not in accounts:
            waiting.append(event)
            continue
        if payout is not None and _must_wait(payout, event, histories):
            waiting.append(event)
            continue
        verdict = _judge(payout, event)
        if isinstance(verdict, NewDiscrepancy):
            found.append(verdict)
            effects.append((event, "discrepancy"))
            continue
        assert payout is not None, "what is not ours is a discrepancy"
        steps.append((payout, event, verdict))
        again = event.outcome == Outcome.RETURNED and verdict.outcome is not Outcome.RETURNED
        if not again:
            effects.append((event, "moved" if verdict.states else "known"))
    events = await _take_steps(tx, [step for step in steps if step[2].states], accounts)
    await open_discrepancies(tx, found)
    await finish_rail_events(tx, effects)
    await postpone_rail_events(tx, waiting, delay_seconds=_BUSY_SECONDS)
    note_discrepancies(found)
    return Heard(len(effects) + sum(1 for *_, step in steps if step.states), events)


def note_discrepancies(found: Iterable[NewDiscrepancy]) -> None:
    """Have them in the log as well."""
    for discrepancy in found:
        get_logger().error(
            LogEvent.PAYOUT_CONTRADICTED,
            payout=None if discrepancy.payout_id is None else render_id(PAYOUT, discrepancy.payout_id),
            rail=discrepancy.rail,
            state=discrepancy.state,
            outcome=discrepancy.word,
            kind=discrepancy.kind,
        )


def _must_wait(payout: LockedPayout, event: RailEvent, histories: Mapping[UUID, History]) -> bool:
    """While a call is under way only "paid" is heard: another word may be about an earlier one, and the answer will tell."""
    return histories[payout.id].open_no is not None and event.outcome not in (Outcome.PAID, Outcome.RETURNED)


def _judge(payout: LockedPayout | None, event: RailEvent) -> _Step | NewDiscrepancy:
    outcome = Outcome(event.outcome)
    if payout is None:
        return _discrepancy(payout, event, "reference", None)
    if (event.amount_minor or payout.amount_minor, event.currency or payout.currency) != (
        payout.amount_minor,
        payout.currency,
    ):
        return _discrepancy(payout, event, "amount", f"{event.amount_minor} {event.currency or ''}".strip())
    if payout.state.is_final:
        if payout.state is State.SUCCESS and outcome is Outcome.RETURNED:
            return _Step((State.REFUNDED,), outcome, "returned_by_bank")
        if outcome in _KNOWN[payout.state]:
            return _Step((), outcome)
        return _discrepancy(payout, event, "status", None)
    # A rail that refused the payout before, and has it now, is not sent it again.
    way = (State.SENDING,) if payout.state is State.QUEUED else ()
    if outcome in (Outcome.PAID, Outcome.RETURNED):
        # What was returned was paid first; the word is heard again when that is done.
        return _Step((*way, State.SUCCESS), Outcome.PAID)
    if outcome is Outcome.DECLINED:
        code = event.failure_code
        return _Step((State.FAILED,), outcome, code if code in FAILURES else "other" if code else "provider_declined")
    return _Step(() if payout.state is State.SUBMITTED else (*way, State.SUBMITTED), outcome)


async def _take_steps(
    tx: Tx, steps: Sequence[tuple[LockedPayout, RailEvent, _Step]], accounts: Mapping[int, LockedAccount]
) -> list[Event]:
    """Write the words down, then move; a payout that passes through a state on its way is there for this transaction only."""
    histories = await find_histories(tx, [payout.id for payout, _, _ in steps])
    await append_words(
        tx,
        [
            NewWord(
                payout.id,
                payout.shop_id,
                histories[payout.id].attempt_no + 1,
                event.rail,
                event.reference,
                step.outcome,
                event.failure_code,
            )
            for payout, event, step in steps
        ],
    )
    references: dict[UUID, str | None] = {payout.id: event.provider_reference for payout, event, _ in steps}
    passing = [(payout, Conclusion(step.states[0], None)) for payout, _, step in steps if len(step.states) > 1]
    events = await carry_out(tx, passing, accounts, {})
    ending = [
        (
            payout if len(step.states) == 1 else replace(payout, state=step.states[0], version=payout.version + 1),
            Conclusion(
                step.states[-1],
                look_up_delay(0) if step.states[-1] is State.SUBMITTED else None,
                step.failure_code,
            ),
        )
        for payout, _, step in steps
    ]
    return events + await carry_out(tx, ending, accounts, references)


def _discrepancy(payout: LockedPayout | None, event: RailEvent, kind: str, detail: str | None) -> NewDiscrepancy:
    return NewDiscrepancy(
        id=new_id(),
        rail=event.rail,
        reference=event.reference,
        payout_id=None if payout is None else payout.id,
        shop_id=None if payout is None else payout.shop_id,
        state=None if payout is None else payout.state,
        word=event.outcome,
        kind=kind,
        detail=detail,
    )
