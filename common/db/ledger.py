"""Accounts under their locks, the entries that move them, and balances as they are read."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import func, insert, select, text

from common.db.engine import Tx
from common.db.merchants import Standing
from common.db.tables import accounts, audit, entries
from common.domain.ledger import Account, EntryKind
from common.errors import PayoutsError


@dataclass(frozen=True, slots=True)
class LockedAccount:
    """An account whose row we hold, the standing of its shop and merchant, and the transaction's time."""

    account: Account
    shop_id: UUID
    shop_status: str
    merchant_status: str
    locked_at: datetime

    def objection(self, shop_code: str) -> PayoutsError | None:
        """Why its shop may do nothing at the moment, or None."""
        return Standing(self.shop_status, self.merchant_status).objection(shop_code)


_LOCK_ACCOUNTS = text(
    "SELECT l.*, now() AS locked_at FROM lock_accounts(CAST(:ids AS bigint[]), CAST(:wait_ms AS integer)) l"
)
_LOCK_ACCOUNTS_AS_ANY = text(
    "SELECT l.*, now() AS locked_at FROM lock_accounts(CAST(:ids AS bigint[]),"
    " (1000 * extract(epoch FROM CAST(current_setting('lock_timeout') AS interval)))::integer) l"
)


async def lock_accounts(
    tx: Tx, account_ids: Collection[int], *, wait_seconds: float | None
) -> dict[int, LockedAccount]:
    """Lock accounts until the transaction ends. With `wait_seconds` 0, those that somebody else holds are left out.

    None: wait as long as the session does for any lock.

    Locks: accounts in id order, `FOR NO KEY UPDATE`.
    Raises: `AccountBusy` (by `in_transaction`) when one is held for longer than `wait_seconds`.
    """
    if wait_seconds is None:
        rows = await tx.execute(_LOCK_ACCOUNTS_AS_ANY, {"ids": list(account_ids)})
    else:
        rows = await tx.execute(_LOCK_ACCOUNTS, {"ids": list(account_ids), "wait_ms": int(wait_seconds * 1000)})
    return {
        row.id: LockedAccount(
            account=Account(row.id, row.posted_minor, row.held_minor, row.credit_limit_minor, row.last_seq),
            shop_id=row.shop_id,
            shop_status=row.shop_status,
            merchant_status=row.merchant_status,
            locked_at=row.locked_at,
        )
        for row in rows
    }


async def append_adjustment(
    tx: Tx, *, account_id: int, amount_minor: int, actor: str, reason: str, subject: str
) -> None:
    """Credit an account by hand: an audit row and the one entry that refers to it.

    Amounts: minor units, positive.
    Locks: the account.
    """
    locked = (await lock_accounts(tx, [account_id], wait_seconds=None))[account_id]
    entry = locked.account.append(EntryKind.ADJUSTMENT, amount_minor)
    audit_id = await append_audit(
        tx,
        actor=actor,
        action="balance.topup",
        subject=subject,
        reason=reason,
        detail={"account_id": account_id, "amount_minor": amount_minor},
    )
    await tx.execute(
        insert(entries).values(
            account_id=account_id,
            seq=entry.seq,
            shop_id=locked.shop_id,
            kind=entry.kind.value,
            contra=entry.contra,
            amount_minor=entry.amount_minor,
            posted_delta_minor=entry.posted_delta_minor,
            held_delta_minor=entry.held_delta_minor,
            posted_after_minor=entry.posted_after_minor,
            held_after_minor=entry.held_after_minor,
            audit_id=audit_id,
        )
    )


async def append_audit(
    tx: Tx, *, actor: str, action: str, subject: str, reason: str | None = None, detail: dict[str, Any] | None = None
) -> int:
    """Write down who did what to what, and why. Returns the row's id."""
    row = await tx.execute(
        insert(audit)
        .values(actor=actor, action=action, subject=subject, reason=reason, detail=detail)
        .returning(audit.c.id)
    )
    audit_id: int = row.scalar_one()
    return audit_id


@dataclass(frozen=True, slots=True)
class Balance:
    """An account as its owner sees it, in minor units. `available + pending + credit = total`."""

    available_minor: int
    pending_minor: int
    credit_minor: int
    as_of: datetime

    @property
    def total_minor(self) -> int:
        """Everything that is there: spendable, held and on credit."""
        return self.available_minor + self.pending_minor + self.credit_minor


async def find_balance(tx: Tx, account_id: int) -> Balance | None:
    """The account's balance now: one row, so always of one moment."""
    row = (
        await tx.execute(
            select(
                accounts.c.posted_minor,
                accounts.c.held_minor,
                accounts.c.credit_limit_minor,
                func.now().label("as_of"),
            ).where(accounts.c.id == account_id)
        )
    ).one_or_none()
    if row is None:
        return None
    own_minor = row.posted_minor - row.held_minor
    return Balance(
        available_minor=max(own_minor, 0),
        pending_minor=row.held_minor,
        credit_minor=row.credit_limit_minor + min(own_minor, 0),
        as_of=row.as_of,
    )
