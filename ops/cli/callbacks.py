"""`payouts callbacks`: what merchants were told, and telling it again."""

from typing import Final
from uuid import UUID

import click

from common.db.callbacks import ListedCallback, list_callbacks, list_put_aside, resend_callback
from common.db.engine import Tx, in_transaction
from common.db.ledger import append_audit
from common.db.stories import has_callback, has_event
from common.domain.ids import EVENT, PAYIN, PAYOUT, render_id
from ops.cli.connect import run_changing, run_connected
from ops.cli.errors import Refused
from ops.cli.options import actor_option, json_option, parse_event_id, parse_shop, reason_option
from ops.cli.output import Record, show_record, show_records
from ops.cli.payouts import find_one_payout

PUT_ASIDE: Final = "put-aside"
STATES: Final = ("pending", "delivered", "exhausted", "rejected", PUT_ASIDE)


@click.group("callbacks")
def callbacks_group() -> None:
    """What merchants are told."""


@callbacks_group.command("list")
@click.option("--payout", metavar="ID_OR_EXTERNAL_ID", help="Of this payout only.")
@click.option("--shop", type=parse_shop, metavar="MERCHANT/SHOP", help="Whose external id is meant.")
@click.option("--state", type=click.Choice(STATES), help="In this state only; put-aside: pending, but kept for people.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
@json_option
def list_callbacks_command(
    payout: str | None, shop: tuple[str, str] | None, state: str | None, limit: int, as_json: bool
) -> None:
    """List callbacks, newest first."""

    async def work(tx: Tx) -> list[ListedCallback]:
        payout_id = None if payout is None else (await find_one_payout(tx, payout, shop)).id
        if state == PUT_ASIDE:
            return await list_put_aside(tx, payout_id=payout_id, rows_max=limit)
        return await list_callbacks(tx, payout_id=payout_id, state=state, rows_max=limit)

    if shop is not None and payout is None:
        raise click.UsageError("--shop says whose --payout is meant, and there is none")
    callbacks = run_connected(lambda engine: in_transaction(engine, work))
    show_records("callbacks", map(_describe, callbacks), as_json=as_json)


@callbacks_group.command("resend")
@click.argument("event_id", type=parse_event_id)
@reason_option
@actor_option
@json_option
def resend_callback_command(event_id: UUID, reason: str, actor: str, as_json: bool) -> None:
    """Make the callback of EVENT_ID due now, whatever became of it. It sends the same bytes again."""
    event = render_id(EVENT, event_id)

    async def work(tx: Tx) -> None:
        if not await resend_callback(tx, event_id):
            raise Refused(await _why_not(tx, event_id))
        await append_audit(tx, actor=actor, action="callback.resend", subject=event, reason=reason)

    run_changing(lambda engine: in_transaction(engine, work, attempts_max=1))
    show_record({"event": event, "state": "pending"}, as_json=as_json)


async def _why_not(tx: Tx, event_id: UUID) -> str:
    """Why a callback cannot be sent again, in words."""
    event = render_id(EVENT, event_id)
    if await has_callback(tx, event_id):
        return f"an attempt to deliver {event} is under way; repeat the command in a minute"
    return await why_no_callback(tx, event_id)


async def why_no_callback(tx: Tx, event_id: UUID) -> str:
    """Why nobody is called about an event, in words."""
    event = render_id(EVENT, event_id)
    if await has_event(tx, event_id):
        return f"nobody asked to be called about {event}"
    return f"there is no event {event}"


def _describe(callback: ListedCallback) -> Record:
    return {
        "event": render_id(EVENT, callback.event_id),
        "payout": None if callback.payout_id is None else render_id(PAYOUT, callback.payout_id),
        "payin": None if callback.payin_id is None else render_id(PAYIN, callback.payin_id),
        "type": callback.type,
        "state": callback.state,
        "attempts": callback.attempts,
        "last_status": callback.last_status,
        "last_error": callback.last_error,
        "due_at": callback.due_at,
        "created_at": callback.created_at,
        "url": callback.url,
    }
