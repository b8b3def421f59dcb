"""What is exported: rows of one merchant, streamed through a cursor, so that nobody has to hold all of them.

All of it is of one moment. Amounts in minor units; recipients only masked.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, select, text

from common.db.engine import Tx
from common.db.tables import accounts, entries, merchants, shops
from common.domain.ids import first_id

_ROWS_PER_FETCH: Final = 1_000
# How much earlier than its row an id may have been made, and how much later than its entry a transaction may have begun.
_ID_AGE: Final = timedelta(hours=1)
_ENTRY_AGE: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows of that merchant, of one of its shops if given, created from `since` on and before `until`."""

    merchant: str
    shop: str | None
    since: datetime
    until: datetime


@dataclass(frozen=True, slots=True)
class ExportedShop:
    """A shop whose rows are wanted."""

    id: UUID
    code: str
    currency: str
    currency_exponent: int
    account_id: int


async def find_exported_shops(tx: Tx, wanted: Wanted) -> Sequence[ExportedShop]:
    """The shops of a merchant, or the one of that code, by code; none: there is no such merchant or shop."""
    query = (
        select(shops.c.id, shops.c.code, shops.c.currency, shops.c.currency_exponent, accounts.c.id.label("account_id"))
        .join(merchants, merchants.c.id == shops.c.merchant_id)
        .join(accounts, accounts.c.shop_id == shops.c.id)
        .where(merchants.c.code == wanted.merchant)
        .order_by(shops.c.code)
    )
    if wanted.shop is not None:
        query = query.where(shops.c.code == wanted.shop)
    return [ExportedShop(**row._mapping) for row in await tx.execute(query)]


# In the order of the ids, which begin with the time: the cursor reads its way along the index.
_PAYOUTS = text(
    """
    SELECT id, shop_id, external_id, state, amount_minor, currency, recipient_masked, failure_code, provider_reference,
           created_at, updated_at, finalized_at, expires_at
      FROM payouts
     WHERE id >= CAST(:first_id AS uuid) AND id < CAST(:last_id AS uuid) AND shop_id = ANY (CAST(:shop_ids AS uuid[]))
       AND created_at >= :since AND created_at < :until
     ORDER BY id
    """
)

_CALLBACKS = text(
    """
    SELECT c.event_id, c.shop_id, c.payout_id, c.payin_id, e.type, e.sequence, c.url, c.state, c.created_at, c.finished_at
      FROM callbacks c
     CROSS JOIN LATERAL (SELECT type, sequence FROM events WHERE id = c.event_id AND shop_id = c.shop_id LIMIT 1) e
     WHERE c.event_id >= CAST(:first_id AS uuid) AND c.event_id < CAST(:last_id AS uuid)
       AND c.shop_id = ANY (CAST(:shop_ids AS uuid[])) AND c.created_at >= :since AND c.created_at < :until
     ORDER BY c.event_id
    """
)

_ENTRIES = text(
    """
    SELECT shop_id, seq, kind, contra, amount_minor, posted_delta_minor, held_delta_minor, posted_after_minor,
           held_after_minor, payout_id, payin_id, created_at
      FROM entries
     WHERE account_id = :account_id AND seq >= :first_seq AND seq < :last_seq
       AND created_at >= :since AND created_at < :until
     ORDER BY account_id, seq
    """
)


async def stream_payouts(
    tx: Tx, wanted: Wanted, exported: Sequence[ExportedShop]
) -> AsyncIterator[Row[*tuple[Any, ...]]]:
    """Payouts by id."""
    async for row in _stream(tx, _PAYOUTS, _by_id(wanted, exported)):
        yield row


async def stream_callbacks(
    tx: Tx, wanted: Wanted, exported: Sequence[ExportedShop]
) -> AsyncIterator[Row[*tuple[Any, ...]]]:
    """Callbacks by their events' ids."""
    async for row in _stream(tx, _CALLBACKS, _by_id(wanted, exported)):
        yield row


async def stream_entries(
    tx: Tx, wanted: Wanted, exported: Sequence[ExportedShop]
) -> AsyncIterator[Row[*tuple[Any, ...]]]:
    """Entries, account by account, in the order in which they moved it."""
    for shop in exported:
        values = {
            "account_id": shop.account_id,
            "first_seq": await _first_seq(tx, shop.account_id, wanted.since - _ENTRY_AGE),
            "last_seq": await _first_seq(tx, shop.account_id, wanted.until + _ENTRY_AGE),
            "since": wanted.since,
            "until": wanted.until,
        }
        async for row in _stream(tx, _ENTRIES, values):
            yield row


async def _stream(tx: Tx, statement: Any, values: dict[str, Any]) -> AsyncIterator[Row[*tuple[Any, ...]]]:
    async with tx.stream(statement, values, execution_options={"yield_per": _ROWS_PER_FETCH}) as rows:
        async for row in rows:
            yield row


def _by_id(wanted: Wanted, exported: Sequence[ExportedShop]) -> dict[str, Any]:
    return {
        "first_id": first_id((wanted.since - _ID_AGE).timestamp()),
        "last_id": first_id((wanted.until + _ID_AGE).timestamp()),
        "shop_ids": [shop.id for shop in exported],
        "since": wanted.since,
        "until": wanted.until,
    }


async def _first_seq(tx: Tx, account_id: int, moment: datetime) -> int:
    """The first entry of an account from about a moment on, or the one to come: entries have no gap, and time does not go back
    further than a transaction is long.
    """
    low = 1
    high = 1 + (await tx.execute(select(accounts.c.last_seq).where(accounts.c.id == account_id))).scalar_one()
    while low < high:
        middle = (low + high) // 2
        at = select(entries.c.created_at).where(entries.c.account_id == account_id, entries.c.seq == middle)
        if (await tx.execute(at)).scalar_one() < moment:
            low = middle + 1
        else:
            high = middle
    return low
