"""The record: what rails answered, and what follows: attempt, state, money, event, callback, what is due; all or nothing of it.

What an answer means is decided by `worker.conclusions`. Where it is the last word about a payout that nothing has happened to
since it was claimed, it is decided before anything is locked, and one statement does it all. The rest is decided under locks.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from common.db.callbacks import Event
from common.db.due import Claim, FinishedAttempt, claim_due, find_contradicted, finish_attempts, lock_due
from common.db.ending import Ending, end_unopposed
from common.db.engine import ATTEMPTS_MAX, Engine, Tx, each_alone, in_transaction
from common.db.ledger import lock_accounts
from common.db.payouts import LockedPayout, lock_payouts
from common.db.rail_events import NewDiscrepancy, open_discrepancies
from common.db.rails import has_rail
from common.domain.ids import new_id
from common.domain.payout import State
from common.moving import Conclusion, carry_out, event_of
from worker.conclusions import SUBMIT, Ended, conclude, contradicts, describe_sum, final_word, names_another_sum, sane
from worker.rails import Outcome


@dataclass(frozen=True, slots=True)
class Recorded:
    """What came of a record: the events that were stored, the payouts that were left because their account is busy, and
    the discrepancies that are new.
    """

    events: list[Event]
    busy: set[UUID]
    discrepancies: list[NewDiscrepancy]


async def record(
    engine: Engine,
    ended: Sequence[Ended],
    *,
    wait_seconds: float,
    attempts_max: int = ATTEMPTS_MAX,
    note: Callable[[Recorded], None] = lambda _: None,
) -> set[UUID]:
    """Write down what the rails said, and what follows; at once what nothing speaks against, then the rest.

    `note` hears of both as soon as they are committed, but not of what ended by a statement whose answer was lost: the scan
    finds its callbacks. Returns: the payouts that were left because their account is busy.
    Locks, repeat: as `record_answers`. Raises: as `in_transaction`; what was noted before is recorded.
    """
    endings = find_endings(ended)
    at_once: set[UUID] = set()
    if endings:
        end = partial(end_unopposed, endings=endings, wait_seconds=wait_seconds)
        at_once = await in_transaction(each_alone(engine), end, attempts_max=attempts_max)
        note(Recorded([ending.event for ending in endings if ending.payout.id in at_once], set(), []))
    rest = [item for item in ended if item.call.payout.id not in at_once]
    if not rest:
        return set()
    decide = partial(record_answers, ended=rest, wait_seconds=wait_seconds)
    recorded = await in_transaction(engine, decide, attempts_max=attempts_max)
    note(recorded)
    return recorded.busy


def find_endings(ended: Sequence[Ended]) -> list[Ending]:
    """The ends of payouts that were sent and of which one answer has come, a definite one."""
    answers = Counter(item.call.payout.id for item in ended)
    endings = []
    for item in ended:
        call, payout = item.call, item.call.payout
        if call.action != SUBMIT or answers[payout.id] > 1:
            continue
        answer = sane(item.answer, call)
        end = final_word(answer)
        if end is None or end.state is None:
            continue
        endings.append(
            Ending(
                payout=payout,
                token=call.token,
                attempt=_finished(Ended(call, answer)),
                state=end.state,
                failure_code=end.failure_code,
                provider_reference=answer.provider_reference,
                # The claim has moved it once.
                event=event_of(payout, end.state, end.failure_code, sequence=payout.version + 2),
            )
        )
    return endings


async def record_answers(tx: Tx, ended: Sequence[Ended], *, wait_seconds: float) -> Recorded:
    """Write down what the rails said, and what follows: attempt, state, money, event, callback, what is due.

    Locks: due rows, payouts, then the accounts of those that end; each in id order. With `wait_seconds` 0, payouts whose
    account somebody else holds are left as they are.
    Repeat: an answer that is recorded already finds its payout moved on and its lease gone, and changes nothing.
    """
    foreign = [item for item in ended if names_another_sum(item.call.payout, item.answer)]
    ended = [Ended(item.call, sane(item.answer, item.call)) for item in ended]
    ids = {item.call.payout.id for item in ended}
    tokens = await lock_due(tx, ids)
    payouts = {payout.id: payout for payout in await lock_payouts(tx, ids)}
    late = [
        (item.call.payout.id, item.call.attempt_no)
        for item in ended
        if item.answer.outcome is Outcome.PAID and tokens.get(item.call.payout.id) != item.call.token
    ]
    contradicted = await find_contradicted(tx, late)
    conclusions: dict[UUID, Conclusion | None] = {}
    references: dict[UUID, str | None] = {}
    against: list[Ended] = []
    for item in sorted(ended, key=lambda item: item.answer.outcome is Outcome.PAID):
        # Of two answers for one payout "paid" is the last word: it cannot be taken back.
        payout_id = item.call.payout.id
        if payout_id in contradicted:
            against.append(item)
            continue
        if contradicts(payouts[payout_id].state, item.answer.outcome, was_declined=_was_declined(item)):
            against.append(item)
        conclusion = conclude(payouts[payout_id], item, held=tokens.get(payout_id) == item.call.token)
        conclusions[payout_id] = conclusion or conclusions.get(payout_id)
        references[payout_id] = item.answer.provider_reference or references.get(payout_id)
    ending = {payouts[key].account_id for key, c in conclusions.items() if c and c.state and c.state.is_final}
    accounts = await lock_accounts(tx, ending, wait_seconds=wait_seconds) if ending else {}
    busy = {
        key
        for key, c in conclusions.items()
        if c and c.state and c.state.is_final and payouts[key].account_id not in accounts
    }
    opened = await open_discrepancies(
        tx,
        [
            *(_discrepancy(payouts[item.call.payout.id], item, "status") for item in against),
            *(_discrepancy(payouts[item.call.payout.id], item, "amount") for item in foreign),
        ],
    )
    await finish_attempts(tx, [_finished(item) for item in ended if item.call.payout.id not in busy])
    concluded = [(payouts[key], c) for key, c in conclusions.items() if c is not None and key not in busy]
    return Recorded(await carry_out(tx, concluded, accounts, references), busy, opened)


def _discrepancy(payout: LockedPayout, item: Ended, kind: str) -> NewDiscrepancy:
    """A word against where a payout stands, or about another sum: for people; no money moves."""
    answer = item.answer
    return NewDiscrepancy(
        id=new_id(),
        rail=item.call.rail,
        reference=item.call.reference,
        payout_id=payout.id,
        shop_id=payout.shop_id,
        state=payout.state,
        word=answer.outcome,
        kind=kind,
        detail=describe_sum(answer) if kind == "amount" else "",
    )


def _was_declined(item: Ended) -> bool:
    return item.call.history is not None and item.call.history.was_declined


async def fail_without_route(tx: Tx, *, claim: Claim, after_shop: UUID) -> UUID | None:
    """End queued payouts whose rail no longer exists; those that were sent keep waiting for a word. What a worker knows of
    rails does not count, only the table.

    Locks: as `record_answers`; payouts whose account somebody else holds are left for another time.
    Returns: the shop behind which to go on, or None at the end.
    """
    if await has_rail(tx, claim.rail):
        return None
    claimed = await claim_due(tx, claim, after_shop, {})
    payouts = await lock_payouts(tx, claimed.shop_ids)
    queued = [
        (payout, Conclusion(State.FAILED, None, "no_route")) for payout in payouts if payout.state is State.QUEUED
    ]
    accounts = await lock_accounts(tx, {payout.account_id for payout, _ in queued}, wait_seconds=0)
    await carry_out(tx, [(payout, end) for payout, end in queued if payout.account_id in accounts], accounts, {})
    return claimed.next_shop


def _finished(item: Ended) -> FinishedAttempt:
    call, answer = item.call, item.answer
    return FinishedAttempt(
        call.payout.id, call.payout.shop_id, call.attempt_no, answer.outcome, answer.failure_code or answer.detail
    )
