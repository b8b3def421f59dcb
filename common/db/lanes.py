"""Lanes: callbacks of one shop to one origin, claimed in turn, each lane at its own pace.

A merchant's share is the lock of all its lanes: whoever takes callbacks, gives them back or ends them holds it, so that
`in_flight` is always the number of leases, and no two claims fill the same room. Whoever only appends a callback locks
nothing: its row is fresh (`in_lane` false) until it is claimed, and somebody has to wake its lane.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, text

from common.db.callbacks import CallbackKey
from common.db.engine import Tx, arrays_of
from common.domain.lane import CAP_UNKNOWN, MERCHANT_UNPROVEN_MAX, SLOW_MILLISECONDS, Pace

FIRST_LANE: Final = UUID(int=0)
# Lanes that one claim looks at, and leases that one round gives back.
LANES_MAX: Final = 32
# How often a claim looks for more lanes when nothing of those that it saw fits.
_LOOKS_MAX: Final = 8
_LAPSED_MAX: Final = 256
# How often a worker may be lost over a callback, until it is put aside for people: it may be what kills them.
LOST_LEASES_MAX: Final = 5
_LOST_APART_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Room:
    """How many callbacks one worker can take: in all, of those that failed before, of lanes that are slow, and per lane.

    `busy`: what the worker has in flight, by lane; `busy_merchants`: by merchant, who may have as much here as one lane.
    """

    total: int
    retries: int
    slow: int
    lane: int
    busy: Mapping[UUID, int]
    busy_merchants: Mapping[UUID, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClaimedCallback:
    """A callback under our lease: what to send, where, and as which attempt. `step` counts scheduled attempts from 0.

    `slow`: its lane takes long, or nobody knows. `resume_at`: it is sent out of turn, and its own turn is then.
    `callback_http` and `callback_ports` are the shop's exceptions from where callbacks may go.
    """

    event_id: UUID
    shop_id: UUID
    lane_id: UUID
    merchant_id: UUID
    step: int
    attempt_no: int
    url: str
    body: bytes
    slow: bool
    resume_at: datetime | None
    callback_http: bool = False
    callback_ports: list[int] | None = None
    payout_id: UUID | None = None
    payin_id: UUID | None = None
    traceparent: str | None = None

    @property
    def key(self) -> CallbackKey:
        """What its rows are found by."""
        return self.event_id, self.shop_id


_LOCK_READY = text(
    """
    SELECT l.id FROM callback_lanes l JOIN callback_shares s ON s.merchant_id = l.merchant_id
     WHERE l.ready_at <= now()
       AND (CAST(:slow_room AS int) > 0 OR l.latency_ms <= CAST(:slow_ms AS int))
     ORDER BY l.ready_at LIMIT CAST(:lanes_max AS int) FOR UPDATE OF s SKIP LOCKED
    """
)

# A probe for each lane, however many wait in it: a flood for one that is full keeps nobody from being found. Lanes that have no
# room know enough: whoever makes room looks for the next callback, fresh or not.
_FIND_SLEEPING = text(
    """
    WITH RECURSIVE fresh AS (
      (SELECT d.lane_id, d.due_at FROM callback_due d
        WHERE d.lease_token IS NULL AND NOT d.in_lane AND d.lane_id > CAST(:behind AS uuid)
        ORDER BY d.lane_id, d.due_at LIMIT 1)
      UNION ALL
      SELECT next.lane_id, next.due_at FROM fresh CROSS JOIN LATERAL (
        SELECT d.lane_id, d.due_at FROM callback_due d
         WHERE d.lease_token IS NULL AND NOT d.in_lane AND d.lane_id > fresh.lane_id
         ORDER BY d.lane_id, d.due_at LIMIT 1) next)
    SELECT f.lane_id, f.due_at <= now() - make_interval(secs => CAST(:overdue_seconds AS float8)) AND l.held_at IS NULL
           AND l.in_flight < l.cap AND l.ready_at > greatest(now(), l.blocked_until) AS sleeping
      FROM (SELECT * FROM fresh LIMIT CAST(:lanes_max AS int)) f
     CROSS JOIN LATERAL (SELECT * FROM callback_lanes WHERE id = f.lane_id LIMIT 1) l
    """
)

_FIND_LANES = text(
    """
    SELECT DISTINCT d.lane_id FROM unnest(CAST(:ids AS uuid[])) AS w (id)
     CROSS JOIN LATERAL (SELECT lane_id FROM callback_due WHERE event_id = w.id LIMIT 1) d
    """
)

# Which of these lanes are of merchants whose lanes are ours now.
_SHARES_OF_LANES = """
    SELECT l.id FROM unnest(CAST(:lane_ids AS uuid[])) AS w (id)
     CROSS JOIN LATERAL (SELECT id, merchant_id FROM callback_lanes WHERE id = w.id LIMIT 1) l
      JOIN callback_shares s ON s.merchant_id = l.merchant_id
     ORDER BY s.merchant_id FOR UPDATE OF s
    """
_LOCK_SHARES, _LOCK_FREE_SHARES = text(_SHARES_OF_LANES), text(f"{_SHARES_OF_LANES} SKIP LOCKED")

# How much each lane may be given now: its own room, and what is left to its merchant. What is due in it, found by a lateral
# probe with a limit, so that on a table nobody has analysed it still goes by index. Of that one of each lane, then a second of
# each, and so on, first the lane from which none was taken for longest, while there is room: the lane's own, its merchant's,
# and the worker's for what is slow and for what failed before. Each is counted among those that had room so far: what has none
# takes none away. What a lane has earned above the unknown is its own; the rest is shared by the lanes of its merchant.
#
# Callbacks and events are found by their ids alone: what is not distinct cannot be looked up, and a range is worth its order.
# While there is nothing, a session might as well choose to go through an index for the shop, and would keep to it. What is
# taken is updated by its ctid: of a flood the planner expects so many that by their ids it would read all that waits. A row
# that somebody has written since this statement began is left to the next look, as in `common.db.due`.
_CLAIM = text(
    """
    WITH wanted AS (
      SELECT unnest(CAST(:lane_ids AS uuid[])) AS lane_id),
    busy AS (
      SELECT * FROM unnest(CAST(:busy_lanes AS uuid[]), CAST(:busy_counts AS int[])) AS b (lane_id, calls)),
    busy_merchants AS (
      SELECT * FROM unnest(CAST(:busy_merchants AS uuid[]), CAST(:merchant_counts AS int[])) AS b (merchant_id, calls)),
    lanes AS (
      SELECT l.id, l.merchant_id, l.taken_at, merchant.room AS merchant_room,
             coalesce(l.latency_ms > CAST(:slow_ms AS int), true) AS slow,
             greatest(l.cap - CAST(:cap_unknown AS int), 0) - l.in_flight AS earned,
             CAST(:lane_max AS int) - coalesce(busy_merchants.calls, 0) AS worker_room,
             CASE WHEN l.held_at IS NULL AND l.blocked_until <= now() THEN greatest(0, least(
                    l.cap - l.in_flight, CAST(:lane_max AS int) - coalesce(busy.calls, 0),
                    CAST(:lane_max AS int) - coalesce(busy_merchants.calls, 0), CAST(:total_room AS int))) ELSE 0
             END AS room
        FROM wanted CROSS JOIN LATERAL (SELECT * FROM callback_lanes WHERE id = wanted.lane_id LIMIT 1) l
        LEFT JOIN busy ON busy.lane_id = l.id
        LEFT JOIN busy_merchants ON busy_merchants.merchant_id = l.merchant_id
       CROSS JOIN LATERAL (
         SELECT CAST(:unproven_max AS int) - coalesce(sum(least(CAST(:cap_unknown AS int), greatest(0,
                  a.in_flight - greatest(a.cap - CAST(:cap_unknown AS int), 0)))), 0) AS room
           FROM callback_lanes a WHERE a.merchant_id = l.merchant_id AND a.in_flight > 0) merchant),
    ranked AS (
      SELECT lanes.id AS lane_id, lanes.merchant_id, lanes.taken_at, lanes.slow, lanes.earned, lanes.merchant_room,
             lanes.worker_room, d.event_id, d.shop_id, d.step, d.row_place,
             row_number() OVER (PARTITION BY lanes.id ORDER BY d.due_at, d.event_id) AS place
        FROM lanes CROSS JOIN LATERAL (
         SELECT d.event_id, d.shop_id, d.step, d.due_at, d.ctid AS row_place FROM callback_due d
          WHERE d.lane_id = lanes.id AND d.lease_token IS NULL AND d.due_at <= now()
          ORDER BY d.due_at LIMIT least(lanes.room, CAST(:each_max AS int)) FOR UPDATE SKIP LOCKED) d),
    of_lanes AS (
      SELECT r.*, count(*) FILTER (WHERE place > earned) OVER (
               PARTITION BY merchant_id ORDER BY place, taken_at, lane_id ROWS UNBOUNDED PRECEDING) AS merchant_place
        FROM ranked r),
    of_workers AS (
      SELECT r.*, row_number() OVER (PARTITION BY merchant_id ORDER BY place, taken_at, lane_id) AS worker_place
        FROM of_lanes r WHERE place <= earned OR merchant_place <= merchant_room),
    of_merchants AS (
      SELECT r.*, count(*) FILTER (WHERE slow) OVER (
               ORDER BY place, taken_at, lane_id ROWS UNBOUNDED PRECEDING) AS slow_place
        FROM of_workers r WHERE worker_place <= worker_room),
    at_pace AS (
      SELECT r.*, count(*) FILTER (WHERE step > 0) OVER (
               ORDER BY place, taken_at, lane_id ROWS UNBOUNDED PRECEDING) AS retry_place
        FROM of_merchants r WHERE NOT slow OR slow_place <= CAST(:slow_room AS int)),
    fitting AS (
      SELECT r.*, row_number() OVER (ORDER BY place, taken_at, lane_id) AS turn
        FROM at_pace r WHERE step = 0 OR retry_place <= CAST(:retry_room AS int)),
    taken AS (
      SELECT * FROM fitting WHERE turn <= CAST(:total_room AS int)),
    leased AS (
      UPDATE callback_due d
         SET lease_token = CAST(:token AS uuid), attempts_made = d.attempts_made + 1, in_lane = true,
             due_at = now() + make_interval(secs => CAST(:lease_seconds AS float8))
        FROM taken WHERE d.ctid = taken.row_place
      RETURNING d.event_id, d.shop_id, d.lane_id, d.step, d.attempts_made, d.resume_at, taken.slow, taken.merchant_id)
    SELECT wanted.lane_id, r.event_id, r.shop_id, r.merchant_id, r.step, r.attempts_made AS attempt_no, r.slow,
           r.resume_at, c.url, c.payout_id, c.payin_id, c.traceparent, e.body, s.callback_http, s.callback_ports,
           EXISTS (SELECT 1 FROM fitting f WHERE f.lane_id = wanted.lane_id) AS fits
      FROM wanted LEFT JOIN leased r ON r.lane_id = wanted.lane_id
      LEFT JOIN LATERAL (
        SELECT c.url, c.payout_id, c.payin_id, c.traceparent FROM callbacks c
         WHERE c.event_id = r.event_id AND c.shop_id IS NOT DISTINCT FROM r.shop_id LIMIT 1) c ON true
      LEFT JOIN LATERAL (
        SELECT e.body FROM events e
         WHERE e.id BETWEEN r.event_id AND r.event_id AND e.shop_id IS NOT DISTINCT FROM r.shop_id
         ORDER BY e.id LIMIT 1) e ON true
      LEFT JOIN LATERAL (SELECT s.callback_http, s.callback_ports FROM shops s WHERE s.id = r.shop_id LIMIT 1) s ON true
    """
)

# What is ours already by that token: the answer to the COMMIT of its claim was lost.
_FIND_CLAIMED = text(
    """
    SELECT d.lane_id, l.merchant_id, d.event_id, d.shop_id, d.step, d.attempts_made AS attempt_no, d.resume_at,
           coalesce(l.latency_ms > CAST(:slow_ms AS int), true) AS slow, c.url, c.payout_id, c.payin_id, c.traceparent,
           e.body, s.callback_http, s.callback_ports
      FROM callback_due d
      JOIN callback_lanes l ON l.id = d.lane_id
      JOIN callbacks c ON c.event_id = d.event_id AND c.shop_id = d.shop_id
      JOIN events e ON e.id = d.event_id AND e.shop_id = d.shop_id
      JOIN shops s ON s.id = d.shop_id
     WHERE d.lease_token = CAST(:token AS uuid)
    """
)

# Whatever has changed in a lane, this says when its turn comes: when its next callback is due and it may be called. While it is
# full nobody needs to look; who ends a lease comes by here again. A lane that counts too few leases is no reason to fail: who
# keeps lanes puts it right.
_NEXT_TURN = """
             coalesce((SELECT d.due_at FROM callback_due d WHERE d.lane_id = l.id AND d.lease_token IS NULL
                        ORDER BY d.due_at LIMIT 1), 'infinity')"""

_SAVE_TURNS = text(
    f"""
    UPDATE callback_lanes l
       SET in_flight = greatest(0, l.in_flight + v.in_flight),
           taken_at = CASE WHEN v.in_flight > 0 THEN now() ELSE l.taken_at END,
           ready_at = CASE WHEN l.held_at IS NOT NULL OR l.in_flight + v.in_flight >= l.cap THEN 'infinity' ELSE least(
             CASE WHEN v.keeps_turn THEN l.ready_at END,
             greatest({_NEXT_TURN}, l.blocked_until, now() + make_interval(secs => v.later_seconds))) END
      FROM unnest(CAST(:lane_id AS uuid[]), CAST(:in_flight AS int[]), CAST(:later_seconds AS float8[]),
                  CAST(:keeps_turn AS boolean[]))
        AS v (lane_id, in_flight, later_seconds, keeps_turn)
     WHERE l.id = v.lane_id
    """
)

_SAVE_LEARNED = text(
    f"""
    UPDATE callback_lanes l
       SET cap = v.cap, streak = v.streak, trouble = v.trouble, latency_ms = v.latency_ms, opened = v.opened,
           in_flight = greatest(0, l.in_flight - v.ended), blocked_until = greatest(l.blocked_until, v.rests_until),
           failing_since = CASE WHEN v.failing THEN coalesce(l.failing_since, now()) END,
           ready_at = CASE WHEN l.held_at IS NOT NULL OR l.in_flight - v.ended >= v.cap THEN 'infinity' ELSE greatest(
             {_NEXT_TURN}, l.blocked_until, v.rests_until, now()) END
      FROM (
        SELECT u.*, CASE WHEN u.rest_seconds > 0 THEN now() + make_interval(secs => u.rest_seconds) END AS rests_until
          FROM unnest(CAST(:lane_id AS uuid[]), CAST(:cap AS int[]), CAST(:streak AS int[]), CAST(:trouble AS float8[]),
                      CAST(:latency_ms AS int[]), CAST(:opened AS int[]), CAST(:failing AS boolean[]),
                      CAST(:rest_seconds AS float8[]), CAST(:ended AS int[]))
            AS u (lane_id, cap, streak, trouble, latency_ms, opened, failing, rest_seconds, ended)) v
     WHERE l.id = v.lane_id
    """
)

_FIND_PACES = text(
    """
    SELECT l.id, l.cap, l.streak, l.trouble, l.latency_ms, l.opened, l.failing_since IS NOT NULL AS failing,
           l.blocked_until > now() AS resting
      FROM unnest(CAST(:lane_ids AS uuid[])) AS w (id)
     CROSS JOIN LATERAL (SELECT * FROM callback_lanes WHERE id = w.id LIMIT 1) l
    """
)

_FIND_LAPSED = text(
    """
    SELECT d.event_id, d.lane_id FROM callback_due d WHERE d.lease_token IS NOT NULL AND d.due_at <= now()
     ORDER BY d.due_at LIMIT CAST(:rows_max AS int)
    """
)

# What was lost more than once comes back at times of its own, so that one that kills workers is lost alone in the end. Each is
# found by its id: the sum with nothing keeps the planner from going by the time instead, through all that are leased.
_RELEASE_LAPSED = text(
    """
    WITH lapsed AS (
      SELECT d.event_id, d.shop_id FROM unnest(CAST(:ids AS uuid[])) AS w (id)
       CROSS JOIN LATERAL (
         SELECT d.event_id, d.shop_id FROM callback_due d
          WHERE d.event_id = w.id AND d.lease_token IS NOT NULL AND d.due_at + interval '0' <= now()
          LIMIT 1 FOR UPDATE SKIP LOCKED) d)
    UPDATE callback_due d
       SET lease_token = NULL, lost_leases = d.lost_leases + 1,
           due_at = CASE WHEN d.lost_leases + 1 >= CAST(:lost_max AS int) THEN 'infinity'::timestamptz
             ELSE now() + make_interval(secs => d.lost_leases * random() * CAST(:apart_seconds AS float8)) END
      FROM lapsed WHERE d.event_id = lapsed.event_id AND d.shop_id = lapsed.shop_id
    RETURNING d.event_id, d.lane_id, d.lost_leases
    """
)


@dataclass(frozen=True, slots=True)
class Turn:
    """By how much a lane's leases change, how far behind the others its next turn is, in seconds, or that it keeps its turn."""

    lane_id: UUID
    in_flight: int
    later_seconds: float = 0.0
    keeps_turn: bool = False


