"""What must still be done for payouts: the due rows, their leases, and the attempts made at the rails.

A lease is a token and a `due_at` in the future. Whoever finds the row due again may take it; the one who comes late finds
another token.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from sqlalchemy import text

from common.db.engine import Tx, arrays_of

# Visits shops that have rows, a few at a time and in turn, and takes the oldest due of each: one merchant's flood is one
# shop among the others. Loose index scan over (rail, shop_id, due_at). What was picked is changed where it stands: a join by
# its key would be one by the whole table where the planner takes the table for small. A row that somebody has written since
# this statement began is locked where it stands now, and what stands there cannot be seen yet (PostgreSQL, "Read Committed"):
# it is left to the next claim.
_CLAIM_DUE = text(
    """
    WITH RECURSIVE turn AS (
      (SELECT d.shop_id, 1 AS n FROM payout_due d
        WHERE d.rail = :rail AND d.shop_id > CAST(:after_shop AS uuid) ORDER BY d.shop_id LIMIT 1)
      UNION ALL
      SELECT next.shop_id, turn.n + 1 FROM turn CROSS JOIN LATERAL (
        SELECT d.shop_id FROM payout_due d
         WHERE d.rail = :rail AND d.shop_id > turn.shop_id ORDER BY d.shop_id LIMIT 1) next
       WHERE turn.n < CAST(:shops_max AS int)),
    busy AS (
      SELECT * FROM unnest(CAST(:busy_shops AS uuid[]), CAST(:busy_counts AS int[])) AS b (shop_id, calls)),
    picked AS (
      SELECT p.place FROM turn LEFT JOIN busy ON busy.shop_id = turn.shop_id
       CROSS JOIN LATERAL (
         SELECT d.ctid AS place FROM payout_due d
          WHERE d.rail = :rail AND d.shop_id = turn.shop_id
            AND d.due_at <= now() - make_interval(secs => CAST(:overdue_seconds AS float8))
          ORDER BY d.due_at LIMIT greatest(CAST(:shop_max AS int) - coalesce(busy.calls, 0), 0)
          FOR UPDATE SKIP LOCKED) p
       LIMIT CAST(:claim_max AS int)),
    claimed AS (
      UPDATE payout_due d
         SET lease_token = CAST(:token AS uuid), due_at = now() + make_interval(secs => CAST(:lease_seconds AS float8))
        FROM picked WHERE d.ctid = picked.place
      RETURNING d.payout_id, d.shop_id)
    SELECT claimed.payout_id, claimed.shop_id, visited.shop_id AS visited, visited.n AS visits
      FROM (SELECT shop_id, n FROM turn ORDER BY n DESC LIMIT 1) visited LEFT JOIN claimed ON true
    """
)

# The same for ids that somebody told us of: LATERAL with LIMIT is one probe per id, and `|| ''` keeps it off the index that
# begins with the rail, which on a table that nobody has analysed looks as good. The share per shop is counted after locking:
# what does not fit stays due.
_CLAIM_DUE_IDS = text(
    """
    WITH busy AS (
      SELECT * FROM unnest(CAST(:busy_shops AS uuid[]), CAST(:busy_counts AS int[])) AS b (shop_id, calls)),
    locked AS (
      SELECT d.place, d.shop_id FROM (SELECT DISTINCT unnest(CAST(:ids AS uuid[])) AS id ORDER BY 1) w
       CROSS JOIN LATERAL (
         SELECT ctid AS place, shop_id FROM payout_due
          WHERE payout_id = w.id AND rail || '' = :rail AND due_at <= now() LIMIT 1 FOR UPDATE SKIP LOCKED) d),
    ranked AS (
      SELECT l.place, coalesce(busy.calls, 0) + row_number() OVER (PARTITION BY l.shop_id) AS number
        FROM locked l LEFT JOIN busy ON busy.shop_id = l.shop_id),
    picked AS (
      SELECT place FROM ranked WHERE number <= CAST(:shop_max AS int) LIMIT CAST(:claim_max AS int)),
    leased AS (
      UPDATE payout_due d
         SET lease_token = CAST(:token AS uuid), due_at = now() + make_interval(secs => CAST(:lease_seconds AS float8))
        FROM picked WHERE d.ctid = picked.place
      RETURNING d.payout_id, d.shop_id)
    SELECT due.n, leased.payout_id, leased.shop_id FROM (SELECT count(*) AS n FROM ranked) due LEFT JOIN leased ON true
    """
)

_FIND_CLAIMED = text(
    """
    SELECT payout_id, shop_id FROM payout_due WHERE rail = :rail AND lease_token = CAST(:token AS uuid)
     ORDER BY payout_id FOR UPDATE
    """
)

_LAST_ATTEMPTS = text(
    """
    SELECT wanted.payout_id, a.attempt_no, a.reference, a.submits_refused, a.look_ups, a.was_taken,
           a.open_no, a.was_declined, a.submitted_seconds_ago, a.taken_seconds_ago
      FROM unnest(CAST(:ids AS uuid[])) AS wanted (payout_id)
     CROSS JOIN LATERAL (
       SELECT max(attempt_no) AS attempt_no,
              min(reference) AS reference,
              count(*) FILTER (WHERE outcome = 'not_accepted' AND coalesce(detail, '') <> ALL (CAST(:not_made AS text[])))
                AS submits_refused,
              count(*) FILTER (WHERE action = 'look_up') AS look_ups,
              coalesce(bool_or(outcome = 'submitted'), false) AS was_taken,
              max(attempt_no) FILTER (WHERE finished_at IS NULL) AS open_no,
              coalesce(bool_or(outcome = 'declined'), false) AS was_declined,
              coalesce(extract(epoch FROM now() - max(started_at) FILTER (WHERE action IN ('submit', 'restore'))), 0)::float8
                AS submitted_seconds_ago,
              coalesce(extract(epoch FROM now() - max(finished_at) FILTER (WHERE outcome = 'submitted')), 0)::float8
                AS taken_seconds_ago
         FROM payout_attempts WHERE payout_id = wanted.payout_id) a
     WHERE a.attempt_no IS NOT NULL
    """
)

_APPEND_ATTEMPTS = text(
    """
    INSERT INTO payout_attempts (payout_id, shop_id, attempt_no, action, rail, reference)
    SELECT * FROM unnest(CAST(:payout_id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:attempt_no AS int[]),
                         CAST(:action AS text[]), CAST(:rail AS text[]), CAST(:reference AS text[]))
    """
)

# An attempt is finished once; only "unknown" may still give way to what was learned late.
_FINISH_ATTEMPTS = text(
    """
    UPDATE payout_attempts a SET finished_at = now(), outcome = f.outcome, detail = left(f.detail, 200)
      FROM unnest(CAST(:payout_id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:attempt_no AS int[]),
                  CAST(:outcome AS text[]), CAST(:detail AS text[])) AS f (payout_id, shop_id, attempt_no, outcome, detail)
     CROSS JOIN LATERAL (
       SELECT ctid AS place FROM payout_attempts
        WHERE payout_id = f.payout_id AND shop_id = f.shop_id AND attempt_no = f.attempt_no LIMIT 1) made
     WHERE a.ctid = made.place
       AND (a.finished_at IS NULL OR a.outcome = 'unknown' AND f.outcome <> 'unknown')
    """
)

# From here on LATERAL with LIMIT again, one probe per id: to a planner that knows no statistics an id without its shop leads to
# many rows, and reading the table from one end to the other looks cheaper.
_FIND_CONTRADICTED = text(
    """
    SELECT a.payout_id FROM unnest(CAST(:payout_id AS uuid[]), CAST(:attempt_no AS int[])) AS w (payout_id, attempt_no)
     CROSS JOIN LATERAL (
       SELECT payout_id, outcome FROM payout_attempts
        WHERE payout_id = w.payout_id AND attempt_no = w.attempt_no LIMIT 1) a
     WHERE a.outcome NOT IN ('unknown', 'paid')
    """
)

_LOCK_DUE, _LOCK_FREE_DUE = (
    text(
        f"""
        SELECT d.payout_id, d.lease_token FROM (SELECT DISTINCT unnest(CAST(:ids AS uuid[])) AS id ORDER BY 1) w
         CROSS JOIN LATERAL (
           SELECT payout_id, lease_token FROM payout_due WHERE payout_id = w.id LIMIT 1 FOR UPDATE {skip}) d
        """
    )
    for skip in ("", "SKIP LOCKED")
)

_RESCHEDULE_DUE = text(
    """
    UPDATE payout_due d
       SET lease_token = NULL, due_at = now() + make_interval(secs => r.delay_seconds),
           verifying_since = CASE WHEN d.payout_id = ANY (CAST(:verifying AS uuid[]))
                                  THEN coalesce(d.verifying_since, now()) END
      FROM unnest(CAST(:ids AS uuid[]), CAST(:delays AS float8[])) AS r (id, delay_seconds)
     CROSS JOIN LATERAL (
       SELECT ctid AS place FROM payout_due WHERE payout_id = r.id LIMIT 1) waiting
     WHERE d.ctid = waiting.place
    """
)


@dataclass(frozen=True, slots=True)
class Claim:
    """How much one worker may take from one rail. Counts of payouts, seconds for the lease.

    `overdue_seconds`: how long past due a payout must be; messages have the first go.
    """

    rail: str
    token: UUID
    lease_seconds: float
    claim_max: int
    shop_max: int
    shops_max: int
    overdue_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim took: shop ids by payout id. `next_shop`: behind it the next claim begins; None: all shops were visited.

    `left_count`: of payouts asked for by id, how many were due and free, and did not fit.
    """

    shop_ids: dict[UUID, UUID]
    next_shop: UUID | None
    left_count: int = 0


