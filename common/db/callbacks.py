"""Events worth telling, the callbacks that tell them, and the log of every attempt."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias
from uuid import UUID

from sqlalchemy import text

from common.db.engine import Tx, arrays_of
from common.domain.addresses import origin_of

# A callback's event and shop; statements join by both, so that the planner knows that there is one row, whatever it has seen.
CallbackKey: TypeAlias = tuple[UUID, UUID]


@dataclass(frozen=True, slots=True)
class Event:
    """A change of status of a payout or a payin, and the bytes that will be told of it, up to the time when it is stored.

    `url` None: nobody asked to be called.
    """

    id: UUID
    shop_id: UUID
    payout_id: UUID | None
    sequence: int
    type: str
    opening: bytes
    url: str | None
    payin_id: UUID | None = None
    traceparent: str | None = None

    @property
    def origin(self) -> str | None:
        """Where the URL leads: with the shop, the lane that its callback takes."""
        return None if self.url is None else origin_of(self.url)


def ids_to_tell(events: Collection[Event]) -> list[CallbackKey]:
    """Event and shop of those that somebody is to be called about."""
    return [(event.id, event.shop_id) for event in events if event.url is not None]


def traceparents_of(events: Collection[Event]) -> list[str]:
    """The contexts of those that somebody is to be called about and that are traced."""
    return [event.traceparent for event in events if event.url is not None and event.traceparent is not None]


# In the order of their ids, so that two who make the same lanes do not wait for each other.
_LANES_MADE = """
    shares AS (
      INSERT INTO callback_shares (merchant_id)
      SELECT DISTINCT s.merchant_id FROM fresh f JOIN shops s ON s.id = f.shop_id WHERE f.origin IS NOT NULL ORDER BY 1
          ON CONFLICT DO NOTHING),
    lanes AS (
      INSERT INTO callback_lanes (id, shop_id, merchant_id, origin)
      SELECT DISTINCT callback_lane_id(f.shop_id, f.origin), f.shop_id, s.merchant_id, f.origin
        FROM fresh f JOIN shops s ON s.id = f.shop_id WHERE f.origin IS NOT NULL ORDER BY 1
          ON CONFLICT DO NOTHING)"""

_APPEND_EVENTS = text(
    f"""
    WITH fresh AS (
      SELECT * FROM unnest(CAST(:id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:payout_id AS uuid[]),
                           CAST(:sequence AS int[]), CAST(:type AS text[]), CAST(:opening AS bytea[]), CAST(:url AS text[]),
                           CAST(:payin_id AS uuid[]), CAST(:traceparent AS text[]), CAST(:origin AS text[]))
        AS e (id, shop_id, payout_id, sequence, type, opening, url, payin_id, traceparent, origin)),
    {_LANES_MADE},
    told AS (
      INSERT INTO callbacks (event_id, shop_id, payout_id, payin_id, url, traceparent)
      SELECT id, shop_id, payout_id, payin_id, url, traceparent FROM fresh WHERE url IS NOT NULL),
    due AS (
      INSERT INTO callback_due (event_id, shop_id, lane_id)
      SELECT id, shop_id, callback_lane_id(shop_id, origin) FROM fresh WHERE url IS NOT NULL)
    INSERT INTO events (id, shop_id, payout_id, payin_id, sequence, type, body)
    SELECT id, shop_id, payout_id, payin_id, sequence, type, close_event(opening) FROM fresh
    """
)

_LOCK_CALLBACK_DUE = text(
    """
    SELECT d.event_id, d.shop_id, d.lease_token, d.attempts_before
      FROM unnest(CAST(:ids AS uuid[]), CAST(:shop_ids AS uuid[])) AS w (event_id, shop_id)
      JOIN callback_due d ON d.event_id = w.event_id AND d.shop_id = w.shop_id ORDER BY d.event_id FOR UPDATE OF d
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
    RETURNING event_id, attempt_no
    """
)

_FINISH_CALLBACKS = text(
    """
    WITH finished AS (
      SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:shop_ids AS uuid[]), CAST(:states AS text[]))
        AS f (event_id, shop_id, state)),
    done AS (
      DELETE FROM callback_due d USING finished f WHERE d.event_id = f.event_id AND d.shop_id = f.shop_id
      RETURNING d.event_id, d.shop_id, f.state, d.attempts_made)
    UPDATE callbacks c SET state = done.state, finished_at = now(), attempts_made = done.attempts_made
      FROM done WHERE c.event_id = done.event_id AND c.shop_id = done.shop_id
    """
)

_RESCHEDULE_CALLBACKS = text(
    """
    UPDATE callback_due d
       SET lease_token = NULL, in_lane = true, step = r.step, lost_leases = 0,
           resume_at = CASE WHEN r.ours THEN d.resume_at END,
           due_at = greatest(now() + make_interval(secs => r.delay_seconds), CASE WHEN NOT r.ours THEN d.resume_at END)
      FROM unnest(CAST(:ids AS uuid[]), CAST(:shop_ids AS uuid[]), CAST(:steps AS int[]), CAST(:delays AS float8[]),
                  CAST(:ours AS boolean[]))
        AS r (event_id, shop_id, step, delay_seconds, ours)
     WHERE d.event_id = r.event_id AND d.shop_id = r.shop_id
    """
)


async def append_events(tx: Tx, events: Sequence[Event]) -> None:
    """Store events, and the callback of each that has somebody to call, due now; the first one to an origin makes its lane."""
    if events:
        await tx.execute(_APPEND_EVENTS, {**arrays_of(events, Event), "origin": [event.origin for event in events]})


def _arrays(keys: Collection[CallbackKey]) -> dict[str, list[UUID]]:
    return {"ids": [event_id for event_id, _ in keys], "shop_ids": [shop_id for _, shop_id in keys]}


@dataclass(frozen=True, slots=True)
class DueCallback:
    """A callback that is to be sent. `attempts_before` were begun before it ended last; later ones are of this life of it."""

    lease_token: UUID | None
    attempts_before: int


async def lock_callback_due(tx: Tx, keys: Collection[CallbackKey]) -> dict[CallbackKey, DueCallback]:
    """Lock callbacks' due rows, those that still exist, until the transaction ends.

    Locks: due rows in event id order.
    """
    rows = await tx.execute(_LOCK_CALLBACK_DUE, _arrays(keys))
    return {(row.event_id, row.shop_id): DueCallback(row.lease_token, row.attempts_before) for row in rows}


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


async def append_callback_attempts(tx: Tx, attempts: Sequence[CallbackAttempt]) -> set[tuple[UUID, int]]:
    """Log attempts, under the locks of their due rows. Repeat: within an hour the same attempt is logged once.

    Returns: those that were not in the log before, by event and number.
    """
    if not attempts:
        return set()
    rows = await tx.execute(_APPEND_ATTEMPTS, arrays_of(attempts, CallbackAttempt))
    return {(row.event_id, row.attempt_no) for row in rows}


async def finish_callbacks(tx: Tx, states: Mapping[CallbackKey, str]) -> None:
    """Callbacks that are delivered, exhausted or rejected: nothing is due any more."""
    if states:
        await tx.execute(_FINISH_CALLBACKS, {**_arrays(states), "states": list(states.values())})


@dataclass(frozen=True, slots=True)
class Again:
    """The next step of a callback and the seconds until it is due. `ours`: as if the attempt had not been made."""

    step: int
    delay_seconds: float
    ours: bool = False


async def reschedule_callbacks(tx: Tx, again: Mapping[CallbackKey, Again]) -> None:
    """Give callbacks back, to be sent again."""
    if again:
        await tx.execute(
            _RESCHEDULE_CALLBACKS,
            {
                **_arrays(again),
                "steps": [item.step for item in again.values()],
                "delays": [item.delay_seconds for item in again.values()],
                "ours": [item.ours for item in again.values()],
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


_LISTED = """
    SELECT c.event_id, c.payout_id, c.payin_id, e.type, c.url, c.state, coalesce(made.n, 0) AS attempts,
           latest.http_status AS last_status, latest.error AS last_error,
           nullif(d.due_at, 'infinity') AS due_at, c.created_at
      FROM {source}
      JOIN events e ON e.id = c.event_id AND e.shop_id = c.shop_id
      LEFT JOIN LATERAL (SELECT count(*)::int AS n FROM callback_attempts a
                          WHERE a.event_id = c.event_id AND a.shop_id = c.shop_id
                            AND a.started_at >= c.created_at - interval '1 day') made ON true
      LEFT JOIN LATERAL (SELECT a.http_status, a.error FROM callback_attempts a
                          WHERE a.event_id = c.event_id AND a.shop_id = c.shop_id
                            AND a.started_at >= c.created_at - interval '1 day'
                          ORDER BY a.attempt_no DESC LIMIT 1) latest ON true
     WHERE (CAST(:payout_id AS uuid) IS NULL OR c.payout_id = :payout_id)
     {condition}
     ORDER BY {order} DESC LIMIT :rows_max
    """

_LIST_CALLBACKS = text(
    _LISTED.format(
        source="callbacks c LEFT JOIN callback_due d ON d.event_id = c.event_id AND d.shop_id = c.shop_id",
        condition="AND (CAST(:state AS text) IS NULL OR c.state = :state)",
        order="c.event_id",
    )
)

# Who is put aside is told by the due row alone, of which there are few.
_LIST_PUT_ASIDE = text(
    _LISTED.format(
        source="callback_due d JOIN callbacks c ON c.event_id = d.event_id AND c.shop_id = d.shop_id",
        condition="AND d.due_at = 'infinity'",
        order="d.event_id",
    )
)

_FIND_TARGET = text("SELECT c.shop_id, c.url FROM callbacks c WHERE c.event_id = :event_id")

# What waits is sent out of turn, and waits for its own turn again should that fail. What has ended begins anew, and counts on.
# What ended before the count was kept has it in the log; attempts are looked for where they can be, a day of wrong clocks
# included, so that partitions are left out.
_RESEND_CALLBACK = text(
    f"""
    WITH fresh AS (
      SELECT CAST(:event_id AS uuid) AS event_id, CAST(:shop_id AS uuid) AS shop_id, CAST(:origin AS text) AS origin),
    {_LANES_MADE},
    again AS (
      UPDATE callbacks c SET state = 'pending', finished_at = NULL FROM fresh f
       WHERE c.event_id = f.event_id AND c.shop_id = f.shop_id AND NOT EXISTS (
         SELECT 1 FROM callback_due d WHERE d.event_id = f.event_id AND d.shop_id = f.shop_id AND d.lease_token IS NOT NULL)
      RETURNING c.event_id, c.shop_id, greatest(c.attempts_made, (
        SELECT max(a.attempt_no) FROM callback_attempts a
         WHERE a.event_id = c.event_id AND a.shop_id = c.shop_id
           AND a.started_at >= c.created_at - interval '1 day')) AS attempts_made)
    INSERT INTO callback_due (event_id, shop_id, lane_id, attempts_made, attempts_before)
    SELECT again.event_id, again.shop_id, callback_lane_id(f.shop_id, f.origin), again.attempts_made, again.attempts_made
      FROM again JOIN fresh f ON f.event_id = again.event_id
        ON CONFLICT (event_id, shop_id) DO UPDATE
       SET due_at = now(), in_lane = false, lost_leases = 0,
           resume_at = coalesce(callback_due.resume_at, nullif(callback_due.due_at, 'infinity'))
     WHERE callback_due.lease_token IS NULL
    RETURNING event_id
    """
)


async def list_callbacks(
    tx: Tx, *, payout_id: UUID | None = None, state: str | None = None, rows_max: int = 50
) -> list[ListedCallback]:
    """Callbacks, newest first, of one payout or in one state when asked."""
    rows = await tx.execute(_LIST_CALLBACKS, {"payout_id": payout_id, "state": state, "rows_max": rows_max})
    return [ListedCallback(**row._mapping) for row in rows]


async def list_put_aside(tx: Tx, *, payout_id: UUID | None = None, rows_max: int = 50) -> list[ListedCallback]:
    """Callbacks that are kept for people because workers fell silent over them, newest first, of one payout when asked."""
    rows = await tx.execute(_LIST_PUT_ASIDE, {"payout_id": payout_id, "rows_max": rows_max})
    return [ListedCallback(**row._mapping) for row in rows]


async def resend_callback(tx: Tx, event_id: UUID) -> bool:
    """Make a callback due now, whatever became of it. False: no such callback, or an attempt is under way.

    Locks: its due row, then the callback.
    """
    target = (await tx.execute(_FIND_TARGET, {"event_id": event_id})).one_or_none()
    if target is None:
        return False
    await lock_callback_due(tx, [(event_id, target.shop_id)])
    values = {"event_id": event_id, "shop_id": target.shop_id, "origin": origin_of(target.url)}
    return await tx.scalar(_RESEND_CALLBACK, values) is not None
