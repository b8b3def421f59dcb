"""`python -m ops.torment`: payouts through a bank in its worst mood, while processes of ours are killed; then both ledgers
are laid side by side.

Everything runs on this machine in a folder of its own, which is removed afterwards: PostgreSQL, RabbitMQ if there is one, two
gateways, five workers, a bank with books of its own, a receiver of callbacks.
"""

import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import text

from common.db.engine import Engine, create_engine, in_transaction
from common.db.invariants import RULES, Finding, verify
from common.domain.payout import STAGES
from common.domain.signing import sign_v1
from common.settings import Settings
from ops import broker, database
from ops.onboarding import add_http_rail, add_key, add_merchant, add_shop, top_up
from ops.ports import choose_port, loopback_url
from ops.processes import Process, Program
from ops.rabbitmq import find_server
from ops.reconciliation import compare, find_ours
from ops.simulator.ledger import Ledger
from ops.state import LOCAL_DEFAULTS, Demo, find_or_make_keys, save_demo

# Everything that takes minutes to days in production takes seconds here; the shape is the same.
_HASTE: Final = {
    "PAYOUTS_RAIL_TIMEOUT_SECONDS": "2",
    "PAYOUTS_SETTLE_LEASE_SECONDS": "8",
    "PAYOUTS_SIGNATURE_WINDOW_SECONDS": "30",
    "PAYOUTS_SUBMIT_DELAYS_SECONDS": "0.2,0.5,1,2,5,10,20,40,60,60",
    "PAYOUTS_LOOK_UP_DELAYS_SECONDS": "0.5,1,2,4,8,15",
    "PAYOUTS_RAIL_BREAKER_REST_SECONDS": "1",
}
_PACE_SECONDS: Final = 0.5
_SLOW_SECONDS: Final = 3.0
_RAIL: Final = "bank"
_ACTOR: Final = "ops.torment"
_PATH: Final = "/api/v1/payouts"
_CONCURRENCY: Final = 24
_RETRY_SECONDS: Final = 0.2
_POLL_SECONDS: Final = 1.0
_REQUEST_SECONDS: Final = 15.0
_DIFFERENCES_SHOWN: Final = 10
_UNFINISHED: Final = frozenset(stage.value for stage in STAGES)

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


@dataclass(slots=True)
class Scene:
    """What runs: the merchant's way in, the bank's books, and the processes that may be killed, by kind."""

    demo: Demo
    engine: Engine
    ledger: Path
    processes: dict[str, list[Process]]
    report: Report = field(default_factory=Report)


@asynccontextmanager
async def scene(folder: Path, seed: int) -> AsyncIterator[Scene]:
    """Bring everything up, and take it down again."""
    async with AsyncExitStack() as running:
        running.callback(broker.remove_own, folder)
        running.callback(database.remove_own, folder)
        for name in ("logs", "processes"):
            (folder / name).mkdir()
        environment = await _environment(folder, running)
        settings = Settings.from_environ(environment)
        await database.migrate(settings.database_url)
        engine = create_engine(settings, role="payouts_ops", application="payouts-torment")
        running.push_async_callback(engine.dispose)
        bank_port, receiver_port = choose_port(), choose_port()
        demo, rail_secret = await _seed(engine, settings, bank_port, receiver_port)
        save_demo(folder, demo)
        ledger = folder / "bank.sqlite"
        bank = (
            *("-m", "ops.simulator", "--port", str(bank_port), "--ledger", str(ledger), "--mood", "worst"),
            *("--events-url", f"{demo.base_url}/api/v1/rails/{_RAIL}/events", "--seed", str(seed)),
            *("--pace-seconds", str(_PACE_SECONDS), "--slow-seconds", str(_SLOW_SECONDS)),
        )
        receiver = ("-m", "ops.receiver", "--port", str(receiver_port), "--folder", str(folder))
        programs = {
            "bank": [Program("bank", bank, bank_port)],
            "receiver": [Program("receiver", receiver, receiver_port)],
            "settle": [Program(f"settle-{number}", ("-m", "worker", "settle")) for number in (1, 2)],
            "callbacks": [Program(f"callbacks-{number}", ("-m", "worker", "callbacks")) for number in (1, 2)],
            "sweep": [Program("sweep", ("-m", "worker", "sweep"))],
            "gateway": [Program(f"gateway-{number}", ("-m", "gateway")) for number in (1, 2)],
        }
        environment |= {"RAIL_SECRET": rail_secret}
        processes = {
            kind: [Process(program, environment, folder) for program in group] for kind, group in programs.items()
        }
        everybody = [process for group in processes.values() for process in group]
        for process in everybody:
            running.push_async_callback(process.stop)
        await asyncio.gather(*(process.start() for process in everybody))
        yield Scene(demo, engine, ledger, processes)


async def _environment(folder: Path, running: AsyncExitStack) -> dict[str, str]:
    """The settings of every process, with a database of our own, and a broker if the machine has one."""
    store = database.own_database(folder)
    running.push_async_callback(store.stop)
    amqp_url, server = "", find_server()
    if server is not None:
        node = broker.own_broker(folder, server)
        running.push_async_callback(node.stop)
        amqp_url = await node.start()
    return {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        **LOCAL_DEFAULTS,
        **find_or_make_keys(folder),
        **_HASTE,
        "DATABASE_URL": await store.start(),
        "AMQP_URL": amqp_url,
        "PORT": str(choose_port()),
    }


