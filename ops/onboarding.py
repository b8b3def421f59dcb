"""Bringing merchants in: merchants, shops with their accounts and webhook secrets, keys, money; and the rails that pay for
them.

Each change is one audited transaction. The command line and the local stack both stand on this; what it returns in the clear
is shown once and kept nowhere.
"""

import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypeVar
from uuid import UUID

from sqlalchemy.exc import IntegrityError

from common.db.engine import Engine, Tx, constraint_name, in_transaction
from common.db.ledger import append_adjustment, append_audit, lock_accounts
from common.db.merchants import (
    append_api_key,
    append_merchant,
    append_shop,
    find_merchant_id,
    find_shop_by_codes,
    save_api_key_revoked,
    save_shop_callbacks,
    save_shop_rail,
    save_shop_status,
    save_webhook_url,
)
from common.db.rails import append_http_rail, delete_rail, has_rail
from common.db.webhook_secrets import (
    append_webhook_secret,
    end_webhook_secret,
    end_webhook_secrets,
    list_webhook_secrets,
)
from common.domain.ids import new_id
from common.domain.money import CURRENCY_EXPONENTS, parse_amount
from common.sealing import API_KEY_PURPOSE, RAIL_SECRET_PURPOSE, Keyring
from common.settings import Settings
from common.webhook_secrets import make_webhook_secret, seal_webhook_secret

_T = TypeVar("_T")


SCOPES: Final = ("payouts:write", "payouts:read", "payins:write", "payins:read", "balance:read")


class OnboardingRefused(Exception):
    """What was asked cannot be done; the text says why, for the operator."""


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A new key. The secret is shown now and never again."""

    public_id: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class IssuedWebhookSecret:
    """A new webhook secret, and until when the older ones sign beside it. It is shown now and never again."""

    id: UUID
    secret: str = field(repr=False)
    older_until: datetime


_TAKEN: Final = {
    "merchants_code_check": "a merchant's code is 1 to 63 characters of a-z 0-9 and -",
    "merchants_name_check": "a merchant's name is 1 to 200 characters",
    "shops_callback_ports_check": "there may be 1 to 100 ports, each 1 to 65535",
    "shops_code_check": "a shop's code is 1 to 64 characters of A-Z a-z 0-9 . _ and -",
    "merchants_code_key": "a merchant of that code exists already",
    "shops_merchant_id_code_key": "the merchant has a shop of that code already",
    "shops_one_default_per_merchant": "the merchant has a default shop already",
    "rails_name_key": "there is a rail of that name already",
    "rails_name_check": "a rail's name is 1 to 63 characters of a-z 0-9 and -, a letter first",
    "rails_stay_while_named": "shops or unfinished payouts still name it",
    "webhook_secrets_are_few": "the shop has three live webhook secrets already; revoke one that merchants have left, or give"
    " no grace",
    "webhook_secrets_one_current": "somebody else has just given the shop another secret",
}


async def _audited(engine: Engine, work: Callable[[Tx], Awaitable[_T]]) -> _T:
    """Run one change. Never repeated: when COMMIT's answer is lost, an operator has to look before asking again."""
    try:
        return await in_transaction(engine, work, attempts_max=1)
    except IntegrityError as error:
        raise OnboardingRefused(_TAKEN.get(constraint_name(error) or "", "the database refused it")) from error


async def add_merchant(engine: Engine, *, code: str, name: str, actor: str) -> None:
    """A new merchant. Raises: `OnboardingRefused` when the code is taken or not fit."""

    async def work(tx: Tx) -> None:
        await append_merchant(tx, merchant_id=new_id(), code=code, name=name)
        await append_audit(tx, actor=actor, action="merchant.add", subject=code, detail={"name": name})

    await _audited(engine, work)


