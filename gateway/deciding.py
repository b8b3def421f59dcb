"""The careful way of deciding creates: under the locks of their accounts, in the order in which they came.

It is written to be repeated: an order whose payout exists with its own id was accepted by an earlier try.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from common.db.accepting import NewPayout, append_accepted
from common.db.engine import Tx
from common.db.ledger import LockedAccount, lock_accounts
from common.db.merchants import Shop
from common.db.payouts import Payout, find_by_external_ids
from common.domain.ledger import Entry, EntryKind
from common.domain.money import render_amount
from common.domain.payout import State
from common.errors import ExternalIdReused, FieldError, InsufficientBalance, InvalidRequest, Overloaded, PayoutsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Order(NewPayout):
    """One create, ready to be decided: what is stored of it when it is accepted, and its shop."""

    shop: Shop


@dataclass(frozen=True, slots=True)
class Accepted:
    """A payout that exists: just created, or before (`replayed`)."""

    payout: Payout
    replayed: bool


Verdict = Accepted | PayoutsError


async def decide_batch(
    tx: Tx, orders: Sequence[Order], *, wait_seconds: float, is_wanted: Callable[[Order], bool] = lambda _: True
) -> list[Verdict | None]:
    """Decide orders in their order, and write those that are accepted: payout, hold and due row.

    Locks: the accounts of the batch, in id order. With `wait_seconds` 0, accounts that somebody else holds are left out.
    `is_wanted` is asked under the locks: an order that was given up while they were awaited is not accepted any more.
    Repeat: an order whose payout exists with its own id was accepted by an earlier try.
    Returns: a verdict per order; None where the account was left out.
    """
    locked = await lock_accounts(tx, {order.account_id for order in orders}, wait_seconds=wait_seconds)
    ours = [order for order in orders if order.account_id in locked]
    existing = await find_by_external_ids(tx, {(order.shop_id, order.external_id) for order in ours}) if ours else {}
    accepted: list[tuple[NewPayout, Entry]] = []
    verdicts: list[Verdict | None] = []
    for order in orders:
        account = locked.get(order.account_id)
        if not is_wanted(order):
            verdicts.append(Overloaded())
        else:
            verdicts.append(None if account is None else _decide(order, account, existing, accepted))
    if accepted:
        await append_accepted(tx, accepted)
    return verdicts


def _decide(
    order: Order,
    locked: LockedAccount,
    existing: dict[tuple[UUID, str], Payout],
    accepted: list[tuple[NewPayout, Entry]],
) -> Verdict:
    """One order, after those before it: `existing` and the account already know them."""
    payout = existing.get((order.shop_id, order.external_id))
    if payout is not None and payout.id == order.id:
        return Accepted(payout, replayed=False)
    objection = locked.objection(order.shop.code)
    if objection is not None:
        return objection
    if payout is not None:
        differing = _differing_fields(order, payout)
        return ExternalIdReused(differing) if differing else Accepted(payout, replayed=True)
    if order.expires_at is not None and order.expires_at <= locked.locked_at:
        return InvalidRequest(FieldError("expires_at", "expires_at must be a time in the future"))
    account, exponent = locked.account, order.shop.currency_exponent
    if order.amount_minor > account.spendable_minor:
        return InsufficientBalance(
            render_amount(order.amount_minor, exponent), render_amount(account.spendable_minor, exponent)
        )
    payout = new_payout(order, locked.locked_at)
    existing[order.shop_id, order.external_id] = payout
    accepted.append((order, account.append(EntryKind.HOLD, order.amount_minor)))
    return Accepted(payout, replayed=False)


def _differing_fields(order: Order, payout: Payout) -> list[str]:
    """The fields of the content in which an order differs from the payout that has its id."""
    pairs = {
        "amount": (order.amount_minor, payout.amount_minor),
        "currency": (order.currency, payout.currency),
        "card_number": (order.recipient_digest, payout.recipient_digest),
        "paymentData": (order.payment_data_digest, payout.payment_data_digest),
    }
    return [name for name, (ours, stored) in pairs.items() if ours != stored]


def new_payout(order: Order, accepted_at: datetime) -> Payout:
    """What an order is from the moment on that it was accepted."""
    return Payout(
        id=order.id,
        shop_id=order.shop_id,
        external_id=order.external_id,
        amount_minor=order.amount_minor,
        currency=order.currency,
        recipient_masked=order.recipient_masked,
        recipient_digest=order.recipient_digest,
        payment_data_digest=order.payment_data_digest,
        callback_url=order.callback_url,
        details=order.details,
        state=State.QUEUED,
        failure_code=None,
        provider_reference=None,
        created_at=accepted_at,
        updated_at=accepted_at,
        finalized_at=None,
        expires_at=order.expires_at,
    )
