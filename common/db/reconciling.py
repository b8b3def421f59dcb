"""What we have under the references that rails know, page by page: to be laid beside what a provider says."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import text

from common.db.engine import Tx
from common.domain.ids import first_id

# How much earlier than its row an event's id may have been made.
_ID_AGE_SECONDS: Final = 3_600.0
# Events that one statement looks at, so that each ends in time however few of them are of the rail.
LOOKS_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class OurSide:
    """A payout or payin as we have it. Amounts in minor units; of the two ids one is None."""

    reference: str
    rail: str
    payout_id: UUID | None
    payin_id: UUID | None
    shop_id: UUID
    shop: str
    state: str
    amount_minor: int
    currency: str


_SHOP_CODE: Final = """
           (SELECT m.code || '/' || s.code FROM shops s JOIN merchants m ON m.id = s.merchant_id
             WHERE s.id = o.shop_id) AS shop"""

# One probe a reference, on tables that nobody has analysed too.
_FIND = text(
    f"""
    SELECT w.reference, o.rail, o.payout_id, o.payin_id, o.shop_id, {_SHOP_CODE}, o.state, o.amount_minor, o.currency
      FROM unnest(CAST(:references AS text[])) AS w (reference)
     CROSS JOIN LATERAL (
       SELECT a.rail, p.id AS payout_id, CAST(NULL AS uuid) AS payin_id, p.shop_id, p.state, p.amount_minor, p.currency
         FROM (SELECT rail, payout_id, shop_id FROM payout_attempts
                WHERE reference = w.reference AND attempt_no = 1 LIMIT 1) a
        CROSS JOIN LATERAL (
          SELECT id, shop_id, state, amount_minor, currency FROM payouts
           WHERE id = a.payout_id AND shop_id = a.shop_id LIMIT 1) p
        UNION ALL
       (SELECT i.rail, NULL, i.id, i.shop_id, i.state, i.amount_minor, i.currency FROM payins i
         WHERE i.reference = w.reference LIMIT 1)) o
    """
)

# Whatever ends is told by an event, whose id begins with the time: so a period is a range of them.
_FIND_MOVED = text(
    f"""
    SELECT o.reference, o.rail, e.payout_id, e.payin_id, e.shop_id, {_SHOP_CODE}, split_part(e.type, '.', 2) AS state,
           o.amount_minor, o.currency
      FROM (SELECT id, shop_id, payout_id, payin_id, type, created_at FROM events
             WHERE id > CAST(:behind AS uuid) AND id < CAST(:until_id AS uuid) ORDER BY id LIMIT CAST(:looks_max AS int)) e
     CROSS JOIN LATERAL (
       SELECT a.reference, a.rail, p.shop_id, p.amount_minor, p.currency
         FROM (SELECT reference, rail FROM payout_attempts
                WHERE payout_id = e.payout_id AND shop_id = e.shop_id AND attempt_no = 1 LIMIT 1) a
        CROSS JOIN LATERAL (
          SELECT shop_id, amount_minor, currency FROM payouts WHERE id = e.payout_id AND shop_id = e.shop_id LIMIT 1) p
        UNION ALL
       (SELECT i.reference, i.rail, i.shop_id, i.amount_minor, i.currency FROM payins i
         WHERE i.id = e.payin_id AND i.shop_id = e.shop_id LIMIT 1)) o
     WHERE e.type IN ('payout.success', 'payout.refunded', 'payin.success', 'payin.refunded')
       AND e.created_at >= :since AND e.created_at < :until AND o.rail = :rail
     ORDER BY e.id
    """
)

_LAST_LOOKED_AT = text(
    """
    SELECT id FROM events WHERE id > CAST(:behind AS uuid) AND id < CAST(:until_id AS uuid)
     ORDER BY id OFFSET CAST(:looks_max AS int) - 1 LIMIT 1
    """
)


async def find_by_references(tx: Tx, references: Sequence[str]) -> dict[str, OurSide]:
    """What we have under those references, of whatever rail."""
    rows = await tx.execute(_FIND, {"references": list(references)})
    return {row.reference: OurSide(**row._mapping) for row in rows}


@dataclass(frozen=True, slots=True)
class Moved:
    """Payouts and payins of a rail whose money moved in a period, and where to go on; `behind` None: these are the last.

    `state` of each: what it became then, `success` or `refunded`; one may have become both.
    """

    found: list[OurSide]
    behind: UUID | None


async def find_moved(
    tx: Tx, rail: str, *, since: datetime, until: datetime, behind: UUID | None, looks_max: int = LOOKS_MAX
) -> Moved:
    """A page of what we say was paid or went back from `since` on and before `until`."""
    place = {
        "behind": behind or first_id(since.timestamp() - _ID_AGE_SECONDS),
        "until_id": first_id(until.timestamp() + _ID_AGE_SECONDS),
        "looks_max": looks_max,
    }
    rows = await tx.execute(_FIND_MOVED, place | {"rail": rail, "since": since, "until": until})
    return Moved([OurSide(**row._mapping) for row in rows], await tx.scalar(_LAST_LOOKED_AT, place))
