"""What rails say by themselves: an inbox, and the discrepancies that come of words against what we know."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, select, text, update

from common.db.engine import Tx, arrays_of
from common.db.tables import discrepancies, shops


@dataclass(frozen=True, slots=True)
class NewRailEvent:
    """A rail's word as it arrives. `event_id` is the rail's own; amounts in minor units, None when it named none.

    `due_in_seconds`: when to listen; only a rail that plays a bank says something else than now.
    """

    rail: str
    event_id: str
    reference: str
    outcome: str
    failure_code: str | None = None
    provider_reference: str | None = None
    amount_minor: int | None = None
    currency: str | None = None
    due_in_seconds: float = 0.0


# Under this name two operators say together what no rail tells.
OPERATORS: Final = "operators"

# A rail and its own id of an event.
EventKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class RailEvent:
    """A word that nobody has applied yet, under our lock. `payout_id` None: nothing of ours has that reference."""

    rail: str
    event_id: str
    reference: str
    outcome: str
    failure_code: str | None
    provider_reference: str | None
    amount_minor: int | None
    currency: str | None
    payout_id: UUID | None

    @property
    def key(self) -> EventKey:
        """What it is known by."""
        return self.rail, self.event_id


# The same event twice is one event.
_APPEND = text(
    """
    INSERT INTO rail_events (rail, event_id, reference, outcome, failure_code, provider_reference, amount_minor,
                             currency, due_at)
    SELECT rail, event_id, reference, outcome, failure_code, provider_reference, amount_minor, currency,
           now() + make_interval(secs => due_in_seconds)
      FROM unnest(CAST(:rail AS text[]), CAST(:event_id AS text[]), CAST(:reference AS text[]), CAST(:outcome AS text[]),
                  CAST(:failure_code AS text[]), CAST(:provider_reference AS text[]), CAST(:amount_minor AS bigint[]),
                  CAST(:currency AS text[]), CAST(:due_in_seconds AS float8[]))
        AS e (rail, event_id, reference, outcome, failure_code, provider_reference, amount_minor, currency,
              due_in_seconds)
        ON CONFLICT (rail, event_id) DO NOTHING
    """
)

_FIND_DUE = text(
    """
    SELECT rail, event_id FROM rail_events
     WHERE applied_at IS NULL AND due_at <= now() AND starts_with(reference, 'pi_') = :payins
     ORDER BY due_at, event_id LIMIT CAST(:events_max AS int)
    """
)

_LOCK = text(
    """
    SELECT e.rail, e.event_id, e.reference, e.outcome, e.failure_code, e.provider_reference, e.amount_minor, e.currency,
           a.payout_id
      FROM unnest(CAST(:rail AS text[]), CAST(:event_id AS text[])) AS w (rail, event_id)
      JOIN rail_events e ON e.rail = w.rail AND e.event_id = w.event_id
      LEFT JOIN payout_attempts a ON a.reference = e.reference AND a.attempt_no = 1 AND e.rail IN (a.rail, 'operators')
     WHERE e.applied_at IS NULL
     ORDER BY e.due_at, e.event_id FOR UPDATE OF e SKIP LOCKED
    """
)

_APPLY = text(
    """
    UPDATE rail_events e SET applied_at = now(), effect = f.effect
      FROM unnest(CAST(:rail AS text[]), CAST(:event_id AS text[]), CAST(:effect AS text[])) AS f (rail, event_id, effect)
     WHERE e.rail = f.rail AND e.event_id = f.event_id
    """
)

_OPEN = text(
    """
    INSERT INTO discrepancies (id, rail, reference, payout_id, shop_id, state, word, kind, detail, payin_id)
    SELECT * FROM unnest(CAST(:id AS uuid[]), CAST(:rail AS text[]), CAST(:reference AS text[]),
                         CAST(:payout_id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:state AS text[]),
                         CAST(:word AS text[]), CAST(:kind AS text[]), CAST(:detail AS text[]),
                         CAST(:payin_id AS uuid[]))
        ON CONFLICT (rail, reference, kind, word, detail) WHERE closed_at IS NULL DO NOTHING
    RETURNING id
    """
)


async def append_rail_events(tx: Tx, events: Sequence[NewRailEvent]) -> None:
    """Store words. Repeat: an event that is there already stays as it is."""
    if events:
        await tx.execute(_APPEND, arrays_of(events, NewRailEvent))


async def find_rail_event(tx: Tx, rail: str, event_id: str) -> NewRailEvent | None:
    """An event as it was stored."""
    row = (await tx.execute(_FIND, {"rail": rail, "event_id": event_id})).one_or_none()
    return None if row is None else NewRailEvent(**row._mapping)


_FIND = text(
    """
    SELECT rail, event_id, reference, outcome, failure_code, provider_reference, amount_minor, currency
      FROM rail_events WHERE rail = :rail AND event_id = :event_id
    """
)


async def find_rail_events_due(tx: Tx, *, events_max: int, payins: bool) -> list[EventKey]:
    """Words to listen to, the oldest first: those about payins, or all others."""
    rows = await tx.execute(_FIND_DUE, {"events_max": events_max, "payins": payins})
    return [(row.rail, row.event_id) for row in rows]


async def lock_rail_events(tx: Tx, keys: Collection[EventKey]) -> list[RailEvent]:
    """Those of these words that nobody has applied, the oldest first.

    Locks: their rows; those that others hold are left out. They come before due rows, payouts and accounts.
    """
    rows = await tx.execute(_LOCK, _columns(keys))
    return [RailEvent(**row._mapping) for row in rows]


async def finish_rail_events(tx: Tx, effects: Collection[tuple[RailEvent, str]]) -> None:
    """Write down that words were listened to, and what came of each: `moved`, `known` or `discrepancy`."""
    if effects:
        keys = [event.key for event, _ in effects]
        await tx.execute(_APPLY, {**_columns(keys), "effect": [effect for _, effect in effects]})


async def postpone_rail_events(tx: Tx, keys: Collection[EventKey], *, delay_seconds: float) -> None:
    """Listen to these later, so that others get their turn."""
    if keys:
        await tx.execute(_POSTPONE, {**_columns(keys), "delay_seconds": delay_seconds})


def _columns(keys: Collection[EventKey]) -> dict[str, list[str]]:
    return {"rail": [rail for rail, _ in keys], "event_id": [event_id for _, event_id in keys]}


_POSTPONE = text(
    """
    UPDATE rail_events e SET due_at = now() + make_interval(secs => CAST(:delay_seconds AS float8))
      FROM unnest(CAST(:rail AS text[]), CAST(:event_id AS text[])) AS f (rail, event_id)
     WHERE e.rail = f.rail AND e.event_id = f.event_id AND e.applied_at IS NULL
    """
)


@dataclass(frozen=True, slots=True)
class NewDiscrepancy:
    """A word against what we know: of a payout's or payin's status, of its amount, of the funds that would have to go back,
    or of a reference that is none of ours.
    """

    id: UUID
    rail: str
    reference: str
    payout_id: UUID | None
    shop_id: UUID | None
    state: str | None
    word: str
    kind: str
    detail: str = ""
    payin_id: UUID | None = None


async def open_discrepancies(tx: Tx, found: Sequence[NewDiscrepancy]) -> list[NewDiscrepancy]:
    """Have people look. Repeat: the same contradiction that is open already stays one. Returns: those that are new."""
    if not found:
        return []
    opened = set(await tx.scalars(_OPEN, arrays_of(found, NewDiscrepancy)))
    return [discrepancy for discrepancy in found if discrepancy.id in opened]


async def list_discrepancies(tx: Tx, *, everything: bool, rows_max: int) -> Sequence[Row[Any]]:
    """Open ones, or all, the newest first, with the shop's code."""
    query = (
        select(discrepancies, shops.c.code.label("shop"))
        .outerjoin(shops, shops.c.id == discrepancies.c.shop_id)
        .order_by(discrepancies.c.opened_at.desc(), discrepancies.c.id)
        .limit(rows_max)
    )
    if not everything:
        query = query.where(discrepancies.c.closed_at.is_(None))
    return (await tx.execute(query)).all()


async def close_discrepancy(tx: Tx, discrepancy_id: UUID, *, audit_id: int) -> datetime | None:
    """Close an open one; when, or None when there is none open of that id."""
    closed_at: datetime | None = await tx.scalar(
        update(discrepancies)
        .where(discrepancies.c.id == discrepancy_id, discrepancies.c.closed_at.is_(None))
        .values(closed_at=text("now()"), audit_id=audit_id)
        .returning(discrepancies.c.closed_at)
    )
    return closed_at
