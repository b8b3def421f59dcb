"""The claim: take due payouts under a lease, and write down the calls that will be made for them, before they are made."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Final
from uuid import UUID

from common.db.due import (
    Claim,
    Claimed,
    FinishedAttempt,
    History,
    NewAttempt,
    append_attempts,
    claim_due,
    claim_due_ids,
    find_claimed,
    find_histories,
    finish_attempts,
    reschedule_due,
)
from common.db.engine import Tx
from common.db.payouts import LockedPayout, Move, lock_payouts, save_moves
from common.domain.ids import PAYOUT, payout_reference, render_id
from common.domain.payout import State
from common.log import LogEvent, get_logger
from worker.conclusions import LOOK_UP, SUBMIT, Call, Terms
from worker.rails import Outcome

# How long a payout that has expired is left to the sweep.
_EXPIRED_SECONDS: Final = 60.0
# How often it is asked whether a frozen shop may go on.
_FROZEN_SECONDS: Final = 60.0


async def claim_calls(
    tx: Tx,
    *,
    claim: Claim,
    terms: Terms,
    after_shop: UUID,
    busy: Counter[UUID],
    payout_ids: Sequence[UUID] | None = None,
) -> tuple[Claimed, list[Call]]:
    """Take due payouts, of those named or shop by shop, and write down the calls that will be made for them, beforehand.

    Locks: due rows (skipping those that others hold), then payouts.
    Returns: what was taken, and the calls to make for it.
    """
    if payout_ids is None:
        claimed = await claim_due(tx, claim, after_shop, busy)
    else:
        claimed = await claim_due_ids(tx, claim, payout_ids, busy)
    shop_ids = claimed.shop_ids
    if not shop_ids:
        return claimed, []
    payouts = await lock_payouts(tx, shop_ids, to_send=True)
    # One that has never moved was never tried: the schema has every attempt come with a move, or after one.
    tried = [payout.id for payout in payouts if payout.version > 1]
    histories = await find_histories(tx, tried) if tried else {}
    open_numbers = [(p, histories[p.id].open_no) for p in payouts if p.id in histories]
    await finish_attempts(
        tx,
        [
            FinishedAttempt(payout.id, payout.shop_id, open_no, Outcome.UNKNOWN, "worker lost")
            for payout, open_no in open_numbers
            if open_no is not None
        ],
    )
    moves: list[Move] = []
    calls: list[Call] = []
    put_off: dict[UUID, float] = {}
    for payout in payouts:
        if payout.state is State.SENDING:
            moves.append(Move(payout, State.VERIFYING))
            continue
        if payout.state is State.QUEUED and payout.has_expired:
            # The sweep ends it; it comes by sooner.
            put_off[payout.id] = _EXPIRED_SECONDS
            continue
        if payout.state is State.QUEUED and payout.is_frozen:
            put_off[payout.id] = _FROZEN_SECONDS
            continue
        if payout.state is State.QUEUED:
            moves.append(Move(payout, State.SENDING))
        history = histories.get(payout.id)
        calls.append(
            Call(
                payout=payout,
                rail=claim.rail,
                action=SUBMIT if payout.state is State.QUEUED else LOOK_UP,
                attempt_no=1 if history is None else history.attempt_no + 1,
                reference=_reference_of(payout, history),
                history=history,
                token=claim.token,
                terms=terms,
            )
        )
    await save_moves(tx, moves)
    await append_attempts(
        tx,
        [NewAttempt(c.payout.id, c.payout.shop_id, c.attempt_no, c.action, claim.rail, c.reference) for c in calls],
    )
    abandoned = [move.payout.id for move in moves if move.state is State.VERIFYING]
    until_look_up = max(terms.patience.look_up_delay(0), terms.lag_seconds)
    await reschedule_due(tx, dict.fromkeys(abandoned, until_look_up), verifying=abandoned)
    await reschedule_due(tx, put_off)
    for payout_id in abandoned:
        get_logger().warning(LogEvent.PAYOUT_LEASE_EXPIRED, payout_id=render_id(PAYOUT, payout_id))
    return claimed, calls


async def find_calls(tx: Tx, *, claim: Claim, terms: Terms) -> list[Call]:
    """The calls of a claim whose COMMIT nobody heard the answer of, as it would have returned them; none, if it did not happen.

    Only for who made none of them yet. Locks: due rows, then payouts.
    """
    claimed = await find_claimed(tx, claim)
    if not claimed:
        return []
    payouts = await lock_payouts(tx, claimed, to_send=True)
    histories = await find_histories(tx, claimed)
    calls: list[Call] = []
    for payout in payouts:
        history = histories.get(payout.id)
        if history is None or history.open_no is None:
            continue
        is_submit = payout.state is State.SENDING
        calls.append(
            Call(
                # As it was when it was claimed: a claim to submit has moved it.
                payout=replace(payout, state=State.QUEUED, version=payout.version - 1) if is_submit else payout,
                rail=claim.rail,
                action=SUBMIT if is_submit else LOOK_UP,
                attempt_no=history.open_no,
                reference=history.reference,
                history=replace(history, open_no=None, look_ups=history.look_ups - (not is_submit)),
                token=claim.token,
                terms=terms,
            )
        )
    return calls


def _reference_of(payout: LockedPayout, history: History | None) -> str:
    """One reference for the payout's whole life: that of its first attempt."""
    if history is not None:
        return history.reference
    return payout_reference(payout.id, payout.shop_id, payout.external_id)
