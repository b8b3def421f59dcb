"""The record: what rails answered, and what follows: attempt, state, money, event, callback, what is due; in one transaction.

What an answer means is decided by `worker.conclusions`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from common.db.callbacks import Event, append_events
from common.db.due import (
    Claim,
    FinishedAttempt,
    claim_due,
    delete_due,
    find_contradicted,
    finish_attempts,
    lock_due,
    reschedule_due,
)
from common.db.engine import Tx
from common.db.ledger import LockedAccount, lock_accounts
from common.db.payouts import LockedPayout, Move, lock_payouts, save_moves
from common.domain.ids import new_id
from common.domain.ledger import EntryKind
from common.domain.payout import State
from common.domain.telling import event_type, render_payout_event
from worker.conclusions import Conclusion, Ended, conclude, note_contradiction, sane
from worker.rails import Outcome


@dataclass(frozen=True, slots=True)
class Recorded:
    """What came of a record: the events that were stored, and the payouts that were left because their account is busy."""

    events: list[Event]
    busy: set[UUID]


async def record_answers(tx: Tx, ended: Sequence[Ended], *, wait_seconds: float) -> Recorded:
    """Write down what the rails said, and what follows: attempt, state, money, event, callback, what is due.

    Locks: due rows, payouts, then the accounts of those that end; each in id order. With `wait_seconds` 0, payouts whose
    account somebody else holds are left as they are.
    Repeat: an answer that is recorded already finds its payout moved on and its lease gone, and changes nothing.
    """
    ended = [Ended(item.call, sane(item.answer, item.call.action)) for item in ended]
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
    for item in sorted(ended, key=lambda item: item.answer.outcome is Outcome.PAID):
        # Of two answers for one payout "paid" is the last word: it cannot be taken back.
        payout_id = item.call.payout.id
        if payout_id in contradicted:
            note_contradiction(payouts[payout_id], item)
            continue
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
    await finish_attempts(tx, [_finished(item) for item in ended if item.call.payout.id not in busy])
    concluded = [(payouts[key], c) for key, c in conclusions.items() if c is not None and key not in busy]
    return Recorded(await _apply(tx, concluded, accounts, references), busy)


async def fail_without_route(tx: Tx, *, claim: Claim, after_shop: UUID) -> UUID | None:
    """End queued payouts whose rail no longer exists; those that were sent keep waiting for a word.

    Locks: as `record_answers`; payouts whose account somebody else holds are left for another time.
    Returns: the shop behind which to go on, or None at the end.
    """
    claimed = await claim_due(tx, claim, after_shop, {})
    payouts = await lock_payouts(tx, claimed.shop_ids)
    queued = [
        (payout, Conclusion(State.FAILED, None, "no_route")) for payout in payouts if payout.state is State.QUEUED
    ]
    accounts = await lock_accounts(tx, {payout.account_id for payout, _ in queued}, wait_seconds=0)
    await _apply(tx, [(payout, end) for payout, end in queued if payout.account_id in accounts], accounts, {})
    return claimed.next_shop


def _finished(item: Ended) -> FinishedAttempt:
    call, answer = item.call, item.answer
    return FinishedAttempt(
        call.payout.id, call.payout.shop_id, call.attempt_no, answer.outcome, answer.failure_code or answer.detail
    )


async def _apply(
    tx: Tx,
    concluded: Sequence[tuple[LockedPayout, Conclusion]],
    accounts: Mapping[int, LockedAccount],
    provider_references: Mapping[UUID, str | None],
) -> list[Event]:
    """Carry conclusions out, and return the events that came of it. The accounts of all that end are locked."""
    moves = []
    for payout, conclusion in concluded:
        if conclusion.state is None:
            continue
        resolution = None
        if conclusion.state.is_final:
            kind = EntryKind.CAPTURE if conclusion.state is State.SUCCESS else EntryKind.RELEASE
            resolution = accounts[payout.account_id].account.append(kind, payout.amount_minor)
        moves.append(
            Move(payout, conclusion.state, conclusion.failure_code, provider_references.get(payout.id), resolution)
        )
    await save_moves(tx, moves)
    events = list(_events(moves))
    await append_events(tx, events)
    await delete_due(tx, [move.payout.id for move in moves if move.state.is_final])
    await reschedule_due(tx, {payout.id: c.delay_seconds for payout, c in concluded if c.delay_seconds is not None})
    return events


def _events(moves: Iterable[Move]) -> Iterable[Event]:
    for move in moves:
        payout = move.payout
        if not move.state.is_final:
            continue
        yield Event(
            id=new_id(),
            shop_id=payout.shop_id,
            payout_id=payout.id,
            sequence=move.version,
            type=event_type(move.state),
            body=render_payout_event(
                payout_id=payout.id,
                external_id=payout.external_id,
                shop_code=payout.shop_code,
                state=move.state,
                amount_minor=payout.amount_minor,
                currency=payout.currency,
                currency_exponent=payout.currency_exponent,
                sequence=move.version,
                failure_code=move.failure_code,
                updated_at=payout.locked_at,
            ),
            url=payout.callback_url or payout.webhook_url,
        )
