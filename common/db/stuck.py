"""What is older than it should be, whatever keeps it: found by index, so many of each kind, the oldest first."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import TextClause, text

from common.db.engine import Tx

# Groups are counted to a bound: a rail that is off may have millions waiting.
COUNTED_MAX: Final = 1_000
# Of what is unfinished, so many of the oldest are looked at where no index tells the state.
LOOKS_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Stuck:
    """Something that does not go on. `reason` is one of those that the statements below give, and says what to do.

    `subject`: an id, or the name of a rail; `count`: of a group, how many, at most `COUNTED_MAX`.
    """

    reason: str
    subject: str | UUID
    shop: str | None
    since: datetime
    count: int | None
    note: str | None


@dataclass(frozen=True, slots=True)
class TooOld:
    """How old is too old, in seconds: what is due, and what is in doubt or waits for somebody else's word."""

    overdue_seconds: float
    doubt_seconds: float


_OVERDUE: Final = "now() - make_interval(secs => CAST(:overdue_seconds AS float8))"
_IN_DOUBT: Final = "now() - make_interval(secs => CAST(:doubt_seconds AS float8))"
# One probe a row, whatever the planner guesses of tables that nobody has analysed.
_SHOP_OF: Final = """
       LEFT JOIN LATERAL (SELECT m.code || '/' || s.code AS code, s.status FROM shops s JOIN merchants m ON m.id = s.merchant_id
                           WHERE s.id = {shop_id} LIMIT 1) shop ON true"""

# A row for each rail and shop: the first of each is its oldest. What is unfinished of a frozen shop waits for people.
_PAYOUTS_OVERDUE: Final = f"""
    WITH RECURSIVE places AS (
      (SELECT rail, shop_id FROM payout_due ORDER BY rail, shop_id LIMIT 1)
      UNION ALL
      SELECT next.rail, next.shop_id FROM places CROSS JOIN LATERAL (
        SELECT d.rail, d.shop_id FROM payout_due d WHERE (d.rail, d.shop_id) > (places.rail, places.shop_id)
         ORDER BY d.rail, d.shop_id LIMIT 1) next)
    SELECT CASE WHEN shop.status <> 'active' THEN 'shop_frozen' WHEN r.name IS NULL THEN 'rail_gone'
                WHEN r.status = 'off' THEN 'rail_off'
                WHEN oldest.lease_token IS NOT NULL THEN 'payout_lease_lapsed' ELSE 'payouts_not_taken' END AS reason,
           places.rail AS subject, shop.code AS shop, least(oldest.due_at, now()) AS since,
           (SELECT count(*) FROM (
              SELECT 1 FROM payout_due d
               WHERE d.rail = places.rail AND d.shop_id = places.shop_id
                 AND (d.due_at <= {_OVERDUE} OR shop.status <> 'active')
               LIMIT {COUNTED_MAX}) c) AS count,
           NULL AS note
      FROM places
     CROSS JOIN LATERAL (
       SELECT d.due_at, d.lease_token FROM payout_due d WHERE d.rail = places.rail AND d.shop_id = places.shop_id
        ORDER BY d.due_at LIMIT 1) oldest
      LEFT JOIN rails r ON r.name = places.rail {_SHOP_OF.format(shop_id="places.shop_id")}
     WHERE oldest.due_at <= {_OVERDUE} OR shop.status <> 'active'
     ORDER BY oldest.due_at LIMIT CAST(:rows_max AS int)
"""

_PAYOUTS_VERIFYING: Final = f"""
    SELECT 'payout_verifying' AS reason, d.payout_id AS subject, shop.code AS shop, d.verifying_since AS since,
           CAST(NULL AS int) AS count, d.rail AS note
      FROM (SELECT * FROM payout_due WHERE verifying_since <= {_IN_DOUBT} ORDER BY verifying_since
             LIMIT CAST(:rows_max AS int)) d {_SHOP_OF.format(shop_id="d.shop_id")}
     ORDER BY d.verifying_since
"""

# Ids begin with the time: the oldest unfinished ones come first.
_PAYOUTS_WITHOUT_WORD: Final = f"""
    SELECT 'payout_without_word' AS reason, d.payout_id AS subject, shop.code AS shop, p.updated_at AS since,
           CAST(NULL AS int) AS count, d.rail AS note
      FROM (SELECT * FROM payout_due WHERE payout_id < CAST(:doubt_id AS uuid) ORDER BY payout_id LIMIT {LOOKS_MAX}) d
     CROSS JOIN LATERAL (
       SELECT updated_at FROM payouts WHERE id = d.payout_id AND shop_id = d.shop_id AND state IN ('sending', 'submitted')
          AND updated_at <= {_IN_DOUBT} LIMIT 1) p {_SHOP_OF.format(shop_id="d.shop_id")}
     ORDER BY d.payout_id LIMIT CAST(:rows_max AS int)
"""

