"""`payouts export`: a merchant's payouts, ledger entries or callbacks as a CSV file that a spreadsheet can open."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

import click
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from common.db.engine import Engine, Tx, in_transaction
from common.db.exports import (
    ExportedShop,
    Wanted,
    find_exported_shops,
    stream_callbacks,
    stream_entries,
    stream_payouts,
)
from common.db.stories import begin_snapshot
from common.domain.ids import EVENT, PAYIN, PAYOUT, render_id
from common.domain.money import render_amount
from common.domain.payout import State
from ops.cli.connect import READONLY, run_connected
from ops.cli.errors import Refused
from ops.cli.options import force_option, json_option, new_file, parse_moment
from ops.cli.output import show_record

_ROWS_PER_STEP: Final = 1_000

# What stands in a column, of a row and its shop.
_Cell: TypeAlias = Callable[[Any, ExportedShop], object]


def _plain(name: str) -> _Cell:
    return lambda row, _: getattr(row, name)


def _money(name: str) -> _Cell:
    return lambda row, shop: render_amount(getattr(row, name), shop.currency_exponent)


def _id(prefix: str, name: str) -> _Cell:
    def render(row: Any, _shop: ExportedShop) -> str | None:
        value = getattr(row, name)
        return None if value is None else render_id(prefix, value)

    return render


def _shop_code(_row: Any, shop: ExportedShop) -> str:
    return shop.code


def _currency(_row: Any, shop: ExportedShop) -> str:
    return shop.currency


@dataclass(frozen=True, slots=True)
class _Export:
    """Where rows come from, and what of each is written, column by column."""

    stream: Callable[[Tx, Wanted, Sequence[ExportedShop]], AsyncIterator[Any]]
    columns: Mapping[str, _Cell]


EXPORTS: Final = {
    "payouts": _Export(
        stream_payouts,
        {
            "id": _id(PAYOUT, "id"),
            "external_id": _plain("external_id"),
            "shop": _shop_code,
            "status": lambda row, _: State(row.state).status,
            "stage": lambda row, _: State(row.state).stage,
            "amount": _money("amount_minor"),
            "currency": _currency,
            "recipient": _plain("recipient_masked"),
            "failure": _plain("failure_code"),
            "provider_reference": _plain("provider_reference"),
            "created_at": _plain("created_at"),
            "updated_at": _plain("updated_at"),
            "finalized_at": _plain("finalized_at"),
            "expires_at": _plain("expires_at"),
        },
    ),
    "entries": _Export(
        stream_entries,
        {
            "shop": _shop_code,
            "seq": _plain("seq"),
            "kind": _plain("kind"),
            "contra": _plain("contra"),
            "amount": _money("amount_minor"),
            "posted_delta": _money("posted_delta_minor"),
            "held_delta": _money("held_delta_minor"),
            "posted_after": _money("posted_after_minor"),
            "held_after": _money("held_after_minor"),
            "currency": _currency,
            "payout": _id(PAYOUT, "payout_id"),
            "payin": _id(PAYIN, "payin_id"),
            "created_at": _plain("created_at"),
        },
    ),
    "callbacks": _Export(
        stream_callbacks,
        {
            "event": _id(EVENT, "event_id"),
            "type": _plain("type"),
            "sequence": _plain("sequence"),
            "shop": _shop_code,
            "payout": _id(PAYOUT, "payout_id"),
            "payin": _id(PAYIN, "payin_id"),
            "state": _plain("state"),
            "url": _plain("url"),
            "created_at": _plain("created_at"),
            "finished_at": _plain("finished_at"),
        },
    ),
}


@click.command("export")
@click.argument("what", type=click.Choice(tuple(EXPORTS)))
@click.option("--merchant", required=True, metavar="CODE", help="Whose.")
@click.option("--shop", metavar="CODE", help="Of this shop of theirs only.")
@click.option(
    "--since", required=True, type=parse_moment, metavar="TIME", help="Created then or later; ISO 8601, in UTC."
)
@click.option("--until", required=True, type=parse_moment, metavar="TIME", help="Created before then.")
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="It is there when all of it is.",
)
@force_option
@json_option
def export_command(
    what: str,
    merchant: str,
    shop: str | None,
    since: datetime,
    until: datetime,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Write a merchant's payouts, entries or callbacks to a CSV file, all of one moment.

    Amounts are decimal strings with their currency, times UTC, recipients masked as merchants see them. A cell that a
    spreadsheet would take for a formula has an apostrophe before it.
    """
    if since >= until:
        raise click.UsageError("--since must be before --until")
    export, wanted = EXPORTS[what], Wanted(merchant, shop, since, until)

    async def work(tx: Tx) -> int:
        await begin_snapshot(tx)
        shops = await find_exported_shops(tx, wanted)
        if not shops:
            raise Refused(f"there is no merchant {merchant}" + (f" with a shop {shop}" if shop else ""))
        by_id = {each.id: each for each in shops}
        written = 0
        with _progress() as progress, new_file(out, tuple(export.columns), overwrite=force) as write:
            task = progress.add_task(what, total=None)
            async for row in export.stream(tx, wanted, shops):
                shop_of_row = by_id[row.shop_id]
                write(cell(row, shop_of_row) for cell in export.columns.values())
                written += 1
                if written % _ROWS_PER_STEP == 0:
                    progress.update(task, completed=written)
        return written

    async def run(engine: Engine) -> int:
        return await in_transaction(engine, work, attempts_max=1)

    show_record({"rows": run_connected(run, role=READONLY), "file": str(out)}, as_json=as_json)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,.0f}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
