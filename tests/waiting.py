"""Callbacks that wait, in any number: written behind the schema's back, where thousands of payouts would have to end first."""

from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text

from common.db.engine import Tx
from common.db.lanes import Room
from tests.conftest import Server
from tests.factories import Merchant, fetch
from tests.flows import Desk, broken_rules, forge

# Every lane gets as many, the first of them due first. Bare: only what is due of them, which is all that a claim looks for.
_WAITING: Final = """
    WITH origins AS (
      SELECT unnest(ARRAY[{origins}]::text[]) AS origin),
    fresh AS MATERIALIZED (
      SELECT gen_random_uuid() AS id, origin, n FROM origins CROSS JOIN generate_series(1, {count}) n),
    shares AS (
      INSERT INTO callback_shares (merchant_id) VALUES ('{merchant_id}') ON CONFLICT DO NOTHING),
    lanes AS (
      INSERT INTO callback_lanes (id, shop_id, merchant_id, origin, cap, latency_ms, ready_at)
      SELECT callback_lane_id('{shop_id}', origin), '{shop_id}', '{merchant_id}', origin, {cap}, {latency_ms},
             CASE WHEN {in_lane} THEN now() - interval '{overdue_seconds} s' ELSE 'infinity' END FROM origins
          ON CONFLICT DO NOTHING),
    told AS (
      INSERT INTO events (id, shop_id, payout_id, sequence, type, body)
      SELECT id, '{shop_id}', id, 2, 'payout.success', '{{}}' FROM fresh WHERE NOT {bare}),
    called AS (
      INSERT INTO callbacks (event_id, shop_id, payout_id, url)
      SELECT id, '{shop_id}', id, origin || '/told' FROM fresh WHERE NOT {bare})
    INSERT INTO callback_due (event_id, shop_id, lane_id, in_lane, step, due_at)
    SELECT id, '{shop_id}', callback_lane_id('{shop_id}', origin), {in_lane}, {step},
           now() - interval '{overdue_seconds} s' + n * interval '1 ms' FROM fresh
"""
_LANE_RULES: Final = frozenset({"due_callback_has_its_lane", "lane_counts_its_leases", "lane_comes_to_its_turn"})
_DUE_RULES: Final = frozenset({"due_callback_is_pending", "pending_callback_is_due"})


async def add_waiting(
    server: Server,
    url: str,
    merchant: Merchant,
    origins: Sequence[str],
    count: int = 1,
    *,
    in_lane: bool = True,
    bare: bool = False,
    step: int = 0,
    cap: int = 8,
    latency_ms: int | None = 5,
    overdue_seconds: float = 60,
) -> None:
    """So many callbacks to each of some origins, due for a while; `latency_ms` None: lanes that nobody knows."""
    statement = _WAITING.format(
        origins=", ".join(f"'{origin}'" for origin in origins),
        count=count,
        merchant_id=merchant.shop.merchant_id,
        shop_id=merchant.shop.id,
        cap=cap,
        latency_ms="NULL::int" if latency_ms is None else latency_ms,
        in_lane=in_lane,
        bare=bare,
        step=step,
        overdue_seconds=overdue_seconds,
    )
    await forge(server, url, statement)


def room(
    total: int = 128,
    *,
    retries: int | None = None,
    slow: int | None = None,
    lane: int | None = None,
    busy_merchants: Mapping[UUID, int] | None = None,
) -> Room:
    """Room for so many callbacks of any kind, unless said otherwise."""
    most = [total if each is None else each for each in (retries, slow, lane)]
    return Room(total=total, retries=most[0], slow=most[1], lane=most[2], busy={}, busy_merchants=busy_merchants or {})


async def assert_lanes_sound(working: Desk, *, bare: bool = False) -> None:
    """Every rule about lanes and what is due holds; the others know nothing of callbacks that no payout has led to."""
    rules = _LANE_RULES if bare else _LANE_RULES | _DUE_RULES
    assert {name: found for name, found in (await broken_rules(working.owner)).items() if name in rules} == {}


async def lane_of(working: Desk, merchant: Merchant, origin: str | None = None) -> Any:
    """A lane of a merchant: the only one, or the one to an origin."""
    (lane,) = await fetch(
        working.owner,
        "SELECT *, (SELECT count(*) FROM callback_due d WHERE d.lane_id = l.id AND d.lease_token IS NOT NULL) AS leases"
        " FROM callback_lanes l WHERE shop_id = :shop AND (CAST(:origin AS text) IS NULL OR origin = :origin)",
        shop=merchant.shop.id,
        origin=origin,
    )
    return lane


async def rows_read(tx: Tx, *tables: str) -> dict[str, int]:
    """How many rows this transaction has read of each of these tables, by whatever way."""
    reads = await tx.execute(
        text(
            "SELECT relname, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) AS n FROM pg_stat_xact_user_tables"
            " WHERE relname = ANY (CAST(:tables AS text[]))"
        ),
        {"tables": list(tables)},
    )
    return {row.relname: row.n for row in reads}
