"""`python -m ops.torment`: payouts through a bank in its worst mood, while processes of ours are killed; then both ledgers
are laid side by side.

Everything runs on this machine in a folder of its own, which is removed afterwards: see `ops.stage`.
"""

import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ops import database
from ops.stage import (
    POLL_SECONDS,
    UNFINISHED,
    Stage,
    Verdict,
    add_verdict,
    count_states,
    lay_side_by_side,
    print_differences,
    send_all,
    stage,
    tell_counts,
    until_quiet,
)

# Who may be killed, and how often one of them is meant.
_VICTIMS: Final = {"gateway": 3, "settle": 5, "callbacks": 1, "sweep": 1, "bank": 2}


@dataclass(slots=True)
class Report:
    """What became of it all."""

    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    repeats: int = 0
    verdict: Verdict = field(default_factory=Verdict)


async def kill_now_and_then(on: Stage, kills: Counter[str], kill_seconds: float, chance: random.Random) -> None:
    """Kill -9 somebody, start them again, and rest; for ever."""
    while True:
        await asyncio.sleep(chance.uniform(0.5, 1.5) * kill_seconds)
        (kind,) = chance.choices(list(_VICTIMS), weights=list(_VICTIMS.values()))
        victim = chance.choice(on.processes[kind])
        victim.kill()
        kills[kind] += 1
        await victim.start()


class Show:
    """A line of progress."""

    def __init__(self, progress: Progress, kills: Counter[str], count: int) -> None:
        self._progress = progress
        self._kills = kills
        self._bars = {stage: progress.add_task(stage, total=count) for stage in ("accepted", "ended")}
        self._line = progress.add_task("", total=None)

    def __call__(self, counts: dict[str, int]) -> None:
        """Show where payouts stand."""
        unfinished = sum(counts.get(state, 0) for state in UNFINISHED)
        self._progress.update(self._bars["accepted"], completed=sum(counts.values()))
        self._progress.update(self._bars["ended"], completed=sum(counts.values()) - unfinished)
        told = " · ".join(f"{state} {number}" for state, number in counts.items())
        self._progress.update(self._line, description=f"{told} · killed {self._kills.total()}")


async def run(
    folder: Path, *, count: int, seed: int, kill_seconds: float, deadline_seconds: float, console: Console
) -> Report:
    """Torment it, wait until all is quiet, lay the ledgers side by side."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    store = database.own_database(folder)
    async with stage(folder, name="torment", seed=seed, mood="worst", store=store) as on:
        started, report = time.monotonic(), Report()
        chance = random.Random(seed)  # noqa: S311 no secret
        ids = iter([f"torment-{number:06}" for number in range(count)])
        with Progress(*columns, console=console) as progress, suppress(TimeoutError):
            show = Show(progress, report.kills, count)
            async with asyncio.timeout(deadline_seconds):
                killing = asyncio.create_task(kill_now_and_then(on, report.kills, kill_seconds, chance))
                watching = asyncio.create_task(_watch(on, show))
                await send_all(on, ids)
                watching.cancel()
                quiet = asyncio.create_task(until_quiet(on, show))
                await asyncio.wait({quiet, killing}, return_when=asyncio.FIRST_COMPLETED)
                killing.cancel()
                await quiet
        report.verdict = await lay_side_by_side(on)
        report.repeats = on.repeats
        report.seconds = time.monotonic() - started
        return report


async def _watch(on: Stage, show: Show) -> None:
    while True:
        show(await count_states(on.engine))
        await asyncio.sleep(POLL_SECONDS)


def render_table(report: Report, count: int) -> Table:
    """How it went, a row for each thing."""
    table = Table("", "", show_header=False)
    table.add_row("payouts sent", f"{count:,}, {report.repeats:,} requests repeated")
    table.add_row("took", f"{report.seconds:.0f} s")
    table.add_row("killed -9", tell_counts(report.kills))
    add_verdict(table, report.verdict)
    return table


@click.command()
@click.option("--payouts", "count", default=10_000, show_default=True, type=click.IntRange(min=1), help="How many.")
@click.option("--seed", default=1, show_default=True, help="Of every chance.")
@click.option("--kill-seconds", default=3.0, show_default=True, help="About how often somebody is killed.")
@click.option("--deadline", default=1800.0, show_default=True, help="Seconds until all must be quiet.")
def main(count: int, seed: int, kill_seconds: float, deadline: float) -> None:
    """Torment the product; exit code 1 when the two ledgers differ, or a rule is broken."""
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="payouts-torment-"))
    try:
        report = asyncio.run(
            run(folder, count=count, seed=seed, kill_seconds=kill_seconds, deadline_seconds=deadline, console=console)
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    console.print(render_table(report, count))
    print_differences(console, report.verdict)
    sys.exit(0 if report.verdict.is_sound and sum(report.verdict.states.values()) == count else 1)


if __name__ == "__main__":
    main()
