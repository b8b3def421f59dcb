"""Payins: how they come to be, how they are found, how they move, and when their rails are asked about them.

A payin and the entry that moves its money are always written by one statement: the schema's checks run at the end of a
statement and see both halves.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, select, text

from common.db.engine import Tx, arrays_of
from common.db.tables import payins
from common.domain.ledger import Entry
from common.domain.payin import PayinState


@dataclass(frozen=True, slots=True)
class Payin:
    """A payin as it stands. Amounts in minor units; `reference` is what its payer quotes."""

    id: UUID
    shop_id: UUID
    external_id: str
    amount_minor: int
    currency: str
    reference: str
    payment_link: str | None
    payment_data_digest: bytes | None
    callback_url: str | None
    details: dict[str, Any] | None
    state: PayinState
    failure_code: str | None
    provider_reference: str | None
    expires_at: datetime | None
    created_at: datetime
    updated_at: datetime
    finalized_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewPayin:
    """Everything that is stored of a create. `look_up_in_seconds`: until its rail is asked for the first time."""

    id: UUID
    shop_id: UUID
    account_id: int
    external_id: str
    amount_minor: int
    currency: str
    rail: str
    reference: str
    payment_data_digest: bytes | None = field(repr=False)
    callback_url: str | None
    details: str | None
    expires_at: datetime | None
    look_up_in_seconds: float


_SHOWN = tuple(payins.c[name] for name in Payin.__dataclass_fields__)

# One that has the id already is waited for and found by the next statement.
_APPEND = text(
    """
    WITH fresh AS (
      INSERT INTO payins (id, shop_id, account_id, external_id, amount_minor, currency, rail, reference, payment_link,
                          payment_data_digest, callback_url, details, expires_at)
      SELECT n.id, n.shop_id, n.account_id, n.external_id, n.amount_minor, n.currency, n.rail, n.reference,
             (SELECT replace(r.payin_link, '{reference}', n.reference) FROM rails r WHERE r.name = n.rail),
             n.payment_data_digest, n.callback_url, n.details, n.expires_at
        FROM (SELECT CAST(:id AS uuid) AS id, CAST(:shop_id AS uuid) AS shop_id, CAST(:account_id AS bigint) AS account_id,
                     CAST(:external_id AS text) AS external_id, CAST(:amount_minor AS bigint) AS amount_minor,
                     CAST(:currency AS text) AS currency, CAST(:rail AS text) AS rail,
                     CAST(:reference AS text) AS reference, CAST(:payment_data_digest AS bytea) AS payment_data_digest,
                     CAST(:callback_url AS text) AS callback_url, CAST(:details AS jsonb) AS details,
                     CAST(:expires_at AS timestamptz) AS expires_at) n
       WHERE coalesce(n.expires_at > now(), true)
          ON CONFLICT (shop_id, external_id) DO NOTHING
      RETURNING id, shop_id, rail)
    INSERT INTO payin_due (payin_id, shop_id, rail, due_at)
    SELECT id, shop_id, rail, now() + make_interval(secs => CAST(:look_up_in_seconds AS float8)) FROM fresh
    """
)


async def append_payin(tx: Tx, payin: NewPayin) -> None:
    """Store a payin with its due row. Nothing is stored when its shop has one of that `external_id`, or its time is over."""
    await tx.execute(_APPEND, {name: getattr(payin, name) for name in NewPayin.__dataclass_fields__})


async def find_payin(tx: Tx, shop_id: UUID, external_id: str) -> Payin | None:
    """One payin of a shop, by the merchant's own id."""
    row = (
        await tx.execute(select(*_SHOWN).where(payins.c.shop_id == shop_id, payins.c.external_id == external_id))
    ).one_or_none()
    return None if row is None else _payin(row)


def _payin(row: Row[Any]) -> Payin:
    values = dict(row._mapping)
    return Payin(**{**values, "state": PayinState(values["state"])})


@dataclass(frozen=True, slots=True)
class Question:
    """A pending payin under our lease, whose rail is to be asked. `is_over`: its time was over when the question was put.

    `is_over` counts from `lag_seconds` after the end: until then the rail may not know of what was paid in time.
    """

    payin_id: UUID
    shop_id: UUID
    rail: str
    reference: str
    amount_minor: int
    currency: str
    look_ups: int
    is_over: bool


