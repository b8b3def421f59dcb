"""The feed: a shop's events in one order for good, page by page, for those who poll."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import text

from common.db.engine import Tx


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A place in the feed: the one behind an event. Of one transaction, events stand by `sequence`."""

    txid: int
    sequence: int
    event_id: UUID


FEED_BEGIN: Final = Place(0, 0, UUID(int=0))


@dataclass(frozen=True, slots=True)
class FeedEvent:
    """An event as the feed tells it. `body` None: of a kind that was not asked for; it is there to be passed over."""

    place: Place
    type: str
    created_at: datetime
    body: bytes | None


# In the order of the index, from the place on: a planner that knows no statistics takes all that is behind it to be little
# enough to sort.
_BY_INDEX: Final = text("SELECT set_config('enable_bitmapscan', 'off', true), set_config('enable_sort', 'off', true)")

# A transaction below the snapshot's xmin has ended, and every one that is still to write has its id at or above it: so
# nothing can come to stand before what was read. The snapshot is the one that this statement reads by.
_READ_FEED: Final = text(
    """
    SELECT CAST(CAST(e.txid AS text) AS numeric) AS txid, e.sequence, e.id, e.type, e.created_at,
           CASE WHEN e.payin_id IS NULL OR :with_payins THEN e.body END AS body
      FROM events e
     WHERE e.shop_id = :shop_id
       AND (e.txid, e.sequence, e.id)
           > (CAST(CAST(:txid AS text) AS xid8), CAST(:sequence AS int), CAST(:event_id AS uuid))
       AND e.txid < pg_snapshot_xmin(pg_current_snapshot())
     ORDER BY e.txid, e.sequence, e.id LIMIT :rows_max
    """
)

_IS_PAST: Final = text("SELECT CAST(CAST(:txid AS text) AS xid8) < pg_snapshot_xmin(pg_current_snapshot())")


async def read_feed(
    tx: Tx, shop_id: UUID, *, after: Place, with_payins: bool, rows_max: int
) -> Sequence[FeedEvent] | None:
    """The events of a shop behind a place, oldest first; nothing will ever come to stand between them.

    It ends before the oldest transaction of the server that still writes. Along the `sequence` of a payout or a payin the
    order is that of `sequence`. None: no feed of this server has come to that place yet.
    """
    await tx.execute(_BY_INDEX)
    rows = await tx.execute(
        _READ_FEED,
        {
            "shop_id": shop_id,
            "txid": str(after.txid),
            "sequence": after.sequence,
            "event_id": after.event_id,
            "with_payins": with_payins,
            "rows_max": rows_max,
        },
    )
    events = [FeedEvent(Place(int(row.txid), row.sequence, row.id), row.type, row.created_at, row.body) for row in rows]
    if not events and not await tx.scalar(_IS_PAST, {"txid": str(after.txid)}):
        return None
    return events
