"""`payouts merchant`, `payouts shop`, `payouts key`: bringing merchants in. Secrets are shown once, when they are made."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

import click
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from common.db.engine import Tx, in_transaction
from common.db.merchants import list_api_keys, list_shops
from common.domain.addresses import parse_callback_url
from common.settings import PORT_MAX
from ops.cli.connect import read_settings, run_changing, run_connected, run_sealing
from ops.cli.options import (
    actor_option,
    json_option,
    merchant_option,
    parse_line,
    parse_moment,
    parse_shop,
    reason_option,
)
from ops.cli.output import show_record, show_records, show_secret
from ops.onboarding import (
    SCOPES,
    add_key,
    add_merchant,
    add_shop,
    change_callbacks,
    change_rail,
    change_webhook_url,
    check_party,
    freeze_shop,
    revoke_key,
    unfreeze_shop,
)


@click.group("merchant")
def merchant_group() -> None:
    """Merchants."""


@merchant_group.command("add")
@click.argument("code")
@click.option("--name", required=True, type=parse_line(200), metavar="TEXT", help="What people call them.")
@actor_option
@json_option
def add_merchant_command(code: str, name: str, actor: str, as_json: bool) -> None:
    """Bring in the merchant CODE (a-z, 0-9 and hyphens)."""
    run_changing(lambda engine: add_merchant(engine, code=code, name=name, actor=actor))
    show_record({"code": code, "name": name}, as_json=as_json)


@click.group("shop")
def shop_group() -> None:
    """Shops of merchants, each with one currency and one account."""


def parse_webhook_url(text: str) -> str:
    """A URL that a callback could go to. Which addresses may be called, the workers judge when they call."""
    url = parse_callback_url(text, private_allowed=True, ports=frozenset())
    if url is None:
        raise click.BadParameter("must be an absolute http(s) URL without user info")
    return url


def parse_schema_file(name: str) -> dict[str, Any]:
    """The JSON Schema that a file holds."""
    try:
        schema = json.loads(Path(name).read_bytes())
        if not isinstance(schema, dict):
            raise click.BadParameter(f"{name} does not hold a JSON object")
        Draft202012Validator.check_schema(schema)
    except OSError as error:
        raise click.BadParameter(f"{name}: {error.strerror}") from error
    except ValueError as error:
        raise click.BadParameter(f"{name} does not hold JSON: {error}") from error
    except SchemaError as error:
        raise click.BadParameter(f"{name} is not a JSON Schema: {error.message}") from error
    return schema


@shop_group.command("add")
@click.argument("merchant")
@click.argument("code")
@click.option("--currency", required=True, help="ISO 4217; it cannot be changed later.")
@click.option("--rail", required=True, help="What pays its payouts; see `payouts rail list`.")
@click.option("--default", "is_default", is_flag=True, help="The one that is meant when a request names none.")
@click.option(
    "--webhook-url", type=parse_webhook_url, metavar="URL", help="Where callbacks go when a payout names no URL."
)
@click.option(
    "--payment-data-schema",
    type=parse_schema_file,
    metavar="FILE",
    help="A JSON Schema (2020-12) that the paymentData of its payouts must meet.",
)
@actor_option
@json_option
def add_shop_command(
    merchant: str,
    code: str,
    currency: str,
    rail: str,
    is_default: bool,
    webhook_url: str | None,
    payment_data_schema: dict[str, Any] | None,
    actor: str,
    as_json: bool,
) -> None:
    """Open the shop CODE of MERCHANT with an empty account, and show its webhook secret."""
    secret = run_sealing(
        lambda engine, keyring: add_shop(
            engine,
            keyring,
            merchant=merchant,
            code=code,
            currency=currency,
            rail=rail,
            is_default=is_default,
            webhook_url=webhook_url,
            payment_data_schema=payment_data_schema,
            actor=actor,
        )
    )
    shop = {"merchant": merchant, "code": code, "currency": currency, "rail": rail, "is_default": is_default}
    show_secret({**shop, "webhook_url": webhook_url, "webhook_secret": secret}, as_json=as_json)


@shop_group.command("rail")
@click.argument("shop", type=parse_shop, metavar="MERCHANT/SHOP")
@click.argument("rail")
@reason_option
@actor_option
@json_option
def change_rail_command(shop: tuple[str, str], rail: str, reason: str, actor: str, as_json: bool) -> None:
    """Have RAIL pay what MERCHANT/SHOP creates from now on; what was created before keeps its own."""
    run_changing(
        lambda engine: change_rail(engine, merchant=shop[0], shop=shop[1], rail=rail, reason=reason, actor=actor)
    )
    show_record({"shop": "/".join(shop), "rail": rail}, as_json=as_json)


@shop_group.command("webhook")
@click.argument("shop", type=parse_shop, metavar="MERCHANT/SHOP")
@click.argument("url", required=False)
@click.option("--none", "is_none", is_flag=True, help="Tell nobody where a payout names no URL.")
@reason_option
@actor_option
@json_option
def change_webhook_command(
    shop: tuple[str, str], url: str | None, is_none: bool, reason: str, actor: str, as_json: bool
) -> None:
    """Call URL about what MERCHANT/SHOP creates without a callback_url, from now on; events that exist keep their URL.

    It is judged like a callback_url, by the settings PAYOUTS_CALLBACK_… and the exceptions of `payouts shop callbacks`.
    """
    if is_none == (url is not None):
        raise click.UsageError("either a URL or --none")
    settings = read_settings()
    run_changing(
        lambda engine: change_webhook_url(
            engine, settings, merchant=shop[0], shop=shop[1], url=url, reason=reason, actor=actor
        )
    )
    show_record({"shop": "/".join(shop), "webhook_url": url}, as_json=as_json)


_PORTS: Final = re.compile(r"[0-9]{1,5}(,[0-9]{1,5})*", re.ASCII)


def parse_ports(text: str) -> tuple[int, ...]:
    """Ports by commas; none for `default`."""
    if text == "default":
        return ()
    if not _PORTS.fullmatch(text):
        raise click.BadParameter("must be ports by commas, or default")
    ports = tuple(sorted({int(port) for port in text.split(",")}))
    if not all(1 <= port <= PORT_MAX for port in ports):
        raise click.BadParameter(f"each must be 1 to {PORT_MAX}")
    return ports


@shop_group.command("callbacks")
@click.argument("shop", type=parse_shop, metavar="MERCHANT/SHOP")
@click.option("--http/--no-http", default=None, help="Callbacks over http too, where the settings want https.")
@click.option(
    "--ports",
    type=parse_ports,
    metavar="PORT,…|default",
    help="Ports of its callbacks, instead of those of the settings.",
)
@actor_option
@reason_option
@json_option
def change_callbacks_command(
    shop: tuple[str, str], http: bool | None, ports: tuple[int, ...] | None, actor: str, reason: str, as_json: bool
) -> None:
    """Say where callbacks of MERCHANT/SHOP may go against the settings. It counts from the next create and attempt on."""
    run_changing(
        lambda engine: change_callbacks(
            engine, merchant=shop[0], shop=shop[1], http=http, ports=ports, reason=reason, actor=actor
        )
    )
    changed = {"http": http, "ports": None if ports is None else list(ports) or "default"}
    show_record({"shop": "/".join(shop)} | {k: v for k, v in changed.items() if v is not None}, as_json=as_json)


@shop_group.command("freeze")
@click.argument("shop", type=parse_shop, metavar="MERCHANT/SHOP")
@reason_option
@actor_option
@json_option
def freeze_shop_command(shop: tuple[str, str], reason: str, actor: str, as_json: bool) -> None:
    """Stop MERCHANT/SHOP: its requests are answered as of an inactive shop, and what was not sent yet waits, its money held.

    What a rail has taken ends as it ends, payins are credited, callbacks go on.
    """
    run_changing(lambda engine: freeze_shop(engine, merchant=shop[0], shop=shop[1], reason=reason, actor=actor))
    show_record({"shop": "/".join(shop), "status": "inactive", "reason": reason}, as_json=as_json)


@shop_group.command("unfreeze")
@click.argument("shop", type=parse_shop, metavar="MERCHANT/SHOP")
@reason_option
@actor_option
@json_option
def unfreeze_shop_command(shop: tuple[str, str], reason: str, actor: str, as_json: bool) -> None:
    """Let MERCHANT/SHOP go on; what waits is sent within a minute."""
    run_changing(lambda engine: unfreeze_shop(engine, merchant=shop[0], shop=shop[1], reason=reason, actor=actor))
    show_record({"shop": "/".join(shop), "status": "active", "reason": reason}, as_json=as_json)


@shop_group.command("list")
@merchant_option
@json_option
def list_shops_command(merchant: str | None, as_json: bool) -> None:
    """List shops, oldest first."""

    async def work(tx: Tx) -> Sequence[Any]:
        await check_party(tx, merchant)
        return await list_shops(tx, merchant)

    rows = run_connected(lambda engine: in_transaction(engine, work))
    show_records("shops", (row._asdict() for row in rows), as_json=as_json)


@click.group("key")
def key_group() -> None:
    """API keys of merchants."""


def parse_network(text: str) -> str:
    """A network in CIDR notation, or one address."""
    try:
        return str(ip_network(text))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def parse_expiry(text: str) -> datetime:
    """A moment to come: ISO 8601, a date or more; in UTC unless it says otherwise."""
    moment = parse_moment(text)
    if moment <= datetime.now(UTC):
        raise click.BadParameter(f"{text} is over")
    return moment


@key_group.command("add")
@click.argument("merchant")
@click.option("--shop", "shops", multiple=True, metavar="CODE", help="Only for this shop; may be repeated.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    default=SCOPES,
    show_default="all",
    help="What it may do; may be repeated.",
)
@click.option(
    "--network", "networks", multiple=True, type=parse_network, metavar="CIDR", help="Only from there; may be repeated."
)
@click.option("--expires", "expires_at", type=parse_expiry, metavar="TIME", help="Until then; ISO 8601, in UTC.")
@click.option("--v1-only", is_flag=True, help="Refuse the older body formula.")
@actor_option
@json_option
def add_key_command(
    merchant: str,
    shops: Sequence[str],
    scopes: Sequence[str],
    networks: Sequence[str],
    expires_at: datetime | None,
    v1_only: bool,
    actor: str,
    as_json: bool,
) -> None:
    """Issue a key of MERCHANT, for all its shops unless some are named, and show its secret."""
    issued = run_sealing(
        lambda engine, keyring: add_key(
            engine,
            keyring,
            merchant=merchant,
            shops=shops,
            scopes=scopes,
            networks=networks,
            expires_at=expires_at,
            v1_only=v1_only,
            actor=actor,
        )
    )
    limits = {"shops": shops, "scopes": scopes, "networks": networks, "expires_at": expires_at, "v1_only": v1_only}
    show_secret(
        {"merchant": merchant, **limits, "public_id": issued.public_id, "secret": issued.secret}, as_json=as_json
    )


@key_group.command("revoke")
@click.argument("public_id")
@actor_option
@json_option
def revoke_key_command(public_id: str, actor: str, as_json: bool) -> None:
    """Revoke the key PUBLIC_ID for good. Gateways follow within PAYOUTS_KEY_CACHE_SECONDS."""
    run_changing(lambda engine: revoke_key(engine, public_id=public_id, actor=actor))
    show_record({"public_id": public_id, "revoked": True}, as_json=as_json)


@key_group.command("list")
@merchant_option
@json_option
def list_keys_command(merchant: str | None, as_json: bool) -> None:
    """List keys, revoked ones too, oldest first; never their secrets."""

    async def work(tx: Tx) -> Sequence[Any]:
        await check_party(tx, merchant)
        return await list_api_keys(tx, merchant)

    rows = run_connected(lambda engine: in_transaction(engine, work))
    show_records("keys", (row._asdict() for row in rows), as_json=as_json)
