"""`payouts payout waiting|resolve`: payouts whose fate no rail tells, and the word of two operators."""

from functools import partial
from typing import Any

import click
from sqlalchemy import Row
from sqlalchemy.exc import IntegrityError

from common.db.engine import Tx, constraint_name, in_transaction
from common.db.resolutions import list_waiting
from common.domain.ids import PAYOUT, render_id
from common.domain.money import render_amount
from common.domain.payout import State
from ops.cli.connect import run_changing, run_connected
from ops.cli.errors import Refused
from ops.cli.options import REASON_CHARACTERS_MAX, actor_option, json_option, parse_line, parse_shop
from ops.cli.output import Record, show_record, show_records
from ops.cli.payouts import find_one_payout
from ops.resolving import Doubtful, ResolutionRefused, Resolved, resolve, withdraw

_PAID, _DECLINED = "paid", "declined"


@click.command("waiting")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
@json_option
def list_waiting_command(limit: int, as_json: bool) -> None:
    """List payouts that are verifying, the oldest doubt first: their money stays held until their rail or people know."""
    found = run_connected(lambda engine: in_transaction(engine, lambda tx: list_waiting(tx, rows_max=limit)))
    show_records("payouts", map(_describe, found), as_json=as_json)


@click.command("resolve")
@click.argument("payout_id", metavar="ID_OR_EXTERNAL_ID")
@click.option("--success", is_flag=True, help="The recipient has the money.")
@click.option("--failed", is_flag=True, help="The recipient has not, and never will under this order.")
@click.option("--withdraw", "withdrawn", is_flag=True, help="Take back what one operator said.")
@click.option(
    "--evidence",
    type=parse_line(REASON_CHARACTERS_MAX),
    required=True,
    metavar="TEXT",
    help="How you know: the bank's letter, statement, ticket; written down.",
)
@click.option("--shop", type=parse_shop, metavar="MERCHANT/SHOP", help="Whose external id is meant.")
@actor_option
@json_option
def resolve_command(
    payout_id: str,
    success: bool,
    failed: bool,
    withdrawn: bool,
    evidence: str,
    shop: tuple[str, str] | None,
    actor: str,
    as_json: bool,
) -> None:
    """Say how a payout ended that no rail tells of.

    It counts when a second operator says the same with evidence of their own. Then a worker ends the payout.
    """
    if success + failed + withdrawn != 1:
        raise click.UsageError("one of --success, --failed and --withdraw is required, and one alone")

    async def work(tx: Tx) -> tuple[str, Resolved]:
        found = await find_one_payout(tx, payout_id, shop)
        payout = Doubtful(found.id, found.shop_id, State(found.state))
        step = withdraw if withdrawn else partial(resolve, outcome=_PAID if success else _DECLINED)
        return render_id(PAYOUT, found.id), await step(tx, payout, evidence=evidence, actor=actor)

    try:
        rendered, resolved = run_changing(lambda engine: in_transaction(engine, work, attempts_max=1))
    except ResolutionRefused as error:
        raise Refused(str(error)) from error
    except IntegrityError as error:
        if constraint_name(error) in ("resolutions_one_open_per_payout", "resolutions_open_whole"):
            raise Refused("somebody was quicker; look at the payout again") from error
        raise
    record = {
        "payout": rendered,
        "resolution": resolved.id,
        "says": resolved.outcome,
        "state": "waits for another operator" if resolved.state == "open" else resolved.state,
        "opened_by": resolved.opened_by,
        "closed_by": resolved.closed_by,
    }
    show_record(record, as_json=as_json)


def _describe(row: Row[Any]) -> Record:
    return {
        "payout": render_id(PAYOUT, row.payout_id),
        "external_id": row.external_id,
        "shop": f"{row.merchant}/{row.shop}",
        "amount": f"{render_amount(row.amount_minor, row.currency_exponent)} {row.currency}",
        "rail": row.rail,
        "verifying_since": row.verifying_since,
        "look_ups": row.look_ups,
        "last_word": row.detail,
        "next_look_up": row.due_at,
        "proposed": None if row.proposed is None else f"{row.proposed} by {row.proposed_by}",
    }