_PAYINS_OVERDUE: Final = f"""
    WITH RECURSIVE named AS (
      (SELECT rail FROM payin_due ORDER BY rail LIMIT 1)
      UNION ALL
      SELECT next.rail FROM named CROSS JOIN LATERAL (
        SELECT d.rail FROM payin_due d WHERE d.rail > named.rail ORDER BY d.rail LIMIT 1) next)
    SELECT CASE WHEN r.status = 'off' THEN 'rail_off_for_payins' ELSE 'payins_not_asked' END AS reason, named.rail AS subject,
           NULL AS shop, oldest.due_at AS since,
           (SELECT count(*) FROM (
              SELECT 1 FROM payin_due d WHERE d.rail = named.rail AND d.due_at <= {_OVERDUE} LIMIT {COUNTED_MAX}) c) AS count,
           NULL AS note
      FROM named
     CROSS JOIN LATERAL (SELECT d.due_at FROM payin_due d WHERE d.rail = named.rail ORDER BY d.due_at LIMIT 1) oldest
      LEFT JOIN rails r ON r.name = named.rail
     WHERE oldest.due_at <= {_OVERDUE}
     ORDER BY oldest.due_at LIMIT CAST(:rows_max AS int)
"""

_PAYINS_UNDECIDED: Final = f"""
    SELECT 'payin_undecided' AS reason, d.payin_id AS subject, shop.code AS shop, p.expires_at AS since,
           CAST(NULL AS int) AS count, d.rail AS note
      FROM (SELECT * FROM payin_due WHERE payin_id < CAST(:doubt_id AS uuid) ORDER BY payin_id LIMIT {LOOKS_MAX}) d
     CROSS JOIN LATERAL (
       SELECT expires_at FROM payins WHERE id = d.payin_id AND shop_id = d.shop_id AND expires_at <= {_IN_DOUBT} LIMIT 1) p
       {_SHOP_OF.format(shop_id="d.shop_id")}
     ORDER BY d.payin_id LIMIT CAST(:rows_max AS int)
"""

# What was heard and cannot be applied is put off again and again: how long is told by when it came.
_RAIL_EVENTS_WAITING: Final = f"""
    SELECT 'rail_event_not_applied' AS reason, e.event_id AS subject, NULL AS shop, e.received_at AS since,
           CAST(NULL AS int) AS count, e.rail || ': ' || e.outcome || ' ' || e.reference AS note
      FROM (SELECT * FROM rail_events WHERE applied_at IS NULL ORDER BY due_at LIMIT {LOOKS_MAX}) e
     WHERE e.received_at <= {_OVERDUE} AND e.due_at <= now() + make_interval(secs => CAST(:doubt_seconds AS float8))
     ORDER BY e.received_at LIMIT CAST(:rows_max AS int)
"""

_LANES_NOT_TAKEN: Final = f"""
    SELECT 'callbacks_not_taken' AS reason, l.id AS subject, shop.code AS shop, l.ready_at AS since,
           CAST(NULL AS int) AS count, l.origin AS note
      FROM (SELECT * FROM callback_lanes WHERE ready_at <= {_OVERDUE} ORDER BY ready_at LIMIT CAST(:rows_max AS int)) l
      {_SHOP_OF.format(shop_id="l.shop_id")}
     ORDER BY l.ready_at
"""

_LANES_NOT_WOKEN: Final = f"""
    WITH RECURSIVE fresh AS (
      (SELECT lane_id, due_at FROM callback_due WHERE lease_token IS NULL AND NOT in_lane ORDER BY lane_id, due_at LIMIT 1)
      UNION ALL
      SELECT next.lane_id, next.due_at FROM fresh CROSS JOIN LATERAL (
        SELECT d.lane_id, d.due_at FROM callback_due d
         WHERE d.lease_token IS NULL AND NOT d.in_lane AND d.lane_id > fresh.lane_id
         ORDER BY d.lane_id, d.due_at LIMIT 1) next)
    SELECT 'callbacks_not_taken' AS reason, l.id AS subject, shop.code AS shop, fresh.due_at AS since,
           CAST(NULL AS int) AS count, l.origin AS note
      FROM fresh
     CROSS JOIN LATERAL (
       SELECT * FROM callback_lanes WHERE id = fresh.lane_id AND held_at IS NULL AND in_flight < cap AND blocked_until <= now()
          AND ready_at > {_OVERDUE} LIMIT 1) l {_SHOP_OF.format(shop_id="l.shop_id")}
     WHERE fresh.due_at <= {_OVERDUE}
     ORDER BY fresh.due_at LIMIT CAST(:rows_max AS int)
"""

