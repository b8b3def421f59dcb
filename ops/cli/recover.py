"""`payouts recover`: after a restore to an earlier moment, every payout that may have moved is looked up before it is sent."""

from functools import partial

import click

from common.db.engine import Engine, Tx, in_transaction
from common.db.ledger import append_audit
from common.db.recovering import (
    UNMARKED,
    InDoubt,
    Recovery,
    Standing,
    begin_recovery,
    count_open,
    doubt_page,
    find_recovery,
    find_standing,
)
from ops.cli.connect import run_changing, run_connected
from ops.cli.errors import Refused
from ops.cli.options import actor_option, json_option, reason_option
from ops.cli.output import Record, print_json, print_record, print_table, progress_bar, show_record


@click.command("recover")
@click.option("--dry-run", is_flag=True, help="Only say how the database stands, and what would be doubted.")
@click.option(
    "--unmarked",
    is_flag=True,
    help="Also when the server does not say that it was restored: after a failover to a standby that was behind.",
)
@reason_option
@actor_option
@json_option
def recover_command(dry_run: bool, unmarked: bool, reason: str, actor: str, as_json: bool) -> None:
    """Let a restored database go on; until then it sends nothing and moves no money.

    Every open payout becomes one whose fate is not known: workers ask its rail, and send it only when an authoritative rail
    has not found it. Payins that are pending are asked about soon. Interrupted, repeat it: it goes on where it ended.
    deploy/restore.md says what comes before and after.
    """
    standing, found = run_connected(lambda engine: in_transaction(engine, _look))
    if dry_run:
        _show(standing, found, as_json=as_json)
        return
    if not standing.awaits and not unmarked:
        raise Refused("the server does not say that it was restored; --unmarked recovers it all the same")

    async def begin(tx: Tx) -> int:
        mark = standing.restored or UNMARKED
        action = "recovery.begin" if standing.open_id is None else "recovery.resume"
        audit_id = await append_audit(tx, actor=actor, action=action, subject=mark, reason=reason)
        return standing.open_id or await begin_recovery(tx, restored=mark, audit_id=audit_id)

    async def work(engine: Engine) -> Recovery:
        recovery_id = await in_transaction(engine, begin, attempts_max=1)
        with progress_bar() as progress:
            task = progress.add_task("payouts", total=sum(each.count for each in found))
            while await in_transaction(engine, partial(doubt_page, recovery_id=recovery_id)):
                recovery = await in_transaction(engine, partial(find_recovery, recovery_id=recovery_id))
                progress.update(task, completed=recovery.payouts)
        return await in_transaction(engine, partial(find_recovery, recovery_id=recovery_id))

    recovery = run_changing(work)
    record = {
        "restored": recovery.restored,
        "payouts_in_doubt": recovery.payouts,
        "payins_asked_about": recovery.payins,
    }
    show_record(record, as_json=as_json)


async def _look(tx: Tx) -> tuple[Standing, list[InDoubt]]:
    return await find_standing(tx), await count_open(tx)


def _show(standing: Standing, found: list[InDoubt], *, as_json: bool) -> None:
    record = {"restored": standing.restored, "waits": standing.awaits, "begun": standing.open_id is not None}
    rows: list[Record] = [
        {"rail": each.rail, "authoritative": each.authoritative, "stage": each.state, "payouts": each.count}
        for each in found
    ]
    if as_json:
        print_json({**record, "would_be_doubted": rows})
        return
    print_record(record)
    click.echo()
    print_table(rows)
