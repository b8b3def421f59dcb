"""What follows from a rail's answer: the next state of a payout, and when it is due again. It reads and writes no row.

Only the rail's definite word ends a payout. "Unknown" keeps the money held and asks again; time alone decides nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from common.db.due import NOT_MADE, History
from common.db.payouts import LockedPayout
from common.db.rail_events import RailEvent
from common.domain.ids import PAYOUT, render_id
from common.domain.money import AMOUNT_MINOR_MAX
from common.domain.payout import FAILURES, State
from common.domain.schedule import USUAL_PATIENCE, Patience
from common.log import LogEvent, get_logger
from common.moving import Conclusion
from worker.rails import Answer, Outcome

# As the schema has them.
PROVIDER_REFERENCE_CHARACTERS_MAX: Final = 200
DETAIL_CHARACTERS_MAX: Final = 200
# Longer than any there is.
CURRENCY_CHARACTERS_MAX: Final = 16

# Until a call is tried again that was not made by our fault, when we may have recovered.
_OURS_AGAIN_SECONDS: Final = 60.0

SUBMIT: Final = "submit"
LOOK_UP: Final = "look_up"


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for all calls of a claim. `start_until` is monotonic: later none must begin.

    `lag_seconds`: as the rail has it. `denial_seconds`: for how long after a claim to submit "not found" is no proof.
    """

    start_until: float
    lag_seconds: float = 0.0
    denial_seconds: float = 0.0
    patience: Patience = USUAL_PATIENCE


@dataclass(frozen=True, slots=True)
class Call:
    """One call to a rail that a claim has committed to."""

    payout: LockedPayout
    rail: str
    action: str
    attempt_no: int
    reference: str
    history: History | None
    token: UUID
    terms: Terms


@dataclass(frozen=True, slots=True)
class Ended:
    """A call and what the rail said."""

    call: Call
    answer: Answer


def conclude(payout: LockedPayout, ended: Ended, *, held: bool) -> Conclusion | None:
    """What an answer means for a payout as it stands under its lock. None: nothing any more.

    `held`: whether the lease is still ours. Without it only "paid" counts, and only where the payout is still open: the
    money is gone whoever asked; everything else is for the one who has the lease now.
    """
    outcome, history = ended.answer.outcome, ended.call.history
    if payout.state.is_final:
        return None
    if payout.state is State.QUEUED:
        return _conclude_queued(outcome, ended.call.terms.patience)
    last = final_word(ended.answer)
    if last is not None and (held or outcome is Outcome.PAID):
        return last
    if not held:
        get_logger().warning(LogEvent.PAYOUT_LEASE_LOST, payout_id=render_id(PAYOUT, payout.id), outcome=outcome)
        return None
    if ended.call.action == SUBMIT:
        return _conclude_submit(ended.answer, ended.call)
    if (
        outcome is Outcome.NOT_FOUND
        and history is not None
        and history.submitted_seconds_ago < ended.call.terms.denial_seconds
    ):
        # A request of ours may still be on its way to the rail.
        outcome = Outcome.UNKNOWN
    return _conclude_look_up(payout, outcome, ended.call)


def final_word(answer: Answer) -> Conclusion | None:
    """How a payout ends that its rail has; None: it does not say."""
    if answer.outcome is Outcome.PAID:
        return Conclusion(State.SUCCESS, None)
    if answer.outcome is Outcome.DECLINED:
        return Conclusion(State.FAILED, None, answer.failure_code or "provider_declined")
    return None


def _conclude_queued(outcome: Outcome, patience: Patience) -> Conclusion | None:
    """The rail has what it seemed not to have: the payout must not be sent again, nor given back."""
    if outcome is Outcome.PAID:
        return Conclusion(State.SUCCESS, None, passing=State.SENDING)
    if outcome is Outcome.SUBMITTED:
        return Conclusion(State.SUBMITTED, patience.look_up_delay(0), passing=State.SENDING)
    return None


def _conclude_submit(answer: Answer, call: Call) -> Conclusion:
    # Before its lag is over, the rail may not know of what it has taken.
    until_look_up = max(call.terms.patience.look_up_delay(0), call.terms.lag_seconds)
    if answer.outcome is Outcome.SUBMITTED:
        return Conclusion(State.SUBMITTED, until_look_up)
    if answer.outcome is Outcome.NOT_ACCEPTED and answer.detail in NOT_MADE:
        return Conclusion(State.QUEUED, _OURS_AGAIN_SECONDS)
    if answer.outcome is Outcome.NOT_ACCEPTED:
        refusals_before = 0 if call.history is None else call.history.submits_refused
        delay_seconds = call.terms.patience.submit_delay(refusals_before + 1)
        if delay_seconds is None:
            return Conclusion(State.FAILED, None, "provider_unavailable")
        return Conclusion(State.QUEUED, delay_seconds)
    return Conclusion(State.VERIFYING, until_look_up)


