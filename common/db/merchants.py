"""Merchants, their shops and their API keys."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import ARRAY, Row, Text, Uuid, any_, bindparam, func, insert, select, text, update

from common.db.engine import Tx
from common.db.tables import accounts, api_key_shops, api_keys, merchants, shops
from common.errors import AccessDenied, InvalidApiKey, PayoutsError, ShopNotFound


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What authentication needs to know of a key. The secret is sealed for (merchant, key)."""

    id: UUID
    merchant_id: UUID
    merchant_status: str
    secret_sealed: bytes
    v1_only: bool
    scopes: frozenset[str]
    allowed_networks: tuple[str, ...] | None
    shop_ids: frozenset[UUID]
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class Shop:
    """A shop as the gateway resolves it. `payment_data_schema` is a JSON Schema or None.

    `callback_http` and `callback_ports` are its exceptions from where callbacks may go.
    """

    id: UUID
    merchant_id: UUID
    account_id: int
    code: str
    currency: str
    currency_exponent: int
    rail: str
    payment_data_schema: dict[str, Any] | None
    callback_http: bool = False
    callback_ports: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether a shop and its merchant may do business."""

    shop_status: str
    merchant_status: str

    def objection(self, shop_code: str) -> PayoutsError | None:
        """Why the shop may do nothing at the moment, or None."""
        if self.merchant_status == "closed":
            return InvalidApiKey()
        if self.merchant_status != "active":
            return AccessDenied()
        return None if self.shop_status == "active" else ShopNotFound(shop_code)


async def find_standing(tx: Tx, shop_id: UUID) -> Standing:
    """How a shop stands now. Raises: `NoResultFound` for one that does not exist."""
    row = (
        await tx.execute(
            select(shops.c.status.label("shop_status"), merchants.c.status.label("merchant_status"))
            .join(merchants, merchants.c.id == shops.c.merchant_id)
            .where(shops.c.id == shop_id)
        )
    ).one()
    return Standing(**row._mapping)


_SHOPS_OF_KEY = func.array(
    select(api_key_shops.c.shop_id).where(api_key_shops.c.api_key_id == api_keys.c.id).scalar_subquery(),
    type_=ARRAY(Uuid),
)


async def find_api_keys(tx: Tx, public_ids: Collection[str]) -> dict[str, ApiKey]:
    """The keys behind these `X-API-Key`, live or not; the caller judges. What is missing does not exist."""
    rows = await tx.execute(
        select(api_keys, merchants.c.status.label("merchant_status"), _SHOPS_OF_KEY.label("shop_ids"))
        .join(merchants, merchants.c.id == api_keys.c.merchant_id)
        .where(api_keys.c.public_id == any_(bindparam("public_ids", type_=ARRAY(Text)))),
        {"public_ids": list(public_ids)},
    )
    return {row.public_id: _api_key(row) for row in rows}


def _api_key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        id=row.id,
        merchant_id=row.merchant_id,
        merchant_status=row.merchant_status,
        secret_sealed=row.secret_sealed,
        v1_only=row.v1_only,
        scopes=frozenset(row.scopes),
        allowed_networks=None if row.allowed_networks is None else tuple(map(str, row.allowed_networks)),
        shop_ids=frozenset(row.shop_ids),
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )


# A merchant and the code of a shop of it, or None for its default one.
ShopKey: TypeAlias = tuple[UUID, str | None]

_FIND_ACTIVE_SHOPS = text(
    """
    SELECT w.code AS asked, s.id, s.merchant_id, s.code, s.currency, s.currency_exponent, s.rail, s.payment_data_schema,
           s.callback_http, s.callback_ports, a.id AS account_id
      FROM unnest(CAST(:merchant_ids AS uuid[]), CAST(:codes AS text[])) AS w (merchant_id, code)
      JOIN shops s ON s.merchant_id = w.merchant_id AND s.status = 'active'
                  AND CASE WHEN w.code IS NULL THEN s.is_default ELSE s.code = w.code END
      JOIN accounts a ON a.shop_id = s.id
    """
)


async def find_active_shops(tx: Tx, wanted: Collection[ShopKey]) -> dict[ShopKey, Shop]:
    """Active shops. What is missing does not exist, or is not active."""
    values = {"merchant_ids": [merchant_id for merchant_id, _ in wanted], "codes": [code for _, code in wanted]}
    return {(row.merchant_id, row.asked): _shop(row) for row in await tx.execute(_FIND_ACTIVE_SHOPS, values)}


def _shop(row: Row[Any]) -> Shop:
    return Shop(
        id=row.id,
        merchant_id=row.merchant_id,
        account_id=row.account_id,
        code=row.code,
        currency=row.currency,
        currency_exponent=row.currency_exponent,
        rail=row.rail,
        payment_data_schema=row.payment_data_schema,
        callback_http=row.callback_http,
        callback_ports=None if row.callback_ports is None else frozenset(row.callback_ports),
    )


async def find_merchant_id(tx: Tx, code: str) -> UUID | None:
    """The merchant of that code."""
    return await tx.scalar(select(merchants.c.id).where(merchants.c.code == code))


async def find_shop_by_codes(tx: Tx, merchant_code: str, shop_code: str) -> Row[*tuple[Any, ...]] | None:
    """A shop, active or not, with its account's id, for operators."""
    return (
        await tx.execute(
            select(
                shops.c.id,
                shops.c.code,
                shops.c.currency,
                shops.c.currency_exponent,
                shops.c.webhook_url,
                shops.c.callback_http,
                shops.c.callback_ports,
                accounts.c.id.label("account_id"),
            )
            .join(merchants, merchants.c.id == shops.c.merchant_id)
            .join(accounts, accounts.c.shop_id == shops.c.id)
            .where(merchants.c.code == merchant_code, shops.c.code == shop_code)
        )
    ).one_or_none()


