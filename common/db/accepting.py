"""How payouts come to be: the payout, the hold of its money and the obligation to settle it, by one statement.

There are two ways. `append_accepted` writes what somebody has decided under the locks of the accounts. `accept_unopposed`
locks, looks and writes at once, where there is nothing to decide: nobody waits for an account longer than PostgreSQL needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import text

from common.db.engine import Tx, arrays_of
from common.domain.ledger import Entry


@dataclass(frozen=True, slots=True)
class NewPayout:
    """Everything that is stored of a payout when it is accepted, but the place of its hold in the ledger."""

    id: UUID
    shop_id: UUID
    account_id: int
    external_id: str
    amount_minor: int
    currency: str
    recipient_sealed: bytes
    recipient_masked: str
    recipient_digest: bytes
    payment_data_digest: bytes | None
    callback_url: str | None
    details: str | None
    rail: str
    expires_at: datetime | None
    traceparent: str | None


# One array for each column, in the order of the fields; `place` is the order in which they came.
_WANTED: Final = """
    unnest(
      CAST(:id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:account_id AS bigint[]), CAST(:external_id AS text[]),
      CAST(:amount_minor AS bigint[]), CAST(:currency AS text[]), CAST(:recipient_sealed AS bytea[]),
      CAST(:recipient_masked AS text[]), CAST(:recipient_digest AS bytea[]), CAST(:payment_data_digest AS bytea[]),
      CAST(:callback_url AS text[]), CAST(:details AS text[]), CAST(:rail AS text[]),
      CAST(:expires_at AS timestamptz[]), CAST(:traceparent AS text[]){more})
    WITH ORDINALITY AS w (id, shop_id, account_id, external_id, amount_minor, currency, recipient_sealed,
                          recipient_masked, recipient_digest, payment_data_digest, callback_url, details, rail,
                          expires_at, traceparent{names}, place)
"""

# What is `accepted`, wherever it comes from.
_WRITE_ACCEPTED: Final = """
    due AS (
      INSERT INTO payout_due (payout_id, shop_id, rail, expires_at) SELECT id, shop_id, rail, expires_at FROM accepted),
    holds AS (
      INSERT INTO entries (account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, held_delta_minor,
                           posted_after_minor, held_after_minor, payout_id)
      SELECT account_id, seq, shop_id, 'hold', 'holds', amount_minor, 0, amount_minor,
             posted_after_minor, held_after_minor, id FROM accepted),
    written AS (
      INSERT INTO payouts (id, shop_id, account_id, external_id, amount_minor, currency, recipient_sealed,
                           recipient_masked, recipient_digest, payment_data_digest, callback_url, details, expires_at,
                           traceparent, hold_seq)
      SELECT id, shop_id, account_id, external_id, amount_minor, currency, recipient_sealed, recipient_masked,
             recipient_digest, payment_data_digest, callback_url, CAST(details AS jsonb), expires_at, traceparent,
             seq FROM accepted)
"""

_DECIDED: Final = _WANTED.format(
    more=", CAST(:seq AS bigint[]), CAST(:posted_after_minor AS bigint[]), CAST(:held_after_minor AS bigint[])",
    names=", seq, posted_after_minor, held_after_minor",
)
_APPEND_ACCEPTED = text(f"WITH accepted AS (SELECT * FROM {_DECIDED}), {_WRITE_ACCEPTED} SELECT count(*) FROM accepted")

# The statement sees what was committed when it began, but for the accounts, which are read anew under their locks. An id that
# came while it waited for them it does not see; the key of the payouts refuses it, and then nothing is written.
# LATERAL with LIMIT: one index probe per id, also on a table that nobody has analysed.
_ACCEPT_UNOPPOSED = text(
    f"""
    WITH locked AS MATERIALIZED (
      SELECT id, last_seq, posted_minor, held_minor, posted_minor - held_minor + credit_limit_minor AS spendable_minor,
             shop_status = 'active' AND merchant_status = 'active' AS active
        FROM lock_accounts(CAST(:accounts AS bigint[]), CAST(:wait_ms AS integer))),
    wanted AS MATERIALIZED (SELECT * FROM {_WANTED.format(more="", names="")}),
    unopposed AS MATERIALIZED (
      SELECT w.account_id
        FROM wanted w JOIN locked l ON l.id = w.account_id
        LEFT JOIN LATERAL (
          SELECT true AS there FROM payouts p
           WHERE p.shop_id = w.shop_id AND p.external_id = w.external_id LIMIT 1) known ON true
       GROUP BY w.account_id
      HAVING bool_and(l.active AND known.there IS NULL AND coalesce(w.expires_at > now(), true))
         AND sum(w.amount_minor) <= min(l.spendable_minor) AND count(DISTINCT w.external_id) = count(*)),
    accepted AS MATERIALIZED (
      SELECT w.*, l.last_seq + row_number() OVER earlier AS seq, l.posted_minor AS posted_after_minor,
             CAST(l.held_minor + sum(w.amount_minor) OVER earlier AS bigint) AS held_after_minor
        FROM wanted w JOIN unopposed u ON u.account_id = w.account_id JOIN locked l ON l.id = w.account_id
      WINDOW earlier AS (PARTITION BY w.account_id ORDER BY w.place)),
    {_WRITE_ACCEPTED}
    SELECT l.id, CASE WHEN EXISTS (SELECT 1 FROM unopposed u WHERE u.account_id = l.id) THEN now() END AS accepted_at
      FROM locked l
    """
)


async def accept_unopposed(tx: Tx, wanted: Sequence[NewPayout], *, wait_seconds: float) -> dict[int, datetime | None]:
    """Accept all payouts of each account that nothing speaks against, and none of the others.

    Something does if the shop is not active, an id is known already or comes twice, the money does not suffice for all, or
    one has expired. Returns: of the accounts that nobody else holds, when their payouts were accepted; None: not at all.

    Locks: the accounts, in id order. With `wait_seconds` 0, those that somebody else holds are left out.
    Raises: `AccountBusy` (by `in_transaction`) when one is held for longer than `wait_seconds`; `IntegrityError` where an id
    came while they were awaited. Nothing is written then.
    """
    accounts = list({payout.account_id for payout in wanted})
    rows = await tx.execute(
        _ACCEPT_UNOPPOSED, {"accounts": accounts, "wait_ms": int(wait_seconds * 1000), **arrays_of(wanted, NewPayout)}
    )
    return {row.id: row.accepted_at for row in rows}


async def append_accepted(tx: Tx, accepted: Sequence[tuple[NewPayout, Entry]]) -> None:
    """Payouts that were accepted, each with the entry that holds its money.

    Locks: the caller holds the accounts, so no other create of these shops can come between.
    """
    columns = arrays_of([payout for payout, _ in accepted], NewPayout)
    for name in ("seq", "posted_after_minor", "held_after_minor"):
        columns[name] = [getattr(hold, name) for _, hold in accepted]
    await tx.execute(_APPEND_ACCEPTED, columns)
