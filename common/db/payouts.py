"""Payouts: how they move, how they are found. How they come to be is in `accepting`.

A payout and the entry that holds or resolves its money are always written by one statement: the schema's checks run at the
end of a statement and see both halves.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, select, text

from common.db.engine import Tx
from common.db.tables import payout_moves, payouts
from common.domain.ledger import Entry
from common.domain.payout import State
from common.errors import InvariantViolated


@dataclass(frozen=True, slots=True)
class Payout:
    """A payout as it stands. Amounts in minor units; the recipient only masked."""

    id: UUID
    shop_id: UUID
    external_id: str
    amount_minor: int
    currency: str
    recipient_masked: str
    recipient_digest: bytes
    payment_data_digest: bytes | None
    callback_url: str | None
    details: dict[str, Any] | None
    state: State
    failure_code: str | None
    provider_reference: str | None
    created_at: datetime
    updated_at: datetime
    finalized_at: datetime | None
    expires_at: datetime | None


_SHOWN = tuple(payouts.c[name] for name in Payout.__dataclass_fields__)

# LATERAL with LIMIT: one index probe per id, also on a table that nobody has analysed.
_FIND_BY_EXTERNAL_IDS = text(
    # The column names are those of `Payout`.
    f"""
    SELECT p.* FROM unnest(CAST(:shop_ids AS uuid[]), CAST(:external_ids AS text[])) AS wanted (shop_id, external_id)
     CROSS JOIN LATERAL (
       SELECT {", ".join(column.name for column in _SHOWN)} FROM payouts
        WHERE payouts.shop_id = wanted.shop_id AND payouts.external_id = wanted.external_id LIMIT 1) p
    """
)


async def find_by_external_ids(tx: Tx, wanted: Collection[tuple[UUID, str]]) -> dict[tuple[UUID, str], Payout]:
    """The payouts that exist of those (shop, external_id)."""
    rows = await tx.execute(
        _FIND_BY_EXTERNAL_IDS,
        {"shop_ids": [shop_id for shop_id, _ in wanted], "external_ids": [external_id for _, external_id in wanted]},
    )
    found = (_payout(row) for row in rows)
    return {(payout.shop_id, payout.external_id): payout for payout in found}


async def find_payout(tx: Tx, shop_id: UUID, external_id: str) -> Payout | None:
    """One payout of a shop, by the merchant's own id."""
    row = (
        await tx.execute(select(*_SHOWN).where(payouts.c.shop_id == shop_id, payouts.c.external_id == external_id))
    ).one_or_none()
    return None if row is None else _payout(row)


def _payout(row: Row[Any]) -> Payout:
    values = dict(row._mapping)
    return Payout(**{**values, "state": State(values["state"])})


@dataclass(frozen=True, slots=True)
class LockedPayout:
    """A payout whose row we hold, with what is needed to send it, to move it and to tell of it.

    `recipient_sealed`: empty unless it was asked for; not every role may read it.
    """

    id: UUID
    shop_id: UUID
    account_id: int
    external_id: str
    amount_minor: int
    currency: str
    recipient_sealed: bytes
    callback_url: str | None
    state: State
    version: int
    provider_reference: str | None
    expires_at: datetime | None
    traceparent: str | None
    shop_code: str
    currency_exponent: int
    webhook_url: str | None
    shop_status: str
    locked_at: datetime

    @property
    def is_frozen(self) -> bool:
        """Whether people have stopped its shop: what has not been sent waits."""
        return self.shop_status != "active"

    @property
    def has_expired(self) -> bool:
        """Whether it must not be sent any more, if it has not been sent yet."""
        return self.expires_at is not None and self.expires_at <= self.locked_at


# LATERAL with LIMIT is one probe per id, whatever the planner knows of the table.
_LOCK_PAYOUTS, _LOCK_PAYOUTS_TO_SEND = (
    text(
        f"""
        SELECT p.*, s.code AS shop_code, s.currency_exponent, s.webhook_url, s.status AS shop_status, now() AS locked_at
          FROM (SELECT DISTINCT unnest(CAST(:ids AS uuid[])) AS id ORDER BY 1) w
         CROSS JOIN LATERAL (
           SELECT id, shop_id, account_id, external_id, amount_minor, currency, {recipient} AS recipient_sealed,
                  callback_url, state, version, provider_reference, expires_at, traceparent
             FROM payouts WHERE id = w.id LIMIT 1 FOR NO KEY UPDATE) p
          JOIN shops s ON s.id = p.shop_id
        """
    )
    for recipient in ("''::bytea", "recipient_sealed")
)


_STATES: Final = {state.value: state for state in State}
_STATE_AT: Final = list(LockedPayout.__dataclass_fields__).index("state")


