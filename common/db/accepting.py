"""How payouts come to be: the payout, the hold of its money and the obligation to settle it, by one statement.

There are two ways. `append_accepted` writes what somebody has decided under the locks of the accounts. `accept_unopposed`
locks, looks and writes in one round trip, where there is nothing to decide.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from common.db.engine import Tx, arrays_of
from common.domain.ledger import Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPayout:
    """Everything that is stored of a payout when it is accepted, but the place of its hold in the ledger."""

    id: UUID
    shop_id: UUID
    account_id: int
    external_id: str
    amount_minor: int
    currency: str
    recipient_sealed: bytes = field(repr=False)
    recipient_masked: str
    recipient_digest: bytes = field(repr=False)
    payment_data_digest: bytes | None = field(repr=False)
    callback_url: str | None
    details: dict[str, Any] | None
    rail: str
    expires_at: datetime | None = None
    traceparent: str | None = None


_APPEND_ACCEPTED = text(
    """
    WITH accepted AS (
      SELECT * FROM unnest(
        CAST(:id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:account_id AS bigint[]), CAST(:external_id AS text[]),
        CAST(:amount_minor AS bigint[]), CAST(:currency AS text[]), CAST(:recipient_sealed AS bytea[]),
        CAST(:recipient_masked AS text[]), CAST(:recipient_digest AS bytea[]), CAST(:payment_data_digest AS bytea[]),
        CAST(:callback_url AS text[]), CAST(:details AS text[]), CAST(:rail AS text[]),
        CAST(:expires_at AS timestamptz[]), CAST(:traceparent AS text[]), CAST(:seq AS bigint[]),
        CAST(:posted_after_minor AS bigint[]), CAST(:held_after_minor AS bigint[]))
      AS a (id, shop_id, account_id, external_id, amount_minor, currency, recipient_sealed, recipient_masked,
            recipient_digest, payment_data_digest, callback_url, details, rail, expires_at, traceparent, seq,
            posted_after_minor, held_after_minor)),
    due AS (
      INSERT INTO payout_due (payout_id, shop_id, rail, expires_at) SELECT id, shop_id, rail, expires_at FROM accepted),
    holds AS (
      INSERT INTO entries (account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, held_delta_minor,
                           posted_after_minor, held_after_minor, payout_id)
      SELECT account_id, seq, shop_id, 'hold', 'holds', amount_minor, 0, amount_minor,
             posted_after_minor, held_after_minor, id FROM accepted)
    INSERT INTO payouts (id, shop_id, account_id, external_id, amount_minor, currency, recipient_sealed,
                         recipient_masked, recipient_digest, payment_data_digest, callback_url, details, expires_at,
                         traceparent, hold_seq)
    SELECT id, shop_id, account_id, external_id, amount_minor, currency, recipient_sealed, recipient_masked,
           recipient_digest, payment_data_digest, callback_url, CAST(details AS jsonb), expires_at, traceparent,
           seq FROM accepted
    """
)

_ACCEPT_UNOPPOSED = text(
    """
    SELECT account_id, accepted_at, told_at FROM accept_unopposed(
      CAST(:accounts AS bigint[]), CAST(:wait_ms AS integer), CAST(:until AS timestamptz),
      CAST(:id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:account_id AS bigint[]), CAST(:external_id AS text[]),
      CAST(:amount_minor AS bigint[]), CAST(:currency AS text[]), CAST(:recipient_sealed AS bytea[]),
      CAST(:recipient_masked AS text[]), CAST(:recipient_digest AS bytea[]), CAST(:payment_data_digest AS bytea[]),
      CAST(:callback_url AS text[]), CAST(:details AS text[]), CAST(:rail AS text[]),
      CAST(:expires_at AS timestamptz[]), CAST(:traceparent AS text[]))
    """
)


@dataclass(frozen=True, slots=True)
class Unopposed:
    """Of the accounts that nobody else holds, when their payouts were accepted; None: not at all.

    `told_at`: the server's clock a moment ago; None when somebody else holds all of them.
    """

    accepted_at: dict[int, datetime | None]
    told_at: datetime | None


async def accept_unopposed(tx: Tx, wanted: Sequence[NewPayout], *, wait_seconds: float, until: datetime) -> Unopposed:
    """Accept all payouts of each account that nothing speaks against, and none of the others. One statement.

    Something does if the shop or its merchant is not active, an id is known already or comes twice, the money does not
    suffice for all, or one has expired. When the server's clock has passed `until`, none is accepted.
    Locks: the accounts, in id order. With `wait_seconds` 0, those that somebody else holds are left out.
    Raises: `AccountBusy` (by `in_transaction`) when one is held for longer than `wait_seconds`.
    """
    accounts = list({payout.account_id for payout in wanted})
    rows = (
        await tx.execute(
            _ACCEPT_UNOPPOSED,
            {
                "accounts": accounts,
                "wait_ms": int(wait_seconds * 1000),
                "until": until,
                **_columns(wanted),
            },
        )
    ).all()
    return Unopposed({row.account_id: row.accepted_at for row in rows}, rows[0].told_at if rows else None)


async def append_accepted(tx: Tx, accepted: Sequence[tuple[NewPayout, Entry]]) -> None:
    """Payouts that were accepted, each with the entry that holds its money.

    Locks: the caller holds the accounts, so no other create of these shops can come between.
    """
    columns = _columns([payout for payout, _ in accepted])
    for name in ("seq", "posted_after_minor", "held_after_minor"):
        columns[name] = [getattr(hold, name) for _, hold in accepted]
    await tx.execute(_APPEND_ACCEPTED, columns)


def _columns(payouts: Sequence[NewPayout]) -> dict[str, list[Any]]:
    columns = arrays_of(payouts, NewPayout)
    columns["details"] = [None if payout.details is None else json.dumps(payout.details) for payout in payouts]
    return columns