# Updated by ctid, and one probe for each payin: of a flood the planner expects so many that it would read all that waits. A row
# that somebody has written since this statement began is left to the next look, as in `common.db.due`.
_CLAIM = text(
    """
    WITH picked AS (
      SELECT ctid AS place FROM payin_due WHERE rail = :rail AND due_at <= now()
       ORDER BY due_at LIMIT CAST(:claim_max AS int) FOR UPDATE SKIP LOCKED),
    leased AS (
      UPDATE payin_due d
         SET lease_token = CAST(:token AS uuid), due_at = now() + make_interval(secs => CAST(:lease_seconds AS float8)),
             look_ups = d.look_ups + 1
        FROM picked WHERE d.ctid = picked.place
      RETURNING d.payin_id, d.shop_id, d.rail, d.look_ups)
    SELECT l.payin_id, l.shop_id, l.rail, p.reference, p.amount_minor, p.currency, l.look_ups,
           coalesce(p.expires_at + make_interval(secs => CAST(:lag_seconds AS float8)) <= now(), false) AS is_over
      FROM leased l CROSS JOIN LATERAL (
        SELECT reference, amount_minor, currency, expires_at FROM payins
         WHERE id = l.payin_id AND shop_id = l.shop_id LIMIT 1) p
    """
)


async def claim_questions(
    tx: Tx, *, rail: str, token: UUID, lease_seconds: float, claim_max: int, lag_seconds: float
) -> list[Question]:
    """Take pending payins that are due under a lease, those that are due longest. Locks: the due rows taken."""
    rows = await tx.execute(
        _CLAIM,
        {
            "rail": rail,
            "token": token,
            "lease_seconds": lease_seconds,
            "claim_max": claim_max,
            "lag_seconds": lag_seconds,
        },
    )
    return [Question(**row._mapping) for row in rows]


# Never behind the payin's end, so that it is told of it in time.
_RESCHEDULE = text(
    """
    UPDATE payin_due d
       SET lease_token = NULL,
           due_at = least(now() + make_interval(secs => CAST(:delay_seconds AS float8)),
                          CASE WHEN p.expires_at > now()
                               THEN p.expires_at + make_interval(secs => CAST(:lag_seconds AS float8)) END)
      FROM payins p
     WHERE d.payin_id = :payin_id AND d.shop_id = :shop_id AND d.lease_token = CAST(:token AS uuid)
       AND p.id = d.payin_id AND p.shop_id = d.shop_id
    """
)


async def reschedule_question(
    tx: Tx, question: Question, *, token: UUID, delay_seconds: float, lag_seconds: float
) -> None:
    """Ask again after that many seconds, and right after the payin's end; unless the lease is somebody else's by now."""
    await tx.execute(
        _RESCHEDULE,
        {
            "payin_id": question.payin_id,
            "shop_id": question.shop_id,
            "token": token,
            "delay_seconds": delay_seconds,
            "lag_seconds": lag_seconds,
        },
    )


@dataclass(frozen=True, slots=True)
class LockedPayin:
    """A payin whose row we hold, with what is needed to move it and to tell of it."""

    id: UUID
    shop_id: UUID
    account_id: int
    external_id: str
    amount_minor: int
    currency: str
    rail: str
    reference: str
    callback_url: str | None
    state: PayinState
    version: int
    provider_reference: str | None
    shop_code: str
    currency_exponent: int
    webhook_url: str | None
    words: int
    has_unheard: bool


_LOCK = text(
    """
    SELECT p.id, p.shop_id, p.account_id, p.external_id, p.amount_minor, p.currency, p.rail, p.reference, p.callback_url,
           p.state, p.version, p.provider_reference, s.code AS shop_code, s.currency_exponent, s.webhook_url
      FROM unnest(CAST(:references AS text[])) AS w (reference)
      JOIN payins p ON p.reference = w.reference JOIN shops s ON s.id = p.shop_id
     ORDER BY p.id FOR NO KEY UPDATE OF p
    """
)

# Asked under the locks, so that nobody's word is missed.
_WORDS = text(
    """
    SELECT p.id, (SELECT count(*) FROM payin_words t WHERE t.payin_id = p.id AND t.shop_id = p.shop_id) AS words,
           EXISTS (SELECT 1 FROM rail_events e
                    WHERE e.reference = p.reference AND e.rail = p.rail AND e.applied_at IS NULL) AS has_unheard
      FROM payins p WHERE p.reference = ANY (CAST(:references AS text[]))
    """
)


async def lock_payins(tx: Tx, references: Collection[str]) -> list[LockedPayin]:
    """Lock the payins of these references until the transaction ends.

    Locks: due rows, then payins, each in id order; accounts come after. Rails' words come before.
    """
    wanted = {"references": sorted(references)}
    await tx.execute(_LOCK_DUE, wanted)
    rows = (await tx.execute(_LOCK, wanted)).all()
    heard = {row.id: row for row in await tx.execute(_WORDS, wanted)}
    return [
        LockedPayin(
            **{**row._mapping, "state": PayinState(row.state)},
            words=heard[row.id].words,
            has_unheard=heard[row.id].has_unheard,
        )
        for row in rows
    ]