async def claim_due(tx: Tx, claim: Claim, after_shop: UUID, busy: Mapping[UUID, int]) -> Claimed:
    """Take due payouts under a lease, shop by shop in turn, beginning behind `after_shop`; what others hold is skipped.

    `busy` says how many calls this worker has under way per shop; they count towards `shop_max`.
    Locks: the due rows taken.
    """
    rows = (
        await tx.execute(
            _CLAIM_DUE,
            {
                "rail": claim.rail,
                "after_shop": after_shop,
                "busy_shops": list(busy),
                "busy_counts": list(busy.values()),
                "token": claim.token,
                "lease_seconds": claim.lease_seconds,
                "claim_max": claim.claim_max,
                "shop_max": claim.shop_max,
                "shops_max": claim.shops_max,
                "overdue_seconds": claim.overdue_seconds,
            },
        )
    ).all()
    shop_ids = {row.payout_id: row.shop_id for row in rows if row.payout_id is not None}
    if len(shop_ids) >= claim.claim_max:
        # Shops behind the last one taken were visited in vain.
        return Claimed(shop_ids, max(shop_ids.values()))
    more = bool(rows) and rows[0].visits >= claim.shops_max
    return Claimed(shop_ids, rows[0].visited if more else None)


async def claim_due_ids(tx: Tx, claim: Claim, payout_ids: Collection[UUID], busy: Mapping[UUID, int]) -> Claimed:
    """Take those of the payouts that are due and nobody has, as `claim_due` does."""
    rows = (
        await tx.execute(
            _CLAIM_DUE_IDS,
            {
                "rail": claim.rail,
                "ids": list(payout_ids),
                "busy_shops": list(busy),
                "busy_counts": list(busy.values()),
                "token": claim.token,
                "lease_seconds": claim.lease_seconds,
                "claim_max": claim.claim_max,
                "shop_max": claim.shop_max,
            },
        )
    ).all()
    shop_ids = {row.payout_id: row.shop_id for row in rows if row.payout_id is not None}
    return Claimed(shop_ids, None, left_count=rows[0].n - len(shop_ids))


