"""A queued payout ends without having been sent: its merchant cancels it, or its time is over."""

from collections.abc import Sequence
from functools import partial
from uuid import UUID

from common.db.callbacks import Event
from common.db.due import Expiring, find_expired, lock_due
from common.db.engine import Engine, Tx, constraint_name, in_transaction
from common.db.ledger import lock_accounts
from common.db.payouts import LockedPayout, Payout, find_payout, lock_payouts
from common.domain.ids import PAYOUT, render_id
from common.domain.payout import State
from common.errors import AccountBusy, NotCancelable, PayoutNotFound, Transient
from common.log import LogEvent, get_logger
from common.moving import Conclusion, carry_out


async def cancel(tx: Tx, shop_id: UUID, external_id: str, *, wait_seconds: float) -> tuple[Payout, list[Event]]:
    """Cancel a payout that nobody has taken yet. Repeat: a canceled payout stays as it is.

    Locks: its due row, the payout, its account, for which it waits that long.
    Returns: the payout as it is then, and the events to tell of.
    Raises: `PayoutNotFound`, `NotCancelable`, `AccountBusy`; as creates do when shop or merchant are not active.
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
        if locked.account_id not in accounts:
            raise AccountBusy
        objection = accounts[locked.account_id].objection(locked.shop_code)
        if objection is not None:
            raise objection
        events = await carry_out(tx, [(locked, Conclusion(State.CANCELED, None))], accounts, {})
    canceled = await find_payout(tx, shop_id, external_id)
    assert canceled is not None, "payouts are never deleted"
    return canceled, events


async def expire_page(engine: Engine, *, behind: Expiring, payouts_max: int) -> tuple[Expiring | None, list[Event]]:
    """End queued payouts whose time is over, a page of them. One that the database refuses to end holds up no other.

    Returns: where the next page begins, or None at the end, and the events to tell of.
    """
    found = await in_transaction(engine, lambda tx: find_expired(tx, behind=behind, payouts_max=payouts_max))
    ids = [each.payout_id for each in found]
    try:
        events = await in_transaction(engine, partial(expire, payout_ids=ids))
    except Transient:
        raise
    except Exception:
        events = [event for payout_id in ids for event in await _expire_one(engine, payout_id)]
    return found[-1] if len(found) == payouts_max else None, events


async def _expire_one(engine: Engine, payout_id: UUID) -> list[Event]:
    try:
        return await in_transaction(engine, partial(expire, payout_ids=[payout_id]))
    except Transient:
        raise
    except Exception as error:
        get_logger().error(
            LogEvent.PAYOUT_EXPIRY_REFUSED,
            payout_id=render_id(PAYOUT, payout_id),
            error=type(error).__name__,
            constraint=constraint_name(error),
        )
        return []


async def expire(tx: Tx, payout_ids: Sequence[UUID]) -> list[Event]:
    """End those of these payouts that were not sent in time. What others hold at the moment is left for another time.

    Locks: due rows, payouts, accounts; of them only payouts are waited for.
    Returns: the events to tell of.
    """
    payouts = await lock_payouts(tx, list(await lock_due(tx, payout_ids, skip_locked=True)))
    expired = [payout for payout in payouts if _may_expire(payout)]
    accounts = await lock_accounts(tx, {payout.account_id for payout in expired}, wait_seconds=0)
    ending = [payout for payout in expired if payout.account_id in accounts]
    return await carry_out(tx, [(payout, Conclusion(State.EXPIRED, None)) for payout in ending], accounts, {})


def _may_expire(payout: LockedPayout) -> bool:
    """Whether it has not been sent, and must not be any more."""
    return payout.state is State.QUEUED and payout.has_expired
