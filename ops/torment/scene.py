"""Where it happens: the whole product in a folder of its own, a bank, a receiver, and shops with money."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import text

from common.db.engine import Engine, create_engine, in_transaction
from common.domain.payout import STAGES
from common.settings import Settings
from ops import broker, database
from ops.onboarding import add_http_rail, add_key, add_merchant, add_shop, rotate_webhook_secret, top_up
from ops.ports import choose_port, loopback_url
from ops.processes import Process, Program
from ops.rabbitmq import find_server
from ops.servers import OwnServer
from ops.state import LOCAL_DEFAULTS, Demo, find_or_make_keys, save_demo

RAIL: Final = "bank"
PATH: Final = "/api/v1/payouts"
CURRENCY: Final = "BDT"
UNFINISHED: Final = frozenset(stage.value for stage in STAGES)
FUNDS: Final = "1000000000.00"

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
_ACTOR: Final = "ops.torment"
_MERCHANT: Final = "torment"


@dataclass(frozen=True, slots=True)
class Plan:
    """How the bank behaves, how many shops there are, and how many payouts the receiver must be able to remember."""

    mood: str
    seed: int
    shops: int
    payouts_max: int


@dataclass(frozen=True, slots=True)
class Scene:
    """What runs: the merchant's way in, the bank's books, the processes by kind, and the servers, PostgreSQL first."""

    demo: Demo
    settings: Settings
    engine: Engine
    ledger: Path
    shops: list[str]
    processes: dict[str, list[Process]]
    servers: list[OwnServer]


@asynccontextmanager
async def scene(folder: Path, plan: Plan) -> AsyncIterator[Scene]:
    """Bring everything up, and take it down again; logs, and what else is written into the folder, stay there."""
    async with AsyncExitStack() as running:
        running.callback(broker.remove_own, folder)
        running.callback(database.remove_own, folder)
        for name in ("logs", "processes"):
            (folder / name).mkdir()
        environment, servers = await _environment(folder, running)
        settings = Settings.from_environ(environment)
        await database.migrate(settings.database_url)
        engine = create_engine(settings, role="payouts_ops", application="payouts-torment")
        running.push_async_callback(engine.dispose)
        bank_port, receiver_port = choose_port(), choose_port()
        shops = [_MERCHANT, *(f"{_MERCHANT}-{number}" for number in range(2, plan.shops + 1))]
        demo, rail_secret = await _seed(engine, settings, shops, bank_port, receiver_port)
        save_demo(folder, demo)
        ledger = folder / "bank.sqlite"
        bank = (
            *("-m", "ops.simulator", "--port", str(bank_port), "--ledger", str(ledger), "--mood", plan.mood),
            *("--events-url", f"{demo.base_url}/api/v1/rails/{RAIL}/events", "--seed", str(plan.seed)),
            *("--pace-seconds", str(_PACE_SECONDS), "--slow-seconds", str(_SLOW_SECONDS)),
        )
        receiver = (
            *("-m", "ops.receiver", "--port", str(receiver_port), "--folder", str(folder)),
            *("--payouts-max", str(plan.payouts_max)),
        )
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
        yield Scene(demo, settings, engine, ledger, shops, processes, servers)


async def _environment(folder: Path, running: AsyncExitStack) -> tuple[dict[str, str], list[OwnServer]]:
    """The settings of every process, with a database of our own, and a broker if the machine has one."""
    servers = [database.own_database(folder)]
    running.push_async_callback(servers[0].stop)
    amqp_url, server = "", find_server()
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


async def _seed(
    engine: Engine, settings: Settings, shops: list[str], bank_port: int, receiver_port: int
) -> tuple[Demo, str]:
    """A merchant whose shops' payouts go to the bank, and the secret that the bank signs with."""
    keyring = settings.keyring
    rail_secret = await add_http_rail(
        engine, keyring, name=RAIL, base_url=loopback_url(bank_port), authoritative=True, actor=_ACTOR
    )
    await add_merchant(engine, code=_MERCHANT, name="Torment", actor=_ACTOR)
    webhook_secret = ""
    for shop in shops:
        secret = await add_shop(
            engine,
            keyring,
            merchant=_MERCHANT,
            code=shop,
            currency=CURRENCY,
            rail=RAIL,
            is_default=not webhook_secret,
            webhook_url=f"{loopback_url(receiver_port)}/callbacks",
            payment_data_schema=None,
            actor=_ACTOR,
        )
        webhook_secret = webhook_secret or secret
        if secret != webhook_secret:
            # The receiver knows one.
            await rotate_webhook_secret(
                engine,
                keyring,
                merchant=_MERCHANT,
                shop=shop,
                grace_seconds=0,
                reason="one for all",
                actor=_ACTOR,
                secret=webhook_secret,
            )
        await top_up(engine, merchant=_MERCHANT, shop=shop, amount=FUNDS, reason="funds", actor=_ACTOR)
    key = await add_key(engine, keyring, merchant=_MERCHANT, actor=_ACTOR)
    demo = Demo(
        base_url=loopback_url(settings.port),
        api_key=key.public_id,
        api_secret=key.secret,
        webhook_secret=webhook_secret,
        shop_code=_MERCHANT,
        currency=CURRENCY,
        receiver_url=loopback_url(receiver_port),
        database_url=settings.database_url,
        amqp_url=None,
    )
    return demo, rail_secret


async def count_states(engine: Engine) -> dict[str, int]:
    """How many payouts stand where."""
    rows = await in_transaction(
        engine, lambda tx: tx.execute(text("SELECT state, count(*) AS n FROM payouts GROUP BY state ORDER BY state"))
    )
    return {row.state: row.n for row in rows}