async def find_rails_gone(tx: Tx) -> list[str]:
    """Rails that no longer exist and have rows all the same, due or not."""
    return list(await tx.scalars(_RAILS_GONE))


@dataclass(frozen=True, slots=True)
class Expiring:
    """A place in the order of expiry; the next page begins behind it."""

    expires_at: datetime
    payout_id: UUID


FIRST_TO_EXPIRE: Final = Expiring(datetime.min.replace(tzinfo=UTC), UUID(int=0))


async def find_expired(tx: Tx, *, behind: Expiring, payouts_max: int) -> list[Expiring]:
    """A page of queued payouts whose time is over, the first to expire first."""
    rows = await tx.execute(
        _FIND_EXPIRED,
        {"expires_at": behind.expires_at, "payout_id": behind.payout_id, "payouts_max": payouts_max},
    )
    return [Expiring(row.expires_at, row.payout_id) for row in rows]


_FIND_EXPIRED = text(
    """
    SELECT d.expires_at, d.payout_id FROM payout_due d
     WHERE d.expires_at <= now()
       AND (SELECT p.state FROM payouts p WHERE p.id = d.payout_id AND p.shop_id = d.shop_id) = 'queued'
       AND (d.expires_at, d.payout_id) > (CAST(:expires_at AS timestamptz), CAST(:payout_id AS uuid))
     ORDER BY d.expires_at, d.payout_id LIMIT CAST(:payouts_max AS int)
    """
)

