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


_MATCHING = """
      FROM callbacks c JOIN shops s ON s.id = c.shop_id JOIN merchants m ON m.id = s.merchant_id
     WHERE c.state = CAST(:state AS text)
       AND c.event_id >= CAST(:first_id AS uuid)
       AND (CAST(:merchant AS text) IS NULL OR m.code = :merchant)
       AND (CAST(:shop AS text) IS NULL OR s.code = :shop)
       AND (CAST(:origins AS text[]) IS NULL
            OR lower(substring(c.url FROM '^[A-Za-z]+://[^/?#]+')) = ANY (CAST(:origins AS text[])))
       AND (CAST(:since AS timestamptz) IS NULL OR c.created_at >= :since)
       AND (CAST(:until AS timestamptz) IS NULL OR c.created_at < :until)"""

_COUNT = text(f"SELECT count(*) {_MATCHING}")

_PAGE = text(
    f"""
    SELECT c.event_id {_MATCHING}
       AND c.created_at < CAST(:begun_at AS timestamptz)
       AND (CAST(:behind AS uuid) IS NULL OR c.event_id > :behind)
     ORDER BY c.event_id LIMIT CAST(:rows_max AS int)
    """
)

_BEGIN = text(
    """
    INSERT INTO callback_replays (id, filter, per_second, actor, reason)
    VALUES (:id, :filter, :per_second, :actor, :reason)
    """
).bindparams(bindparam("filter", type_=JSONB))

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


def _values(chosen: Chosen) -> dict[str, Any]:
    """What the statements are asked with. Ids begin with the time: there is no use in looking at those from before `since`."""
    values = asdict(chosen)
    origin = values.pop("origin")
    since_ms = 0 if chosen.since is None else int(chosen.since.timestamp() * 1000)
    first_id = UUID(int=max(0, since_ms - _ID_AGE_MILLISECONDS) << 80)
    return values | {"first_id": first_id, "origins": None if origin is None else spellings_of(origin)}


async def count_chosen(tx: Tx, chosen: Chosen) -> int:
    """How many callbacks a replay would send again now."""
    return int(await tx.scalar(_COUNT, _values(chosen)) or 0)


async def begin_replay(tx: Tx, replay_id: UUID, chosen: Chosen, *, per_second: int, actor: str, reason: str) -> None:
    """Write down what is to be sent again. Nothing is sent yet."""
    values = {
        name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(chosen).items()
    }
    await tx.execute(
        _BEGIN, {"id": replay_id, "filter": values, "per_second": per_second, "actor": actor, "reason": reason}
    )


async def replay_page(tx: Tx, replay_id: UUID, *, rows_max: int) -> Replay | None:
    """Send the next few callbacks of a replay again; None: there is no such replay. Repeat: goes on where the last page ended.

    What came after the replay was begun is none of its business, so that it ends however fast new ones come.
    Locks: the replay, the callbacks and their due rows.
    """
    replay = (await tx.execute(_LOCK, {"id": replay_id})).one_or_none()
    if replay is None or replay.finished:
        return None if replay is None else Replay(replay.id, replay.per_second, replay.sent, replay.passed_over, True)
    place = {"begun_at": replay.created_at, "behind": replay.behind, "rows_max": rows_max}
    page = list(await tx.scalars(_PAGE, _values(_parse(replay.filter)) | place))
    sent = sum([await resend_callback(tx, event_id) for event_id in page])
    values = {
        "id": replay_id,
        "behind": page[-1] if page else None,
        "sent": sent,
        "passed_over": len(page) - sent,
        "finished": len(page) < rows_max,
    }
    return Replay(**(await tx.execute(_SAVE, values)).one()._mapping)


def _parse(stored: Mapping[str, Any]) -> Chosen:
    times = {name: datetime.fromisoformat(stored[name]) for name in ("since", "until") if stored[name] is not None}
    return Chosen(**{**stored, **times})
