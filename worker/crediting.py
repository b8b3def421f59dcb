"""Crediting: what a rail's word means for a payin, whoever brought it, and the one transaction that carries it out.

A payin is credited once, for exactly the amount that it is about, and only with the sum that the rail named. Any other sum, and
a word against how a payin ended, moves no money: it opens a discrepancy.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from common.db.callbacks import Event, append_events
from common.db.engine import Tx
from common.db.ledger import LockedAccount, lock_accounts
from common.db.payins import (
    LockedPayin,
    PayinMove,
    PayinWord,
    Question,
    append_payin_word,
    lock_payins,
    reschedule_question,
    save_payin_move,
)
from common.db.rail_events import (
    EventKey,
    NewDiscrepancy,
    RailEvent,
    finish_rail_events,
    lock_rail_events,
    open_discrepancies,
    postpone_rail_events,
)
from common.domain.ids import new_id
from common.domain.ledger import EntryKind
from common.domain.payin import FAILURES, PayinState
from common.domain.telling import open_payin_event, payin_event_type
from worker.rails import Answer, Outcome

# As the schema has it.
_DETAIL_CHARACTERS_MAX: Final = 500
# How long a word waits for an account that somebody else holds, or behind another word about its payin.
_BUSY_SECONDS: Final = 0.2
# How long an answer waits for its account; nobody else waits for it.
_ACCOUNT_WAIT_SECONDS: Final = 2.0
# How long a refund waits until the account can bear it.
_UNCOVERED_SECONDS: Final = 60.0

_ENTRY_KINDS: Final = {PayinState.SUCCESS: EntryKind.PAYIN, PayinState.REFUNDED: EntryKind.PAYIN_REFUND}


@dataclass(frozen=True, slots=True)
class Credited:
    """What came of words: how many were heard, the events to tell of, the discrepancies that are new.

    `words`: those that a rail said by itself, each with its effect and the payin that it is about.
    """

    count: int = 0
    events: list[Event] = field(default_factory=list)
    discrepancies: list[NewDiscrepancy] = field(default_factory=list)
    words: list[tuple[RailEvent, str, UUID | None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a word leads to: the states to pass through, in order; or a contradiction; or nothing, when it is known."""

    states: tuple[PayinState, ...] = ()
    contradiction: NewDiscrepancy | None = None


def judge(payin: LockedPayin, word: PayinWord, *, is_over: bool = False) -> Verdict:
    """What a word means for a payin as it stands under its lock.

    `is_over`: the rail was asked after the payin's end, so that "not found" says it was not paid in time.
    """
    outcome = Outcome(word.outcome)
    if outcome in (Outcome.PAID, Outcome.RETURNED) and (word.amount_minor, word.currency) != (
        payin.amount_minor,
        payin.currency,
    ):
        paid = f"{'' if word.amount_minor is None else word.amount_minor} {word.currency or ''}".strip()
        return _contradiction(payin, word, "amount", paid)
    if payin.state is PayinState.PENDING:
        return Verdict(_judge_pending(payin, outcome, is_over=is_over))
    if payin.state is PayinState.SUCCESS and outcome is Outcome.RETURNED:
        return Verdict((PayinState.REFUNDED,))
    known, named = payin.provider_reference, word.provider_reference
    if outcome is Outcome.PAID and None not in (known, named) and known != named:
        return _contradiction(payin, word, "status", f"another payment: {named}")
    if _contradicts(payin.state, outcome):
        return _contradiction(payin, word, "status")
    return Verdict()


def _judge_pending(payin: LockedPayin, outcome: Outcome, *, is_over: bool) -> tuple[PayinState, ...]:
    if outcome is Outcome.PAID:
        return (PayinState.SUCCESS,)
    if outcome is Outcome.RETURNED:
        # What was returned was paid first.
        return (PayinState.SUCCESS, PayinState.REFUNDED)
    if outcome is Outcome.DECLINED:
        return (PayinState.FAILED,)
    if outcome is Outcome.NOT_FOUND and is_over and not payin.has_unheard:
        return (PayinState.EXPIRED,)
    return ()