_RAILS_GONE = text(
    """
    WITH RECURSIVE named AS (
      (SELECT rail FROM payout_due ORDER BY rail LIMIT 1)
      UNION ALL
      SELECT next.rail FROM named CROSS JOIN LATERAL (
        SELECT d.rail FROM payout_due d WHERE d.rail > named.rail ORDER BY d.rail LIMIT 1) next)
    SELECT rail FROM named WHERE NOT EXISTS (SELECT 1 FROM rails r WHERE r.name = named.rail)
    """
)


async def find_claimed(tx: Tx, claim: Claim) -> dict[UUID, UUID]:
    """What a claim took whose COMMIT nobody heard the answer of: shop ids by payout id. Locks: the due rows, in id order."""
    rows = await tx.execute(_FIND_CLAIMED, {"rail": claim.rail, "token": claim.token})
    return {row.payout_id: row.shop_id for row in rows}


# Why a call was not made, which no rail can be blamed for: such an attempt is no refusal.
DOES_NOT_OPEN: Final = "recipient does not open"
TOO_LATE: Final = "lease ran out before the call"
NOT_MADE: Final = (DOES_NOT_OPEN, TOO_LATE)


@dataclass(frozen=True, slots=True)
class History:
    """What was tried for a payout so far. `submits_refused`: by the rail, so without those that were not even made.
    `was_taken`, `was_declined`: the rail said once that it had taken, or declined it.

    `open_no`: the attempt that nobody has finished yet; words of the rail may have come since. `submitted_seconds_ago`: when
    the last submit began, by the database's clock; or when it was restored, for it has forgotten later ones.
    `taken_seconds_ago`: when the rail last said that it had taken it.
    """

    attempt_no: int
    reference: str
    submits_refused: int
    look_ups: int
    was_taken: bool = False
    open_no: int | None = None
    was_declined: bool = False
    submitted_seconds_ago: float = 0.0
    taken_seconds_ago: float = 0.0


async def find_histories(tx: Tx, payout_ids: Collection[UUID]) -> dict[UUID, History]:
    """The attempts of payouts in a nutshell; payouts never tried are left out."""
    rows = await tx.execute(_LAST_ATTEMPTS, {"ids": list(payout_ids), "not_made": list(NOT_MADE)})
    return {
        row.payout_id: History(
            row.attempt_no,
            row.reference,
            row.submits_refused,
            row.look_ups,
            row.was_taken,
            row.open_no,
            row.was_declined,
            row.submitted_seconds_ago,
            row.taken_seconds_ago,
        )
        for row in rows
    }


