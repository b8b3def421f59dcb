"""Webhook secrets of shops, sealed: the current one, and older ones that sign beside it until they end."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, func, insert, or_, select, text, update

from common.db.engine import Tx
from common.db.tables import merchants, shops, webhook_secrets


@dataclass(frozen=True, slots=True)
class SealedWebhookSecret:
    """A live secret, sealed for (shop, id)."""

    id: UUID
    shop_id: UUID
    sealed: bytes


_FIND_WEBHOOK_SECRETS: Final = text(
    """
    SELECT s.id, s.shop_id, s.sealed FROM unnest(CAST(:shop_ids AS uuid[])) AS w (shop_id)
     CROSS JOIN LATERAL (
       SELECT * FROM webhook_secrets
        WHERE shop_id = w.shop_id AND (not_after IS NULL OR not_after > now())) s
     ORDER BY s.shop_id, s.not_after IS NULL DESC, s.created_at DESC, s.id DESC
    """
)

_END_WEBHOOK_SECRETS: Final = text(
    """
    UPDATE webhook_secrets SET not_after = now() + make_interval(secs => CAST(:grace_seconds AS float8))
     WHERE shop_id = :shop_id
       AND (not_after IS NULL OR not_after > now() + make_interval(secs => CAST(:grace_seconds AS float8)))
    RETURNING not_after
    """
)


async def find_webhook_secrets(tx: Tx, shop_ids: Collection[UUID]) -> dict[UUID, list[SealedWebhookSecret]]:
    """The live secrets of each of these shops, newest first; a shop that exists has at least one."""
    found: dict[UUID, list[SealedWebhookSecret]] = {}
    if shop_ids:
        for row in await tx.execute(_FIND_WEBHOOK_SECRETS, {"shop_ids": list(shop_ids)}):
            found.setdefault(row.shop_id, []).append(SealedWebhookSecret(**row._mapping))
    return found


async def append_webhook_secret(tx: Tx, *, secret_id: UUID, shop_id: UUID, sealed: bytes) -> None:
    """A shop's new current secret, sealed for (shop, secret). The one before must have an end.

    Raises: `IntegrityError` (`webhook_secrets_one_current`, `webhook_secrets_are_few`).
    """
    await tx.execute(insert(webhook_secrets).values(id=secret_id, shop_id=shop_id, sealed=sealed))


async def end_webhook_secrets(tx: Tx, shop_id: UUID, *, grace_seconds: float) -> datetime | None:
    """Have all secrets of a shop end within so many seconds, in the transaction in which a new one comes.

    Locks: the shop's secrets that live longer.
    Returns: when, or None when another transaction has just done so.
    """
    rows = await tx.execute(_END_WEBHOOK_SECRETS, {"shop_id": shop_id, "grace_seconds": grace_seconds})
    return rows.scalars().first()


async def end_webhook_secret(tx: Tx, shop_id: UUID, secret_id: UUID) -> bool:
    """End a secret now that has an end. Repeat: the first time stands. False: the shop has no such secret, or it is current."""
    ended = await tx.execute(
        update(webhook_secrets)
        .where(webhook_secrets.c.id == secret_id, webhook_secrets.c.shop_id == shop_id)
        .where(webhook_secrets.c.not_after.is_not(None))
        .values(not_after=func.least(webhook_secrets.c.not_after, func.now()))
    )
    return ended.rowcount == 1


async def list_webhook_secrets(
    tx: Tx, shop: tuple[str, str] | None = None, *, with_ended: bool = False
) -> Sequence[Row[*tuple[Any, ...]]]:
    """Secrets without their seals, of all shops or of the one of those codes, newest first; those that live, or all."""
    current = webhook_secrets.c.not_after.is_(None)
    live = or_(current, webhook_secrets.c.not_after > func.now())
    query = (
        select(
            (merchants.c.code + "/" + shops.c.code).label("shop"),
            webhook_secrets.c.id,
            webhook_secrets.c.created_at,
            webhook_secrets.c.not_after,
            current.label("current"),
            live.label("live"),
        )
        .join(shops, shops.c.id == webhook_secrets.c.shop_id)
        .join(merchants, merchants.c.id == shops.c.merchant_id)
        .order_by(merchants.c.code, shops.c.code, current.desc(), webhook_secrets.c.created_at.desc())
    )
    if shop is not None:
        query = query.where(merchants.c.code == shop[0], shops.c.code == shop[1])
    return (await tx.execute(query if with_ended else query.where(live))).all()
