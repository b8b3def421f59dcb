"""A queued payout ends without having been sent: its merchant cancels it, or its time is over."""

from uuid import UUID

from common.db.callbacks import Event
from common.db.due import FIRST_TO_EXPIRE, Expiring, find_expired, lock_due
from common.db.engine import Tx
from common.db.ledger import lock_accounts
from common.db.payouts import LockedPayout, Payout, find_payout, lock_payouts
from common.domain.payout import State
from common.errors import NotCancelable, PayoutNotFound
from common.moving import Conclusion, carry_out


async def cancel(tx: Tx, shop_id: UUID, external_id: str, *, wait_seconds: float) -> tuple[Payout, list[Event]]:
    """Cancel a payout that nobody has taken yet. Repeat: a canceled payout stays as it is.

    Locks: its due row, the payout, its account, for which it waits that long.
    Returns: the payout as it is then, and the events to tell of.
    Raises: `PayoutNotFound`, `NotCancelable`, `AccountBusy`.
    """
    payout = await find_payout(tx, shop_id, external_id)
    if payout is None:
        raise PayoutNotFound
    await lock_due(tx, [payout.id])
    (locked,) = await lock_payouts(tx, [payout.id])
    events: list[Event] = []
    if locked.state is not State.CANCELED:
        if locked.state is not State.QUEUED:
            raise NotCancelable
        accounts = await lock_accounts(tx, [locked.account_id], wait_seconds=wait_seconds)
        events = await carry_out(tx, [(locked, Conclusion(State.CANCELED, None))], accounts, {})
    canceled = await find_payout(tx, shop_id, external_id)
    assert canceled is not None, "payouts are never deleted"
    return canceled, events


async def expire(
    tx: Tx, *, behind: Expiring = FIRST_TO_EXPIRE, payouts_max: int
) -> tuple[Expiring | None, list[Event]]:
    """End queued payouts whose time is over, of one page of those. What others hold at the moment is left for another time.

    Locks: due rows, payouts, accounts; of them only payouts are waited for.
    Returns: where the next page begins, or None at the end, and the events to tell of.
    """
    found = await find_expired(tx, behind=behind, payouts_max=payouts_max)
    payouts = await lock_payouts(tx, [each.payout_id for each in found])
    expired = [payout for payout in payouts if _may_expire(payout)]
    accounts = await lock_accounts(tx, {payout.account_id for payout in expired}, wait_seconds=0)
    ending = [payout for payout in expired if payout.account_id in accounts]
    events = await carry_out(tx, [(payout, Conclusion(State.EXPIRED, None)) for payout in ending], accounts, {})
    return found[-1] if len(found) == payouts_max else None, events


def _may_expire(payout: LockedPayout) -> bool:
    """Whether it has not been sent, and must not be any more."""
    return payout.state is State.QUEUED and payout.has_expired
