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

from ops.stage import (
    POLL_SECONDS,
    UNFINISHED,
    Stage,
    Verdict,
    add_verdict,
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
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def is_sound(self) -> bool:
        """Whether the ledgers are equal and every rule holds."""
        return self.verdict.is_sound

    @property
    def differences(self) -> list[str]:
        """Where the ledgers differ."""
        return self.verdict.differences


async def kill_now_and_then(on: Stage, report: Report, kill_seconds: float, chance: random.Random) -> None:
    """Kill -9 somebody, start them again, and rest; for ever."""
    while True:
        await asyncio.sleep(chance.uniform(0.5, 1.5) * kill_seconds)
        (kind,) = chance.choices(list(_VICTIMS), weights=list(_VICTIMS.values()))
        victim = chance.choice(on.processes[kind])
        victim.kill()
        report.kills[kind] += 1
        await victim.start()


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
            async with asyncio.timeout(deadline_seconds):
                killing = asyncio.create_task(kill_now_and_then(on, report, kill_seconds, chance))
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
