"""`python -m ops.demo`: a merchant with 1,000 payouts, over HTTP, against the stack that runs on this machine."""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median, quantiles
from typing import Any, Final

import aiohttp
import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from common.db.engine import driver_url
from common.db.invariants import RULES, Finding, verify
from ops.state import FOLDER, Demo, find_demo

_PATH: Final = "/api/v1/payouts"
_AMOUNT: Final = "1.00"
_CONCURRENCY: Final = 32
_POLL_SECONDS: Final = 0.5
# Sent one at a time when all is quiet, to see what a single payout takes.
_ALONE_COUNT: Final = 21
_WATCH_SECONDS: Final = 0.005
_SURPRISES_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Idle:
    """A payout that was alone: seconds from its 201 until it was success, and until its callback was there."""

    success_seconds: float
    callback_seconds: float


@dataclass(slots=True)
class Outcome:
    """What became of the payouts, as the merchant saw it: `external_id`s, and seconds per accepted create.

    `idle`: of payouts that were sent one at a time, when all the others were through.
    """

    accepted: set[str] = field(default_factory=set)
    settled: set[str] = field(default_factory=set)
    delivered: set[str] = field(default_factory=set)
    verified: set[str] = field(default_factory=set)
    accept_seconds: list[float] = field(default_factory=list)
    idle: list["Idle"] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)

    def stages(self) -> dict[str, set[str]]:
        """Who has come how far."""
        return {
            "accepted": self.accepted,
            "settled": self.settled,
            "delivered": self.delivered,
            "verified": self.verified,
        }

    def is_complete(self, count: int) -> bool:
        """Whether all payouts went the whole way."""
        return all(len(done) == count for done in self.stages().values())


class Merchant:
    """The demo merchant at work; `outcome` is what it saw, and is shown whenever it changes."""

    def __init__(self, session: aiohttp.ClientSession, demo: Demo, show: Callable[[Outcome], None]) -> None:
        self.outcome = Outcome()
        self._show = show
        self._session = session
        self._demo = demo

    async def create(self, external_ids: Iterator[str]) -> None:
        """Create payouts one after the other, as long as there are ids; others may take from the same iterator."""
        for external_id in external_ids:
            started = time.perf_counter()
            if await self._create(external_id):
                self.outcome.accept_seconds.append(time.perf_counter() - started)
                self.outcome.accepted.add(external_id)
            self._show(self.outcome)

    async def watch_one(self, external_id: str) -> None:
        """Create a payout and wait for its callback. All clocks are this machine's."""
        if not await self._create(external_id):
            return
        accepted_at = time.time()
        while not (received := await self._read_received(external_id)):  # noqa: ASYNC110 we are the outside world
            await asyncio.sleep(_WATCH_SECONDS)
        _, answer = await self._send("GET", f"{_PATH}/{external_id}", b"")
        finalized_at = datetime.fromisoformat(answer["finalization_date"]).timestamp()
        (callback, *_) = received[external_id]
        self.outcome.idle.append(Idle(finalized_at - accepted_at, callback["received_at"] - accepted_at))

    async def look_up(self, external_ids: Iterator[str]) -> None:
        """Ask for payouts one after the other, and note those that are settled."""
        for external_id in external_ids:
            status, answer = await self._send("GET", f"{_PATH}/{external_id}", b"")
            if status == 200 and answer["status"] == "pending":
                continue
            self.outcome.settled.add(external_id)
            if status != 200 or answer["status"] != "success":
                self.outcome.surprises.append(f"look-up of {external_id}: {status} {answer}")
            self._show(self.outcome)

    async def read_received(self, prefix: str) -> None:
        """Ask the receiver what came."""
        received = await self._read_received(prefix)
        self.outcome.delivered |= received.keys()
        self.outcome.verified |= {key for key, callbacks in received.items() if all(c["verified"] for c in callbacks)}
        self._show(self.outcome)

    async def _create(self, external_id: str) -> bool:
        """Whether it was answered 201."""
        payout = {
            "external_id": external_id,
            "amount": _AMOUNT,
            "currency": self._demo.currency,
            "card_number": "01700005678",
            "callback_url": f"{self._demo.receiver_url}/callbacks",
        }
        status, answer = await self._send("POST", _PATH, json.dumps(payout).encode())
        if status != 201:
            self.outcome.surprises.append(f"create of {external_id}: {status} {answer}")
        return status == 201

    async def _read_received(self, prefix: str) -> dict[str, list[dict[str, Any]]]:
        async with self._session.get(f"{self._demo.receiver_url}/received", params={"prefix": prefix}) as response:
            received: dict[str, list[dict[str, Any]]] = (await response.json())["by_external_id"]
            return received

    async def _send(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        headers = self._demo.sign(method, path, body)
        async with self._session.request(method, self._demo.base_url + path, data=body, headers=headers) as response:
            return response.status, await response.json()


async def run(demo: Demo, count: int, deadline_seconds: float, show: Callable[[Outcome], None]) -> Outcome:
    """Create the payouts and follow them until all are through, one surprises us, or the deadline has come."""
    prefix = f"demo-{time.time_ns() // 1_000_000}-"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=_CONCURRENCY)) as session:
        merchant = Merchant(session, demo, show)
        outcome = merchant.outcome
        try:
            async with asyncio.timeout(deadline_seconds):
                fresh = iter([f"{prefix}{number:05}" for number in range(count)])
                await asyncio.gather(*(merchant.create(fresh) for _ in range(_CONCURRENCY)))
                while not outcome.surprises and not outcome.is_complete(count):
                    await asyncio.sleep(_POLL_SECONDS)
                    unsettled = iter(sorted(outcome.accepted - outcome.settled))
                    await asyncio.gather(*(merchant.look_up(unsettled) for _ in range(_CONCURRENCY)))
                    await merchant.read_received(prefix)
                for number in range(_ALONE_COUNT):
                    await merchant.watch_one(f"{prefix}alone-{number:02}")
        except TimeoutError:
            outcome.surprises.append(f"not everything was through after {deadline_seconds:g} s")
        except aiohttp.ClientError as error:
            outcome.surprises.append(f"the stack does not answer: {error}")
        return outcome


