"""The claim: take due payouts under a lease, and write down the calls that will be made for them, before they are made."""

from collections import Counter
from collections.abc import Sequence
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
    find_histories,
    finish_attempts,
    reschedule_due,
)
from common.db.engine import Tx
from common.db.payouts import LockedPayout, Move, lock_payouts, save_moves
from common.domain.ids import PAYOUT, render_id
from common.domain.payout import State
from common.domain.schedule import look_up_delay
from common.log import LogEvent, get_logger
from worker.conclusions import LOOK_UP, SUBMIT, Call
from worker.rails import Outcome


async def claim_calls(
    tx: Tx,
    *,
    claim: Claim,
    after_shop: UUID,
    busy: Counter[UUID],
    lag_seconds: float,
    start_until: float,
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
    payouts = await lock_payouts(tx, shop_ids)
    histories = await find_histories(tx, shop_ids)
    lost = [(p, histories[p.id]) for p in payouts if p.id in histories and histories[p.id].outcome is None]
    await finish_attempts(
        tx, [FinishedAttempt(p.id, p.shop_id, h.attempt_no, Outcome.UNKNOWN, "worker lost") for p, h in lost]
    )
    moves: list[Move] = []
    calls: list[Call] = []
    for payout in payouts:
        if payout.state is State.SENDING:
            moves.append(Move(payout, State.VERIFYING))
            continue
        if payout.state is State.QUEUED:
            moves.append(Move(payout, State.SENDING))
        calls.append(_call(payout, histories.get(payout.id), claim.token, start_until, lag_seconds))
    await save_moves(tx, moves)
    await append_attempts(
        tx,
        [NewAttempt(c.payout.id, c.payout.shop_id, c.attempt_no, c.action, claim.rail, c.reference) for c in calls],
    )
    abandoned = [move.payout.id for move in moves if move.state is State.VERIFYING]
    await reschedule_due(tx, dict.fromkeys(abandoned, max(look_up_delay(0), lag_seconds)))
    for payout_id in abandoned:
        get_logger().warning(LogEvent.PAYOUT_LEASE_EXPIRED, payout=render_id(PAYOUT, payout_id))
    return claimed, calls


def _call(payout: LockedPayout, history: History | None, token: UUID, start_until: float, lag_seconds: float) -> Call:
    return Call(
        payout=payout,
        action=SUBMIT if payout.state is State.QUEUED else LOOK_UP,
        attempt_no=1 if history is None else history.attempt_no + 1,
        # One reference for the payout's whole life.
        reference=render_id(PAYOUT, payout.id) if history is None else history.reference,
        history=history,
        token=token,
        start_until=start_until,
        lag_seconds=lag_seconds,
    )