async def _seed(engine: Engine, settings: Settings, bank_port: int, receiver_port: int) -> tuple[Demo, str]:
    """A merchant whose shop's payouts go to the bank, and the secret that the bank signs with."""
    keyring = settings.keyring
    rail_secret = await add_http_rail(
        engine, keyring, name=_RAIL, base_url=loopback_url(bank_port), authoritative=True, actor=_ACTOR
    )
    await add_merchant(engine, code="torment", name="Torment", actor=_ACTOR)
    webhook_secret = await add_shop(
        engine,
        keyring,
        merchant="torment",
        code="torment",
        currency="BDT",
        rail=_RAIL,
        is_default=True,
        webhook_url=f"{loopback_url(receiver_port)}/callbacks",
        payment_data_schema=None,
        actor=_ACTOR,
    )
    await top_up(engine, merchant="torment", shop="torment", amount="100000000.00", reason="funds", actor=_ACTOR)
    key = await add_key(engine, keyring, merchant="torment", actor=_ACTOR)
    demo = Demo(
        base_url=loopback_url(settings.port),
        api_key=key.public_id,
        api_secret=key.secret,
        webhook_secret=webhook_secret,
        shop_code="torment",
        currency="BDT",
        receiver_url=loopback_url(receiver_port),
        database_url=settings.database_url,
        amqp_url=None,
    )
    return demo, rail_secret


async def send(on: Scene, external_ids: Iterator[str], chance: random.Random) -> None:
    """Create payouts one after the other, each repeated until it is answered, as merchants are told to."""
    timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for external_id in external_ids:
            body = json.dumps(
                {
                    "external_id": external_id,
                    "amount": f"{chance.randrange(1, 500)}.00",
                    "currency": "BDT",
                    "card_number": f"017{chance.randrange(10**8):08}",
                }
            ).encode()
            while not await _answered(on, session, body):
                on.report.repeats += 1
                await asyncio.sleep(_RETRY_SECONDS)


async def _answered(on: Scene, session: aiohttp.ClientSession, body: bytes) -> bool:
    timestamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "X-API-Key": on.demo.api_key,
        "X-Timestamp": timestamp,
        "X-Signature": sign_v1(on.demo.api_secret, timestamp, "POST", _PATH, "", body),
    }
    with suppress(aiohttp.ClientError, TimeoutError):
        async with session.post(on.demo.base_url + _PATH, data=body, headers=headers) as response:
            return response.status in (200, 201)
    return False


async def kill_now_and_then(on: Scene, kill_seconds: float, chance: random.Random) -> None:
    """Kill -9 somebody, start them again, and rest; for ever."""
    while True:
        await asyncio.sleep(chance.uniform(0.5, 1.5) * kill_seconds)
        (kind,) = chance.choices(list(_VICTIMS), weights=list(_VICTIMS.values()))
        victim = chance.choice(on.processes[kind])
        victim.kill()
        on.report.kills[kind] += 1
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
            unfinished = set(counts) & _UNFINISHED
            if not unfinished and not unheard and ledger.count_untold() == 0:
                return
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        ledger.close()


async def count_states(engine: Engine) -> dict[str, int]:
    """How many payouts stand where."""
    rows = await in_transaction(
        engine, lambda tx: tx.execute(text("SELECT state, count(*) AS n FROM payouts GROUP BY state ORDER BY state"))
    )
    return {row.state: row.n for row in rows}


async def lay_side_by_side(on: Scene) -> None:
    """Compare the two ledgers, check every rule, and write down what there is to tell."""
    ledger = Ledger(on.ledger)
    payments = ledger.payments()
    ledger.close()
    report = on.report
    report.differences = compare(await in_transaction(on.engine, lambda tx: find_ours(tx, _RAIL)), payments)
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
        unfinished = sum(counts.get(state, 0) for state in _UNFINISHED)
        self._progress.update(self._bars["accepted"], completed=sum(counts.values()))
        self._progress.update(self._bars["ended"], completed=sum(counts.values()) - unfinished)
        told = " · ".join(f"{state} {number}" for state, number in counts.items())
        self._progress.update(self._line, description=f"{told} · killed {self._report.kills.total()}")


async def run(
    folder: Path, *, count: int, seed: int, kill_seconds: float, deadline_seconds: float, console: Console
) -> Report:
    """Torment it, wait until all is quiet, lay the ledgers side by side."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    async with scene(folder, seed) as on:
        started = time.monotonic()
        chance = random.Random(seed)  # noqa: S311 no secret
        ids = iter([f"torment-{number:06}" for number in range(count)])
        with Progress(*columns, console=console) as progress, suppress(TimeoutError):
            show = Show(progress, on.report, count)
            async with asyncio.timeout(deadline_seconds):
                killing = asyncio.create_task(kill_now_and_then(on, kill_seconds, chance))
                watching = asyncio.create_task(_watch(on, show))
                await asyncio.gather(*(send(on, ids, chance) for _ in range(_CONCURRENCY)))
                watching.cancel()
                quiet = asyncio.create_task(until_quiet(on, show))
                await asyncio.wait({quiet, killing}, return_when=asyncio.FIRST_COMPLETED)
                killing.cancel()
                await quiet
        await lay_side_by_side(on)
        on.report.seconds = time.monotonic() - started
        return on.report


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
    for difference in report.differences[:_DIFFERENCES_SHOWN]:
        console.print(difference, markup=False, highlight=False)
    sys.exit(0 if report.is_sound and sum(report.states.values()) == count else 1)


if __name__ == "__main__":
    main()
