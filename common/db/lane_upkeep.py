"""Lanes as people and the sweep see them: listed, held, released, and put right where a row says what its callbacks do not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, select, text

from common.db.engine import Tx
from common.db.lanes import Turn, lock_shares, save_turns
from common.db.tables import callback_lanes, merchants, shops
from common.domain.lane import CAP_UNKNOWN

# Everything that a lane says of itself against what its callbacks say: leases, and when its next one is due.
_PAGE = text(
    """
    SELECT l.id, coalesce(leases.n, 0) - l.in_flight AS missing,
           coalesce(next.in_lane AND l.held_at IS NULL AND l.in_flight < l.cap
             AND l.ready_at > next.latest + interval '5 s', false) AS late
      FROM (SELECT * FROM callback_lanes WHERE id > CAST(:behind AS uuid) ORDER BY id LIMIT CAST(:lanes_max AS int)) l
      LEFT JOIN (SELECT d.lane_id, count(*) AS n FROM callback_due d WHERE d.lease_token IS NOT NULL
                  GROUP BY d.lane_id) leases ON leases.lane_id = l.id
      LEFT JOIN LATERAL (
        SELECT greatest(d.due_at, l.blocked_until, now()) AS latest, d.in_lane FROM callback_due d
         WHERE d.lane_id = l.id AND d.lease_token IS NULL ORDER BY d.due_at LIMIT 1) next ON true
     ORDER BY l.id
    """
)

_FIND_LEASES = text(
    """
    SELECT l.id, (SELECT count(*) FROM callback_due d WHERE d.lease_token IS NOT NULL AND d.lane_id = l.id) - l.in_flight
           AS missing
      FROM callback_lanes l WHERE l.id = ANY (CAST(:lane_ids AS uuid[]))
    """
)

_FIND_FAILING = text(
    """
    SELECT l.id FROM callback_lanes l
     WHERE l.failing_since <= now() - make_interval(secs => CAST(:seconds AS float8)) AND l.held_at IS NULL
       AND l.blocked_until > now() - interval '1 day'
       AND EXISTS (SELECT 1 FROM callback_due d WHERE d.lane_id = l.id AND d.lease_token IS NULL)
     ORDER BY l.failing_since LIMIT CAST(:lanes_max AS int)
    """
)

_HOLD = text(
    """
    UPDATE callback_lanes SET held_at = now(), held_reason = :reason, ready_at = 'infinity'
     WHERE id = ANY (CAST(:lane_ids AS uuid[])) AND held_at IS NULL
       AND (CAST(:seconds AS float8) IS NULL OR failing_since <= now() - make_interval(secs => :seconds)) RETURNING id
    """
)

# Whoever releases a lane says that its receiver is well again: it begins anew, as a lane that nobody knows.
_RELEASE = text(
    """
    UPDATE callback_lanes
       SET held_at = NULL, held_reason = NULL, cap = :cap, streak = 0, trouble = 0, latency_ms = NULL, opened = 0,
           blocked_until = '-infinity', failing_since = NULL
     WHERE id = :lane_id RETURNING id
    """
)

_COUNT = text(
    """
    SELECT (SELECT count(*) FROM callback_lanes WHERE held_at IS NOT NULL) AS held,
           (SELECT count(*) FROM callback_lanes WHERE failing_since IS NOT NULL AND held_at IS NULL) AS failing
    """
)


@dataclass(frozen=True, slots=True)
class LaneCounts:
    """Lanes that are held for people, and lanes whose receiver answers nothing well."""

    held: int
    failing: int


async def count_lanes(tx: Tx) -> LaneCounts:
    """How many lanes are in trouble now."""
    return LaneCounts(**(await tx.execute(_COUNT)).one()._mapping)


async def mend_lanes(tx: Tx, *, behind: UUID, lanes_max: int) -> tuple[UUID | None, list[UUID]]:
    """Look at a page of lanes behind one, and put right what is not.

    Returns: the last lane of the page (None: it was the last page), and the lanes that were put right.
    Locks: the shares of those, by id.
    """
    rows = (await tx.execute(_PAGE, {"behind": behind, "lanes_max": lanes_max})).all()
    crooked = [row.id for row in rows if row.missing or row.late]
    if crooked:
        crooked = await lock_shares(tx, crooked, waits=False)
        leases = await tx.execute(_FIND_LEASES, {"lane_ids": crooked})
        await save_turns(tx, [Turn(row.id, row.missing) for row in leases])
    return (rows[-1].id if len(rows) == lanes_max else None), crooked


async def hold_failing(tx: Tx, *, failing_seconds: float, lanes_max: int) -> list[UUID]:
    """Hold lanes that have done nothing but fail for so long and in which something waits. Returns: those held now.

    What waits is kept.
    Locks: the shares of those, by id.
    """
    lane_ids = list(await tx.scalars(_FIND_FAILING, {"seconds": failing_seconds, "lanes_max": lanes_max}))
    if not lane_ids:
        return []
    lane_ids = await lock_shares(tx, lane_ids, waits=False)
    reason = f"nothing but failures for {failing_seconds / 3600:g} hours"
    return list(await tx.scalars(_HOLD, {"lane_ids": lane_ids, "reason": reason, "seconds": failing_seconds}))


async def hold_lane(tx: Tx, lane_id: UUID, *, reason: str) -> bool:
    """Send nothing more through a lane until it is released. False: there is no such lane, or it is held already.

    Locks: its merchant's share.
    """
    await lock_shares(tx, [lane_id])
    return await tx.scalar(_HOLD, {"lane_ids": [lane_id], "reason": reason, "seconds": None}) is not None


async def release_lane(tx: Tx, lane_id: UUID) -> bool:
    """Let a lane go on, held or resting, and forget what went wrong. False: there is no such lane.

    Locks: its merchant's share.
    """
    await lock_shares(tx, [lane_id])
    if await tx.scalar(_RELEASE, {"lane_id": lane_id, "cap": CAP_UNKNOWN}) is None:
        return False
    await save_turns(tx, [Turn(lane_id, 0)])
    return True


# Counted to a bound: a lane in trouble may have hundreds of thousands.
WAITING_COUNTED_MAX: Final = 10_000
_RESTS_UNTIL: Final = text("CASE WHEN blocked_until > now() THEN blocked_until END AS rests_until")
_WAITING: Final = text(
    "(SELECT count(*) FROM (SELECT 1 FROM callback_due d WHERE d.lane_id = callback_lanes.id AND d.lease_token IS NULL"
    f" LIMIT {WAITING_COUNTED_MAX}) w) AS waiting"
)


async def list_lanes(
    tx: Tx, *, merchant: str | None = None, troubled: bool = False, rows_max: int = 50
) -> Sequence[Row[*tuple[Any, ...]]]:
    """Lanes with the codes of merchant and shop, of one merchant when asked; `troubled`: those held, resting or coming back."""
    lane = callback_lanes.c
    query = (
        select(
            lane.id,
            merchants.c.code.label("merchant"),
            shops.c.code.label("shop"),
            lane.origin,
            lane.cap,
            lane.in_flight,
            lane.latency_ms,
            _RESTS_UNTIL,
            lane.failing_since,
            lane.held_at,
            lane.held_reason,
            _WAITING,
        )
        .join(shops, shops.c.id == lane.shop_id)
        .join(merchants, merchants.c.id == lane.merchant_id)
        .order_by(merchants.c.code, shops.c.code, lane.origin)
        .limit(rows_max)
    )
    if merchant is not None:
        query = query.where(merchants.c.code == merchant)
    if troubled:
        query = query.where(text("(held_at IS NOT NULL OR opened > 0 OR blocked_until > now())"))
    return (await tx.execute(query)).all()
