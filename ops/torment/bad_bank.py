"""Payouts through a bank in its worst mood, while processes of ours and the bank are killed now and then."""

import asyncio
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.process import end_tasks
from ops.processes import Process, ProcessFailed, StartAgain
from ops.stage import (
    POLL_SECONDS,
    UNFINISHED,
    Comparison,
    Stage,
    add_comparison,
    count_states,
    lay_side_by_side,
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
    faults: list[str] = field(default_factory=list)
    comparison: Comparison = field(default_factory=Comparison)

    @property
    def is_sound(self) -> bool:
        """Whether the ledgers are equal, every rule holds, and all came back who were killed."""
        return self.comparison.is_sound and not self.faults

    @property
    def differences(self) -> list[str]:
        """What must not be: where the ledgers differ, and who did not come back."""
        return self.faults + self.comparison.differences


async def kill_now_and_then(on: Stage, report: Report, kill_seconds: float, chance: random.Random) -> None:
    """Kill -9 somebody, start them again, and rest; until one does not come back."""
    while not report.faults:
        await asyncio.sleep(chance.uniform(0.5, 1.5) * kill_seconds)
        (kind,) = chance.choices(list(_VICTIMS), weights=list(_VICTIMS.values()))
        victim = chance.choice(on.processes[kind])
        victim.kill()
        report.kills[kind] += 1
        try:
            await _bring_back(victim)
        except ProcessFailed as failure:
            report.faults.append(f"{victim.name} did not come back: {failure}")


async def _bring_back(victim: Process) -> None:
    with suppress(StartAgain):
        return await victim.start()
    return await victim.start()


class Show:
    """A line of progress."""

    def __init__(self, progress: Progress, report: Report, count: int) -> None:
        self._progress = progress
        self._report = report
        self._bars = {name: progress.add_task(name, total=count) for name in ("accepted", "ended")}
        self._line = progress.add_task("", total=None)

    def __call__(self, counts: dict[str, int]) -> None:
        """Show where payouts stand."""
        unfinished = sum(counts.get(state, 0) for state in UNFINISHED)
        self._progress.update(self._bars["accepted"], completed=sum(counts.values()))
        self._progress.update(self._bars["ended"], completed=sum(counts.values()) - unfinished)
        told = " · ".join(f"{state} {number}" for state, number in counts.items())
        self._progress.update(self._line, description=f"{told} · killed {self._report.kills.total()}")


async def run(
    folder: Path, *, count: int, seed: int, kill_seconds: float, deadline_seconds: float, console: Console
) -> Report:
    """Torment it, wait until all is quiet, lay the ledgers side by side."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    report = Report()
    async with stage(folder, name="torment", mood="worst", seed=seed, payouts_max=count) as on:
        started = time.monotonic()
        chance = random.Random(seed)  # noqa: S311 no secret
        ids = iter([f"torment-{number:06}" for number in range(count)])
        with Progress(*columns, console=console) as progress, suppress(TimeoutError):
            show = Show(progress, report, count)
            killing = asyncio.create_task(kill_now_and_then(on, report, kill_seconds, chance))
            watching = asyncio.create_task(_watch(on, show))
            try:
                async with asyncio.timeout(deadline_seconds):
                    await send_all(on, ids)
                    await until_quiet(on)
            finally:
                await end_tasks([killing, watching], 0)
        report.comparison = await lay_side_by_side(on)
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
    add_comparison(table, report.comparison)
    return table
