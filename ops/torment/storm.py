"""A storm: under a steady load somebody dies by kill -9 every few seconds, servers too; then all books are compared."""

import asyncio
import random
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.domain.money import CURRENCY_EXPONENTS, render_amount
from common.errors import Transient
from ops.broker import CONNECT_ERRORS, BrokerUnusable
from ops.processes import Process, ProcessFailed, StartAgain
from ops.servers import OwnServer, ServerFailed
from ops.stage import CURRENCY, Stage, add_findings, stage, tell_counts
from ops.torment.clients import Clients, Tally
from ops.torment.verdict import Backlog, Verdict, find_backlog, judge

ANSWERS: Final = "answers.jsonl"

_MOOD: Final = "gloomy"
_SHOPS: Final = 4
_OURS: Final = ("gateway", "settle", "callbacks", "sweep")
# A merchant holds the payouts of so many seconds, and then begins no more.
_WAITING_SECONDS_MAX: Final = 30.0
_POLL_SECONDS: Final = 1.0
_START_AGAIN_SECONDS: Final = 0.5

Victim = Process | OwnServer


@dataclass(slots=True)
class Report:
    """What became of it all. `away_seconds`: by kind, how long each took to be ready again; `slow_starts`: how often
    that was given up, and begun anew.
    """

    seconds: float
    rate: float
    tally: Tally
    accepted_in_time: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    slow_starts: Counter[str] = field(default_factory=Counter)
    away_seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    quiet_seconds: float | None = None
    faults: list[str] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def differences(self) -> list[str]:
        """Everything that must not be."""
        return self.faults + self.verdict.differences

    @property
    def is_sound(self) -> bool:
        """Whether nothing is lost, doubled or stuck."""
        return not self.differences and not self.verdict.broken


class Storm:
    """Who is killed when, and brought back: at once, as a supervisor would."""

    def __init__(self, on: Stage, report: Report, chance: random.Random) -> None:
        self._victims: list[Victim] = [*(p for kind in _OURS for p in on.processes[kind]), *on.servers]
        self._report = report
        self._chance = chance
        self._turn: list[Victim] = []
        self._away: dict[str, asyncio.Task[None]] = {}

    async def rage(self, seconds: float, kill_seconds: float) -> None:
        """Kill somebody who is there every `kill_seconds`, and look after those who end by themselves."""
        clock = asyncio.get_running_loop().time
        ends_at, strikes_at = clock() + seconds, clock() + kill_seconds
        while clock() < ends_at:
            self._find_dead()
            if clock() >= strikes_at:
                strikes_at += kill_seconds
                await self._strike()
            await asyncio.sleep(max(0.0, min(strikes_at - clock(), _POLL_SECONDS)))

    async def keep(self) -> None:
        """Look after those who end by themselves; for ever."""
        while True:
            self._find_dead()
            await asyncio.sleep(_POLL_SECONDS)

    async def _strike(self) -> None:
        victim = self._draw()
        if victim is None:
            return
        self._report.kills[_kind(victim)] += 1
        await asyncio.to_thread(victim.kill)
        self._bring_back(victim)

    def _draw(self) -> Victim | None:
        """Somebody who is there, by chance; nobody has a second turn before all had one. None: all are away."""
        there = [victim for victim in self._turn or self._victims if victim.name not in self._away]
        if not there:
            there = [victim for victim in self._victims if victim.name not in self._away]
        if not there:
            return None
        victim = self._chance.choice(there)
        self._turn = [other for other in self._turn or self._victims if other is not victim]
        return victim

    def _find_dead(self) -> None:
        for victim in self._victims:
            if victim.name not in self._away and victim.process_id is None:
                self._report.faults.append(f"{victim.name} ended by itself")
                self._bring_back(victim)

    def _bring_back(self, victim: Victim) -> None:
        task = asyncio.create_task(self._start(victim))
        self._away[victim.name] = task
        task.add_done_callback(lambda _: self._away.pop(victim.name))

    async def _start(self, victim: Victim) -> None:
        started = time.monotonic()
        while True:
            try:
                await victim.start()
                break
            except (StartAgain, ServerFailed):
                self._report.slow_starts[_kind(victim)] += 1
            except ProcessFailed as failure:
                self._report.faults.append(f"{victim.name} did not start: {failure}")
            await asyncio.sleep(_START_AGAIN_SECONDS)
        self._report.away_seconds[_kind(victim)].append(time.monotonic() - started)

    async def calm(self) -> None:
        """Return when everybody is there again."""
        while self._away:
            await asyncio.gather(*self._away.values())


def _kind(victim: Victim) -> str:
    return victim.name.partition("-")[0]


class Show:
    """Lines of progress."""

    def __init__(self, progress: Progress, report: Report) -> None:
        self._progress = progress
        self._report = report
        count = round(report.rate * report.seconds)
        self._bars = {stage: progress.add_task(stage, total=count) for stage in ("offered", "last word")}
        self._line = progress.add_task("", total=None)

    def __call__(self, backlog: Backlog | None) -> None:
        """Show how far it is; `backlog` None: somebody who could tell is dead right now."""
        tally = self._report.tally
        self._progress.update(self._bars["offered"], completed=tally.offered)
        self._progress.update(self._bars["last word"], completed=tally.accepted + tally.refused)
        left = "" if backlog is None else f"due {backlog.payouts} · to tell {backlog.callbacks} · "
        self._progress.update(
            self._line, description=f"in the client {tally.waiting} · {left}killed {self._report.kills.total()}"
        )