async def append_merchant(tx: Tx, *, merchant_id: UUID, code: str, name: str) -> None:
    """A new merchant, active. Raises: `IntegrityError` (`merchants_code_key`) when the code is taken."""
    await tx.execute(insert(merchants).values(id=merchant_id, code=code, name=name))


async def append_shop(
    tx: Tx,
    *,
    shop_id: UUID,
    merchant_id: UUID,
    code: str,
    currency: str,
    currency_exponent: int,
    rail: str,
    is_default: bool,
    webhook_url: str | None,
    payment_data_schema: dict[str, Any] | None,
) -> int:
    """A new shop with its empty account; returns the account's id. Its first webhook secret comes in the same transaction.

    Raises: `IntegrityError` (`shops_merchant_id_code_key`, `shops_one_default_per_merchant`).
    """
    await tx.execute(
        insert(shops).values(
            id=shop_id,
            merchant_id=merchant_id,
            code=code,
            currency=currency,
            currency_exponent=currency_exponent,
            rail=rail,
            is_default=is_default,
            webhook_url=webhook_url,
            **({} if payment_data_schema is None else {"payment_data_schema": payment_data_schema}),
        )
    )
    account_id: int = (
        await tx.execute(insert(accounts).values(shop_id=shop_id, currency=currency).returning(accounts.c.id))
    ).scalar_one()
    return account_id


async def append_api_key(
    tx: Tx,
    *,
    key_id: UUID,
    public_id: str,
    merchant_id: UUID,
    secret_sealed: bytes,
    scopes: Sequence[str],
    v1_only: bool,
    allowed_networks: Sequence[str] | None,
    expires_at: datetime | None,
    shop_ids: Sequence[UUID],
) -> None:
    """A new key; with `shop_ids` it opens those shops only."""
    await tx.execute(
        insert(api_keys).values(
            id=key_id,
            public_id=public_id,
            merchant_id=merchant_id,
            secret_sealed=secret_sealed,
            scopes=list(scopes),
            v1_only=v1_only,
            allowed_networks=None if allowed_networks is None else list(allowed_networks),
            expires_at=expires_at,
        )
    )
    if shop_ids:
        rows = [{"api_key_id": key_id, "merchant_id": merchant_id, "shop_id": shop_id} for shop_id in shop_ids]
        await tx.execute(insert(api_key_shops), rows)


