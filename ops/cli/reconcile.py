"""`payouts reconcile`: a provider's statement against ours, and what differs handed to people."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

import click

from common.db.engine import Engine, Tx, in_transaction
from common.db.ledger import append_audit
from common.db.rails import has_rail
from common.db.stories import begin_snapshot
from common.domain.ids import PAYIN, PAYOUT, render_id
from common.domain.money import CURRENCY_EXPONENTS, render_amount
from ops.cli.connect import run_changing, run_connected
from ops.cli.errors import CheckFailed, Refused
from ops.cli.options import (
    REASON_CHARACTERS_MAX,
    actor_option,
    force_option,
    json_option,
    new_file,
    parse_line,
    parse_moment,
)
from ops.cli.output import Record, print_json, print_table
from ops.reconciling import PAGE_ROWS_MAX, Compared, Tally, Verdict, compare, open_of
from ops.spreadsheets import WriteRow
from ops.statement import Statement, StatementInvalid, show_reference

_COLUMNS: Final = (
    "verdict",
    "reference",
    "line",
    "shop",
    "id",
    "currency",
    "our_amount",
    "our_status",
    "their_amount",
    "their_status",
    "detail",
)


@dataclass(slots=True)
class _Report:
    """What came of a comparison. `listed`: the first of those that do not match; `opened`: discrepancies that are new."""

    rows_max: int
    tally: Tally = field(default_factory=Tally)
    listed: list[Record] = field(default_factory=list)
    opened: int = 0

    def add(self, compared: Compared, write: WriteRow | None) -> None:
        """Count one, list and write it down if it does not match."""
        self.tally.add(compared)
        if compared.verdict is not Verdict.MATCHED:
            record = _describe(compared)
            if len(self.listed) < self.rows_max:
                self.listed.append(record)
            if write is not None:
                write(record.values())


@click.command("reconcile")
@click.option("--rail", required=True, metavar="NAME", help="Whose statement it is.")
@click.option(
    "--statement",
    "path",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="CSV with the columns reference, amount, currency, status (submitted, declined, paid, returned) and date.",
)
@click.option(
    "--since",
    required=True,
    type=parse_moment,
    metavar="TIME",
    help="What moved then or later must be in it; ISO 8601.",
)
@click.option("--until", required=True, type=parse_moment, metavar="TIME", help="What moved before then must be in it.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many to list at most.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write all that do not match to this CSV file.",
)
@force_option
@click.option(
    "--open-discrepancies", is_flag=True, help="Open a discrepancy for each that differs in status or amount."
)
@click.option("--dry-run/--no-dry-run", default=True, show_default=True, help="Only say how many would be opened.")
@click.option("--reason", type=parse_line(REASON_CHARACTERS_MAX), metavar="TEXT", help="Why; with --no-dry-run.")
@actor_option
@json_option
def reconcile_command(
    rail: str,
    path: Path,
    since: datetime,
    until: datetime,
    limit: int,
    out: Path | None,
    force: bool,
    open_discrepancies: bool,
    dry_run: bool,
    reason: str | None,
    actor: str,
    as_json: bool,
) -> None:
    """Lay the statement of a rail's provider beside our payouts and payins. It moves no money.

    matched; unfinished: the provider has said a last word that has not come to us; missing: ours and not in the statement;
    extra: in the statement and not ours; different: in status or amount. Exit code 1 when there are any of the last three.
    """
    if since >= until:
        raise click.UsageError("--since must be before --until")
    for_real = open_discrepancies and not dry_run
    if not dry_run and not open_discrepancies:
        raise click.UsageError("--no-dry-run goes with --open-discrepancies: nothing else is changed")
    if for_real and reason is None:
        raise click.UsageError("--no-dry-run needs a --reason")
    report = _Report(limit)
    with _read(path) as statement, _file(out, overwrite=force) as write:

        async def work(tx: Tx) -> None:
            if not for_real:
                await begin_snapshot(tx)
            if not await has_rail(tx, rail):
                raise Refused(f"there is no rail {rail}")
            await _compare(tx, report, statement, write, rail=rail, since=since, until=until, opens=for_real)
            if for_real:
                detail = {"opened": report.opened, **{v.value: report.tally.counts[v] for v in Verdict}}
                await append_audit(tx, actor=actor, action="rail.reconcile", subject=rail, reason=reason, detail=detail)

        async def run(engine: Engine) -> None:
            await in_transaction(engine, work, attempts_max=1)

        (run_changing if for_real else run_connected)(run)
    _show(report, statement, opens=open_discrepancies, dry_run=dry_run, as_json=as_json)


async def _compare(
    tx: Tx,
    report: _Report,
    statement: Statement,
    write: WriteRow | None,
    *,
    rail: str,
    since: datetime,
    until: datetime,
    opens: bool,
) -> None:
    different: list[Compared] = []
    async for compared in compare(tx, statement, rail=rail, since=since, until=until):
        report.add(compared, write)
        if opens and compared.verdict is Verdict.DIFFERENT:
            different.append(compared)
        if len(different) == PAGE_ROWS_MAX:
            report.opened += await open_of(tx, different)
            different = []
    report.opened += await open_of(tx, different)


@contextmanager
def _read(path: Path) -> Iterator[Statement]:
    with Statement() as statement:
        try:
            statement.read(path)
        except StatementInvalid as error:
            raise Refused(f"{path}: {error}") from error
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}") from error
        yield statement


@contextmanager
def _file(path: Path | None, *, overwrite: bool) -> Iterator[WriteRow | None]:
    if path is None:
        yield None
        return
    with new_file(path, _COLUMNS, overwrite=overwrite) as write:
        yield write


def _show(report: _Report, statement: Statement, *, opens: bool, dry_run: bool, as_json: bool) -> None:
    tally = report.tally
    unmatched = sum(tally.counts.values()) - tally.counts[Verdict.MATCHED]
    sums = [
        {"verdict": verdict.value, "currency": currency, "sum": render_amount(minor, CURRENCY_EXPONENTS[currency])}
        for (verdict, currency), minor in sorted(tally.sums_minor.items())
    ]
    counts = {verdict.value: tally.counts[verdict] for verdict in Verdict}
    opening = {
        "would_be_opened" if dry_run else "opened": tally.counts[Verdict.DIFFERENT] if dry_run else report.opened
    }
    if as_json:
        print_json(
            {
                "lines": statement.lines,
                **counts,
                "sums": sums,
                **(opening if opens else {}),
                "unmatched": report.listed,
                "not_listed": unmatched - len(report.listed),
            }
        )
    else:
        print_table([{**row, "references": counts[row["verdict"]]} for row in sums])
        if report.listed:
            click.echo()
            print_table(report.listed)
        if unmatched > len(report.listed):
            click.echo(f"and {unmatched - len(report.listed)} more: --out writes all of them to a file")
        if opens:
            click.echo(" ".join(f"discrepancies {name.replace('_', ' ')}: {count}" for name, count in opening.items()))
    if not tally.is_clean:
        wrong = ", ".join(f"{counts[v]} {v}" for v in (Verdict.MISSING, Verdict.EXTRA, Verdict.DIFFERENT) if counts[v])
        raise CheckFailed(wrong)


def _describe(compared: Compared) -> Record:
    ours, theirs = compared.ours, compared.theirs
    currency = compared.money[0]
    return dict(
        zip(
            _COLUMNS,
            (
                compared.verdict.value,
                ours.reference if ours else show_reference(theirs.reference) if theirs else None,
                theirs.line if theirs else None,
                ours.shop if ours else None,
                _render_ours(compared),
                currency,
                render_amount(ours.amount_minor, CURRENCY_EXPONENTS[ours.currency]) if ours else None,
                ours.state if ours else None,
                render_amount(theirs.amount_minor, CURRENCY_EXPONENTS[theirs.currency]) if theirs else None,
                theirs.status if theirs else None,
                compared.detail or None,
            ),
            strict=True,
        )
    )


def _render_ours(compared: Compared) -> str | None:
    ours = compared.ours
    if ours is None:
        return None
    if ours.payout_id is not None:
        return render_id(PAYOUT, ours.payout_id)
    return None if ours.payin_id is None else render_id(PAYIN, ours.payin_id)
