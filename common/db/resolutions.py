"""How payouts ended that no rail tells of, as operators say: what waits for them, and what two of them resolve."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, insert, text, update

from common.db.engine import Tx
from common.db.tables import resolutions


@dataclass(frozen=True, slots=True)
class OpenResolution:
    """What one operator said, and another has not confirmed."""

    id: UUID
    reference: str
    outcome: str
    actor: str


_LOCK_OPEN = text(
    """
    SELECT r.id, r.reference, r.outcome, a.actor FROM resolutions r JOIN audit a ON a.id = r.opened_by
     WHERE r.payout_id = :payout_id AND r.closed_at IS NULL FOR UPDATE OF r
    """
)


async def lock_open_resolution(tx: Tx, payout_id: UUID) -> OpenResolution | None:
    """The open resolution of a payout. Locks: it."""
    row = (await tx.execute(_LOCK_OPEN, {"payout_id": payout_id})).one_or_none()
    return None if row is None else OpenResolution(**row._mapping)


_FIND_REFERENCE = text(
    "SELECT reference FROM payout_attempts WHERE payout_id = :payout_id AND shop_id = :shop_id AND attempt_no = 1"
)


async def find_reference(tx: Tx, payout_id: UUID, shop_id: UUID) -> str:
    """The one reference under which a payout was sent. Raises: `NoResultFound` when it never was."""
    found = await tx.execute(_FIND_REFERENCE, {"payout_id": payout_id, "shop_id": shop_id})
    reference: str = found.scalar_one()
    return reference


async def append_resolution(
    tx: Tx, *, resolution_id: UUID, payout_id: UUID, shop_id: UUID, reference: str, outcome: str, audit_id: int
) -> None:
    """Have one operator's word. Raises: `IntegrityError` (`resolutions_one_open_per_payout`, `resolutions_open_whole`)."""
    await tx.execute(
        insert(resolutions).values(
            id=resolution_id,
            payout_id=payout_id,
            shop_id=shop_id,
            reference=reference,
            outcome=outcome,
            opened_by=audit_id,
        )
    )


async def close_resolution(tx: Tx, resolution_id: UUID, *, audit_id: int, is_confirmed: bool) -> None:
    """Have it confirmed or withdrawn. Raises: `IntegrityError` (`resolutions_need_two`)."""
    await tx.execute(
        update(resolutions)
        .where(resolutions.c.id == resolution_id)
        .values(closed_at=text("now()"), closed_by=audit_id, is_confirmed=is_confirmed)
    )


_LIST_WAITING = text(
    """
    SELECT d.payout_id, p.external_id, m.code AS merchant, s.code AS shop, s.currency_exponent, p.amount_minor, p.currency,
           d.rail, d.verifying_since, t.look_ups, t.detail, d.due_at, r.outcome AS proposed, a.actor AS proposed_by
      FROM (SELECT * FROM payout_due WHERE verifying_since IS NOT NULL ORDER BY verifying_since
             LIMIT CAST(:rows_max AS int)) d
      JOIN payouts p ON p.id = d.payout_id AND p.shop_id = d.shop_id
      JOIN shops s ON s.id = d.shop_id
      JOIN merchants m ON m.id = s.merchant_id
     CROSS JOIN LATERAL (
       SELECT count(*) FILTER (WHERE action = 'look_up') AS look_ups,
              (array_agg(detail ORDER BY attempt_no DESC) FILTER (WHERE finished_at IS NOT NULL))[1] AS detail
         FROM payout_attempts WHERE payout_id = d.payout_id AND shop_id = d.shop_id) t
      LEFT JOIN resolutions r ON r.payout_id = d.payout_id AND r.closed_at IS NULL
      LEFT JOIN audit a ON a.id = r.opened_by
     ORDER BY d.verifying_since
    """
)


async def list_waiting(tx: Tx, *, rows_max: int) -> Sequence[Row[Any]]:
    """Payouts whose fate is not known, the oldest doubt first, with what one operator said about them."""
    return (await tx.execute(_LIST_WAITING, {"rows_max": rows_max})).all()


@dataclass(frozen=True, slots=True)
class Doubts:
    """How much waits for people. `verifying_seconds`: how long the oldest payout has; 0 when there is none."""

    verifying: int
    verifying_seconds: float
    discrepancies: int
    resolutions: int


_COUNT_DOUBTS = text(
    """
    SELECT v.n AS verifying, coalesce(extract(epoch FROM now() - v.oldest), 0)::float8 AS verifying_seconds,
           (SELECT count(*) FROM discrepancies WHERE closed_at IS NULL) AS discrepancies,
           (SELECT count(*) FROM resolutions WHERE closed_at IS NULL) AS resolutions
      FROM (SELECT count(*) AS n, min(verifying_since) AS oldest FROM payout_due WHERE verifying_since IS NOT NULL) v
    """
)


async def count_doubts(tx: Tx) -> Doubts:
    """How much waits for people now."""
    return Doubts(**(await tx.execute(_COUNT_DOUBTS)).one()._mapping)
