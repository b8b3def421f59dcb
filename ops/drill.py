"""`python -m ops.drill`: the database is lost under load and restored to an earlier moment; then both ledgers are laid side by
side.

The scripts are those of deploy/postgresql, the command is `payouts recover`, the way is that of deploy/restore.md. Everything
runs on this machine in a folder of its own, which is removed afterwards: see `ops.stage`.
"""

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import asyncpg
import click
from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import make_url

from ops import database
from ops.ports import loopback_url
from ops.postgres import Cluster
from ops.processes import Process
from ops.servers import OwnServer
from ops.simulator.ledger import Ledger, Payment
from ops.simulator.moods import MOODS
from ops.stage import (
    Comparison,
    Stage,
    add_comparison,
    count_states,
    lay_side_by_side,
    print_differences,
    send_all,
    send_once,
    stage,
    tell_counts,
    until_quiet,
)
from ops.state import CHECKOUT

_SCRIPTS: Final = CHECKOUT / "deploy" / "postgresql"
# The server runs in its data folder.
_ARCHIVING: Final = {
    "archive_mode": "on",
    "archive_command": 'ARCHIVE=../archive sh ../archive.sh "%p" "%f"',
}
_POLL_SECONDS: Final = 0.1
_REFUSED: Final = 503

Say = Callable[[str], None]


@dataclass(slots=True)
class Report:
    """How it went. Counts of payouts; `seconds` by what took them."""

    open_then: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    restored: dict[str, int] = field(default_factory=dict)
    # What processes said between restore and recovery, and how many payments the bank was asked for meanwhile.
    create_answered: int | None = None
    workers_wait: bool = False
    asked_meanwhile: int = 0
    in_doubt: int = 0
    # How many settings of the target the server's configuration still had when it went on.
    targets_left: int | None = None
    # Of the payments that the bank had booked and the restored database knew nothing of, how many it was asked for again.
    sent_again: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    comparison: Comparison = field(default_factory=Comparison)

    @property
    def waited(self) -> bool:
        """Whether nothing happened before the recovery."""
        return self.create_answered == _REFUSED and self.workers_wait and self.asked_meanwhile == 0

    @property
    def is_sound(self) -> bool:
        """Whether it came back to the moment, nothing was sent again, and both ledgers are equal."""
        came_back = self.restored == self.open_then and sum(self.lost.values()) > sum(self.restored.values())
        recovered = self.waited and self.in_doubt > 0 and self.targets_left == 0
        return came_back and recovered and self.sent_again == 0 and self.comparison.is_sound


async def run(
    folder: Path,
    *,
    count: int,
    unsent: int,
    seed: int,
    mood: str,
    deadline_seconds: float,
    with_broker: bool,
    say: Say,
    copies: int = 2,
) -> Report:
    """Lose the database and get it back. `unsent`: how many payouts have not been sent, or are under way, when it is lost;
    `copies`: of each process.
    """
    cluster = database.own_cluster(folder, _ARCHIVING)
    await asyncio.to_thread(_make_archive, cluster)
    store = OwnServer(database.NAME, cluster)
    async with (
        stage(folder, name="drill", seed=seed, mood=mood, store=store, with_broker=with_broker, copies=copies) as on,
        asyncio.timeout(deadline_seconds),
    ):
        drill = _Drill(on, cluster, store, Report(), say)
        moment, began = await drill.load(count, unsent)
        await drill.lose()
        await drill.restore(moment)
        await drill.recover(began)
        drill.report.comparison = await lay_side_by_side(on)
        return drill.report


def _make_archive(cluster: Cluster) -> None:
    for name in ("archive", "backups"):
        cluster.make_folder(name)
    shutil.copy(_SCRIPTS / "archive.sh", cluster.home)