async def lock_payouts(tx: Tx, payout_ids: Collection[UUID], *, to_send: bool = False) -> list[LockedPayout]:
    """Lock payouts until the transaction ends; the newest values of each, with `to_send` the recipients too.

    Locks: payouts in id order. Due rows come before, accounts after.
    """
    rows = await tx.execute(_LOCK_PAYOUTS_TO_SEND if to_send else _LOCK_PAYOUTS, {"ids": list(payout_ids)})
    return [_locked_payout(row) for row in rows]


def _locked_payout(row: Row[Any]) -> LockedPayout:
    """The columns are the fields, in their order; by name it would take twice as long."""
    values = list(row)
    values[_STATE_AT] = _STATES[values[_STATE_AT]]
    return LockedPayout(*values)


@dataclass(frozen=True, slots=True)
class Move:
    """A payout's next state, and the entry that comes with it: of the hold's resolution, or of what was returned."""

    payout: LockedPayout
    state: State
    failure_code: str | None = None
    provider_reference: str | None = None
    entry: Entry | None = None

    @property
    def version(self) -> int:
        """The version the payout has after the move; also the `sequence` of what is told about it."""
        return self.payout.version + 1


# The caller holds the rows, so they stay where this statement finds them.
_SAVE_MOVES = text(
    """
    WITH moved AS (
      SELECT * FROM unnest(
        CAST(:id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:account_id AS bigint[]), CAST(:amount_minor AS bigint[]),
        CAST(:state AS text[]), CAST(:version AS int[]), CAST(:failure_code AS text[]),
        CAST(:provider_reference AS text[]), CAST(:seq AS bigint[]), CAST(:kind AS text[]), CAST(:contra AS text[]),
        CAST(:posted_delta_minor AS bigint[]), CAST(:held_delta_minor AS bigint[]),
        CAST(:posted_after_minor AS bigint[]), CAST(:held_after_minor AS bigint[]))
      AS m (id, shop_id, account_id, amount_minor, state, version, failure_code, provider_reference, seq, kind, contra,
            posted_delta_minor, held_delta_minor, posted_after_minor, held_after_minor)),
    resolutions AS (
      INSERT INTO entries (account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, held_delta_minor,
                           posted_after_minor, held_after_minor, payout_id)
      SELECT account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, held_delta_minor,
             posted_after_minor, held_after_minor, id FROM moved WHERE seq IS NOT NULL),
    done AS (
      DELETE FROM payout_due WHERE payout_id = ANY (ARRAY (SELECT id FROM moved WHERE seq IS NOT NULL)))
    UPDATE payouts p
       SET state = m.state, version = m.version, failure_code = m.failure_code,
           provider_reference = CASE WHEN p.resolution_seq IS NULL
             THEN coalesce(p.provider_reference, m.provider_reference) ELSE p.provider_reference END,
           resolution_seq = coalesce(p.resolution_seq, m.seq),
           return_seq = CASE WHEN m.state = 'refunded' THEN m.seq END, updated_at = now(),
           finalized_at = coalesce(p.finalized_at, CASE WHEN m.seq IS NOT NULL THEN now() END)
      FROM moved m CROSS JOIN LATERAL (
        SELECT ctid AS place FROM payouts WHERE id = m.id AND shop_id IS NOT DISTINCT FROM m.shop_id LIMIT 1) held
     WHERE p.ctid = held.place
    """
)


async def save_moves(tx: Tx, moves: Sequence[Move]) -> None:
    """Give payouts their next state. Those whose move has an entry end or come back: with it, and due no more.

    Locks: the caller holds the payouts, and the due rows and accounts of those that end.
    Raises: `InvariantViolated` when a payout was not held, and had gone from where it was found.
    """
    if not moves:
        return
    arrays: dict[str, list[Any]] = {
        name: [getattr(move.payout, name) for move in moves] for name in ("id", "shop_id", "account_id", "amount_minor")
    }
    arrays |= {
        name: [getattr(move, name) for move in moves]
        for name in ("state", "version", "failure_code", "provider_reference")
    }
    for name in (
        "seq",
        "kind",
        "contra",
        "posted_delta_minor",
        "held_delta_minor",
        "posted_after_minor",
        "held_after_minor",
    ):
        arrays[name] = [None if move.entry is None else getattr(move.entry, name) for move in moves]
    if (await tx.execute(_SAVE_MOVES, arrays)).rowcount != len(moves):
        raise InvariantViolated


@dataclass(frozen=True, slots=True)
class PastMove:
    """A line of a payout's history: the state it came to, under which version, and when."""

    version: int
    state: State
    at: datetime


async def find_moves(tx: Tx, payout_id: UUID, shop_id: UUID) -> list[PastMove]:
    """Where a payout has been since it was queued, oldest first."""
    rows = await tx.execute(
        select(payout_moves.c.version, payout_moves.c.state, payout_moves.c.at)
        .where(payout_moves.c.payout_id == payout_id, payout_moves.c.shop_id == shop_id)
        .order_by(payout_moves.c.version)
    )
    return [PastMove(row.version, State(row.state), row.at) for row in rows]