async def add_shop(
    engine: Engine,
    keyring: Keyring,
    *,
    merchant: str,
    code: str,
    currency: str,
    rail: str,
    is_default: bool,
    webhook_url: str | None,
    payment_data_schema: dict[str, Any] | None,
    actor: str,
) -> str:
    """A new shop with an empty account. Returns its webhook secret. Raises: `OnboardingRefused`."""
    exponent = CURRENCY_EXPONENTS.get(currency)
    if exponent is None:
        raise OnboardingRefused(f"{currency} is not an ISO 4217 currency")
    shop_id, secret = new_id(), make_webhook_secret()

    async def work(tx: Tx) -> None:
        await _check_rail(tx, rail)
        await append_shop(
            tx,
            shop_id=shop_id,
            merchant_id=await _merchant_id(tx, merchant),
            code=code,
            currency=currency,
            currency_exponent=exponent,
            rail=rail,
            is_default=is_default,
            webhook_url=webhook_url,
            payment_data_schema=payment_data_schema,
        )
        await _append_webhook_secret(tx, keyring, shop_id, new_id(), secret)
        await append_audit(
            tx,
            actor=actor,
            action="shop.add",
            subject=f"{merchant}/{code}",
            detail={"currency": currency, "rail": rail},
        )

    await _audited(engine, work)
    return secret


async def add_http_rail(
    engine: Engine,
    keyring: Keyring,
    *,
    name: str,
    base_url: str,
    authoritative: bool,
    lag_seconds: float = 0.0,
    concurrency: int | None = None,
    payin_link: str | None = None,
    secret: str | None = None,
    actor: str,
) -> str:
    """A new rail, switched on. Returns the secret that both sides sign with, a fresh one unless it is given.

    Raises: `OnboardingRefused`.
    """
    rail_id, secret = new_id(), secret or f"rk_{secrets.token_urlsafe(32)}"
    sealed = keyring.seal(secret.encode(), owner=rail_id, row=rail_id, purpose=RAIL_SECRET_PURPOSE, now=time.time())

    async def work(tx: Tx) -> None:
        await append_http_rail(
            tx,
            rail_id=rail_id,
            name=name,
            base_url=base_url,
            secret_sealed=sealed,
            authoritative=authoritative,
            lag_seconds=lag_seconds,
            concurrency=concurrency,
            payin_link=payin_link,
        )
        await append_audit(tx, actor=actor, action="rail.add", subject=name, detail={"base_url": base_url})

    await _audited(engine, work)
    return secret


async def remove_rail(engine: Engine, *, name: str, reason: str, actor: str) -> None:
    """Forget a rail that nothing names. Raises: `OnboardingRefused`."""

    async def work(tx: Tx) -> None:
        if not await delete_rail(tx, name):
            raise OnboardingRefused(f"there is no rail {name}")
        await append_audit(tx, actor=actor, action="rail.remove", subject=name, reason=reason)

    await _audited(engine, work)


async def freeze_shop(engine: Engine, *, merchant: str, shop: str, reason: str, actor: str) -> None:
    """Accept nothing more for a shop, and send nothing of it that has not been sent. Raises: `OnboardingRefused`.

    Locks: the shop's account, so that nothing is accepted any more once this has returned.
    """

    async def work(tx: Tx) -> None:
        found = await _shop(tx, merchant, shop)
        await lock_accounts(tx, [found.account_id], wait_seconds=None)
        if not await save_shop_status(tx, found.id, "inactive"):
            raise OnboardingRefused(f"the shop {merchant}/{shop} is frozen already")
        await append_audit(tx, actor=actor, action="shop.freeze", subject=f"{merchant}/{shop}", reason=reason)

    await _audited(engine, work)


async def unfreeze_shop(engine: Engine, *, merchant: str, shop: str, reason: str, actor: str) -> None:
    """Let a shop go on; what waits is sent within a minute. Raises: `OnboardingRefused`."""

    async def work(tx: Tx) -> None:
        if not await save_shop_status(tx, (await _shop(tx, merchant, shop)).id, "active"):
            raise OnboardingRefused(f"the shop {merchant}/{shop} is not frozen")
        await append_audit(tx, actor=actor, action="shop.unfreeze", subject=f"{merchant}/{shop}", reason=reason)

    await _audited(engine, work)


async def change_rail(engine: Engine, *, merchant: str, shop: str, rail: str, reason: str, actor: str) -> None:
    """Another rail for what a shop creates from now on. Raises: `OnboardingRefused`."""

    async def work(tx: Tx) -> None:
        await _check_rail(tx, rail)
        await save_shop_rail(tx, (await _shop(tx, merchant, shop)).id, rail)
        subject = f"{merchant}/{shop}"
        await append_audit(tx, actor=actor, action="shop.rail", subject=subject, reason=reason, detail={"rail": rail})

    await _audited(engine, work)


