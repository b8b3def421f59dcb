"""The whole product with a bank of its own on one machine, for a trial: brought up in a folder, driven by a merchant, brought
to rest, and its ledger laid beside the bank's.

PostgreSQL, RabbitMQ if there is one, two gateways, five workers, a bank with books of its own, a receiver of callbacks.
"""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from common.db.engine import Engine, create_engine, in_transaction
from common.db.invariants import RULES, Finding, verify
from common.domain.payout import STAGES
from common.settings import Settings
from ops import broker, database
from ops.onboarding import add_http_rail, add_key, add_merchant, add_shop, rotate_webhook_secret, top_up
from ops.ports import choose_port, loopback_url
from ops.processes import Process, Program
from ops.rabbitmq import find_server
from ops.receiver import PAYOUTS_MAX
from ops.reconciliation import compare, find_ours
from ops.servers import OwnServer
from ops.simulator.ledger import Ledger
from ops.state import LOCAL_DEFAULTS, Demo, find_or_make_keys, save_demo

RAIL: Final = "bank"
PATH: Final = "/api/v1/payouts"
CURRENCY: Final = "BDT"
UNFINISHED: Final = frozenset(stage.value for stage in STAGES)
POLL_SECONDS: Final = 1.0

# Everything that takes minutes to days in production takes seconds here; the shape is the same.
_HASTE: Final = {
    "PAYOUTS_RAIL_TIMEOUT_SECONDS": "2",
    "PAYOUTS_SETTLE_LEASE_SECONDS": "8",
    "PAYOUTS_SIGNATURE_WINDOW_SECONDS": "30",
    "PAYOUTS_SUBMIT_DELAYS_SECONDS": "0.2,0.5,1,2,5,10,20,40,60,60",
    "PAYOUTS_LOOK_UP_DELAYS_SECONDS": "0.5,1,2,4,8,15",
    "PAYOUTS_RAIL_BREAKER_REST_SECONDS": "1",
    "PAYOUTS_CALLBACK_TIMEOUT_SECONDS": "5",
    "PAYOUTS_CALLBACK_LEASE_SECONDS": "12",
}
_PACE_SECONDS: Final = 0.5
_SLOW_SECONDS: Final = 3.0
_FUNDS: Final = "1000000000.00"
_CONCURRENCY: Final = 24
_RETRY_SECONDS: Final = 0.2
_REQUEST_SECONDS: Final = 15.0
_DIFFERENCES_SHOWN: Final = 10


@dataclass(slots=True)
class Stage:
    """What runs: the merchant's way in, the bank's books, our processes by kind, and the servers, PostgreSQL first.

    `repeats`: of requests not answered.
    """

    name: str
    demo: Demo
    settings: Settings
    engine: Engine
    ledger: Path
    environment: Mapping[str, str]
    shops: list[str]
    processes: dict[str, list[Process]]
    servers: list[OwnServer]
    seed: int
    repeats: int = 0


@asynccontextmanager
async def stage(
    folder: Path,
    *,
    name: str,
    seed: int,
    mood: str,
    store: OwnServer | None = None,
    with_broker: bool = True,
    copies: int = 2,
    shops: int = 1,
    payouts_max: int = PAYOUTS_MAX,
) -> AsyncIterator[Stage]:
    """Bring everything up, and take it down again, with the data of both servers.

    `name`: the merchant's, and of its first shop. `store`: a PostgreSQL of the caller's. `copies`: of each process that
    there may be many of. `payouts_max`: how many payouts the receiver remembers.
    """
    async with AsyncExitStack() as running:
        running.callback(broker.remove_own, folder)
        running.callback(database.remove_own, folder)
        for part in ("logs", "processes"):
            (folder / part).mkdir()
        environment, servers = await _environment(folder, running, store, with_broker=with_broker)
        settings = Settings.from_environ(environment)
        await database.migrate(settings.database_url)
        engine = create_engine(settings, role="payouts_ops", application=f"payouts-{name}")
        running.push_async_callback(engine.dispose)
        bank_port, receiver_port = choose_port(), choose_port()
        codes = [name, *(f"{name}-{number}" for number in range(2, shops + 1))]
        demo, rail_secret = await _seed(engine, settings, codes, bank_port, receiver_port)
        save_demo(folder, demo)
        ledger = folder / "bank.sqlite"
        programs = _programs(
            demo,
            folder,
            ports=(bank_port, receiver_port),
            bank=("--ledger", str(ledger), "--mood", mood, "--seed", str(seed)),
            copies=copies,
            payouts_max=payouts_max,
        )
        environment |= {"RAIL_SECRET": rail_secret}
        processes = {
            kind: [Process(program, environment, folder) for program in group] for kind, group in programs.items()
        }
        everybody = [process for group in processes.values() for process in group]
        for process in everybody:
            running.push_async_callback(process.stop)
        await asyncio.gather(*(process.start() for process in everybody))
        yield Stage(name, demo, settings, engine, ledger, environment, codes, processes, servers, seed)


