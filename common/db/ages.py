"""What scaling and alarms look at: how long the oldest work has been waiting, and how the server of the database stands."""

from dataclasses import dataclass

from sqlalchemy import text

from common.db.engine import Tx


@dataclass(frozen=True, slots=True)
class Ages:
    """Seconds past due of the oldest payout and callback that nobody has taken; 0 when none is overdue."""

    payout_seconds: float
    callback_seconds: float


# Of callbacks: what no lane knows of yet, what a worker that is gone has taken, and lanes whose turn has come; what waits in a
# lane that rests, is full or is held waits for its receiver, not for a worker.
# The first row of each (rail, shop) is its oldest: the same loose scan as a claim makes.
_AGES = text(
    """
    WITH RECURSIVE lanes AS (
      (SELECT rail, shop_id FROM payout_due ORDER BY rail, shop_id LIMIT 1)
      UNION ALL
      SELECT next.rail, next.shop_id FROM lanes CROSS JOIN LATERAL (
        SELECT d.rail, d.shop_id FROM payout_due d WHERE (d.rail, d.shop_id) > (lanes.rail, lanes.shop_id)
         ORDER BY d.rail, d.shop_id LIMIT 1) next),
    fresh AS (
      (SELECT lane_id, due_at FROM callback_due WHERE lease_token IS NULL AND NOT in_lane ORDER BY lane_id, due_at LIMIT 1)
      UNION ALL
      SELECT next.lane_id, next.due_at FROM fresh CROSS JOIN LATERAL (
        SELECT d.lane_id, d.due_at FROM callback_due d
         WHERE d.lease_token IS NULL AND NOT d.in_lane AND d.lane_id > fresh.lane_id
         ORDER BY d.lane_id, d.due_at LIMIT 1) next)
    SELECT coalesce(greatest(extract(epoch FROM now() - (
             SELECT min(oldest.due_at) FROM lanes CROSS JOIN LATERAL (
               SELECT d.due_at FROM payout_due d WHERE d.rail = lanes.rail AND d.shop_id = lanes.shop_id
                ORDER BY d.due_at LIMIT 1) oldest)), 0), 0)::float8 AS payout_seconds,
           coalesce(greatest(extract(epoch FROM now() - least(
             (SELECT min(fresh.due_at) FROM fresh
               CROSS JOIN LATERAL (SELECT * FROM callback_lanes WHERE id = fresh.lane_id LIMIT 1) l
               WHERE l.held_at IS NULL AND l.in_flight < l.cap AND l.blocked_until <= now()),
             (SELECT due_at FROM callback_due WHERE lease_token IS NOT NULL ORDER BY due_at LIMIT 1),
             (SELECT ready_at FROM callback_lanes ORDER BY ready_at LIMIT 1))), 0), 0)::float8 AS callback_seconds
    """
)


async def find_ages(tx: Tx) -> Ages:
    """The ages now, in seconds."""
    row = (await tx.execute(_AGES)).one()
    return Ages(row.payout_seconds, row.callback_seconds)


@dataclass(frozen=True, slots=True)
class Load:
    """Connections to the server, how many it takes, and the id of the oldest transaction that writes; None when none does."""

    connections: int
    connections_max: int
    oldest_transaction: int | None


# When it began only its own login may see; its id, which holds back the feed and vacuum, everybody may.
# Source: PostgreSQL, "Transaction ID and Snapshot Information Functions".
_LOAD = text(
    """
    SELECT (SELECT sum(numbackends) FROM pg_stat_database)::int AS connections,
           current_setting('max_connections')::int AS connections_max,
           CASE WHEN pg_snapshot_xmin(s.now) < pg_snapshot_xmax(s.now)
                THEN CAST(CAST(pg_snapshot_xmin(s.now) AS text) AS bigint) END AS oldest_transaction
      FROM (SELECT pg_current_snapshot() AS now) s
    """
)


async def find_load(tx: Tx) -> Load:
    """How the server stands now."""
    row = (await tx.execute(_LOAD)).one()
    return Load(row.connections, row.connections_max, row.oldest_transaction)