class _Drill:
    def __init__(self, on: Stage, cluster: Cluster, store: OwnServer, report: Report, say: Say) -> None:
        self._on = on
        self._cluster = cluster
        self._store = store
        self._say = say
        self._external_ids: list[str] = []
        self._booked: dict[str, Payment] = {}
        self.report = report

    async def load(self, count: int, unsent: int) -> tuple[str, float]:
        """A backup, payouts that wait, the moment to come back to, and all that will be forgotten. Returns: that moment, as
        PostgreSQL has it and in Unix seconds.
        """
        on = self._on
        await self._take("backup", partial(asyncio.to_thread, self._backup))
        await self._create(count // 2)
        await asyncio.gather(*(process.stop() for process in on.processes["settle"]))
        await self._create(count - count // 2)
        moment, began = await self._ask("SELECT now()::text"), time.time()
        self.report.open_then = await count_states(on.engine)
        self._say(f"{moment} is the moment to come back to, with {tell_counts(self.report.open_then)}")
        await asyncio.gather(*(process.start() for process in on.processes["settle"]))
        await self._create(count // 4)
        await _until(partial(self._has_ended, len(self._external_ids) - unsent))
        for process in on.processes["settle"]:
            process.kill()
        self.report.lost = await count_states(on.engine)
        return str(moment), began

    async def lose(self) -> None:
        """Kill the database, and take its disk away."""
        segment = await self._ask("SELECT pg_walfile_name(pg_switch_wal())")

        async def archived() -> bool:
            return bool(await self._ask("SELECT last_archived_wal >= $1 FROM pg_stat_archiver", segment))

        await _until(archived)
        await asyncio.to_thread(self._cluster.kill)
        await asyncio.to_thread(self._cluster.lose_data)
        self._say(f"the database is lost with {tell_counts(self.report.lost)}")

    async def restore(self, moment: str) -> None:
        """Have the database as it was at that moment, and see that nobody does anything."""
        on, report = self._on, self.report

        async def start() -> None:
            await asyncio.to_thread(self._restore, moment)
            # It lets readers in on its way there.
            await self._store.start()
            await _until(self._is_there)

        await self._take("restore", start)
        report.restored = await count_states(on.engine)
        self._say(f"restored with {tell_counts(report.restored)}")
        payments = self._payments()
        self._booked = {reference: payment for reference, payment in payments.items() if payment.status != "asked"}
        async with aiohttp.ClientSession() as session:
            report.create_answered = await send_once(on, session, self._external_ids[-1])
        await asyncio.gather(*(process.launch() for process in on.processes["settle"]))
        await _until(self._settlers_wait)
        report.workers_wait = True
        asked = {reference: payment.submits for reference, payment in self._payments().items()}
        report.asked_meanwhile = sum(asked.values()) - sum(payment.submits for payment in payments.values())
        self._say(f"a create is answered {report.create_answered}, and workers wait")

    async def recover(self, began: float) -> None:
        """`payouts recover`, and the target is forgotten; merchants send again what they sent, the bank tells again what it
        told since then.
        """
        on, report = self._on, self.report
        found = await self._take("recover", partial(self._payouts, "recover", "--reason", "drill", "--json"))
        report.in_doubt = found["payouts_in_doubt"]
        self._say(f"{report.in_doubt} payouts are in doubt; workers go on")
        await self._take("forget the target", self._forget_target)
        await asyncio.gather(*(process.wait_ready() for process in on.processes["settle"]))

        async def rest() -> None:
            await send_all(on, iter(self._external_ids))
            ledger = Ledger(on.ledger)
            ledger.tell_once_more(began)
            ledger.close()
            await until_quiet(on)

        await self._take("rest", rest)
        known, after = await self._known_references(), self._payments()
        report.sent_again = sum(
            after[reference].submits > payment.submits
            for reference, payment in self._booked.items()
            if reference in known
        )

    async def _create(self, count: int) -> None:
        begin = len(self._external_ids)
        fresh = [f"drill-{number:06}" for number in range(begin, begin + count)]
        self._external_ids += fresh
        await send_all(self._on, iter(fresh))

    async def _is_there(self) -> bool:
        return not await self._ask("SELECT pg_is_in_recovery()")

    async def _has_ended(self, count: int) -> bool:
        rows = await self._ask("SELECT count(*) FROM payouts WHERE finalized_at IS NOT NULL")
        return bool(rows >= count)

    async def _settlers_wait(self) -> bool:
        return all([await _waits(process) for process in self._on.processes["settle"]])

    async def _forget_target(self) -> None:
        """No standby that is made of this server shall stop at the target, and take over."""
        for setting in ("recovery_target_time", "recovery_target_action"):
            await self._ask(f"ALTER SYSTEM RESET {setting}")
        await self._store.stop()
        await self._store.start()
        self.report.targets_left = await self._ask(
            "SELECT count(*) FROM pg_file_settings WHERE name LIKE 'recovery_target%'"
        )

    async def _known_references(self) -> set[str]:
        """What the restored database knew without knowing what became of it."""
        connection = await asyncpg.connect(self._cluster.url("postgres"))
        try:
            rows = await connection.fetch("SELECT reference FROM payout_attempts WHERE action = 'restore'")
            return {row["reference"] for row in rows}
        finally:
            await connection.close()

    async def _ask(self, question: str, *arguments: object) -> Any:
        connection = await asyncpg.connect(self._cluster.url("postgres"))
        try:
            return await connection.fetchval(question, *arguments)
        finally:
            await connection.close()

    async def _payouts(self, *arguments: str) -> Any:
        """What a command of operators prints as JSON."""
        command = [sys.executable, "-c", "from ops.cli import main; main()", *arguments, "--actor", "ops.drill"]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=CHECKOUT, env=dict(self._on.environment), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        if process.returncode:
            raise click.ClickException(f"payouts {' '.join(arguments)} ended with {process.returncode}")
        return json.loads(out)

    def _payments(self) -> dict[str, Payment]:
        ledger = Ledger(self._on.ledger)
        try:
            return {payment.reference: payment for payment in ledger.payments()}
        finally:
            ledger.close()

    def _backup(self) -> None:
        server = dict(zip(("PGHOST", "PGPORT", "PGUSER", "PGPASSWORD"), self._address(), strict=True))
        # The wheel's pg_verifybackup crashes; what is restored here is looked at more closely anyway.
        settings = {"BACKUPS": str(self._cluster.home / "backups"), "VERIFY": "true"}
        self._cluster.run_script(_SCRIPTS / "backup.sh", settings | server)

    def _address(self) -> tuple[str, str, str, str]:
        url = make_url(self._cluster.url("postgres"))
        return str(url.host), str(url.port), str(url.username), str(url.password)

    def _restore(self, moment: str) -> None:
        home = self._cluster.home
        self._cluster.make_folder("data")
        self._cluster.run_script(
            _SCRIPTS / "restore.sh",
            {
                "BACKUP": str(next((home / "backups").iterdir())),
                "ARCHIVE": str(home / "archive"),
                "PGDATA": str(home / "data"),
                "TARGET": moment,
            },
        )

    async def _take(self, name: str, work: Callable[[], Awaitable[Any]]) -> Any:
        began = time.monotonic()
        done = await work()
        self.report.seconds[name] = time.monotonic() - began
        return done


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110 - it is another process that we wait for
        await asyncio.sleep(_POLL_SECONDS)


async def _waits(process: Process) -> bool:
    """Whether a process says that it waits for the recovery."""
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{loopback_url(process.port)}/readyz") as response:
            return "payouts recover" in (await response.json()).get("reason", "")
    except aiohttp.ClientError:
        return False


def render_table(report: Report) -> Table:
    """How it went, a row for each thing."""
    table = Table("", "", show_header=False)
    table.add_row("at the moment", tell_counts(report.open_then))
    table.add_row("when lost", tell_counts(report.lost))
    table.add_row("restored", tell_counts(report.restored))
    waited = "every process waited" if report.waited else "SOMEBODY DID NOT WAIT"
    table.add_row(
        "until recovered",
        f"{waited}: a create was answered {report.create_answered}, the bank asked {report.asked_meanwhile} times",
    )
    table.add_row("in doubt", f"{report.in_doubt:,}, of which {report.sent_again:,} were sent again that the bank had")
    table.add_row("the target", "is forgotten" if report.targets_left == 0 else "STILL IN THE CONFIGURATION")
    table.add_row("took", " · ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items()))
    add_comparison(table, report.comparison)
    table.add_row("verdict", "sound" if report.is_sound else "NOT SOUND")
    return table


@click.command()
@click.option("--payouts", "count", default=1_000, show_default=True, type=click.IntRange(min=8), help="Accepted then.")
@click.option("--unsent", default=50, show_default=True, type=click.IntRange(min=0), help="About as many are not sent.")
@click.option("--seed", default=1, show_default=True, help="Of every chance.")
@click.option("--mood", default="gloomy", show_default=True, type=click.Choice(MOODS), help="Of the bank.")
@click.option("--deadline", default=900.0, show_default=True, help="Seconds until all must be quiet.")
@click.option(
    "--broker/--no-broker", "with_broker", default=True, show_default=True, help="With RabbitMQ, if there is one."
)
def main(count: int, unsent: int, seed: int, mood: str, deadline: float, with_broker: bool) -> None:
    """Lose the database and restore it to an earlier moment; exit code 1 when anything was paid twice, lost or guessed."""
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="payouts-drill-"))
    try:
        report = asyncio.run(
            run(
                folder,
                count=count,
                unsent=unsent,
                seed=seed,
                mood=mood,
                deadline_seconds=deadline,
                with_broker=with_broker,
                say=partial(console.print, markup=False, highlight=False),
            )
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    console.print(render_table(report))
    print_differences(console, report.comparison.differences)
    sys.exit(0 if report.is_sound else 1)


if __name__ == "__main__":
    main()
