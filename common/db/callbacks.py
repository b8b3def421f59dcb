"""Events worth telling, the callbacks that tell them, and the log of every attempt."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import text

from common.db.engine import Tx, arrays_of


@dataclass(frozen=True, slots=True)
class Event:
    """A change of status of a payout or a payin, as the bytes that will be told. `url` None: nobody asked to be called."""

    id: UUID
    shop_id: UUID
    payout_id: UUID | None
    sequence: int
    type: str
    body: bytes
    url: str | None
    payin_id: UUID | None = None


def ids_to_tell(events: Collection[Event]) -> list[tuple[UUID, UUID]]:
    """Event and shop of those that somebody is to be called about."""
    return [(event.id, event.shop_id) for event in events if event.url is not None]


_APPEND_EVENTS = text(
    """
    WITH fresh AS (
      SELECT * FROM unnest(CAST(:id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:payout_id AS uuid[]),
                           CAST(:sequence AS int[]), CAST(:type AS text[]), CAST(:body AS bytea[]), CAST(:url AS text[]),
                           CAST(:payin_id AS uuid[]))
        AS e (id, shop_id, payout_id, sequence, type, body, url, payin_id)),
    told AS (
      INSERT INTO callbacks (event_id, shop_id, payout_id, payin_id, url)
      SELECT id, shop_id, payout_id, payin_id, url FROM fresh WHERE url IS NOT NULL),
    due AS (
      INSERT INTO callback_due (event_id, shop_id) SELECT id, shop_id FROM fresh WHERE url IS NOT NULL)
    INSERT INTO events (id, shop_id, payout_id, payin_id, sequence, type, body)
    SELECT id, shop_id, payout_id, payin_id, sequence, type, body FROM fresh
    """
)

# By time; or by the ids that somebody told us of, one probe for each.
_PICKED_DUE = """
      SELECT d.event_id, d.shop_id FROM callback_due d
       WHERE d.due_at <= now() - make_interval(secs => CAST(:overdue_seconds AS float8))
       ORDER BY d.due_at LIMIT CAST(:claim_max AS int) FOR UPDATE SKIP LOCKED"""
_PICKED_IDS = """
      SELECT d.event_id, d.shop_id FROM (SELECT DISTINCT unnest(CAST(:ids AS uuid[])) AS id ORDER BY 1) w
       CROSS JOIN LATERAL (
         SELECT event_id, shop_id FROM callback_due
          WHERE event_id = w.id AND due_at + interval '0' <= now() LIMIT 1 FOR UPDATE SKIP LOCKED) d
       LIMIT CAST(:claim_max AS int)"""

_CLAIM_CALLBACKS, _CLAIM_CALLBACK_IDS = (
    text(
        f"""
        WITH picked AS ({picked}),
        leased AS (
          UPDATE callback_due d
             SET lease_token = CAST(:token AS uuid), attempts_made = d.attempts_made + 1,
                 due_at = now() + make_interval(secs => CAST(:lease_seconds AS float8))
            FROM picked WHERE d.event_id = picked.event_id AND d.shop_id = picked.shop_id
          RETURNING d.event_id, d.shop_id, d.step, d.attempts_made)
        SELECT l.event_id, l.shop_id, l.step, l.attempts_made AS attempt_no, c.url, e.body, s.webhook_secret_sealed,
               s.callback_http, s.callback_ports
          FROM leased l
          JOIN callbacks c ON c.event_id = l.event_id AND c.shop_id = l.shop_id
          JOIN events e ON e.id = l.event_id AND e.shop_id = l.shop_id
          JOIN shops s ON s.id = l.shop_id
        """
    )
    for picked in (_PICKED_DUE, _PICKED_IDS)
)

_LOCK_CALLBACK_DUE = text(
    """
    SELECT d.event_id, d.lease_token FROM unnest(CAST(:ids AS uuid[])) AS w (id)
      JOIN callback_due d ON d.event_id = w.id ORDER BY d.event_id FOR UPDATE OF d
    """
)

# The same attempt comes for the second time when COMMIT's answer was lost, which is found out within the hour; its due row's
# lock keeps the two apart. Only the weeks of that hour are looked at.
_APPEND_ATTEMPTS = text(
    """
    INSERT INTO callback_attempts (event_id, shop_id, attempt_no, started_at, duration_ms, http_status, error,
                                   response_excerpt, address, late, dns_ms, connect_ms, first_byte_ms, reused,
                                   retry_after_seconds)
    SELECT a.event_id, a.shop_id, a.attempt_no, now() - make_interval(secs => a.age_seconds), a.duration_ms, a.http_status,
           a.error, a.response_excerpt, CAST(a.address AS inet), a.late, a.dns_ms, a.connect_ms, a.first_byte_ms, a.reused,
           a.retry_after_seconds
      FROM unnest(CAST(:event_id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:attempt_no AS int[]),
                  CAST(:age_seconds AS float8[]), CAST(:duration_ms AS int[]), CAST(:http_status AS int[]),
                  CAST(:error AS text[]), CAST(:response_excerpt AS bytea[]), CAST(:address AS text[]),
                  CAST(:late AS boolean[]), CAST(:dns_ms AS int[]), CAST(:connect_ms AS int[]),
                  CAST(:first_byte_ms AS int[]), CAST(:reused AS boolean[]), CAST(:retry_after_seconds AS int[]))
        AS a (event_id, shop_id, attempt_no, age_seconds, duration_ms, http_status, error, response_excerpt, address,
              late, dns_ms, connect_ms, first_byte_ms, reused, retry_after_seconds)
      LEFT JOIN LATERAL (
        SELECT true AS logged FROM callback_attempts t
         WHERE t.event_id = a.event_id AND t.shop_id = a.shop_id AND t.attempt_no = a.attempt_no
           AND t.started_at > now() - interval '1 hour' AND t.started_at <= now() LIMIT 1) before ON true
     WHERE before.logged IS NULL
    """
)

_FINISH_CALLBACKS = text(
    """
    WITH finished AS (
      SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:states AS text[])) AS f (event_id, state)),
    done AS (
      DELETE FROM callback_due d USING finished f WHERE d.event_id = f.event_id)
    UPDATE callbacks c SET state = f.state, finished_at = now() FROM finished f WHERE c.event_id = f.event_id
    """
)

_RESCHEDULE_CALLBACKS = text(
    """
    UPDATE callback_due d
       SET lease_token = NULL, step = r.step, due_at = now() + make_interval(secs => r.delay_seconds)
      FROM unnest(CAST(:ids AS uuid[]), CAST(:steps AS int[]), CAST(:delays AS float8[])) AS r (event_id, step, delay_seconds)
     WHERE d.event_id = r.event_id
    """
)


async def append_events(tx: Tx, events: Sequence[Event]) -> None:
    """Store events, and the callback of each that has somebody to call, due now."""
    if events:
        await tx.execute(_APPEND_EVENTS, arrays_of(events, Event))


@dataclass(frozen=True, slots=True)
class ClaimedCallback:
    """A callback under our lease: what to send, where, and as which attempt. `step` counts scheduled attempts from 0.

    `callback_http` and `callback_ports` are the shop's exceptions from where callbacks may go.
    """

    event_id: UUID
    shop_id: UUID
    step: int
    attempt_no: int
    url: str
    body: bytes
    webhook_secret_sealed: bytes
    callback_http: bool = False
    callback_ports: list[int] | None = None


async def claim_callbacks(
    tx: Tx,
    *,
    token: UUID,
    lease_seconds: float,
    claim_max: int,
    event_ids: Sequence[UUID] | None = None,
    overdue_seconds: float = 0.0,
) -> list[ClaimedCallback]:
    """Take callbacks that are due under a lease: those of these events, else those that are due longest; others' are skipped.

    `overdue_seconds`: how long past due the latter must be; messages have the first go.
    Locks: the due rows taken.
    """
    lease = {"token": token, "lease_seconds": lease_seconds, "claim_max": claim_max}
    if event_ids is None:
        rows = await tx.execute(_CLAIM_CALLBACKS, {**lease, "overdue_seconds": overdue_seconds})
    else:
        rows = await tx.execute(_CLAIM_CALLBACK_IDS, {**lease, "ids": list(event_ids)})
    return [ClaimedCallback(**row._mapping) for row in rows]


async def lock_callback_due(tx: Tx, event_ids: Sequence[UUID]) -> dict[UUID, UUID | None]:
    """Lock callbacks' due rows until the transaction ends; the lease token of each that still exists.

    Locks: due rows in event id order.
    """
    rows = await tx.execute(_LOCK_CALLBACK_DUE, {"ids": list(event_ids)})
    return {row.event_id: row.lease_token for row in rows}


@dataclass(frozen=True, slots=True)
class CallbackAttempt:
    """One HTTP exchange as it is logged. `late`: its lease had passed to somebody else. Phases are as in `Attempt`."""

    event_id: UUID
    shop_id: UUID
    attempt_no: int
    age_seconds: float
    duration_ms: int
    http_status: int | None
    error: str | None
    response_excerpt: bytes
    address: str | None
    late: bool
    dns_ms: int | None
    connect_ms: int | None
    first_byte_ms: int | None
    reused: bool
    retry_after_seconds: int | None


async def append_callback_attempts(tx: Tx, attempts: Sequence[CallbackAttempt]) -> None:
    """Log attempts, under the locks of their due rows. Repeat: within an hour the same attempt is logged once."""
    if attempts:
        await tx.execute(_APPEND_ATTEMPTS, arrays_of(attempts, CallbackAttempt))


async def finish_callbacks(tx: Tx, states: dict[UUID, str]) -> None:
    """Callbacks that are delivered, exhausted or rejected: nothing is due any more."""
    if states:
        await tx.execute(_FINISH_CALLBACKS, {"ids": list(states), "states": list(states.values())})


async def reschedule_callbacks(tx: Tx, steps: dict[UUID, tuple[int, float]]) -> None:
    """Give callbacks back: the next step of each and the seconds until it is due."""
    if steps:
        await tx.execute(
            _RESCHEDULE_CALLBACKS,
            {
                "ids": list(steps),
                "steps": [step for step, _ in steps.values()],
                "delays": [delay for _, delay in steps.values()],
            },
        )


@dataclass(frozen=True, slots=True)
class ListedCallback:
    """A callback as operators see it."""

    event_id: UUID
    payout_id: UUID | None
    payin_id: UUID | None
    type: str
    url: str
    state: str
    attempts: int
    last_status: int | None
    last_error: str | None
    due_at: datetime | None
    created_at: datetime


_LIST_CALLBACKS = text(
    """
    SELECT c.event_id, c.payout_id, c.payin_id, e.type, c.url, c.state, coalesce(made.n, 0) AS attempts,
           latest.http_status AS last_status, latest.error AS last_error, d.due_at, c.created_at
      FROM callbacks c
      JOIN events e ON e.id = c.event_id AND e.shop_id = c.shop_id
      LEFT JOIN callback_due d ON d.event_id = c.event_id AND d.shop_id = c.shop_id
      LEFT JOIN LATERAL (SELECT count(*)::int AS n FROM callback_attempts a
                          WHERE a.event_id = c.event_id AND a.shop_id = c.shop_id
                            AND a.started_at >= c.created_at) made ON true
      LEFT JOIN LATERAL (SELECT a.http_status, a.error FROM callback_attempts a
                          WHERE a.event_id = c.event_id AND a.shop_id = c.shop_id AND a.started_at >= c.created_at
                          ORDER BY a.attempt_no DESC LIMIT 1) latest ON true
     WHERE (CAST(:payout_id AS uuid) IS NULL OR c.payout_id = :payout_id)
       AND (CAST(:state AS text) IS NULL OR c.state = :state)
     ORDER BY c.event_id DESC LIMIT :rows_max
    """
)

_RESEND_CALLBACK = text(
    """
    WITH again AS (
      UPDATE callbacks SET state = 'pending', finished_at = NULL
       WHERE event_id = :event_id AND NOT EXISTS (
         SELECT 1 FROM callback_due d WHERE d.event_id = callbacks.event_id AND d.lease_token IS NOT NULL AND d.due_at > now())
      RETURNING event_id, shop_id, created_at)
    INSERT INTO callback_due (event_id, shop_id, attempts_made)
    SELECT again.event_id, again.shop_id,
           (SELECT coalesce(max(a.attempt_no), 0) FROM callback_attempts a
             WHERE a.event_id = again.event_id AND a.shop_id = again.shop_id AND a.started_at >= again.created_at)
      FROM again
        ON CONFLICT (event_id, shop_id) DO UPDATE SET due_at = now()
           WHERE callback_due.lease_token IS NULL OR callback_due.due_at <= now()
    RETURNING event_id
    """
)


async def list_callbacks(
    tx: Tx, *, payout_id: UUID | None = None, state: str | None = None, rows_max: int = 50
) -> list[ListedCallback]:
    """Callbacks, newest first, of one payout or in one state when asked."""
    rows = await tx.execute(_LIST_CALLBACKS, {"payout_id": payout_id, "state": state, "rows_max": rows_max})
    return [ListedCallback(**row._mapping) for row in rows]


async def resend_callback(tx: Tx, event_id: UUID) -> bool:
    """Make a callback due now, whatever became of it. False: no such callback, or an attempt is under way."""
    return await tx.scalar(_RESEND_CALLBACK, {"event_id": event_id}) is not None