async def _environment(
    folder: Path, running: AsyncExitStack, store: OwnServer | None, *, with_broker: bool
) -> tuple[dict[str, str], list[OwnServer]]:
    """The settings of every process, with a database of our own, and a broker if the machine has one."""
    servers = [store or database.own_database(folder)]
    running.push_async_callback(servers[0].stop)
    amqp_url, server = "", find_server() if with_broker else None
    if server is not None:
        node = broker.own_broker(folder, server)
        servers.append(node)
        running.push_async_callback(node.stop)
        amqp_url = await node.start()
    return {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        **LOCAL_DEFAULTS,
        **find_or_make_keys(folder),
        **_HASTE,
        "DATABASE_URL": await servers[0].start(),
        "AMQP_URL": amqp_url,
        "PORT": str(choose_port()),
    }, servers


def _programs(
    demo: Demo, folder: Path, *, ports: tuple[int, int], bank: Sequence[str], copies: int, payouts_max: int
) -> dict[str, list[Program]]:
    """Who runs, by kind. `ports`: the bank's and the receiver's; `bank`: what the bank is told besides."""
    bank_port, receiver_port = ports
    numbers = range(1, copies + 1)
    bank_arguments = (
        *("-m", "ops.simulator", "--port", str(bank_port), *bank),
        *("--events-url", f"{demo.base_url}/api/v1/rails/{RAIL}/events"),
        *("--pace-seconds", str(_PACE_SECONDS), "--slow-seconds", str(_SLOW_SECONDS)),
    )
    receiver_arguments = (
        *("-m", "ops.receiver", "--port", str(receiver_port)),
        *("--folder", str(folder), "--payouts-max", str(payouts_max)),
    )
    return {
        "bank": [Program("bank", bank_arguments, bank_port)],
        "receiver": [Program("receiver", receiver_arguments, receiver_port)],
        "settle": [Program(f"settle-{number}", ("-m", "worker", "settle")) for number in numbers],
        "callbacks": [Program(f"callbacks-{number}", ("-m", "worker", "callbacks")) for number in numbers],
        "sweep": [Program("sweep", ("-m", "worker", "sweep"))],
        "gateway": [Program(f"gateway-{number}", ("-m", "gateway")) for number in numbers],
    }


async def _seed(
    engine: Engine, settings: Settings, shops: list[str], bank_port: int, receiver_port: int
) -> tuple[Demo, str]:
    """A merchant whose shops' payouts go to the bank, and the secret that the bank signs with."""
    name, keyring = shops[0], settings.keyring
    actor = f"ops.{name}"
    rail_secret = await add_http_rail(
        engine, keyring, name=RAIL, base_url=loopback_url(bank_port), authoritative=True, actor=actor
    )
    await add_merchant(engine, code=name, name=name.capitalize(), actor=actor)
    webhook_secret = ""
    for shop in shops:
        secret = await add_shop(
            engine,
            keyring,
            merchant=name,
            code=shop,
            currency=CURRENCY,
            rail=RAIL,
            is_default=not webhook_secret,
            webhook_url=f"{loopback_url(receiver_port)}/callbacks",
            payment_data_schema=None,
            actor=actor,
        )
        webhook_secret = webhook_secret or secret
        if secret != webhook_secret:
            # The receiver knows one.
            await rotate_webhook_secret(
                engine,
                keyring,
                merchant=name,
                shop=shop,
                grace_seconds=0,
                reason="one for all",
                actor=actor,
                secret=webhook_secret,
            )
        await top_up(engine, merchant=name, shop=shop, amount=_FUNDS, reason="funds", actor=actor)
    key = await add_key(engine, keyring, merchant=name, actor=actor)
    demo = Demo(
        base_url=loopback_url(settings.port),
        api_key=key.public_id,
        api_secret=key.secret,
        webhook_secret=webhook_secret,
        shop_code=name,
        currency=CURRENCY,
        receiver_url=loopback_url(receiver_port),
        database_url=settings.database_url,
        amqp_url=None,
    )
    return demo, rail_secret


async def send_all(on: Stage, external_ids: Iterator[str]) -> None:
    """Create payouts, some at a time, each repeated until it is answered, as merchants are told to."""
    await asyncio.gather(*(_send(on, external_ids) for _ in range(_CONCURRENCY)))