def _contradicts(state: PayinState, outcome: Outcome) -> bool:
    if state in (PayinState.FAILED, PayinState.EXPIRED):
        return outcome in (Outcome.PAID, Outcome.RETURNED)
    return outcome is Outcome.DECLINED


async def record_answer(
    tx: Tx, question: Question, answer: Answer, *, token: UUID, again_in_seconds: float, lag_seconds: float
) -> Credited:
    """Carry out what a rail answered to a question, or ask again later.

    Locks: due row, payin, account. Raises: `AccountBusy`.
    Repeat: what the first answer has moved stays; the lease only decides who schedules the next question.
    """
    (payin,) = await lock_payins(tx, [question.reference])
    word = _word(question, answer)
    verdict = judge(payin, word, is_over=question.is_over)
    states = verdict.states
    found = [] if verdict.contradiction is None else [verdict.contradiction]
    events: list[Event] = []
    if states:
        accounts = await lock_accounts(tx, [payin.account_id], wait_seconds=_ACCOUNT_WAIT_SECONDS)
        if _is_covered(payin, states, accounts):
            events = await _carry_out(tx, payin, states, word, accounts)
        else:
            found.append(_uncovered(payin, word))
    opened = await open_discrepancies(tx, found)
    if not events:
        await reschedule_question(tx, question, token=token, delay_seconds=again_in_seconds, lag_seconds=lag_seconds)
    return Credited(1, events, opened)


async def apply_payin_words(tx: Tx, keys: Collection[EventKey]) -> Credited:
    """Apply what rails said by themselves about payins, each payin's words in their order, one in a transaction.

    Locks: the words, due rows, payins, then the accounts of those that move money; what waits for an account that
    somebody else holds is left for later.
    """
    words = await lock_rail_events(tx, keys)
    payins = {payin.reference: payin for payin in await lock_payins(tx, {event.reference for event in words})}
    firsts, waiting = _first_of_each(words)
    plans = [_plan(payins.get(event.reference), event) for event in firsts]
    needed = {plan.payin.account_id for plan in plans if plan.payin is not None and plan.verdict.states}
    accounts = await lock_accounts(tx, needed, wait_seconds=0) if needed else {}
    events: list[Event] = []
    found: list[NewDiscrepancy] = []
    heard: list[tuple[RailEvent, str, UUID | None]] = []
    uncovered: list[RailEvent] = []
    for plan in plans:
        payin, states = plan.payin, plan.verdict.states
        if payin is None or not states:
            found += [] if plan.verdict.contradiction is None else [plan.verdict.contradiction]
            effect = "known" if plan.verdict.contradiction is None else "discrepancy"
            heard.append((plan.event, effect, None if payin is None else payin.id))
        elif payin.account_id not in accounts:
            waiting.append(plan.event)
        elif _is_covered(payin, states, accounts):
            events += await _carry_out(tx, payin, states, plan.word, accounts)
            heard.append((plan.event, "moved", payin.id))
        else:
            found.append(_uncovered(payin, plan.word))
            uncovered.append(plan.event)
    opened = await open_discrepancies(tx, found)
    await finish_rail_events(tx, [(event, effect) for event, effect, _ in heard])
    await postpone_rail_events(tx, [event.key for event in waiting], delay_seconds=_BUSY_SECONDS)
    await postpone_rail_events(tx, [event.key for event in uncovered], delay_seconds=_UNCOVERED_SECONDS)
    return Credited(len(heard), events, opened, heard)


@dataclass(frozen=True, slots=True)
class _Plan:
    payin: LockedPayin | None
    event: RailEvent
    word: PayinWord
    verdict: Verdict


