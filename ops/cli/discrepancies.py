"""`payouts discrepancies`: words of rails against what we know. They moved no money; people find out, and say so."""

from typing import Any
from uuid import UUID

import click
from sqlalchemy import Row

from common.db.engine import Tx, in_transaction
from common.db.ledger import append_audit
from common.db.rail_events import close_discrepancy, list_discrepancies
from common.domain.ids import PAYIN, PAYOUT, render_id
from ops.cli.connect import run_changing, run_connected
from ops.cli.errors import Refused
from ops.cli.options import actor_option, json_option, parse_uuid, reason_option
from ops.cli.output import Record, show_record, show_records


def parse_discrepancy_id(text: str) -> UUID:
    """The id that `list` shows."""
    discrepancy_id = parse_uuid(text)
    if discrepancy_id is None:
        raise click.BadParameter(f"{text!r} is not the id of a discrepancy")
    return discrepancy_id


@click.group("discrepancies")
def discrepancies_group() -> None:
    """Words of rails against what we know."""


@discrepancies_group.command("list")
@click.option("--all", "everything", is_flag=True, help="Closed ones too.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
@json_option
def list_discrepancies_command(everything: bool, limit: int, as_json: bool) -> None:
    """List open discrepancies, the newest first."""
    found = run_connected(
        lambda engine: in_transaction(engine, lambda tx: list_discrepancies(tx, everything=everything, rows_max=limit))
    )
    show_records("discrepancies", map(_describe, found), as_json=as_json)


@discrepancies_group.command("close")
@click.argument("discrepancy_id", type=parse_discrepancy_id)
@reason_option
@actor_option
@json_option
def close_discrepancy_command(discrepancy_id: UUID, reason: str, actor: str, as_json: bool) -> None:
    """Close DISCREPANCY_ID: what was found out is the --reason. It moves no money."""

    async def work(tx: Tx) -> None:
        audit_id = await append_audit(
            tx, actor=actor, action="discrepancy.close", subject=str(discrepancy_id), reason=reason
        )
        if await close_discrepancy(tx, discrepancy_id, audit_id=audit_id) is None:
            raise Refused(f"no discrepancy {discrepancy_id} is open")

    run_changing(lambda engine: in_transaction(engine, work, attempts_max=1))
    show_record({"id": discrepancy_id, "state": "closed", "reason": reason}, as_json=as_json)


def _describe(row: Row[Any]) -> Record:
    return {
        "id": row.id,
        "payout": None if row.payout_id is None else render_id(PAYOUT, row.payout_id),
        "payin": None if row.payin_id is None else render_id(PAYIN, row.payin_id),
        "shop": row.shop,
        "rail": row.rail,
        "reference": row.reference,
        "kind": row.kind,
        "state": row.state,
        "word": row.word,
        "detail": row.detail,
        "opened_at": row.opened_at,
        "closed_at": row.closed_at,
    }
