"""`payouts payin`: everything that is known of one, in order of time."""

from collections.abc import Sequence
from typing import Any

import click
from sqlalchemy import Row

from common.db.engine import Tx, in_transaction
from common.db.stories import PayinStory, begin_snapshot, find_payin_story, find_payins
from common.domain.ids import PAYIN, parse_id, render_id
from common.domain.money import render_amount
from ops.cli.connect import run_connected
from ops.cli.errors import Refused
from ops.cli.options import json_option, parse_shop, parse_uuid
from ops.cli.output import Record, print_json, print_record
from ops.cli.payouts import moment, print_story, tell_callback, tell_discrepancy, tell_entry, tell_event, tell_word


@click.group("payin")
def payin_group() -> None:
    """Payins."""


@payin_group.command("show")
@click.argument("payin_id", metavar="ID_OR_EXTERNAL_ID")
@click.option("--shop", type=parse_shop, metavar="MERCHANT/SHOP", help="Whose external id is meant.")
@json_option
def show_payin_command(payin_id: str, shop: tuple[str, str] | None, as_json: bool) -> None:
    """Tell the whole story of a payin: its money, what its rail said, events, callbacks."""

    async def work(tx: Tx) -> PayinStory:
        await begin_snapshot(tx)
        return await find_payin_story(tx, await _find_one(tx, payin_id, shop))

    story = run_connected(lambda engine: in_transaction(engine, work))
    payin, moments = _describe(story), _tell(story)
    if as_json:
        print_json({"payin": payin, "story": moments})
        return
    print_record(payin)
    print_story(moments)


async def _find_one(tx: Tx, text: str, shop: tuple[str, str] | None) -> Row[Any]:
    """The payin of an id (`pi_…`, or as the database shows it), else of the merchant's own id. Raises: `Refused`."""
    payin_id = parse_id(PAYIN, text) or parse_uuid(text)
    found: Sequence[Row[Any]] = await find_payins(tx, payin_id=payin_id, shop=shop) if payin_id else []
    found = found or await find_payins(tx, external_id=text, shop=shop)
    if not found:
        raise Refused(f"there is no payin {text}" + ("" if shop is None else f" in {'/'.join(shop)}"))
    if len(found) > 1:
        shops = ", ".join(f"{payin.merchant}/{payin.shop}" for payin in found)
        raise Refused(f"several shops have a payin {text}; choose with --shop: {shops}")
    return found[0]


def _describe(story: PayinStory) -> Record:
    payin, due = story.payin, story.due
    return {
        "id": render_id(PAYIN, payin.id),
        "external_id": payin.external_id,
        "merchant": payin.merchant,
        "shop": payin.shop,
        "status": payin.state,
        "amount": render_amount(payin.amount_minor, payin.currency_exponent),
        "currency": payin.currency,
        "rail": payin.rail,
        "reference": payin.reference,
        "payment_link": payin.payment_link,
        "callback_url": payin.callback_url,
        "details": payin.details,
        "failure": payin.failure_code,
        "provider_reference": payin.provider_reference,
        "created_at": payin.created_at,
        "updated_at": payin.updated_at,
        "expires_at": payin.expires_at,
        "finalized_at": payin.finalized_at,
        "look_ups": None if due is None else due.look_ups,
        "due_at": None if due is None else due.due_at,
    }


def _tell(story: PayinStory) -> list[dict[str, Any]]:
    exponent = story.payin.currency_exponent
    moments = [
        moment(story.payin.created_at, "payin", state="pending"),
        *(moment(move.at, "payin", state=move.state) for move in story.moves),
        *(tell_entry(entry, exponent) for entry in story.entries),
        *(tell_word(word, exponent) for word in story.events_of_rail),
        *(tell_discrepancy(discrepancy) for discrepancy in story.discrepancies),
        *(tell_event(event) for event in story.events),
        *(told for callback in story.callbacks for told in tell_callback(callback)),
    ]
    return sorted(moments, key=lambda told: told["at"])
