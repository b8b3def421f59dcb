"""What tests need to exist: settings, merchants with money, orders. Every argument is optional and by keyword."""

import base64
import itertools
import json
import time
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text

from common.db.engine import Engine, create_engine, in_transaction
from common.db.merchants import Shop, find_active_shops, find_merchant_id
from common.db.payins import NewPayin
from common.domain.ids import PAYIN, new_id, render_id
from common.domain.payout import mask_recipient
from common.domain.signing import sign_v1
from common.recipients import Recipient, seal_recipient
from common.settings import Settings
from gateway.deciding import Order
from ops.onboarding import add_key, add_merchant, add_shop, top_up

KEY: Final = base64.b64encode(bytes(range(32))).decode()
ACTOR: Final = "tests"

_numbers = itertools.count(1)


def environment(database_url: str, **overrides: str) -> dict[str, str]:
    """The environment of a process of ours; short waits, callbacks to this machine allowed."""
    return {
        "DATABASE_URL": database_url,
        "PAYOUTS_MASTER_KEYS": f"1:{KEY}",
        "PAYOUTS_CONTENT_KEY": KEY,
        "PAYOUTS_CALLBACK_PRIVATE_ADDRESSES": "1",
        "PAYOUTS_CALLBACK_PORTS": "",
        **overrides,
    }


def settings(database_url: str, **overrides: str) -> Settings:
    """The same, read."""
    return Settings.from_environ(environment(database_url, **overrides))


def engine(database_url: str, *, role: str = "payouts_owner", **overrides: str) -> Engine:
    """A pool that acts as a role; by default as the owner of everything, which skips every grant."""
    return create_engine(settings(database_url, **overrides), role=role, application="payouts-tests")


@dataclass(frozen=True, slots=True)
class Merchant:
    """A merchant with one default shop, its key and its secrets."""

    code: str
    shop: Shop
    api_key: str
    api_secret: str
    webhook_secret: str

    def headers(
        self, method: str, path: str, body: bytes = b"", *, query: str = "", timestamp: str | None = None
    ) -> dict[str, str]:
        """Headers that sign a request by the v1 formula."""
        timestamp = timestamp or str(int(time.time()))
        return {
            "X-API-Key": self.api_key,
            "X-Timestamp": timestamp,
            "X-Signature": sign_v1(self.api_secret, timestamp, method, path, query, body),
            "Content-Type": "application/json",
        }


async def add_funded_merchant(
    owner: Engine, config: Settings, *, currency: str = "BDT", funds: str | None = "1000000.00", **shop_options: Any
) -> Merchant:
    """A merchant of its own, ready to pay."""
    code = f"merchant-{next(_numbers)}"
    await add_merchant(owner, code=code, name=code, actor=ACTOR)
    rail = shop_options.pop("rail", None)
    options: dict[str, Any] = {
        "rail": "sandbox",
        "is_default": True,
        "webhook_url": None,
        "payment_data_schema": None,
    } | shop_options
    webhook_secret = await add_shop(
        owner, config.keyring, merchant=code, code="shop-001", currency=currency, actor=ACTOR, **options
    )
    if rail is not None:
        # Whether there is such a rail or not.
        await execute(
            owner,
            "UPDATE shops SET rail = :rail WHERE merchant_id = (SELECT id FROM merchants WHERE code = :code)",
            rail=rail,
            code=code,
        )
    key = await add_key(owner, config.keyring, merchant=code, actor=ACTOR)
    if funds is not None:
        await top_up(owner, merchant=code, shop="shop-001", amount=funds, reason="a test", actor=ACTOR)

    async def find(tx: Any) -> Shop:
        merchant_id = await find_merchant_id(tx, code)
        assert merchant_id is not None
        return (await find_active_shops(tx, [(merchant_id, None)]))[merchant_id, None]

    return Merchant(code, await in_transaction(owner, find), key.public_id, key.secret, webhook_secret)


def create_body(**fields: Any) -> bytes:
    """The body of a create with a fresh id; a field given as None is left out."""
    body = {
        "external_id": f"PAY-{next(_numbers)}",
        "amount": "10.00",
        "currency": "BDT",
        "card_number": "01712345678",
    } | fields
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


def order(config: Settings, shop: Shop, *, payout_id: UUID | None = None, **fields: Any) -> Order:
    """A create that has passed every check but those of the transaction."""
    payout_id = payout_id or new_id()
    recipient = fields.pop("recipient", "01712345678")
    values: dict[str, Any] = {
        "id": payout_id,
        "shop": shop,
        "shop_id": shop.id,
        "account_id": shop.account_id,
        "external_id": f"PAY-{next(_numbers)}",
        "amount_minor": 1000,
        "currency": shop.currency,
        "recipient_sealed": seal_recipient(
            config.keyring, Recipient(recipient, None), shop_id=shop.id, payout_id=payout_id, now=time.time()
        ),
        "recipient_masked": mask_recipient(recipient),
        "recipient_digest": config.keyring.digest(f"recipient|{recipient}", owner=shop.id),
        "payment_data_digest": None,
        "callback_url": None,
        "details": None,
        "rail": shop.rail,
    } | fields
    return Order(**values)


def new_payin(shop: Shop, **fields: Any) -> NewPayin:
    """A create of a payin that has passed every check; its rail is asked at once."""
    payin_id = fields.pop("payin_id", None) or new_id()
    values: dict[str, Any] = {
        "id": payin_id,
        "shop_id": shop.id,
        "account_id": shop.account_id,
        "external_id": f"IN-{next(_numbers)}",
        "amount_minor": 1000,
        "currency": shop.currency,
        "rail": shop.rail,
        "reference": render_id(PAYIN, payin_id),
        "payment_data_digest": None,
        "callback_url": None,
        "details": None,
        "expires_at": None,
        "look_up_in_seconds": 0.0,
    } | fields
    return NewPayin(**values)


async def fetch(owner: Engine, query: str, *, commit: bool = False, **values: Any) -> list[Any]:
    """Rows of a query, asked as the owner; with `commit`, of a statement that returns what it wrote."""
    async with owner.connect() as connection:
        rows = list((await connection.execute(text(query), values)).all())
        if commit:
            await connection.commit()
        return rows


async def execute(owner: Engine, statement: str, **values: Any) -> None:
    """Run a statement as the owner and commit it."""
    async with owner.begin() as tx:
        await tx.execute(text(statement), values)
