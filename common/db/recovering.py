"""Recovering: after a restore to an earlier moment every open payout is doubted, page by page, before anything is sent again.

Nothing is sent and no money moves meanwhile, nor before it: the schema sees to that (`awaits_recovery`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy import text

from common.db.engine import Tx
from common.domain.ids import payout_reference

PAGE_ROWS_MAX: Final = 500
# The mark of a recovery that no server asks for.
UNMARKED: Final = "unmarked"


@dataclass(frozen=True, slots=True)
class Recovery:
    """A recovery and how far it is, in payouts doubted and payins that are asked about soon."""

    id: int
    restored: str
    payouts: int
    payins: int


@dataclass(frozen=True, slots=True)
class Standing:
    """What a database needs. `restored`: what its server says of a restore; `awaits`: whether it waits for a recovery."""

    restored: str | None
    awaits: bool
    open_id: int | None


@dataclass(frozen=True, slots=True)
class InDoubt:
    """How many payouts of a rail are open in a state. `authoritative`: whether its "not found" lets one be sent again; None:
    there is no such rail any more.
    """

    rail: str
    authoritative: bool | None
    state: str
    count: int


async def awaits_recovery(tx: Tx) -> bool:
    """Whether the database was restored and has not been recovered."""
    return bool(await tx.scalar(text("SELECT awaits_recovery()")))


async def find_standing(tx: Tx) -> Standing:
    """What the database needs."""
    return Standing(**(await tx.execute(_STANDING)).one()._mapping)


_STANDING = text(
    """
    SELECT restored_as() AS restored, awaits_recovery() AS awaits,
           (SELECT id FROM recoveries WHERE finished_at IS NULL) AS open_id
    """
)


async def count_open(tx: Tx) -> list[InDoubt]:
    """The payouts that a recovery doubts, by rail and state."""
    return [InDoubt(**row._mapping) for row in await tx.execute(_COUNT)]


_COUNT = text(
    """
    SELECT d.rail, r.kind = 'sandbox' OR r.authoritative AS authoritative, p.state, count(*) AS count
      FROM payout_due d JOIN payouts p ON p.id = d.payout_id AND p.shop_id = d.shop_id LEFT JOIN rails r ON r.name = d.rail
     GROUP BY d.rail, r.kind, r.authoritative, p.state ORDER BY d.rail, p.state
    """
)


async def begin_recovery(tx: Tx, *, restored: str, audit_id: int) -> int:
    """From now on everything waits until it is finished. Raises: `IntegrityError` (`recoveries_one_open`)."""
    recovery_id: int = await tx.scalar(_BEGIN, {"restored": restored, "audit_id": audit_id})
    return recovery_id


_BEGIN = text("INSERT INTO recoveries (restored, audit_id) VALUES (:restored, :audit_id) RETURNING id")


async def doubt_page(tx: Tx, recovery_id: int, *, rows_max: int = PAGE_ROWS_MAX) -> bool:
    """Doubt the next payouts, then have the next payins asked about; when there are none, finish: everything goes on.

    Locks: the recovery, due rows, payouts. Repeat: a page is done once, whoever does it.
    Returns: whether there is more to do.
    """
    behind = (await tx.execute(_LOCK, {"id": recovery_id})).one_or_none()
    if behind is None:
        return False
    page = (await tx.execute(_PAGE, {"behind": behind.behind, "rows_max": rows_max})).all()
    if page:
        await tx.execute(
            _DOUBT,
            {
                "ids": [row.payout_id for row in page],
                "references": [
                    row.reference or payout_reference(row.payout_id, row.shop_id, row.external_id) for row in page
                ],
            },
        )
        await tx.execute(_SAVE, {"id": recovery_id, "behind": page[-1].payout_id, "count": len(page)})
        return True
    payins: Sequence[UUID] = (
        await tx.scalars(_HASTEN_PAYINS, {"behind": behind.payins_behind, "rows_max": rows_max})
    ).all()
    if payins:
        await tx.execute(_SAVE_PAYINS, {"id": recovery_id, "behind": max(payins), "count": len(payins)})
    else:
        await tx.execute(_FINISH, {"id": recovery_id})
    return bool(payins)


_LOCK = text("SELECT behind, payins_behind FROM recoveries WHERE id = :id AND finished_at IS NULL FOR UPDATE")

_PAGE = text(
    """
    SELECT d.payout_id, d.shop_id, p.external_id, a.reference
      FROM (SELECT payout_id, shop_id FROM payout_due WHERE payout_id > CAST(:behind AS uuid)
             ORDER BY payout_id LIMIT CAST(:rows_max AS int)) d
      JOIN payouts p ON p.id = d.payout_id AND p.shop_id = d.shop_id
      LEFT JOIN payout_attempts a ON a.payout_id = d.payout_id AND a.shop_id = d.shop_id AND a.attempt_no = 1
     ORDER BY d.payout_id
    """
)

_DOUBT = text("SELECT doubt_payouts(CAST(:ids AS uuid[]), CAST(:references AS text[]))")

_SAVE = text("UPDATE recoveries SET behind = :behind, payouts = payouts + :count WHERE id = :id")

_HASTEN_PAYINS = text(
    """
    UPDATE payin_due d SET due_at = now(), lease_token = NULL
      FROM (SELECT payin_id, shop_id FROM payin_due WHERE payin_id > CAST(:behind AS uuid)
             ORDER BY payin_id LIMIT CAST(:rows_max AS int)) page
     WHERE d.payin_id = page.payin_id AND d.shop_id = page.shop_id RETURNING d.payin_id
    """
)

_SAVE_PAYINS = text("UPDATE recoveries SET payins_behind = :behind, payins = payins + :count WHERE id = :id")


async def find_recovery(tx: Tx, recovery_id: int) -> Recovery:
    """How far it is."""
    return Recovery(**(await tx.execute(_FIND, {"id": recovery_id})).one()._mapping)


_FIND = text("SELECT id, restored, payouts, payins FROM recoveries WHERE id = :id")

_FINISH = text("UPDATE recoveries SET finished_at = now() WHERE id = :id")
