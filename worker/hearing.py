"""Hearing: what a rail says by itself is applied like the answer to a call, whatever comes twice, late or out of order.

An event tells the rail's final word, so it may end a payout in whatever stage it is. A word against a status that is final,
or about another amount, moves no money: it opens a discrepancy.
"""

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final
from uuid import UUID

from common.db.callbacks import Event
from common.db.due import History, NewWord, append_words, find_histories, lock_due
from common.db.engine import Engine, Tx, constraint_name, in_transaction
from common.db.ledger import lock_accounts
from common.db.payouts import LockedPayout, lock_payouts
from common.db.rail_events import (
    OPERATORS,
    EventKey,
    NewDiscrepancy,
    RailEvent,
    find_rail_events_due,
    finish_rail_events,
    lock_rail_events,
    open_discrepancies,
    postpone_rail_events,
)
from common.domain.ids import PAYIN, PAYOUT, new_id, render_id
from common.domain.payout import FAILURES, State
from common.domain.schedule import USUAL_PATIENCE, Patience
from common.errors import Transient
from common.log import LogEvent, get_logger
from common.moving import Conclusion, carry_out
from worker.conclusions import contradicts, describe_sum, names_another_sum
from worker.crediting import apply_payin_words
from worker.rails import Outcome

EVENTS_MAX: Final = 64
# How long a word waits for an account that somebody else holds, or for a call under way, before it is its turn again.
_BUSY_SECONDS: Final = 0.2
# How long a word waits that the database refuses to carry out.
_REFUSED_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of listening: how many words were applied, the events to tell of, the discrepancies that are new.

    `words`: those that are done with, each with its effect and, if it is about a payin, that.
    """

    count: int = 0
    events: list[Event] = field(default_factory=list)
    discrepancies: list[NewDiscrepancy] = field(default_factory=list)
    words: list[tuple[RailEvent, str, UUID | None]] = field(default_factory=list)


Apply = Callable[..., Awaitable[Heard]]


@dataclass(frozen=True, slots=True)
class _Step:
    """What a word leads to, and the word as it is written down. No conclusion: nothing moves."""

    conclusion: Conclusion | None
    outcome: Outcome


@dataclass(slots=True)
class _Plan:
    """What the words about one payout, in their order, come to: at most one step, and what is known or contradicted."""

    payout: LockedPayout | None
    step: tuple[RailEvent, _Step] | None = None
    effects: list[tuple[RailEvent, str]] = field(default_factory=list)
    found: list[NewDiscrepancy] = field(default_factory=list)
    waiting: list[RailEvent] = field(default_factory=list)

    @property
    def payout_id(self) -> UUID | None:
        """Whom it is about; None: nobody of ours."""
        return None if self.payout is None else self.payout.id

    @property
    def account_id(self) -> int | None:
        """The account that it needs, if it moves money."""
        conclusion = None if self.step is None else self.step[1].conclusion
        if self.payout is None or conclusion is None or conclusion.state is None or not conclusion.state.is_final:
            return None
        return self.payout.account_id


async def hear(engine: Engine, patience: Patience = USUAL_PATIENCE) -> Heard:
    """Apply the oldest words, about payouts and about payins. One that the database refuses holds up nobody: it is logged, and
    its turn comes again later.

    Repeat: a word is applied once, whoever gets to it first.
    """
    about_payouts = await _hear_some(engine, partial(apply_words, patience=patience), payins=False)
    about_payins = await _hear_some(engine, _apply_payin_words, payins=True)
    heard = _sum([about_payouts, about_payins])
    note_discrepancies(heard.discrepancies)
    for event, effect, payin_id in heard.words:
        _log_word(event, effect, payin_id)
    return heard


async def _apply_payin_words(tx: Tx, keys: Collection[EventKey]) -> Heard:
    credited = await apply_payin_words(tx, keys)
    return Heard(credited.count, credited.events, credited.discrepancies, credited.words)


def _sum(each: Sequence[Heard]) -> Heard:
    return Heard(
        sum(one.count for one in each),
        [event for one in each for event in one.events],
        [discrepancy for one in each for discrepancy in one.discrepancies],
        [word for one in each for word in one.words],
    )


def _log_word(event: RailEvent, effect: str, payin_id: UUID | None) -> None:
    """The one line of a word. Its own id and its reference are as the rail made them up, so they stay in the database."""
    get_logger().info(
        LogEvent.RAIL_EVENT_APPLIED,
        rail=event.rail,
        payout_id=None if event.payout_id is None else render_id(PAYOUT, event.payout_id),
        payin_id=None if payin_id is None else render_id(PAYIN, payin_id),
        outcome=event.outcome,
        effect=effect,
    )


async def _hear_some(engine: Engine, apply: Apply, *, payins: bool) -> Heard:
    find = partial(find_rail_events_due, events_max=EVENTS_MAX, payins=payins)
    keys = await in_transaction(engine, find)
    if not keys:
        return Heard()
    try:
        return await in_transaction(engine, partial(apply, keys=keys))
    except Transient:
        raise
    except Exception:
        return _sum([await _hear_one(engine, key, apply) for key in keys])


async def _hear_one(engine: Engine, key: EventKey, apply: Apply) -> Heard:
    try:
        return await in_transaction(engine, partial(apply, keys=[key]))
    except Transient:
        raise
    except Exception as error:
        rail, event_id = key
        get_logger().error(
            LogEvent.RAIL_EVENT_REFUSED,
            rail=rail,
            event_id=event_id,
            error=type(error).__name__,
            constraint=constraint_name(error),
        )
    await in_transaction(engine, lambda tx: postpone_rail_events(tx, [key], delay_seconds=_REFUSED_SECONDS))
    return Heard()


async def apply_words(tx: Tx, keys: Collection[EventKey], patience: Patience = USUAL_PATIENCE) -> Heard:
    """Apply words, all about one payout in their order until one has moved it; those after it have their turn next time.

    Locks: the words, due rows, payouts, then the accounts of those that end; what waits for an account that somebody
    else holds is left for later.
    """
    words = await lock_rail_events(tx, keys)
    ids = {event.payout_id for event in words if event.payout_id is not None}
    await lock_due(tx, ids)
    payouts = {payout.id: payout for payout in await lock_payouts(tx, ids)}
    histories = await find_histories(tx, ids)
    plans = [
        _plan(
            None if payout_id is None else payouts[payout_id],
            [event for event in words if event.payout_id == payout_id],
            None if payout_id is None else histories[payout_id],
            patience,
        )
        for payout_id in {event.payout_id: None for event in words}
    ]
    needed = {plan.account_id for plan in plans if plan.account_id is not None}
    accounts = await lock_accounts(tx, needed, wait_seconds=0) if needed else {}
    busy = {plan.payout_id for plan in plans if plan.account_id is not None and plan.account_id not in accounts}
    ready = [plan for plan in plans if plan.payout_id not in busy]
    steps = [(plan.payout, *plan.step) for plan in ready if plan.payout is not None and plan.step is not None]
    await _append_steps(tx, steps, histories)
    concluded = [(payout, step.conclusion) for payout, _, step in steps if step.conclusion is not None]
    references: dict[UUID, str | None] = {payout.id: event.provider_reference for payout, event, _ in steps}
    events = await carry_out(tx, concluded, accounts, references)
    opened = await open_discrepancies(tx, [found for plan in ready for found in plan.found])
    effects = [effect for plan in ready for effect in plan.effects]
    await finish_rail_events(tx, effects)
    waiting = [event.key for plan in ready for event in plan.waiting]
    waiting += [event.key for event in words if event.payout_id in busy]
    await postpone_rail_events(tx, waiting, delay_seconds=_BUSY_SECONDS)
    applied = {event.key for event, _ in effects} | {event.key for _, event, _ in steps}
    return Heard(len(applied), events, opened, [(event, effect, None) for event, effect in effects])


def note_discrepancies(opened: Iterable[NewDiscrepancy]) -> None:
    """Have them in the log as well, once they are committed."""
    for discrepancy in opened:
        get_logger().error(
            LogEvent.PAYOUT_CONTRADICTED,
            payout_id=None if discrepancy.payout_id is None else render_id(PAYOUT, discrepancy.payout_id),
            payin_id=None if discrepancy.payin_id is None else render_id(PAYIN, discrepancy.payin_id),
            rail=discrepancy.rail,
            state=discrepancy.state,
            outcome=discrepancy.word,
            kind=discrepancy.kind,
        )


def _plan(
    payout: LockedPayout | None, words: Sequence[RailEvent], history: History | None, patience: Patience
) -> _Plan:
    """Judge the words about one payout in their order, each against where those before it have left the payout."""
    plan = _Plan(payout)
    was_declined = history is not None and history.was_declined
    seen = payout
    for event in words:
        if seen is not None and history is not None and _must_wait(seen, history, event):
            plan.waiting.append(event)
            continue
        verdict = _judge(seen, event, patience, was_declined=was_declined)
        if isinstance(verdict, NewDiscrepancy):
            plan.found.append(verdict)
            plan.effects.append((event, "discrepancy"))
        elif verdict.conclusion is None:
            plan.effects.append((event, "known"))
        elif plan.step is not None:
            break
        else:
            plan.step = (event, verdict)
            if event.outcome != verdict.outcome:
                # It was paid before it was returned; the word itself is heard when that is done.
                break
            plan.effects.append((event, "moved"))
            if seen is not None and verdict.conclusion.state is not None:
                seen = replace(seen, state=verdict.conclusion.state)
            was_declined = was_declined or verdict.outcome is Outcome.DECLINED
    return plan


def _must_wait(payout: LockedPayout, history: History, event: RailEvent) -> bool:
    """While a call is under way only "paid" is heard: another word may be about an earlier one, and the answer will tell.

    Of a payout that has ended no answer tells anything any more; the worker that asked may be gone for good.
    """
    is_open = history.open_no is not None and not payout.state.is_final
    return is_open and event.outcome not in (Outcome.PAID, Outcome.RETURNED)


def _judge(
    payout: LockedPayout | None, event: RailEvent, patience: Patience, *, was_declined: bool
) -> _Step | NewDiscrepancy:
    outcome = Outcome(event.outcome)
    if payout is None:
        return _discrepancy(payout, event, "reference")
    if names_another_sum(payout, event):
        return _discrepancy(payout, event, "amount", describe_sum(event))
    if event.rail == OPERATORS and not payout.state.is_final and payout.state is not State.VERIFYING:
        # The rail has said something since they looked.
        return _discrepancy(payout, event, "status")
    if payout.state is State.SUCCESS and outcome is Outcome.RETURNED:
        return _Step(Conclusion(State.REFUNDED, None, "returned_by_bank"), outcome)
    if contradicts(payout.state, outcome, was_declined=was_declined):
        return _discrepancy(payout, event, "status")
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
    return _Step(Conclusion(State.SUBMITTED, patience.look_up_delay(0), passing=passing), outcome)


async def _append_steps(
    tx: Tx, steps: Sequence[tuple[LockedPayout, RailEvent, _Step]], histories: Mapping[UUID, History]
) -> None:
    """Write down the words that move something, in line with the answers to calls."""
    words = [
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
    ]
    await append_words(tx, words)


def _discrepancy(payout: LockedPayout | None, event: RailEvent, kind: str, detail: str = "") -> NewDiscrepancy:
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
