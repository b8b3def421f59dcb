"""Replays: many callbacks sent again, page by page, each page from where the last one ended, whatever became of its sender."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from common.db.callbacks import resend_callback
from common.db.engine import Tx
from common.domain.addresses import spellings_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which callbacks: in that state, of that merchant, shop and origin if given, created from `since` on, before `until`."""

    state: str
    merchant: str | None = None
    shop: str | None = None
    origin: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """A replay and how far it is: callbacks sent again, and those that were being sent just then."""

    id: UUID
    per_second: int
    sent: int
    passed_over: int
    finished: bool


_MATCHES = """c.state = CAST(:state AS text)
       AND (CAST(:merchant AS text) IS NULL OR m.code = :merchant)
       AND (CAST(:shop AS text) IS NULL OR s.code = :shop)
       AND (CAST(:origins AS text[]) IS NULL
            OR lower(substring(c.url FROM '^[A-Za-z]+://[^/?#]+')) = ANY (CAST(:origins AS text[])))
       AND (CAST(:since AS timestamptz) IS NULL OR c.created_at >= :since)
       AND (CAST(:until AS timestamptz) IS NULL OR c.created_at < :until)
       AND (CAST(:begun_at AS timestamptz) IS NULL OR c.created_at < :begun_at)"""

# Of so many callbacks in the order of their ids, those that match. What does not is looked at once, not again by each page.
_PAGE = text(
    f"""
    SELECT c.event_id
      FROM (SELECT * FROM callbacks WHERE event_id > CAST(:behind AS uuid) ORDER BY event_id LIMIT CAST(:looks_max AS int)) c
      JOIN shops s ON s.id = c.shop_id JOIN merchants m ON m.id = s.merchant_id
     WHERE {_MATCHES}
     ORDER BY c.event_id LIMIT CAST(:rows_max AS int)
    """
)

_LAST_LOOKED_AT = text(
    """
    SELECT event_id FROM callbacks WHERE event_id > CAST(:behind AS uuid)
     ORDER BY event_id OFFSET CAST(:looks_max AS int) - 1 LIMIT 1
    """
)

_BEGIN = text(
    """
    INSERT INTO callback_replays (id, filter, per_second, actor, reason)
    VALUES (:id, :filter, :per_second, :actor, :reason)
    """
).bindparams(bindparam("filter", type_=JSONB))

_EXISTS = text("SELECT EXISTS (SELECT 1 FROM callback_replays WHERE id = :id)")

_LOCK = text(
    """
    SELECT id, filter, per_second, behind, sent, passed_over, created_at, finished_at IS NOT NULL AS finished
      FROM callback_replays WHERE id = :id FOR UPDATE
    """
).columns(filter=JSONB)

_SAVE = text(
    """
    UPDATE callback_replays
       SET behind = coalesce(:behind, behind), sent = sent + :sent, passed_over = passed_over + :passed_over,
           finished_at = CASE WHEN :finished THEN coalesce(finished_at, now()) END
     WHERE id = :id RETURNING id, per_second, sent, passed_over, finished_at IS NOT NULL AS finished
    """
)


# How much earlier than its callback an event's id may have been made.
_ID_AGE_MILLISECONDS: Final = 3_600_000
# Callbacks that one statement looks at, so that each ends in time however few of them match.
LOOKS_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Page:
    """The next callbacks that match, by their events, and where to go on; `behind` None: these are the last."""

    event_ids: list[UUID]
    behind: UUID | None


def _values(chosen: Chosen) -> dict[str, Any]:
    """What the statements are asked with."""
    values = asdict(chosen)
    origin = values.pop("origin")
    return values | {"origins": None if origin is None else spellings_of(origin)}


def _begin_of(chosen: Chosen) -> UUID:
    """Ids begin with the time: there is no use in looking at those from before `since`."""
    since_ms = 0 if chosen.since is None else int(chosen.since.timestamp() * 1000)
    return UUID(int=max(0, since_ms - _ID_AGE_MILLISECONDS) << 80)


async def find_page(
    tx: Tx,
    chosen: Chosen,
    *,
    behind: UUID | None,
    begun_at: datetime | None = None,
    rows_max: int = LOOKS_MAX,
    looks_max: int = LOOKS_MAX,
) -> Page:
    """At most `rows_max` of those chosen, created before `begun_at`, among the next `looks_max` behind an event, or from the
    first one on.
    """
    place = {"behind": behind or _begin_of(chosen), "looks_max": looks_max}
    values = _values(chosen) | place | {"begun_at": begun_at, "rows_max": rows_max}
    event_ids = list(await tx.scalars(_PAGE, values))
    if len(event_ids) == rows_max:
        return Page(event_ids, event_ids[-1])
    return Page(event_ids, await tx.scalar(_LAST_LOOKED_AT, place))


async def begin_replay(tx: Tx, replay_id: UUID, chosen: Chosen, *, per_second: int, actor: str, reason: str) -> None:
    """Write down what is to be sent again. Nothing is sent yet."""
    values = {
        name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(chosen).items()
    }
    await tx.execute(
        _BEGIN, {"id": replay_id, "filter": values, "per_second": per_second, "actor": actor, "reason": reason}
    )


async def has_replay(tx: Tx, replay_id: UUID) -> bool:
    """Whether there is such a replay, over or not."""
    return bool(await tx.scalar(_EXISTS, {"id": replay_id}))


async def replay_page(tx: Tx, replay_id: UUID, *, rows_max: int, looks_max: int = LOOKS_MAX) -> Replay | None:
    """Send the next few callbacks of a replay again; None: there is no such replay. Repeat: goes on where the last page ended.

    Fewer than `rows_max`, or none, when few of the next `looks_max` are those that were chosen.

    What came after the replay was begun is none of its business, so that it ends however fast new ones come.
    Locks: the replay, the callbacks and their due rows.
    """
    replay = (await tx.execute(_LOCK, {"id": replay_id})).one_or_none()
    if replay is None or replay.finished:
        return None if replay is None else Replay(replay.id, replay.per_second, replay.sent, replay.passed_over, True)
    page = await find_page(
        tx,
        _parse(replay.filter),
        behind=replay.behind,
        begun_at=replay.created_at,
        rows_max=rows_max,
        looks_max=looks_max,
    )
    sent = sum([await resend_callback(tx, event_id) for event_id in page.event_ids])
    values = {
        "id": replay_id,
        "behind": page.behind,
        "sent": sent,
        "passed_over": len(page.event_ids) - sent,
        "finished": page.behind is None,
    }
    return Replay(**(await tx.execute(_SAVE, values)).one()._mapping)


def _parse(stored: Mapping[str, Any]) -> Chosen:
    times = {name: datetime.fromisoformat(stored[name]) for name in ("since", "until") if stored[name] is not None}
    return Chosen(**{**stored, **times})
