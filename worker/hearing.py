"""Hearing: what a rail says by itself is applied like the answer to a call, whatever comes twice, late or out of order.

An event tells the rail's final word, so it may end a payout in whatever stage it is. A word against a status that is final,
or about another amount, moves no money: it opens a discrepancy.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from worker.conclusions import contradicts
from worker.rails import Outcome

EVENTS_MAX: Final = 64
# How long a word waits for an account that somebody else holds before it is its turn again.
_BUSY_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of listening: how many words were applied, and the events to tell of."""

    count: int
    events: list[Event]


@dataclass(frozen=True, slots=True)
class _Step:
    """What a word leads to, and the word as it is written down. No conclusion: nothing moves."""

    conclusion: Conclusion | None
    outcome: Outcome


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
        verdict = _judge(payout, event, was_declined=payout is not None and histories[payout.id].was_declined)
        if isinstance(verdict, NewDiscrepancy):
            found.append(verdict)
            effects.append((event, "discrepancy"))
            continue
        assert payout is not None, "what is not ours is a discrepancy"
        steps.append((payout, event, verdict))
        again = event.outcome == Outcome.RETURNED and verdict.outcome is not Outcome.RETURNED
        if not again:
            effects.append((event, "known" if verdict.conclusion is None else "moved"))
    events = await _take_steps(tx, steps, histories, accounts)
    await open_discrepancies(tx, found)
    await finish_rail_events(tx, effects)
    await postpone_rail_events(tx, waiting, delay_seconds=_BUSY_SECONDS)
    note_discrepancies(found)
    return Heard(len(words) - len(waiting), events)


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


def _judge(payout: LockedPayout | None, event: RailEvent, *, was_declined: bool) -> _Step | NewDiscrepancy:
    outcome = Outcome(event.outcome)
    if payout is None:
        return _discrepancy(payout, event, "reference", None)
    if (event.amount_minor or payout.amount_minor, event.currency or payout.currency) != (
        payout.amount_minor,
        payout.currency,
    ):
        return _discrepancy(payout, event, "amount", f"{event.amount_minor} {event.currency or ''}".strip())
    if payout.state is State.SUCCESS and outcome is Outcome.RETURNED:
        return _Step(Conclusion(State.REFUNDED, None, "returned_by_bank"), outcome)
    if contradicts(payout.state, outcome, was_declined=was_declined):
        return _discrepancy(payout, event, "status", None)
    if payout.state.is_final:
        return _Step(None, outcome)
    # A rail that refused the payout before, and has it now, is not sent it again.
    passing = State.SENDING if payout.state is State.QUEUED else None
    if outcome in (Outcome.PAID, Outcome.RETURNED):
        # What was returned was paid first; the word is heard again when that is done.
        return _Step(Conclusion(State.SUCCESS, None, passing=passing), Outcome.PAID)
    if outcome is Outcome.DECLINED:
        code = event.failure_code
        known_code = code if code in FAILURES else "other" if code else "provider_declined"
        return _Step(Conclusion(State.FAILED, None, known_code, passing), outcome)
    if payout.state is State.SUBMITTED:
        return _Step(None, outcome)
    return _Step(Conclusion(State.SUBMITTED, look_up_delay(0), passing=passing), outcome)


async def _take_steps(
    tx: Tx,
    steps: Sequence[tuple[LockedPayout, RailEvent, _Step]],
    histories: Mapping[UUID, History],
    accounts: Mapping[int, LockedAccount],
) -> list[Event]:
    """Write down the words that move something, then move."""
    moving = [(payout, event, step.outcome, step.conclusion) for payout, event, step in steps if step.conclusion]
    await append_words(
        tx,
        [
            NewWord(
                payout.id,
                payout.shop_id,
                histories[payout.id].attempt_no + 1,
                event.rail,
                event.reference,
                outcome,
                event.failure_code,
            )
            for payout, event, outcome, _ in moving
        ],
    )
    references: dict[UUID, str | None] = {payout.id: event.provider_reference for payout, event, _, _ in moving}
    return await carry_out(tx, [(payout, conclusion) for payout, _, _, conclusion in moving], accounts, references)


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
