"""What became of the callbacks of one payout or payin, as its merchant may see it: never which address was called."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import TextClause, text

from common.db.engine import Tx

EXCERPT_BYTES_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class Delivery:
    """One HTTP exchange of a callback. `late`: its lease had passed to somebody else.

    `response_excerpt` has at most `EXCERPT_BYTES_MAX`.
    """

    attempt_no: int
    started_at: datetime
    duration_ms: int
    http_status: int | None
    error: str | None
    response_excerpt: bytes | None
    late: bool


@dataclass(frozen=True, slots=True)
class ToldCallback:
    """A callback and its newest deliveries, oldest first. `next_attempt_at` None: it has ended, or is being sent right now.

    `called_lately`: within the last second.
    """

    event_id: UUID
    type: str
    sequence: int
    url: str
    state: str
    created_at: datetime
    finished_at: datetime | None
    next_attempt_at: datetime | None
    called_lately: bool
    deliveries: Sequence[Delivery]


# From the events, whose indexes on payout and payin have their sequence. What is not distinct cannot be looked up, so that no
# index is gone through for a shop alone, as if planned while there was nothing.
_FIND_CALLBACKS, _FIND_PAYIN_CALLBACKS = (
    text(
        f"""
        SELECT c.event_id, e.type, e.sequence, c.url, c.state, c.created_at, c.finished_at,
               CASE WHEN d.lease_token IS NULL OR d.due_at <= now() THEN nullif(d.due_at, 'infinity') END AS next_attempt_at,
               EXISTS (SELECT 1 FROM callback_attempts a
                        WHERE a.event_id = c.event_id AND a.shop_id = c.shop_id
                          AND a.started_at > now() - interval '1 second') AS called_lately
          FROM events e
         CROSS JOIN LATERAL (
           SELECT event_id, shop_id, url, state, created_at, finished_at FROM callbacks
            WHERE event_id = e.id AND shop_id IS NOT DISTINCT FROM e.shop_id LIMIT 1) c
          LEFT JOIN callback_due d ON d.event_id = c.event_id AND d.shop_id = c.shop_id
         WHERE e.{subject} = :subject_id AND e.shop_id IS NOT DISTINCT FROM :shop_id
         ORDER BY e.sequence
        """
    )
    for subject in ("payout_id", "payin_id")
)

_FIND_DELIVERIES: Final = text(
    """
    SELECT w.id AS event_id, a.attempt_no, a.started_at, a.duration_ms, a.http_status, a.error, a.late,
           substring(a.response_excerpt FROM 1 FOR :excerpt_bytes_max) AS response_excerpt
      FROM unnest(CAST(:ids AS uuid[])) AS w (id)
     CROSS JOIN LATERAL (
       SELECT attempt_no, started_at, duration_ms, http_status, error, response_excerpt, late FROM callback_attempts
        WHERE event_id = w.id AND shop_id = :shop_id ORDER BY attempt_no DESC LIMIT :attempts_max) a
     ORDER BY w.id, a.attempt_no
    """
)


async def find_callbacks(tx: Tx, payout_id: UUID, shop_id: UUID, *, attempts_max: int) -> list[ToldCallback]:
    """The callbacks of a payout, oldest first, each with at most that many of its newest deliveries."""
    return await _find(tx, _FIND_CALLBACKS, payout_id, shop_id, attempts_max)


async def find_payin_callbacks(tx: Tx, payin_id: UUID, shop_id: UUID, *, attempts_max: int) -> list[ToldCallback]:
    """The same of a payin."""
    return await _find(tx, _FIND_PAYIN_CALLBACKS, payin_id, shop_id, attempts_max)


async def _find(
    tx: Tx, statement: TextClause, subject_id: UUID, shop_id: UUID, attempts_max: int
) -> list[ToldCallback]:
    called = (await tx.execute(statement, {"subject_id": subject_id, "shop_id": shop_id})).all()
    deliveries: dict[UUID, list[Delivery]] = {row.event_id: [] for row in called}
    made = await tx.execute(
        _FIND_DELIVERIES,
        {
            "ids": list(deliveries),
            "shop_id": shop_id,
            "attempts_max": attempts_max,
            "excerpt_bytes_max": EXCERPT_BYTES_MAX,
        },
    )
    for row in made:
        values = dict(row._mapping)
        deliveries[values.pop("event_id")].append(Delivery(**values))
    return [ToldCallback(**row._mapping, deliveries=deliveries[row.event_id]) for row in called]
