"""Payouts through a bank in its worst mood, while processes of ours and the bank are killed now and then."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import text

from common.db.engine import in_transaction
from common.db.invariants import RULES, Finding, verify
from common.domain.signing import sign_v1
from ops.reconciliation import compare, find_ours
from ops.simulator.ledger import Ledger
from ops.torment.scene import CURRENCY, PATH, RAIL, UNFINISHED, Plan, Scene, count_states, scene

_CONCURRENCY: Final = 24
_RETRY_SECONDS: Final = 0.2
_POLL_SECONDS: Final = 1.0
_REQUEST_SECONDS: Final = 15.0

# Who may be killed, and how often one of them is meant.
_VICTIMS: Final = {"gateway": 3, "settle": 5, "callbacks": 1, "sweep": 1, "bank": 2}


@dataclass(slots=True)
class Report:
    """What became of it all."""

    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    states: dict[str, int] = field(default_factory=dict)
    statuses: Counter[str] = field(default_factory=Counter)
    discrepancies: dict[str, int] = field(default_factory=dict)
    repeats: int = 0
    resends: int = 0
    callbacks: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    broken: list[Finding] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether the ledgers are equal and every rule holds."""
        return not self.differences and not self.broken


async def send(on: Scene, report: Report, external_ids: Iterator[str], chance: random.Random) -> None:
    """Create payouts one after the other, each repeated until it is answered, as merchants are told to."""
    timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for external_id in external_ids:
            body = json.dumps(
                {
                    "external_id": external_id,
                    "amount": f"{chance.randrange(1, 500)}.00",
                    "currency": CURRENCY,
                    "card_number": f"017{chance.randrange(10**8):08}",
                }
            ).encode()
            while not await _answered(on, session, body):
                report.repeats += 1
                await asyncio.sleep(_RETRY_SECONDS)


async def _answered(on: Scene, session: aiohttp.ClientSession, body: bytes) -> bool:
    timestamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "X-API-Key": on.demo.api_key,
        "X-Timestamp": timestamp,
        "X-Signature": sign_v1(on.demo.api_secret, timestamp, "POST", PATH, "", body),
    }
    with suppress(aiohttp.ClientError, TimeoutError):
        async with session.post(on.demo.base_url + PATH, data=body, headers=headers) as response:
            return response.status in (200, 201)
    return False


async def kill_now_and_then(on: Scene, report: Report, kill_seconds: float, chance: random.Random) -> None:
    """Kill -9 somebody, start them again, and rest; for ever."""
    while True:
        await asyncio.sleep(chance.uniform(0.5, 1.5) * kill_seconds)
        (kind,) = chance.choices(list(_VICTIMS), weights=list(_VICTIMS.values()))
        victim = chance.choice(on.processes[kind])
        victim.kill()
        report.kills[kind] += 1
        await victim.start()


async def until_quiet(on: Scene, show: "Show") -> None:
    """Return once every payout has ended, and every word of the bank is heard."""
    ledger = Ledger(on.ledger)
    try:
        while True:
            counts = await count_states(on.engine)
            show(counts)
            unheard = await in_transaction(
                on.engine, lambda tx: tx.scalar(text("SELECT count(*) FROM rail_events WHERE applied_at IS NULL"))
            )
            unfinished = set(counts) & UNFINISHED
            if not unfinished and not unheard and ledger.count_untold() == 0:
                return
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        ledger.close()


async def lay_side_by_side(on: Scene, report: Report) -> None:
    """Compare the two ledgers, check every rule, and write down what there is to tell."""
    ledger = Ledger(on.ledger)
    payments = ledger.payments()
    ledger.close()
    report.differences = compare(await in_transaction(on.engine, lambda tx: find_ours(tx, RAIL)), payments)
    report.broken = [finding for finding in await verify(on.engine) if finding.count]
    report.states = await count_states(on.engine)
    report.statuses = Counter(payment.status for payment in payments)
    report.resends = sum(payment.submits - 1 for payment in payments)
    rows = await in_transaction(
        on.engine,
        lambda tx: tx.execute(text("SELECT kind, count(*) AS n FROM discrepancies GROUP BY kind ORDER BY kind")),
    )
    report.discrepancies = {row.kind: row.n for row in rows}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{on.demo.receiver_url}/received", params={"prefix": "torment-"}) as response,
    ):
        received = await response.json()
    report.callbacks = Counter(
        {"payouts told of": len(received["by_external_id"]), **{k: received[k] for k in ("verified", "rejected")}}
    )


class Show:
    """A line of progress."""

    def __init__(self, progress: Progress, report: Report, count: int) -> None:
        self._progress = progress
        self._report = report
        self._bars = {stage: progress.add_task(stage, total=count) for stage in ("accepted", "ended")}
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
    async with scene(folder, Plan("worst", seed, shops=1, payouts_max=count)) as on:
        started = time.monotonic()
        chance = random.Random(seed)  # noqa: S311 no secret
        ids = iter([f"torment-{number:06}" for number in range(count)])
        with Progress(*columns, console=console) as progress, suppress(TimeoutError):
            show = Show(progress, report, count)
            async with asyncio.timeout(deadline_seconds):
                killing = asyncio.create_task(kill_now_and_then(on, report, kill_seconds, chance))
                watching = asyncio.create_task(_watch(on, show))
                await asyncio.gather(*(send(on, report, ids, chance) for _ in range(_CONCURRENCY)))
                watching.cancel()
                quiet = asyncio.create_task(until_quiet(on, show))
                await asyncio.wait({quiet, killing}, return_when=asyncio.FIRST_COMPLETED)
                killing.cancel()
                await quiet
        await lay_side_by_side(on, report)
        report.seconds = time.monotonic() - started
        return report


async def _watch(on: Scene, show: Show) -> None:
    while True:
        show(await count_states(on.engine))
        await asyncio.sleep(_POLL_SECONDS)


def render_table(report: Report, count: int) -> Table:
    """How it went, a row for each thing."""

    def tell(counts: Any) -> str:
        return " · ".join(f"{name} {number:,}" for name, number in sorted(counts.items())) or "none"

    table = Table("", "", show_header=False)
    table.add_row("payouts sent", f"{count:,}, {report.repeats:,} requests repeated")
    table.add_row("took", f"{report.seconds:.0f} s")
    table.add_row("killed -9", tell(report.kills))
    table.add_row("our ledger", tell(report.states))
    table.add_row("the bank's ledger", f"{tell(report.statuses)}; asked again {report.resends:,} times")
    table.add_row("discrepancies", tell(report.discrepancies))
    table.add_row("callbacks so far", tell(report.callbacks))
    table.add_row("side by side", f"{len(report.differences):,} differences" if report.differences else "equal")
    ledger = "; ".join(f"{f.rule.name}: {f.count}, first {', '.join(f.offenders)}" for f in report.broken)
    table.add_row("verify", ledger or f"all {len(RULES)} rules hold")
    return table