async def check_ledger(database_url: str) -> list[Finding]:
    """The rules of the ledger that are broken. Raises: `OSError` when the database does not answer."""
    engine = create_async_engine(
        driver_url(database_url), poolclass=NullPool, connect_args={"server_settings": {"role": "payouts_readonly"}}
    )
    return [finding for finding in await verify(engine) if finding.count]


def follow(demo: Demo, count: int, deadline_seconds: float, console: Console) -> Outcome:
    """Run with a bar for each stage of the way."""
    columns = TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bars = {stage: progress.add_task(stage, total=count) for stage in Outcome().stages()}

        def show(outcome: Outcome) -> None:
            for stage, done in outcome.stages().items():
                progress.update(bars[stage], completed=len(done))

        return asyncio.run(run(demo, count, deadline_seconds, show))


def render_table(outcome: Outcome, broken: list[Finding], count: int, carrier: str) -> Table:
    """How it went, a row for each thing."""
    table = Table("", "", show_header=False)
    table.add_row("carried by", carrier)
    for stage, done in outcome.stages().items():
        table.add_row(stage, f"{len(done):,} of {count:,}")
    if len(outcome.accept_seconds) > 1:
        percentiles = quantiles(outcome.accept_seconds, n=100)
        table.add_row("accept p50", f"{percentiles[49] * 1000:.1f} ms")
        table.add_row("accept p99", f"{percentiles[98] * 1000:.1f} ms")
    if outcome.idle:
        for name in ("success", "callback"):
            seconds = median(getattr(idle, f"{name}_seconds") for idle in outcome.idle)
            table.add_row(f"201 to {name}, idle, p50", f"{seconds * 1000:.1f} ms")
    ledger = "; ".join(f"{f.rule.name}: {f.count}, first {', '.join(f.offenders)}" for f in broken)
    table.add_row("ledger", ledger or f"all {len(RULES)} rules hold")
    return table


@click.command()
@click.option("--count", default=1_000, show_default=True, type=click.IntRange(min=1), help="How many payouts.")
@click.option("--deadline", default=120.0, show_default=True, help="Seconds until all must be through.")
def main(count: int, deadline: float) -> None:
    """Send payouts through the running stack; exit code 1 when anything is off."""
    demo = find_demo(FOLDER)
    if demo is None:
        sys.exit("error: nothing ran here yet; start it with: make run")
    console = Console()
    outcome = follow(demo, count, deadline, console)
    try:
        broken = asyncio.run(check_ledger(demo.database_url))
    except OSError:
        sys.exit("error: nothing runs here now; start it with: make run")
    carrier = "RabbitMQ" if demo.amqp_url else "PostgreSQL alone"
    console.print(render_table(outcome, broken, count, carrier))
    for surprise in outcome.surprises[:_SURPRISES_SHOWN]:
        console.print(surprise, markup=False, highlight=False)
    sys.exit(0 if outcome.is_complete(count) and not outcome.surprises and not broken else 1)


if __name__ == "__main__":
    main()