def _first_of_each(words: Sequence[RailEvent]) -> tuple[list[RailEvent], list[RailEvent]]:
    """The first word about each payin, and those that have to wait behind it."""
    firsts: dict[str, RailEvent] = {}
    for event in words:
        firsts.setdefault(event.reference, event)
    return list(firsts.values()), [event for event in words if firsts[event.reference] is not event]


def _plan(payin: LockedPayin | None, event: RailEvent) -> _Plan:
    word = PayinWord(
        "event",
        event.rail,
        event.reference,
        event.outcome,
        event.amount_minor,
        event.currency,
        event.failure_code,
        event.provider_reference,
    )
    if payin is None or payin.rail != event.rail:
        # Of no payin, or of one that is another rail's.
        return _Plan(None, event, word, _contradiction(None, word, "reference"))
    return _Plan(payin, event, word, judge(payin, word))


def _word(question: Question, answer: Answer) -> PayinWord:
    return PayinWord(
        "look_up",
        question.rail,
        question.reference,
        answer.outcome,
        answer.amount_minor,
        answer.currency,
        answer.failure_code,
        answer.provider_reference,
    )


def _is_covered(payin: LockedPayin, states: Sequence[PayinState], accounts: Mapping[int, LockedAccount]) -> bool:
    """Whether the account can bear it: what goes back to a payer may have been spent."""
    if states != (PayinState.REFUNDED,):
        return True
    return accounts[payin.account_id].account.spendable_minor >= payin.amount_minor


async def _carry_out(
    tx: Tx, payin: LockedPayin, states: Sequence[PayinState], word: PayinWord, accounts: Mapping[int, LockedAccount]
) -> list[Event]:
    """Write down the word, move the payin through the states with its money, and store what is to be told."""
    await append_payin_word(tx, payin, word)
    failure_code = _failure_code(word)
    events = []
    for version, state in enumerate(states, payin.version + 1):
        kind = _ENTRY_KINDS.get(state)
        entry = None if kind is None else accounts[payin.account_id].account.append(kind, payin.amount_minor)
        code = failure_code if state is PayinState.FAILED else None
        await save_payin_move(tx, PayinMove(payin, state, version, code, word.provider_reference, entry))
        event = _event(payin, state, version, code)
        await append_events(tx, [event])
        events.append(event)
    return events


def _failure_code(word: PayinWord) -> str:
    code = word.failure_code
    return code if code in FAILURES else "provider_declined" if code is None else "other"


def _event(payin: LockedPayin, state: PayinState, version: int, failure_code: str | None) -> Event:
    return Event(
        id=new_id(),
        shop_id=payin.shop_id,
        payout_id=None,
        payin_id=payin.id,
        sequence=version,
        type=payin_event_type(state),
        opening=open_payin_event(
            payin_id=payin.id,
            external_id=payin.external_id,
            shop_code=payin.shop_code,
            state=state,
            amount_minor=payin.amount_minor,
            currency=payin.currency,
            currency_exponent=payin.currency_exponent,
            sequence=version,
            failure_code=failure_code,
        ),
        url=payin.callback_url or payin.webhook_url,
    )


def _contradiction(payin: LockedPayin | None, word: PayinWord, kind: str, detail: str = "") -> Verdict:
    return Verdict(contradiction=_discrepancy(payin, word, kind, detail))


def _uncovered(payin: LockedPayin, word: PayinWord) -> NewDiscrepancy:
    return _discrepancy(payin, word, "funds")


def _discrepancy(payin: LockedPayin | None, word: PayinWord, kind: str, detail: str = "") -> NewDiscrepancy:
    return NewDiscrepancy(
        id=new_id(),
        rail=word.rail,
        reference=word.reference,
        payout_id=None,
        payin_id=None if payin is None else payin.id,
        shop_id=None if payin is None else payin.shop_id,
        state=None if payin is None else payin.state,
        word=word.outcome,
        kind=kind,
        detail=detail[:_DETAIL_CHARACTERS_MAX],
    )