def _conclude_look_up(payout: LockedPayout, outcome: Outcome, call: Call) -> Conclusion:
    history = call.history
    delay_seconds = call.terms.patience.look_up_delay(1 if history is None else history.look_ups + 1)
    silent_seconds = 0.0 if history is None else history.taken_seconds_ago
    was_taken = payout.provider_reference is not None or (history is not None and history.was_taken)
    if outcome is Outcome.SUBMITTED:
        return Conclusion(State.SUBMITTED if payout.state is State.VERIFYING else None, delay_seconds)
    if outcome is Outcome.NOT_FOUND:
        if payout.state is State.SUBMITTED:
            return Conclusion(State.VERIFYING, delay_seconds)
        if not was_taken:
            return Conclusion(State.QUEUED, 0.0)
        # It took the payout once and now denies it: nothing to send again on such a word.
    elif payout.state is State.SUBMITTED and silent_seconds > call.terms.patience.silence_seconds:
        return Conclusion(State.VERIFYING, delay_seconds)
    return Conclusion(None, delay_seconds)


# Words that say again, or too late, what is known of a payout that has ended. Of one that failed without the rail's "declined",
# "submitted" is news.
_KNOWN: Final[Mapping[State, frozenset[Outcome]]] = {
    State.SUCCESS: frozenset({Outcome.PAID, Outcome.SUBMITTED}),
    State.FAILED: frozenset({Outcome.DECLINED}),
    State.CANCELED: frozenset({Outcome.DECLINED}),
    State.EXPIRED: frozenset({Outcome.DECLINED}),
    State.REFUNDED: frozenset({Outcome.PAID, Outcome.SUBMITTED, Outcome.RETURNED}),
}
_DEFINITE: Final = frozenset({Outcome.PAID, Outcome.DECLINED, Outcome.SUBMITTED, Outcome.RETURNED})


def contradicts(state: State, outcome: Outcome, *, was_declined: bool) -> bool:
    """Whether a definite word is against the final status of a payout: that is for people, and no money moves."""
    if outcome not in _DEFINITE or not state.is_final:
        return False
    return outcome not in _KNOWN[state] and not (was_declined and outcome is Outcome.SUBMITTED)


def names_another_sum(payout: LockedPayout, word: Answer | RailEvent) -> bool:
    """Whether a rail speaks of another amount or currency than it was asked for. What it does not name is not another."""
    return word.amount_minor not in (None, payout.amount_minor) or word.currency not in (None, payout.currency)


def describe_sum(word: Answer | RailEvent) -> str:
    """What it speaks of, for people; whatever it made up fits a discrepancy."""
    named = "" if word.amount_minor is None else word.amount_minor
    return _storable(f"{named} {word.currency or ''}".strip(), DETAIL_CHARACTERS_MAX) or ""


def sane(answer: Answer, call: Call) -> Answer:
    """An answer that can be stored, whatever a rail made up: an outcome that does not answer the call, or is about another
    sum, is `UNKNOWN`, unknown codes are `other`, texts fit their columns.
    """
    code = answer.failure_code
    beside = {Outcome.RETURNED, Outcome.NOT_FOUND if call.action == SUBMIT else Outcome.NOT_ACCEPTED}
    unusable = answer.outcome in beside or names_another_sum(call.payout, answer)
    # What was not taken has no reference there, and shall not look as if it had been taken.
    reference = None if answer.outcome is Outcome.NOT_ACCEPTED else answer.provider_reference
    return Answer(
        Outcome.UNKNOWN if unusable else answer.outcome,
        failure_code=code if code is None or code in FAILURES else "other",
        provider_reference=_storable(reference, PROVIDER_REFERENCE_CHARACTERS_MAX),
        detail=_storable(answer.detail, DETAIL_CHARACTERS_MAX),
    )


def storable(answer: Answer) -> Answer:
    """The same answer about a payin, as it fits its columns. A sum that no ledger holds is none."""
    amount_minor = answer.amount_minor
    return replace(
        answer,
        amount_minor=amount_minor if amount_minor and 0 < amount_minor <= AMOUNT_MINOR_MAX else None,
        provider_reference=_storable(answer.provider_reference, PROVIDER_REFERENCE_CHARACTERS_MAX),
        detail=_storable(answer.detail, DETAIL_CHARACTERS_MAX),
        currency=_storable(answer.currency, CURRENCY_CHARACTERS_MAX),
    )


def _storable(text: str | None, characters_max: int) -> str | None:
    if text is None:
        return None
    return text.replace("\x00", "").encode("utf-8", "replace").decode()[:characters_max] or None