_LOCK_DUE = text(
    """
    SELECT d.payin_id FROM unnest(CAST(:references AS text[])) AS w (reference)
      JOIN payins p ON p.reference = w.reference
      JOIN payin_due d ON d.payin_id = p.id AND d.shop_id = p.shop_id ORDER BY d.payin_id FOR UPDATE OF d
    """
)


@dataclass(frozen=True, slots=True)
class PayinWord:
    """What a rail said about a payin, by `look_up` or as an `event`. Amount in minor units, None when it named none."""

    source: str
    rail: str
    reference: str
    outcome: str
    amount_minor: int | None = None
    currency: str | None = None
    failure_code: str | None = None
    provider_reference: str | None = None


@dataclass(frozen=True, slots=True)
class _WordRow:
    payin_id: UUID
    shop_id: UUID
    word_no: int
    source: str
    rail: str
    outcome: str
    amount_minor: int | None
    currency: str | None
    failure_code: str | None
    provider_reference: str | None


_APPEND_WORD = text(
    """
    INSERT INTO payin_words (payin_id, shop_id, word_no, source, rail, outcome, amount_minor, currency, failure_code,
                             provider_reference)
    SELECT * FROM unnest(CAST(:payin_id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:word_no AS int[]),
                         CAST(:source AS text[]), CAST(:rail AS text[]), CAST(:outcome AS text[]),
                         CAST(:amount_minor AS bigint[]), CAST(:currency AS text[]), CAST(:failure_code AS text[]),
                         CAST(:provider_reference AS text[]))
    """
)


async def append_payin_word(tx: Tx, payin: LockedPayin, word: PayinWord) -> None:
    """Write down the word that moves a payin. Locks: the caller holds the payin."""
    row = _WordRow(
        payin.id,
        payin.shop_id,
        payin.words + 1,
        word.source,
        word.rail,
        word.outcome,
        word.amount_minor,
        word.currency,
        word.failure_code,
        word.provider_reference,
    )
    await tx.execute(_APPEND_WORD, arrays_of([row], _WordRow))


@dataclass(frozen=True, slots=True)
class PayinMove:
    """A payin's next state, and the entry that comes with it: the credit, or the refund."""

    payin: LockedPayin
    state: PayinState
    version: int
    failure_code: str | None = None
    provider_reference: str | None = None
    entry: Entry | None = None


_SAVE_MOVE = text(
    """
    WITH moved AS (
      SELECT CAST(:id AS uuid) AS id, CAST(:shop_id AS uuid) AS shop_id, CAST(:account_id AS bigint) AS account_id,
             CAST(:amount_minor AS bigint) AS amount_minor, CAST(:seq AS bigint) AS seq, CAST(:kind AS text) AS kind,
             CAST(:contra AS text) AS contra, CAST(:posted_delta_minor AS bigint) AS posted_delta_minor,
             CAST(:posted_after_minor AS bigint) AS posted_after_minor, CAST(:held_after_minor AS bigint) AS held_after_minor),
    money AS (
      INSERT INTO entries (account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, held_delta_minor,
                           posted_after_minor, held_after_minor, payin_id)
      SELECT account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, 0, posted_after_minor,
             held_after_minor, id FROM moved WHERE seq IS NOT NULL),
    done AS (
      DELETE FROM payin_due d USING moved m WHERE d.payin_id = m.id AND d.shop_id = m.shop_id)
    UPDATE payins p
       SET state = :state, version = CAST(:version AS int), failure_code = CAST(:failure_code AS text),
           provider_reference = CASE WHEN p.state = 'pending' THEN CAST(:provider_reference AS text)
                                     ELSE p.provider_reference END,
           credit_seq = CASE WHEN m.kind = 'payin' THEN m.seq ELSE p.credit_seq END,
           refund_seq = CASE WHEN m.kind = 'payin_refund' THEN m.seq END,
           updated_at = now(), finalized_at = coalesce(p.finalized_at, now())
      FROM moved m WHERE p.id = m.id AND p.shop_id = m.shop_id
    """
)


async def save_payin_move(tx: Tx, move: PayinMove) -> None:
    """Give a payin its next state, together with the entry of its money; nothing is due for it any more.

    Locks: the caller holds the payin, and the account when money moves.
    """
    payin, entry = move.payin, move.entry
    await tx.execute(
        _SAVE_MOVE,
        {
            "id": payin.id,
            "shop_id": payin.shop_id,
            "account_id": payin.account_id,
            "amount_minor": payin.amount_minor,
            "state": move.state.value,
            "version": move.version,
            "failure_code": move.failure_code,
            "provider_reference": move.provider_reference,
            **{
                name: None if entry is None else getattr(entry, name)
                for name in ("seq", "kind", "contra", "posted_delta_minor", "posted_after_minor", "held_after_minor")
            },
        },
    )