async def run(
    folder: Path,
    *,
    seconds: float,
    rate: float,
    kill_seconds: float,
    seed: int,
    deadline_seconds: float,
    console: Console,
) -> Report:
    """Let it storm for so long, wait until all is quiet, and judge. `deadline_seconds`: from the end of the storm on."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    count = round(rate * seconds)
    async with stage(folder, name="torment", mood=_MOOD, seed=seed, shops=_SHOPS, payouts_max=count) as on:
        chance = random.Random(seed)  # noqa: S311 no secret
        answers = folder / ANSWERS
        clients = Clients(on.demo, on.shops, answers, waiting_max=round(rate * _WAITING_SECONDS_MAX), chance=chance)
        report = Report(seconds, rate, clients.tally)
        storm = Storm(on, report, chance)
        try:
            with Progress(*columns, console=console) as progress:
                watching = asyncio.create_task(_watch(on, Show(progress, report)))
                async with asyncio.TaskGroup() as raging:
                    raging.create_task(clients.offer(rate, seconds))
                    raging.create_task(storm.rage(seconds, kill_seconds))
                report.accepted_in_time = report.tally.accepted
                keeping = asyncio.create_task(storm.keep())
                await _until_quiet(on, clients, storm, report, deadline_seconds)
                for task in (watching, keeping):
                    task.cancel()
        finally:
            await clients.close()
        report.verdict = await judge(on, answers)
        return report


async def _until_quiet(on: Stage, clients: Clients, storm: Storm, report: Report, deadline_seconds: float) -> None:
    """Return when there is nothing left to do; when that takes too long, note what there is."""
    started = time.monotonic()
    backlog: Backlog | None = None
    with suppress(TimeoutError):
        async with asyncio.timeout(deadline_seconds):
            await storm.calm()
            await clients.all_answered()
            while not (backlog := await _look(on)) or not backlog.is_empty:  # noqa: ASYNC110 - others work
                await asyncio.sleep(_POLL_SECONDS)
            report.quiet_seconds = time.monotonic() - started
            return
    report.faults.append(
        f"not quiet {deadline_seconds:g} s after the storm: {report.tally.waiting} unanswered, {backlog}"
    )


async def _watch(on: Stage, show: Show) -> None:
    while True:
        show(await _look(on))
        await asyncio.sleep(_POLL_SECONDS)


async def _look(on: Stage) -> Backlog | None:
    """What is still to be done; None while somebody who could tell is dead."""
    with suppress(Transient, BrokerUnusable, *CONNECT_ERRORS):
        return await find_backlog(on)
    return None


def render_table(report: Report) -> Table:
    """How it went, a row for each thing."""
    tally, verdict = report.tally, report.verdict
    exponent = CURRENCY_EXPONENTS[CURRENCY]
    table = Table("", "", show_header=False)
    table.add_row(
        "offered", f"{tally.offered:,} in {report.seconds:g} s: {tally.offered / report.seconds:,.1f} per second"
    )
    table.add_row("not begun", f"{tally.turned_away:,}: the client held too many")
    table.add_row(
        "accepted",
        f"{tally.accepted:,}; {report.accepted_in_time:,} of them during the storm:"
        f" {report.accepted_in_time / report.seconds:,.1f} per second",
    )
    table.add_row("refused", f"{tally.refused:,} for which there is not enough money")
    table.add_row("answers", tell_counts(tally.answers))
    if len(tally.answer_seconds) > 1:
        percentiles = quantiles(tally.answer_seconds, n=1000)
        told = " · ".join(
            f"p{name} {percentiles[at] * 1000:,.0f} ms" for name, at in (("50", 499), ("99", 989), ("99.9", 998))
        )
        table.add_row("until the last word", f"{told} · longest {max(tally.answer_seconds):.1f} s")
    table.add_row("killed -9", f"{report.kills.total()}: {tell_counts(report.kills)}")
    away = {name: f"{sum(s) / len(s):.1f} (longest {max(s):.1f})" for name, s in sorted(report.away_seconds.items())}
    table.add_row("seconds until back", " · ".join(f"{name} {told}" for name, told in away.items()))
    table.add_row("starts given up", tell_counts(report.slow_starts))
    quiet = "never" if report.quiet_seconds is None else f"{report.quiet_seconds:.0f} s after the storm"
    table.add_row("all quiet", quiet)
    table.add_row(
        "our ledger", f"{tell_counts(verdict.states)}; captured {render_amount(verdict.captured_minor, exponent)}"
    )
    table.add_row(
        "the bank's ledger",
        f"{tell_counts(verdict.bank)}; paid {render_amount(verdict.paid_minor, exponent)};"
        f" asked again {verdict.resends:,} times",
    )
    table.add_row("discrepancies", f"{verdict.discrepancies:,}")
    table.add_row("callbacks", tell_counts(verdict.callbacks))
    add_findings(table, report.differences, verdict.broken)
    return table