@dataclass(frozen=True, slots=True)
class _Learned:
    lane_id: UUID
    cap: int
    streak: int
    trouble: float
    latency_ms: int | None
    opened: int
    failing: bool
    rest_seconds: float
    ended: int


@dataclass(frozen=True, slots=True)
class Lease:
    """What a claim takes callbacks under."""

    token: UUID
    seconds: float


async def claim_in_turn(tx: Tx, lease: Lease, room: Room) -> list[ClaimedCallback]:
    """Take what is due in the lanes whose turn has come. Lanes of merchants whom somebody else holds are skipped.

    Two statements, never one: the second sees all that was committed before the first had its locks.
    Locks: the shares of the lanes' merchants.
    """
    if room.total == 0:
        return []
    which = {"slow_room": room.slow, "slow_ms": SLOW_MILLISECONDS, "lanes_max": LANES_MAX}
    claimed: list[ClaimedCallback] = []
    for _ in range(_LOOKS_MAX):
        lane_ids = list(await tx.scalars(_LOCK_READY, which))
        claimed = await _claim(tx, lease, room, lane_ids)
        if claimed or len(lane_ids) < LANES_MAX:
            break
    return claimed


async def claim_told_of(tx: Tx, lease: Lease, room: Room, event_ids: Sequence[UUID]) -> list[ClaimedCallback]:
    """Take what is due in the lanes of these callbacks, the longest due first; what does not fit waits there for its turn.

    Lanes of merchants whom somebody else holds are left: whoever it is looks for their next callback, or the scan does.
    Locks: the shares of the lanes' merchants, by id.
    """
    lane_ids = list(await tx.scalars(_FIND_LANES, {"ids": list(event_ids)}))
    return await _claim(tx, lease, room, await lock_shares(tx, lane_ids, waits=False))


