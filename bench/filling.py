"""Merchants with work that waits, made as the product makes it.

By SQL, behind the triggers, come only payouts that are queued and whose time is over. What follows from them, events,
callbacks and what is due, comes from the product's own `expire`, in transactions like any other: so nothing here knows how
callbacks are stored.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import UUID

from sqlalchemy import text

from bench.load import Sender
from bench.scene import Scene
from common.canceling import expire
from common.db.engine import in_transaction
from ops.onboarding import add_key, add_merchant, add_shop, top_up

_ACTOR: Final = "bench"
_FUNDS: Final = "1000000000000.00"
_ONBOARDED_AT_ONCE: Final = 8
_TOLD_AT_ONCE: Final = 128
_TICK_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Shop:
    """The only shop of a merchant, of the same code, and where its callbacks go."""

    id: UUID
    code: str
    url: str


# Amounts of 1.00; the ids and the order of writing are those of the product, so that indexes look like its own.
_QUEUE_PAYOUTS: Final = text(
    """
    WITH fresh AS MATERIALIZED (
      SELECT uuidv7() AS id, a.id AS account_id, a.shop_id, a.posted_minor, a.held_minor, a.last_seq, n,
             now() - interval '1 s' AS expires_at
        FROM generate_series(1, CAST(:each AS int)) AS n CROSS JOIN accounts a
       WHERE a.shop_id = ANY (CAST(:shops AS uuid[])) ORDER BY n, a.id),
    due AS (
      INSERT INTO payout_due (payout_id, shop_id, rail, expires_at) SELECT id, shop_id, 'sandbox', expires_at FROM fresh),
    holds AS (
      INSERT INTO entries (account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, held_delta_minor,
                           posted_after_minor, held_after_minor, payout_id)
      SELECT account_id, last_seq + n, shop_id, 'hold', 'holds', 100, 0, 100, posted_minor, held_minor + n * 100, id
        FROM fresh),
    moved AS (
      UPDATE accounts SET held_minor = held_minor + :each * 100, last_seq = last_seq + :each
       WHERE shop_id = ANY (CAST(:shops AS uuid[])))
    INSERT INTO payouts (id, shop_id, account_id, external_id, amount_minor, currency, recipient_sealed, recipient_masked,
                         recipient_digest, expires_at, hold_seq)
    SELECT id, shop_id, account_id, 'BENCH-' || last_seq + n, 100, 'BDT', '', '*******5678', sha256('x'), expires_at,
           last_seq + n
      FROM fresh
    RETURNING id
    """
)


async def add_shops(on: Scene, name: str, urls: Sequence[str]) -> list[Shop]:
    """A merchant with one funded shop for each URL."""
    turns = asyncio.Semaphore(_ONBOARDED_AT_ONCE)

    async def add(code: str, url: str) -> None:
        async with turns:
            await add_merchant(on.ops, code=code, name=code, actor=_ACTOR)
            await add_shop(
                on.ops,
                on.settings.keyring,
                merchant=code,
                code=code,
                currency="BDT",
                rail="sandbox",
                is_default=True,
                webhook_url=url,
                payment_data_schema=None,
                actor=_ACTOR,
            )
            await top_up(on.ops, merchant=code, shop=code, amount=_FUNDS, reason="funds", actor=_ACTOR)

    by_code = {f"{name}-{number}": url for number, url in enumerate(urls)}
    await asyncio.gather(*(add(code, url) for code, url in by_code.items()))
    rows = await in_transaction(
        on.ops,
        lambda tx: tx.execute(text("SELECT id, code FROM shops WHERE code = ANY (:codes)"), {"codes": list(by_code)}),
    )
    return [Shop(row.id, row.code, by_code[row.code]) for row in rows]


async def add_senders(on: Scene, shops: Sequence[Shop]) -> list[Sender]:
    """A key for the merchant of each shop, in their order."""
    turns = asyncio.Semaphore(_ONBOARDED_AT_ONCE)

    async def add(shop: Shop) -> Sender:
        async with turns:
            key = await add_key(on.ops, on.settings.keyring, merchant=shop.code, actor=_ACTOR)
            return Sender(key.public_id, key.secret, shop.url)

    return await asyncio.gather(*(add(shop) for shop in shops))


async def queue_payouts(on: Scene, shops: Sequence[Shop], each: int) -> list[UUID]:
    """That many payouts of each shop whose time is over, so that `tell` can end them; the shops take turns in the list."""
    async with on.superuser.begin() as tx:
        await tx.execute(text("SET LOCAL session_replication_role = replica"))
        rows = await tx.execute(_QUEUE_PAYOUTS, {"shops": [shop.id for shop in shops], "each": each})
        return [row.id for row in rows]


async def tell(on: Scene, payout_ids: Sequence[UUID]) -> list[UUID]:
    """End payouts in one transaction; returns the ids of the events that somebody is to be called about."""
    events = await in_transaction(on.product, partial(expire, payout_ids=payout_ids))
    assert len(events) == len(payout_ids), "nobody else holds them"
    return [event.id for event in events]


async def tell_steadily(on: Scene, payout_ids: Sequence[UUID], rate: int, show: Callable[[int], None]) -> list[UUID]:
    """End payouts at that many a second, made up for when a turn comes late. Returns their events."""
    clock = asyncio.get_running_loop().time
    started, event_ids = clock(), list[UUID]()
    while len(event_ids) < len(payout_ids):
        due = min(len(payout_ids), int((clock() - started) * rate))
        if due > len(event_ids):
            first = len(event_ids)
            event_ids += await tell(on, payout_ids[first : min(due, first + _TOLD_AT_ONCE)])
            show(len(event_ids))
        await asyncio.sleep(_TICK_SECONDS)
    return event_ids


async def fill(on: Scene, shops: Sequence[Shop], each: int, show: Callable[[int], None]) -> list[UUID]:
    """Have that many callbacks wait for each shop; returns their events. `show` is told how many there are."""
    payout_ids = await queue_payouts(on, shops, each)
    event_ids: list[UUID] = []
    for first in range(0, len(payout_ids), _TOLD_AT_ONCE):
        event_ids += await tell(on, payout_ids[first : first + _TOLD_AT_ONCE])
        show(len(event_ids))
    return event_ids