async def change_webhook_url(
    engine: Engine, settings: Settings, *, merchant: str, shop: str, url: str | None, reason: str, actor: str
) -> None:
    """Another URL for what is told without a `callback_url` from now on, or none. Raises: `OnboardingRefused`."""

    async def work(tx: Tx) -> None:
        found = await _shop(tx, merchant, shop)
        if url and not settings.allows_callback(url, shop_http=found.callback_http, shop_ports=found.callback_ports):
            raise OnboardingRefused(
                "callbacks of this shop may not go to that URL: see PAYOUTS_CALLBACK_… and `shop callbacks`"
            )
        await save_webhook_url(tx, found.id, url)
        subject = f"{merchant}/{shop}"
        await append_audit(tx, actor=actor, action="shop.webhook", subject=subject, reason=reason, detail={"url": url})

    await _audited(engine, work)


async def rotate_webhook_secret(
    engine: Engine,
    keyring: Keyring,
    *,
    merchant: str,
    shop: str,
    grace_seconds: float,
    reason: str,
    actor: str,
    secret: str | None = None,
) -> IssuedWebhookSecret:
    """Give a shop another webhook secret, a fresh one unless it is given; the older ones end within `grace_seconds`.

    Raises: `OnboardingRefused`, also when the shop would have too many.
    """
    secret_id, secret = new_id(), secret or make_webhook_secret()

    async def work(tx: Tx) -> datetime:
        shop_id = (await _shop(tx, merchant, shop)).id
        older_until = await end_webhook_secrets(tx, shop_id, grace_seconds=grace_seconds)
        if older_until is None:
            raise OnboardingRefused(_TAKEN["webhook_secrets_one_current"])
        await _append_webhook_secret(tx, keyring, shop_id, secret_id, secret)
        await append_audit(
            tx,
            actor=actor,
            action="shop.rotate_webhook_secret",
            subject=f"{merchant}/{shop}",
            reason=reason,
            detail={"secret_id": str(secret_id), "grace_seconds": grace_seconds},
        )
        return older_until

    return IssuedWebhookSecret(secret_id, secret, await _audited(engine, work))


async def revoke_webhook_secret(
    engine: Engine, *, merchant: str, shop: str, secret_id: UUID, reason: str, actor: str
) -> None:
    """End an older webhook secret now. Raises: `OnboardingRefused`, also for the current one."""

    async def work(tx: Tx) -> None:
        if not await end_webhook_secret(tx, (await _shop(tx, merchant, shop)).id, secret_id):
            listed = await list_webhook_secrets(tx, (merchant, shop))
            if any(row.id == secret_id for row in listed):
                raise OnboardingRefused(f"{secret_id} is the current one: rotate with --grace 0, which ends it now")
            raise OnboardingRefused(f"the shop {shop} has no secret {secret_id}")
        await append_audit(
            tx,
            actor=actor,
            action="shop.revoke_webhook_secret",
            subject=f"{merchant}/{shop}",
            reason=reason,
            detail={"secret_id": str(secret_id)},
        )

    await _audited(engine, work)


async def change_callbacks(
    engine: Engine,
    *,
    merchant: str,
    shop: str,
    http: bool | None,
    ports: Sequence[int] | None,
    reason: str,
    actor: str,
) -> None:
    """Change where a shop's callbacks may go against the settings, from the next create and the next attempt on.

    None leaves an exception as it is; without ports they are those of the settings. Raises: `OnboardingRefused`.
    """
    if http is None and ports is None:
        raise OnboardingRefused("nothing was said that could be changed")

    async def work(tx: Tx) -> None:
        await save_shop_callbacks(tx, (await _shop(tx, merchant, shop)).id, http=http, ports=ports)
        said = {"http": http, "ports": None if ports is None else list(ports) or "default"}
        await append_audit(
            tx,
            actor=actor,
            action="shop.callbacks",
            subject=f"{merchant}/{shop}",
            reason=reason,
            detail={name: value for name, value in said.items() if value is not None},
        )

    await _audited(engine, work)