async def _send(on: Stage, external_ids: Iterator[str]) -> None:
    timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for external_id in external_ids:
            while await send_once(on, session, external_id) not in (200, 201):
                on.repeats += 1
                await asyncio.sleep(_RETRY_SECONDS)


async def send_once(on: Stage, session: aiohttp.ClientSession, external_id: str) -> int | None:
    """Create a payout, the same for the same id; the status of the answer, or None when there was none."""
    chance = random.Random(f"{on.seed} {external_id}")  # noqa: S311 no secret
    body = json.dumps(
        {
            "external_id": external_id,
            "amount": f"{chance.randrange(1, 500)}.00",
            "currency": CURRENCY,
            "card_number": f"017{chance.randrange(10**8):08}",
        }
    ).encode()
    headers = on.demo.sign("POST", PATH, body)
    with suppress(aiohttp.ClientError, TimeoutError):
        async with session.post(on.demo.base_url + PATH, data=body, headers=headers) as response:
            return response.status
    return None


async def until_quiet(on: Stage) -> None:
    """Return once every payout has ended, and every word of the bank is heard."""
    ledger = Ledger(on.ledger)
    try:
        while True:
            counts = await count_states(on.engine)
            unheard = await in_transaction(
                on.engine, lambda tx: tx.scalar(text("SELECT count(*) FROM rail_events WHERE applied_at IS NULL"))
            )
            if not set(counts) & UNFINISHED and not unheard and ledger.count_untold() == 0:
                return
            await asyncio.sleep(POLL_SECONDS)
    finally:
        ledger.close()


async def count_states(engine: Engine) -> dict[str, int]:
    """How many payouts stand where."""
    rows = await in_transaction(
        engine, lambda tx: tx.execute(text("SELECT state, count(*) AS n FROM payouts GROUP BY state ORDER BY state"))
    )
    return {row.state: row.n for row in rows}


@dataclass(slots=True)
class Comparison:
    """Both ledgers side by side: how payouts stand in each, where they differ, which rules are broken."""

    states: dict[str, int] = field(default_factory=dict)
    statuses: Counter[str] = field(default_factory=Counter)
    discrepancies: dict[str, int] = field(default_factory=dict)
    resends: int = 0
    callbacks: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    broken: list[Finding] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether the ledgers are equal and every rule holds."""
        return not self.differences and not self.broken


async def lay_side_by_side(on: Stage) -> Comparison:
    """Compare the two ledgers and check every rule."""
    ledger = Ledger(on.ledger)
    payments = ledger.payments()
    ledger.close()
    rows = await in_transaction(
        on.engine,
        lambda tx: tx.execute(text("SELECT kind, count(*) AS n FROM discrepancies GROUP BY kind ORDER BY kind")),
    )
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{on.demo.receiver_url}/received", params={"prefix": f"{on.name}-"}) as response,
    ):
        received = await response.json()
    return Comparison(
        states=await count_states(on.engine),
        statuses=Counter(payment.status for payment in payments),
        discrepancies={row.kind: row.n for row in rows},
        resends=sum(payment.submits - 1 for payment in payments),
        callbacks=Counter(
            {"payouts told of": len(received["by_external_id"]), **{k: received[k] for k in ("verified", "rejected")}}
        ),
        differences=compare(await in_transaction(on.engine, lambda tx: find_ours(tx, RAIL)), payments),
        broken=[finding for finding in await verify(on.engine) if finding.count],
    )


def tell_counts(counts: Mapping[Any, int]) -> str:
    """Counts by name, in a line."""
    return " · ".join(f"{name} {number:,}" for name, number in sorted(counts.items())) or "none"


def add_comparison(table: Table, comparison: Comparison) -> None:
    """A row for each thing that the ledgers tell."""
    table.add_row("our ledger", tell_counts(comparison.states))
    table.add_row("the bank's ledger", f"{tell_counts(comparison.statuses)}; asked again {comparison.resends:,} times")
    table.add_row("discrepancies", tell_counts(comparison.discrepancies))
    table.add_row("callbacks so far", tell_counts(comparison.callbacks))
    add_findings(table, comparison.differences, comparison.broken)


def add_findings(table: Table, differences: Sequence[str], broken: Sequence[Finding]) -> None:
    """Where the ledgers differ, and which rules are broken."""
    table.add_row("side by side", f"{len(differences):,} differences" if differences else "equal")
    rules = "; ".join(f"{f.rule.name}: {f.count}, first {', '.join(f.offenders)}" for f in broken)
    table.add_row("verify", rules or f"all {len(RULES)} rules hold")


def print_differences(console: Console, differences: Sequence[str]) -> None:
    """The first of them, one a line."""
    for difference in differences[:_DIFFERENCES_SHOWN]:
        console.print(difference, markup=False, highlight=False)
