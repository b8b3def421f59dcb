"""The demo merchant: a shop with money, another whose payouts a bank pays, and a key. Made once, found again."""

from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit
from uuid import UUID

from common.db.engine import Engine, Tx, create_engine, in_transaction
from common.db.ledger import append_adjustment, lock_accounts
from common.db.merchants import find_merchant_id, find_shop_by_codes, list_api_keys
from common.db.rails import has_rail
from common.sealing import Keyring
from common.settings import Settings
from ops.onboarding import (
    add_http_rail,
    add_key,
    add_merchant,
    add_shop,
    change_rail,
    rotate_webhook_secret,
    top_up,
)
from ops.state import Demo

MERCHANT: Final = "demo"
SHOP: Final = "demo-shop"
BANK_SHOP: Final = "bank-shop"
CURRENCY: Final = "BDT"
FUNDS_MINOR: Final = 100_000_000
_ACTOR: Final = "ops.local"
_NOBODY: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the demo merchant proves itself with, and what it checks callbacks with."""

    api_key: str
    api_secret: str = field(repr=False)
    webhook_secret: str = field(repr=False)


async def seed_bank(settings: Settings, bank_url: str, webhook_secret: str) -> tuple[str, str]:
    """See that there is a rail to the bank at that URL and a shop whose payouts go there; its callbacks are signed with
    that secret, like the other shop's.

    Returns: the rail's name, and the secret that both sides sign with. It follows from the keys of this stack, so nobody has
    to remember it.
    """
    engine = create_engine(settings, role="payouts_ops", application="payouts-local")
    rail = f"bank-{urlsplit(bank_url).port}"
    secret = settings.keyring.digest("the demo's bank", owner=_NOBODY).hex()
    try:
        is_new = not await in_transaction(engine, lambda tx: has_rail(tx, rail))
        if is_new:
            await add_http_rail(
                engine,
                settings.keyring,
                name=rail,
                base_url=bank_url,
                authoritative=True,
                secret=secret,
                actor=_ACTOR,
            )
        shop = await in_transaction(engine, lambda tx: find_shop_by_codes(tx, MERCHANT, BANK_SHOP))
        if shop is None:
            await _add_shop(engine, settings.keyring, BANK_SHOP, rail, is_default=False)
            await top_up(engine, merchant=MERCHANT, shop=BANK_SHOP, amount="1000000.00", reason="funds", actor=_ACTOR)
        elif is_new:
            await change_rail(engine, merchant=MERCHANT, shop=BANK_SHOP, rail=rail, reason="another bank", actor=_ACTOR)
        await _renew_webhook_secret(engine, settings.keyring, BANK_SHOP, webhook_secret)
        return rail, secret
    finally:
        await engine.dispose()


async def seed(settings: Settings, remembered: Demo | None) -> Credentials:
    """See that the demo merchant exists in this database, and return its credentials.

    Repeat: what is remembered and still opens this database stays valid, else it is replaced. The shop's account gets its
    funds as its first entry, so once.
    """
    engine = create_engine(settings, role="payouts_ops", application="payouts-local")
    try:
        known = remembered if remembered is not None and await _is_live(engine, remembered.api_key) else None
        webhook_secret = await _see_to_shop(engine, settings.keyring, known)
        await in_transaction(engine, _fund)
        if known is not None:
            return Credentials(known.api_key, known.api_secret, webhook_secret)
        issued = await add_key(engine, settings.keyring, merchant=MERCHANT, actor=_ACTOR)
        return Credentials(issued.public_id, issued.secret, webhook_secret)
    finally:
        await engine.dispose()


async def _is_live(engine: Engine, public_id: str) -> bool:
    keys = await in_transaction(engine, lambda tx: list_api_keys(tx, MERCHANT))
    return any(key.public_id == public_id and key.revoked_at is None for key in keys)


async def _see_to_shop(engine: Engine, keyring: Keyring, known: Demo | None) -> str:
    """Make the merchant and the shop unless they exist; return the shop's webhook secret."""
    if await in_transaction(engine, lambda tx: find_merchant_id(tx, MERCHANT)) is None:
        await add_merchant(engine, code=MERCHANT, name="Demo", actor=_ACTOR)
    shop = await in_transaction(engine, lambda tx: find_shop_by_codes(tx, MERCHANT, SHOP))
    if shop is None:
        return await _add_shop(engine, keyring, SHOP, "sandbox", is_default=True)
    # Nobody remembers the secret that it has.
    return await _renew_webhook_secret(engine, keyring, SHOP) if known is None else known.webhook_secret


async def _add_shop(engine: Engine, keyring: Keyring, code: str, rail: str, *, is_default: bool) -> str:
    return await add_shop(
        engine,
        keyring,
        merchant=MERCHANT,
        code=code,
        currency=CURRENCY,
        rail=rail,
        is_default=is_default,
        webhook_url=None,
        payment_data_schema=None,
        actor=_ACTOR,
    )


async def _renew_webhook_secret(engine: Engine, keyring: Keyring, code: str, secret: str | None = None) -> str:
    """Give a shop that webhook secret, else a fresh one; the ones before end now."""
    issued = await rotate_webhook_secret(
        engine,
        keyring,
        merchant=MERCHANT,
        shop=code,
        grace_seconds=0,
        reason="the demo's start",
        actor=_ACTOR,
        secret=secret,
    )
    return issued.secret


async def _fund(tx: Tx) -> None:
    """Credit the shop's account unless it ever had an entry.

    Locks: the account.
    """
    shop = await find_shop_by_codes(tx, MERCHANT, SHOP)
    if shop is None:
        raise LookupError(SHOP)
    locked = (await lock_accounts(tx, [shop.account_id], wait_seconds=None))[shop.account_id]
    if locked.account.last_seq == 0:
        await append_adjustment(
            tx,
            account_id=shop.account_id,
            amount_minor=FUNDS_MINOR,
            actor=_ACTOR,
            reason="funds of the demo shop",
            subject=f"{MERCHANT}/{SHOP}",
        )