@dataclass(frozen=True, slots=True)
class NewAttempt:
    """A call that is about to be made."""

    payout_id: UUID
    shop_id: UUID
    attempt_no: int
    action: str
    rail: str
    reference: str


@dataclass(frozen=True, slots=True)
class FinishedAttempt:
    """How a call ended."""

    payout_id: UUID
    shop_id: UUID
    attempt_no: int
    outcome: str
    detail: str | None


async def append_attempts(tx: Tx, attempts: Sequence[NewAttempt]) -> None:
    """Write down calls before they are made."""
    if attempts:
        await tx.execute(_APPEND_ATTEMPTS, arrays_of(attempts, NewAttempt))


async def finish_attempts(tx: Tx, attempts: Sequence[FinishedAttempt]) -> None:
    """Write down how calls ended. Repeat: the first outcome of an attempt stands.

    Locks: the caller holds the payouts, and by them their attempts.
    """
    if attempts:
        await tx.execute(_FINISH_ATTEMPTS, arrays_of(attempts, FinishedAttempt))


@dataclass(frozen=True, slots=True)
class NewWord:
    """What a rail said by itself, in line with the answers to our calls."""

    payout_id: UUID
    shop_id: UUID
    attempt_no: int
    rail: str
    reference: str
    outcome: str
    detail: str | None


async def append_words(tx: Tx, words: Sequence[NewWord]) -> None:
    """Write down words that nobody asked for. The caller holds the payouts."""
    if words:
        await tx.execute(_APPEND_WORDS, arrays_of(words, NewWord))


_APPEND_WORDS = text(
    """
    INSERT INTO payout_attempts (payout_id, shop_id, attempt_no, action, rail, reference, outcome, detail, finished_at)
    SELECT payout_id, shop_id, attempt_no, 'event', rail, reference, outcome, detail, now()
      FROM unnest(CAST(:payout_id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:attempt_no AS int[]), CAST(:rail AS text[]),
                  CAST(:reference AS text[]), CAST(:outcome AS text[]), CAST(:detail AS text[]))
        AS w (payout_id, shop_id, attempt_no, rail, reference, outcome, detail)
    """
)


async def find_contradicted(tx: Tx, paid: Sequence[tuple[UUID, int]]) -> set[UUID]:
    """Of attempts (payout, number) that are now called paid, the payouts where that attempt was told otherwise before."""
    if not paid:
        return set()
    rows = await tx.scalars(
        _FIND_CONTRADICTED, {"payout_id": [key for key, _ in paid], "attempt_no": [number for _, number in paid]}
    )
    return set(rows)


async def lock_due(tx: Tx, payout_ids: Collection[UUID], *, skip_locked: bool = False) -> dict[UUID, UUID | None]:
    """Lock due rows until the transaction ends; the lease token of each that still exists.

    Locks: due rows in payout id order; they come before payouts and accounts. With `skip_locked`, rows that somebody else
    holds are left out.
    """
    rows = await tx.execute(_LOCK_FREE_DUE if skip_locked else _LOCK_DUE, {"ids": list(payout_ids)})
    return {row.payout_id: row.lease_token for row in rows}


async def reschedule_due(
    tx: Tx, delays_seconds: Mapping[UUID, float], *, verifying: Collection[UUID] = frozenset()
) -> None:
    """Give payouts back, to be due again after that many seconds; those that are verifying wait for people as well.

    Locks: the caller holds the due rows.
    """
    if delays_seconds:
        values = {"ids": list(delays_seconds), "delays": list(delays_seconds.values()), "verifying": list(verifying)}
        await tx.execute(_RESCHEDULE_DUE, values)