async def save_api_key_revoked(tx: Tx, public_id: str) -> bool:
    """Revoke a key now. Repeat: the first time stands. Returns whether there is such a key."""
    revoked = await tx.execute(
        update(api_keys)
        .where(api_keys.c.public_id == public_id)
        .values(revoked_at=func.coalesce(api_keys.c.revoked_at, func.now()))
    )
    return revoked.rowcount == 1


async def save_shop_status(tx: Tx, shop_id: UUID, status: str) -> bool:
    """Make a shop `active` or `inactive`. False: it is so already."""
    changed = await tx.execute(
        update(shops).where(shops.c.id == shop_id, shops.c.status != status).values(status=status)
    )
    return changed.rowcount == 1


async def save_shop_rail(tx: Tx, shop_id: UUID, rail: str) -> None:
    """Give a shop another rail for what it creates from now on."""
    await tx.execute(update(shops).where(shops.c.id == shop_id).values(rail=rail))


async def save_webhook_url(tx: Tx, shop_id: UUID, url: str | None) -> None:
    """Give a shop another URL for what is told from now on, or none; events that exist keep theirs."""
    await tx.execute(update(shops).where(shops.c.id == shop_id).values(webhook_url=url))


async def save_shop_callbacks(tx: Tx, shop_id: UUID, *, http: bool | None, ports: Sequence[int] | None) -> None:
    """Change a shop's exceptions from where callbacks may go; None leaves one as it is, no ports mean the settings'."""
    values: dict[str, Any] = {} if http is None else {"callback_http": http}
    if ports is not None:
        values["callback_ports"] = list(ports) or None
    await tx.execute(update(shops).where(shops.c.id == shop_id).values(**values))


async def list_shops(tx: Tx, merchant_code: str | None) -> Sequence[Row[*tuple[Any, ...]]]:
    """Shops with their merchants' codes, oldest first."""
    query = (
        select(
            merchants.c.code.label("merchant"),
            shops.c.code,
            shops.c.currency,
            shops.c.status,
            shops.c.is_default,
            shops.c.rail,
            shops.c.webhook_url,
            shops.c.callback_http,
            shops.c.callback_ports,
            shops.c.created_at,
        )
        .join(merchants, merchants.c.id == shops.c.merchant_id)
        .order_by(shops.c.created_at, shops.c.id)
    )
    if merchant_code is not None:
        query = query.where(merchants.c.code == merchant_code)
    return (await tx.execute(query)).all()


async def list_api_keys(tx: Tx, merchant_code: str | None) -> Sequence[Row[*tuple[Any, ...]]]:
    """Keys without their secrets, oldest first."""
    query = (
        select(
            merchants.c.code.label("merchant"),
            api_keys.c.public_id,
            api_keys.c.scopes,
            select(func.array_agg(shops.c.code))
            .join(api_key_shops, api_key_shops.c.shop_id == shops.c.id)
            .where(api_key_shops.c.api_key_id == api_keys.c.id)
            .scalar_subquery()
            .label("shops"),
            api_keys.c.allowed_networks,
            api_keys.c.v1_only,
            api_keys.c.expires_at,
            api_keys.c.revoked_at,
            api_keys.c.created_at,
        )
        .join(merchants, merchants.c.id == api_keys.c.merchant_id)
        .order_by(api_keys.c.created_at, api_keys.c.id)
    )
    if merchant_code is not None:
        query = query.where(merchants.c.code == merchant_code)
    return (await tx.execute(query)).all()