_CALLBACK_LEASES_LAPSED: Final = f"""
    SELECT 'callback_lease_lapsed' AS reason, d.event_id AS subject, shop.code AS shop, d.due_at AS since,
           CAST(NULL AS int) AS count, NULL AS note
      FROM (SELECT * FROM callback_due WHERE lease_token IS NOT NULL AND due_at <= {_OVERDUE} ORDER BY due_at
             LIMIT CAST(:rows_max AS int)) d {_SHOP_OF.format(shop_id="d.shop_id")}
     ORDER BY d.due_at
"""

_CALLBACKS_PUT_ASIDE: Final = f"""
    SELECT 'callback_put_aside' AS reason, d.event_id AS subject, shop.code AS shop, c.created_at AS since,
           CAST(NULL AS int) AS count, d.lost_leases || ' workers fell silent over it' AS note
      FROM (SELECT * FROM callback_due WHERE due_at = 'infinity' ORDER BY event_id LIMIT CAST(:rows_max AS int)) d
     CROSS JOIN LATERAL (
       SELECT created_at FROM callbacks WHERE event_id = d.event_id AND shop_id = d.shop_id LIMIT 1) c
      {_SHOP_OF.format(shop_id="d.shop_id")}
     ORDER BY d.event_id
"""

_LANES_HELD: Final = f"""
    SELECT 'lane_held' AS reason, l.id AS subject, shop.code AS shop, l.held_at AS since, CAST(NULL AS int) AS count,
           l.origin || ': ' || l.held_reason AS note
      FROM (SELECT * FROM callback_lanes WHERE held_at IS NOT NULL ORDER BY held_at LIMIT CAST(:rows_max AS int)) l
      {_SHOP_OF.format(shop_id="l.shop_id")}
     ORDER BY l.held_at
"""

_DISCREPANCIES_OPEN: Final = f"""
    SELECT 'discrepancy_open' AS reason, d.id AS subject, shop.code AS shop, d.opened_at AS since,
           CAST(NULL AS int) AS count, concat_ws(' ', d.rail || ' says', d.word, 'of', d.reference, d.state) AS note
      FROM discrepancies d {_SHOP_OF.format(shop_id="d.shop_id")}
     WHERE d.closed_at IS NULL ORDER BY d.opened_at LIMIT CAST(:rows_max AS int)
"""

_RESOLUTIONS_OPEN: Final = f"""
    SELECT 'resolution_open' AS reason, r.payout_id AS subject, shop.code AS shop, r.opened_at AS since,
           CAST(NULL AS int) AS count, a.actor || ' says ' || r.outcome AS note
      FROM resolutions r JOIN audit a ON a.id = r.opened_by {_SHOP_OF.format(shop_id="r.shop_id")}
     WHERE r.closed_at IS NULL ORDER BY r.opened_at LIMIT CAST(:rows_max AS int)
"""

# In the order in which they are told: money first.
_KINDS: Final[tuple[TextClause, ...]] = tuple(
    map(
        text,
        (
            _PAYOUTS_OVERDUE,
            _PAYOUTS_VERIFYING,
            _PAYOUTS_WITHOUT_WORD,
            _DISCREPANCIES_OPEN,
            _RESOLUTIONS_OPEN,
            _RAIL_EVENTS_WAITING,
            _PAYINS_OVERDUE,
            _PAYINS_UNDECIDED,
            _CALLBACK_LEASES_LAPSED,
            _CALLBACKS_PUT_ASIDE,
            _LANES_NOT_TAKEN,
            _LANES_NOT_WOKEN,
            _LANES_HELD,
        ),
    )
)


async def find_stuck(tx: Tx, limits: TooOld, *, now: float, rows_max: int) -> Sequence[Stuck]:
    """What does not go on, at most `rows_max` of each kind. `now` is Unix seconds, for ids that tell when they were made."""
    values = {
        "overdue_seconds": limits.overdue_seconds,
        "doubt_seconds": limits.doubt_seconds,
        "doubt_id": UUID(int=max(0, int((now - limits.doubt_seconds) * 1000)) << 80),
        "rows_max": rows_max,
    }
    found: list[Stuck] = []
    for kind in _KINDS:
        wanted = {name: values[name] for name in kind.compile().params}
        found += [Stuck(**row._mapping) for row in await tx.execute(kind, wanted)]
    return found
