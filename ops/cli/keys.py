"""`payouts keys`: the master keys, under which secrets and recipients are sealed."""

from typing import Final

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from common.db.engine import Engine, Tx, in_transaction
from common.db.ledger import append_audit
from common.db.sealed import NO_KEY
from common.sealing import Keyring
from ops.cli.connect import run_resealing
from ops.cli.errors import CheckFailed
from ops.cli.options import actor_option, json_option, reason_option
from ops.cli.output import Record, print_json, print_table
from ops.rotation import Rotated, count, rotate

_ROTATE: Final = "keys.rotate_master"


@click.group("keys")
def keys_group() -> None:
    """Master keys, under which secrets and recipients are sealed; `payouts key` is about the API keys of merchants."""


@keys_group.command("rotate-master")
@click.option("--dry-run", is_flag=True, help="Only count what is sealed under which key.")
@reason_option
@actor_option
@json_option
def rotate_master_command(dry_run: bool, reason: str, actor: str, as_json: bool) -> None:
    """Seal everything anew under the newest of PAYOUTS_MASTER_KEYS, which is the one with the highest id.

    Everybody may go on working. Interrupted, repeat it: what is done is passed over. First every process must have the new
    key beside the old one: workers, then gateways, then whoever runs this. Exit code 1 when something is left.
    """

    async def work(engine: Engine, keyring: Keyring) -> Rotated:
        with _progress() as progress:
            task = progress.add_task("", total=None)

            def tell(what: str, done: int) -> None:
                progress.update(task, description=what, completed=done)

            if dry_run:
                return Rotated(keyring.current_id, counts=await count(engine, tell=tell))
            subject = f"master key {keyring.current_id}"

            async def begin(tx: Tx) -> None:
                await append_audit(tx, actor=actor, action=_ROTATE, subject=subject, reason=reason)

            await in_transaction(engine, begin, attempts_max=1)
            return await rotate(engine, keyring, tell=tell)

    rotated, old = run_resealing(work)
    _show(rotated, old, dry_run=dry_run, as_json=as_json)


def _show(rotated: Rotated, old: frozenset[int], *, dry_run: bool, as_json: bool) -> None:
    left = rotated.others
    done = not left and not dry_run
    removable = sorted(old) if done else []
    if as_json:
        print_json(
            {
                "newest": rotated.newest,
                "sealed_anew": rotated.exchanged,
                "left": {str(key_id): n for key_id, n in left.items()},
                "unreadable": rotated.unreadable,
                "removable": removable,
            }
        )
    else:
        print_table(_count_by_table(rotated))
        if not dry_run:
            click.echo(f"\nsealed anew under master key {rotated.newest}: {rotated.exchanged}")
        if removable:
            ids = ", ".join(map(str, removable))
            click.echo(
                f"Nothing is sealed under {ids} any more: take it out of PAYOUTS_MASTER_KEYS once every process has"
                f" {rotated.newest}, and keep it for as long as backups from before."
            )
    if rotated.unreadable:
        raise CheckFailed(f"no key of ours opens {', '.join(rotated.unreadable)}: they were left as they are")
    if left and not dry_run:
        amounts = ", ".join(f"{n} under master key {key_id}" for key_id, n in left.items())
        raise CheckFailed(f"left: {amounts}; somebody holds them or still seals so: repeat it")


def _count_by_table(rotated: Rotated) -> list[Record]:
    return [
        {"table": table, "master key": "none" if key_id == NO_KEY else key_id, "values": n}
        for table, counted in rotated.counts.items()
        for key_id, n in sorted(counted.items())
    ]


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description} {task.completed:,.0f}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