async def wake_lanes(tx: Tx, *, behind: UUID, overdue_seconds: float, lanes_max: int) -> tuple[UUID | None, int]:
    """See that lanes come to their turn in which callbacks are due, for so long, that nobody has told of.

    Looks at so many lanes that have fresh callbacks, behind one. Returns: the last one looked at (None: there are no more), and
    how many were woken. Lanes of merchants whom somebody else holds sleep on.
    Locks: the shares of those, by id.
    """
    values = {"behind": behind, "overdue_seconds": overdue_seconds, "lanes_max": lanes_max}
    rows = (await tx.execute(_FIND_SLEEPING, values)).all()
    sleeping = [row.lane_id for row in rows if row.sleeping]
    woken = await lock_shares(tx, sleeping, waits=False)
    await save_turns(tx, [Turn(lane_id, 0) for lane_id in woken])
    return (max(row.lane_id for row in rows) if len(rows) == lanes_max else None), len(woken)


# How far behind the others a lane goes whose callbacks did not fit.
_NOTHING_FITTED_SECONDS: Final = 0.2


async def _claim(tx: Tx, lease: Lease, room: Room, lane_ids: Sequence[UUID]) -> list[ClaimedCallback]:
    if not lane_ids:
        return []
    # Some lanes have less than their part: so twice that, and not all that there is room for of each.
    each_max = max(2, 2 * room.total // len(lane_ids))
    rows = (
        await tx.execute(
            _CLAIM,
            {
                "lane_ids": list(lane_ids),
                "each_max": each_max,
                "token": lease.token,
                "lease_seconds": lease.seconds,
                "busy_lanes": list(room.busy),
                "busy_counts": list(room.busy.values()),
                "busy_merchants": list(room.busy_merchants),
                "merchant_counts": list(room.busy_merchants.values()),
                "lane_max": room.lane,
                "total_room": room.total,
                "retry_room": room.retries,
                "slow_room": room.slow,
                "slow_ms": SLOW_MILLISECONDS,
                "cap_unknown": CAP_UNKNOWN,
                "unproven_max": MERCHANT_UNPROVEN_MAX,
            },
        )
    ).all()
    taken, fits = dict.fromkeys((row.lane_id for row in rows), 0), {row.lane_id: row.fits for row in rows}
    claimed = []
    for row in rows:
        if row.event_id is not None:
            taken[row.lane_id] += 1
            claimed.append(_callback(row))
    # A lane for which it was only we that had no room left in all is somebody else's to serve, at once.
    keeps = {lane for lane, n in taken.items() if n == 0 and (fits[lane] or room.total == 0)}
    turns = [
        Turn(lane, n, 0.0 if n or lane in keeps else _NOTHING_FITTED_SECONDS, lane in keeps)
        for lane, n in taken.items()
    ]
    await save_turns(tx, turns)
    return claimed


def _callback(row: Row[*tuple[Any, ...]]) -> ClaimedCallback:
    return ClaimedCallback(
        event_id=row.event_id,
        shop_id=row.shop_id,
        lane_id=row.lane_id,
        merchant_id=row.merchant_id,
        step=row.step,
        attempt_no=row.attempt_no,
        url=row.url,
        body=row.body,
        slow=row.slow,
        resume_at=row.resume_at,
        callback_http=row.callback_http,
        callback_ports=row.callback_ports,
        payout_id=row.payout_id,
        payin_id=row.payin_id,
        traceparent=row.traceparent,
    )


async def find_claimed(tx: Tx, lease: Lease) -> list[ClaimedCallback]:
    """What a claim under this lease took, when nobody heard whether it was committed."""
    rows = await tx.execute(_FIND_CLAIMED, {"token": lease.token, "slow_ms": SLOW_MILLISECONDS})
    return [_callback(row) for row in rows]


async def lock_shares(tx: Tx, lane_ids: Collection[UUID], *, waits: bool = True) -> list[UUID]:
    """Hold the lanes of these lanes' merchants until the transaction ends. Returns: those of these lanes that are ours now.

    `waits` False: those of merchants whom somebody else holds are left out.
    Locks: the shares, by id.
    """
    if not lane_ids:
        return []
    return list(await tx.scalars(_LOCK_SHARES if waits else _LOCK_FREE_SHARES, {"lane_ids": list(lane_ids)}))


async def find_paces(tx: Tx, lane_ids: Collection[UUID]) -> dict[UUID, Pace]:
    """What is known of lanes. The caller holds their shares."""
    rows = await tx.execute(_FIND_PACES, {"lane_ids": list(lane_ids)})
    return {
        row.id: Pace(
            row.cap, row.streak, row.trouble, row.latency_ms, row.opened, failing=row.failing, resting=row.resting
        )
        for row in rows
    }


async def save_lanes(tx: Tx, paces: Mapping[UUID, Pace], leases_ended: Mapping[UUID, int]) -> None:
    """Note what was learned of lanes, and how many leases of each have ended. The caller holds their shares.

    Must come after what became of the callbacks themselves: it looks when the next one is due.
    """
    learned = [
        _Learned(
            lane,
            pace.cap,
            pace.streak,
            pace.trouble,
            pace.latency_ms,
            pace.opened,
            pace.failing,
            pace.rest_seconds,
            leases_ended.get(lane, 0),
        )
        for lane, pace in paces.items()
    ]
    if learned:
        await tx.execute(_SAVE_LEARNED, arrays_of(learned, _Learned))


async def save_turns(tx: Tx, turns: Sequence[Turn]) -> None:
    """Note how many leases lanes have, and when their next turn is. The caller holds their shares."""
    if turns:
        await tx.execute(_SAVE_TURNS, arrays_of(turns, Turn))


@dataclass(frozen=True, slots=True)
class Lapsed:
    """A callback whose worker was silent for too long, how often that has happened to it, and whether it is put aside now."""

    event_id: UUID
    lost_leases: int

    @property
    def put_aside(self) -> bool:
        """Whether it is sent no more until an operator sends it again."""
        return self.lost_leases >= LOST_LEASES_MAX


async def release_lapsed(tx: Tx) -> list[Lapsed]:
    """Give back callbacks whose lease ran out: due now, or soon when it is not the first time, their step as it was.

    Those that somebody else holds are left for the next time.
    Locks: the shares of their merchants, by id.
    """
    found = (await tx.execute(_FIND_LAPSED, {"rows_max": _LAPSED_MAX})).all()
    ours = set(await lock_shares(tx, {row.lane_id for row in found}, waits=False))
    event_ids = [row.event_id for row in found if row.lane_id in ours]
    if not event_ids:
        return []
    values = {"ids": event_ids, "lost_max": LOST_LEASES_MAX, "apart_seconds": _LOST_APART_SECONDS}
    rows = (await tx.execute(_RELEASE_LAPSED, values)).all()
    ended = Counter(row.lane_id for row in rows)
    await save_turns(tx, [Turn(lane, -count) for lane, count in ended.items()])
    return [Lapsed(row.event_id, row.lost_leases) for row in rows]
