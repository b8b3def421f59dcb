"""`payouts rail`: what pays. A rail's secret is shown once, when the rail is added."""

from typing import Final

import click
from yarl import URL

from common.db.engine import Tx, in_transaction
from common.db.ledger import append_audit
from common.db.rails import list_rails, save_rail_status
from common.domain.addresses import parse_callback_url
from ops.cli.connect import run_changing, run_connected, run_sealing
from ops.cli.errors import Refused
from ops.cli.options import actor_option, json_option, reason_option
from ops.cli.output import show_record, show_records, show_secret
from ops.onboarding import add_http_rail, remove_rail

_REFERENCE: Final = "{reference}"


@click.group("rail")
def rail_group() -> None:
    """Rails: what pays, and whether it is switched on."""


def parse_base_url(text: str) -> str:
    """The URL below which a bank answers; workers may be allowed to reach any address and port."""
    url = parse_callback_url(text, private_allowed=True, ports=frozenset())
    if url is None or URL(url).query_string or URL(url).fragment:
        raise click.BadParameter("must be an absolute http(s) URL without user info, query and fragment")
    return url.rstrip("/")


def parse_payin_link(text: str) -> str:
    """The template of a link for payers."""
    if (
        _REFERENCE not in text
        or parse_callback_url(text.replace(_REFERENCE, "pi_0"), private_allowed=True, ports=frozenset()) is None
    ):
        raise click.BadParameter(f"must be an absolute http(s) URL with {_REFERENCE} in it")
    return text


@rail_group.command("add")
@click.argument("name")
@click.option("--base-url", required=True, type=parse_base_url, metavar="URL", help="Below it the bank answers.")
@click.option(
    "--authoritative", is_flag=True, help="What its look-up does not find was never taken: it may be sent again."
)
@click.option(
    "--lag-seconds",
    type=click.FloatRange(0, 604_800),
    default=0.0,
    show_default=True,
    help="How long its look-up may not know yet of what it took.",
)
@click.option(
    "--concurrency", type=click.IntRange(1, 10_000), help="Calls in flight per worker; else the worker's own."
)
@click.option(
    "--payin-link",
    type=parse_payin_link,
    metavar="URL",
    help="Where payers pay in: a URL with {reference} in it; else they quote the reference.",
)
@actor_option
@json_option
def add_rail_command(
    name: str,
    base_url: str,
    authoritative: bool,
    lag_seconds: float,
    concurrency: int | None,
    payin_link: str | None,
    actor: str,
    as_json: bool,
) -> None:
    """Bring in the rail NAME, a bank that speaks our protocol, and show the secret that both sides sign with."""
    secret = run_sealing(
        lambda engine, keyring: add_http_rail(
            engine,
            keyring,
            name=name,
            base_url=base_url,
            authoritative=authoritative,
            lag_seconds=lag_seconds,
            concurrency=concurrency,
            payin_link=payin_link,
            actor=actor,
        )
    )
    terms = {
        "base_url": base_url,
        "authoritative": authoritative,
        "lag_seconds": lag_seconds,
        "concurrency": concurrency,
        "payin_link": payin_link,
    }
    show_secret({"name": name, "kind": "http", **terms, "secret": secret}, as_json=as_json)


@rail_group.command("off")
@click.argument("name")
@reason_option
@actor_option
@json_option
def switch_off_command(name: str, reason: str, actor: str, as_json: bool) -> None:
    """Switch NAME off: its payouts wait, nothing is refused. Workers follow within seconds."""
    _switch(name, "off", reason, actor, as_json)


@rail_group.command("on")
@click.argument("name")
@reason_option
@actor_option
@json_option
def switch_on_command(name: str, reason: str, actor: str, as_json: bool) -> None:
    """Switch NAME on again."""
    _switch(name, "on", reason, actor, as_json)


def _switch(name: str, status: str, reason: str, actor: str, as_json: bool) -> None:
    async def work(tx: Tx) -> None:
        if not await save_rail_status(tx, name, status):
            raise Refused(f"there is no rail {name}")
        await append_audit(tx, actor=actor, action=f"rail.{status}", subject=name, reason=reason)

    run_changing(lambda engine: in_transaction(engine, work, attempts_max=1))
    show_record({"name": name, "status": status, "reason": reason}, as_json=as_json)


@rail_group.command("remove")
@click.argument("name")
@reason_option
@actor_option
@json_option
def remove_rail_command(name: str, reason: str, actor: str, as_json: bool) -> None:
    """Forget NAME, which no shop and no unfinished payout names any more."""
    run_changing(lambda engine: remove_rail(engine, name=name, reason=reason, actor=actor))
    show_record({"name": name, "removed": True}, as_json=as_json)


@rail_group.command("list")
@json_option
def list_rails_command(as_json: bool) -> None:
    """List rails, and how many unfinished payouts each has; never their secrets."""
    rows = run_connected(lambda engine: in_transaction(engine, list_rails))
    show_records("rails", (row._asdict() for row in rows), as_json=as_json)