async def add_key(
    engine: Engine,
    keyring: Keyring,
    *,
    merchant: str,
    shops: Sequence[str] = (),
    scopes: Sequence[str] = SCOPES,
    v1_only: bool = False,
    networks: Sequence[str] = (),
    expires_at: datetime | None = None,
    actor: str,
) -> IssuedKey:
    """A new API key of a merchant; with `shops`, for those only. Raises: `OnboardingRefused`."""
    key_id = new_id()
    issued = IssuedKey(f"pk_{secrets.token_hex(16)}", f"sk_{secrets.token_urlsafe(32)}")

    async def work(tx: Tx) -> None:
        merchant_id = await _merchant_id(tx, merchant)
        shop_ids = [(await _shop(tx, merchant, code)).id for code in shops]
        await append_api_key(
            tx,
            key_id=key_id,
            public_id=issued.public_id,
            merchant_id=merchant_id,
            secret_sealed=keyring.seal(
                issued.secret.encode(), owner=merchant_id, row=key_id, purpose=API_KEY_PURPOSE, now=time.time()
            ),
            scopes=scopes,
            v1_only=v1_only,
            allowed_networks=networks or None,
            expires_at=expires_at,
            shop_ids=shop_ids,
        )
        await append_audit(
            tx,
            actor=actor,
            action="key.add",
            subject=issued.public_id,
            detail={"merchant": merchant, "scopes": list(scopes)},
        )

    await _audited(engine, work)
    return issued


async def revoke_key(engine: Engine, *, public_id: str, actor: str) -> None:
    """Revoke a key; gateways follow within their cache time. Raises: `OnboardingRefused` when there is no such key."""

    async def work(tx: Tx) -> None:
        if not await save_api_key_revoked(tx, public_id):
            raise OnboardingRefused(f"there is no key {public_id}")
        await append_audit(tx, actor=actor, action="key.revoke", subject=public_id)

    await _audited(engine, work)


async def top_up(engine: Engine, *, merchant: str, shop: str, amount: str, reason: str, actor: str) -> None:
    """Credit a shop's account: an audit row and a ledger entry. `amount` is a decimal string at the shop's scale.

    Raises: `OnboardingRefused`.
    """

    async def work(tx: Tx) -> None:
        found = await _shop(tx, merchant, shop)
        amount_minor = parse_amount(amount, found.currency_exponent)
        if amount_minor is None:
            raise OnboardingRefused(
                f"amount must be a positive decimal string with at most {found.currency_exponent} decimals"
            )
        await append_adjustment(
            tx,
            account_id=found.account_id,
            amount_minor=amount_minor,
            actor=actor,
            reason=reason,
            subject=f"{merchant}/{shop}",
        )

    await _audited(engine, work)


async def _append_webhook_secret(tx: Tx, keyring: Keyring, shop_id: UUID, secret_id: UUID, secret: str) -> None:
    sealed = seal_webhook_secret(keyring, secret, shop_id=shop_id, secret_id=secret_id, now=time.time())
    await append_webhook_secret(tx, secret_id=secret_id, shop_id=shop_id, sealed=sealed)


async def check_party(tx: Tx, merchant: str | None, shop: str | None = None) -> None:
    """See that whoever is asked about exists, where somebody is named. Raises: `OnboardingRefused`."""
    if merchant is not None:
        await _merchant_id(tx, merchant)
    if merchant is not None and shop is not None:
        await _shop(tx, merchant, shop)


async def _check_rail(tx: Tx, name: str) -> None:
    if not await has_rail(tx, name):
        raise OnboardingRefused(f"there is no rail {name}")


async def _merchant_id(tx: Tx, code: str) -> UUID:
    merchant_id = await find_merchant_id(tx, code)
    if merchant_id is None:
        raise OnboardingRefused(f"there is no merchant {code}")
    return merchant_id


async def _shop(tx: Tx, merchant: str, code: str) -> Any:
    shop = await find_shop_by_codes(tx, merchant, code)
    if shop is None:
        raise OnboardingRefused(f"the merchant {merchant} has no shop {code}")
    return shop
