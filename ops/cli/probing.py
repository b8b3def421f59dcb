"""`payouts callbacks preview|test`: what a merchant's server is sent, to look at, and a try whether it takes it.

Both sign with the shop's live secrets and show none. They read them as `payouts_worker`, see `run_opening`; who sends a test is
audited as `payouts_ops`. No process's login may be both, the one of `payouts-custodian` may.
"""

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from uuid import UUID

import click
from yarl import URL

from common.db.engine import Tx, in_transaction
from common.db.ledger import append_audit
from common.db.merchants import find_shop_by_codes
from common.db.stories import find_callback
from common.db.webhook_secrets import SealedWebhookSecret, find_webhook_secrets
from common.deadlines import TimeLimit
from common.domain.ids import EVENT, new_id, render_id
from common.domain.telling import TEST_EVENT_TYPE, render_test_event
from common.sealing import SealBroken
from common.settings import Settings
from common.webhook_secrets import open_webhook_secrets
from ops.cli.callbacks import why_no_callback
from ops.cli.connect import read_settings, run_changing, run_explained, run_opening
from ops.cli.errors import CheckFailed, Refused
from ops.cli.options import actor_option, json_option, parse_event_id, parse_shop
from ops.cli.output import print_json, render_cell, show_record
from ops.cli.parties import parse_webhook_url
from worker.callbacks.send import Attempt, open_session, render_headers, send_callback


@dataclass(frozen=True, slots=True)
class Request:
    """One attempt as it goes over the wire."""

    url: str
    headers: dict[str, str]
    body: bytes
    shop_http: bool = False
    shop_ports: frozenset[int] | None = None

    @property
    def whole_headers(self) -> dict[str, str]:
        """All headers: ours, and those that every request of the HTTP client has."""
        url = URL(self.url)
        host = url.host_port_subcomponent if url.explicit_port else url.host_subcomponent
        return {"Host": host or "", **self.headers, "Accept": "*/*", "Content-Length": str(len(self.body))}


@click.command("preview")
@click.argument("event_id", type=parse_event_id)
@json_option
def preview_command(event_id: UUID, as_json: bool) -> None:
    """Show what an attempt to deliver EVENT_ID would send now, byte for byte, and send nothing."""
    request = run_opening(lambda engine, settings: in_transaction(engine, lambda tx: _preview(tx, settings, event_id)))
    if as_json:
        shown = {"event": render_id(EVENT, event_id), "method": "POST", "url": request.url}
        print_json({**shown, "headers": request.whole_headers, "body": request.body.decode(errors="replace")})
        return
    click.echo(f"POST {render_cell(request.url)}")
    for name, value in request.whole_headers.items():
        click.echo(f"{name}: {render_cell(value)}")
    click.echo()
    click.echo(request.body)


@click.command("test")
@click.argument("shop", type=parse_shop, metavar="MERCHANT/SHOP")
@click.option("--url", type=parse_webhook_url, metavar="URL", help="Instead of the shop's webhook URL.")
@actor_option
@json_option
def test_command(shop: tuple[str, str], url: str | None, actor: str, as_json: bool) -> None:
    """Send one signed event of type test.ping to MERCHANT/SHOP, as callbacks are sent, and show what came of it.

    It is no event of the shop's: nothing is stored but who did this. Exit code 1 unless the answer is 2xx.
    """
    event_id = new_id()
    request = run_opening(
        lambda engine, settings: in_transaction(engine, lambda tx: _test_request(tx, settings, event_id, shop, url))
    )
    event = request.headers["webhook-id"]

    async def note(tx: Tx) -> None:
        detail = {"event": event, "url": request.url}
        await append_audit(tx, actor=actor, action="callback.test", subject="/".join(shop), detail=detail)

    run_changing(lambda engine: in_transaction(engine, note, attempts_max=1))
    attempt = run_explained(_send(request, read_settings()))
    show_record(
        {
            "event": event,
            "type": TEST_EVENT_TYPE,
            "url": request.url,
            "status": attempt.http_status,
            "error": attempt.error,
            "duration_ms": attempt.duration_ms,
            "excerpt": attempt.response_excerpt.decode("utf-8", "replace"),
        },
        as_json=as_json,
    )
    if not attempt.delivered:
        raise CheckFailed(f"the test event was not taken: {attempt.error}")


async def _preview(tx: Tx, settings: Settings, event_id: UUID) -> Request:
    callback = await find_callback(tx, event_id)
    if callback is None:
        raise Refused(await why_no_callback(tx, event_id))
    secrets = (await find_webhook_secrets(tx, [callback.shop_id]))[callback.shop_id]
    return _sign(settings, secrets, render_id(EVENT, event_id), callback.url, callback.body)


async def _test_request(tx: Tx, settings: Settings, event_id: UUID, shop: tuple[str, str], url: str | None) -> Request:
    found = await find_shop_by_codes(tx, *shop)
    if found is None:
        raise Refused(f"the merchant {shop[0]} has no shop {shop[1]}")
    url = url or found.webhook_url
    if url is None:
        raise Refused("the shop has no webhook URL; say --url")
    body = render_test_event(event_id=event_id, shop_code=found.code, created_at=datetime.now(UTC))
    secrets = (await find_webhook_secrets(tx, [found.id]))[found.id]
    request = _sign(settings, secrets, render_id(EVENT, event_id), url, body)
    ports = None if found.callback_ports is None else frozenset(found.callback_ports)
    return replace(request, shop_http=found.callback_http, shop_ports=ports)


def _sign(settings: Settings, sealed: list[SealedWebhookSecret], event: str, url: str, body: bytes) -> Request:
    """What is sent now. Raises: `Refused` when a secret does not open."""
    try:
        secrets = open_webhook_secrets(settings.keyring, sealed)
    except SealBroken as error:
        raise Refused(f"a webhook secret of the shop does not open under these keys: {error}") from error
    return Request(url, render_headers(event, secrets, time.time(), body), body)


async def _send(request: Request, settings: Settings) -> Attempt:
    async with open_session(
        private_allowed=settings.callback_private_addresses,
        https_only=settings.callback_https_only,
        ports=settings.callback_ports,
        forbidden=settings.callback_networks_forbidden,
    ) as session:
        return await send_callback(
            session,
            request.url,
            request.headers,
            request.body,
            limit=TimeLimit(settings.callback_timeout_seconds),
            shop_http=request.shop_http,
            shop_ports=request.shop_ports,
        )
