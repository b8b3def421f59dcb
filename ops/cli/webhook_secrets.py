"""`payouts shop secret`: the secrets that a shop's callbacks are signed with. A new one is shown once, when it is made."""

from typing import Any, Final
from uuid import UUID

import click
from sqlalchemy import Row

from common.db.engine import in_transaction
from common.db.webhook_secrets import list_webhook_secrets
from ops.cli.connect import run_changing, run_connected, run_sealing
from ops.cli.options import actor_option, json_option, parse_duration, parse_shop, parse_uuid, reason_option
from ops.cli.output import Record, show_record, show_records, show_secret
from ops.onboarding import revoke_webhook_secret, rotate_webhook_secret

# The schema's bound.
_GRACE_SECONDS_MAX: Final = 7 * 86_400


@click.group("secret")
def secret_group() -> None:
    """The secrets that a shop's callbacks are signed with: every live one signs."""


def parse_secret_id(text: str) -> UUID:
    """A webhook secret's id."""
    secret_id = parse_uuid(text)
    if secret_id is None:
        raise click.BadParameter(f"{text!r} is not the id of a webhook secret")
    return secret_id


@secret_group.command("rotate")
@click.argument("shop", type=parse_shop, metavar="MERCHANT/SHOP")
@click.option(
    "--grace",
    "grace_seconds",
    type=parse_duration(_GRACE_SECONDS_MAX),
    default="24h",
    show_default=True,
    metavar="TIME",
    help="How long the older ones sign as well, up to 7d; 0 ends them now.",
)
@reason_option
@actor_option
@json_option
def rotate_secret_command(shop: tuple[str, str], grace_seconds: int, reason: str, actor: str, as_json: bool) -> None:
    """Give MERCHANT/SHOP a new webhook secret and show it. Until the grace is over the older ones sign beside it."""
    issued = run_sealing(
        lambda engine, keyring: rotate_webhook_secret(
            engine,
            keyring,
            merchant=shop[0],
            shop=shop[1],
            grace_seconds=grace_seconds,
            reason=reason,
            actor=actor,
        )
    )
    show_secret(
        {
            "shop": "/".join(shop),
            "id": issued.id,
            "older_until": issued.older_until,
            "reason": reason,
            "webhook_secret": issued.secret,
        },
        as_json=as_json,
    )


@secret_group.command("revoke")
@click.argument("shop", type=parse_shop, metavar="MERCHANT/SHOP")
@click.argument("secret_id", type=parse_secret_id, metavar="ID")
@reason_option
@actor_option
@json_option
def revoke_secret_command(shop: tuple[str, str], secret_id: UUID, reason: str, actor: str, as_json: bool) -> None:
    """End the older secret ID of MERCHANT/SHOP now. The current one is ended by a rotation."""
    run_changing(
        lambda engine: revoke_webhook_secret(
            engine, merchant=shop[0], shop=shop[1], secret_id=secret_id, reason=reason, actor=actor
        )
    )
    show_record({"shop": "/".join(shop), "id": secret_id, "revoked": True, "reason": reason}, as_json=as_json)


@secret_group.command("list")
@click.argument("shop", type=parse_shop, required=False, metavar="[MERCHANT/SHOP]")
@click.option("--all", "with_ended", is_flag=True, help="Those that have ended too.")
@json_option
def list_secrets_command(shop: tuple[str, str] | None, with_ended: bool, as_json: bool) -> None:
    """List live webhook secrets, the newest of each shop first; never the secrets themselves."""
    rows = run_connected(
        lambda engine: in_transaction(engine, lambda tx: list_webhook_secrets(tx, shop, with_ended=with_ended))
    )
    show_records("secrets", map(_describe, rows), as_json=as_json)


def _describe(row: Row[*tuple[Any, ...]]) -> Record:
    return {
        "shop": row.shop,
        "id": row.id,
        "state": "current" if row.current else "ending" if row.live else "ended",
        "created_at": row.created_at,
        "not_after": row.not_after,
    }
