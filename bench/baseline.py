"""What the product is held against: the programs in `bench/baselines`, as they are, on the same machine in the same minutes.

They work in a database of their own beside ours, in the same PostgreSQL. What they claim to have done is laid beside it.
"""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from bench.answers import Row
from bench.scene import RABBITMQ, SUPERUSER, Scene
from common.db.engine import driver_url
from ops import broker
from ops.ports import LOOPBACK, choose_port
from ops.postgres import find_programs
from ops.state import CHECKOUT

FOLDER: Final = CHECKOUT / "bench" / "baselines"
DATABASE: Final = "baselines"
PATH: Final = "/v1/payouts"
SHOPS: Final = 1000
BATCH: Final = 64
_QUEUE: Final = "plain"
# As the programs' own README runs them.
_CLIENTS, _THREADS = 16, 2
_FUNDS_MINOR: Final = 10**15
_READY_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.05
_PROCESSED: Final = re.compile(r"number of transactions actually processed: (\d+)")
_PER_SECOND: Final = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)


class BaselineFailed(Exception):
    """A baseline that does not run; the text is for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class SqlRun:
    """What `pgbench` says of one script, and by how many payouts the database disagrees."""

    per_second: float
    differing: int


def has_plain() -> bool:
    """Whether what the plain implementation needs is installed."""
    return all(find_spec(name) for name in ("fastapi", "uvicorn"))


async def prepare(on: Scene) -> None:
    """A fresh database with the bare schema, and funds."""
    engine = create_async_engine(
        driver_url(on.cluster.url(SUPERUSER)), isolation_level="AUTOCOMMIT", poolclass=NullPool
    )
    async with engine.connect() as connection:
        await connection.execute(text(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)"))
        await connection.execute(text(f"CREATE DATABASE {DATABASE}"))
    schema = (FOLDER / "schema.sql").read_text()
    async with _engine(on).begin() as tx:
        for statement in filter(str.strip, schema.split(";\n")):
            await tx.exec_driver_sql(statement)


async def run_sql(on: Scene, script: str, *, shops: int, batch: int = 1, seconds: float) -> SqlRun:
    """One of the scripts, by `pgbench`. Raises: `BaselineFailed`."""
    before = await _count_payouts(on)
    url = urlsplit(on.cluster.url(SUPERUSER, DATABASE))
    process = await asyncio.create_subprocess_exec(
        str(find_programs() / "pgbench"),
        *("-n", "-M", "prepared", "-c", str(_CLIENTS), "-j", str(_THREADS), "-T", str(max(1, round(seconds)))),
        *("-D", f"shops={shops}", "-D", f"n={batch}", "-f", str(FOLDER / script)),
        *("-h", LOOPBACK, "-p", str(url.port), "-U", SUPERUSER, DATABASE),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"PATH": os.defpath, "LC_ALL": "C", "PGPASSWORD": url.password or ""},
    )
    printed = (await process.communicate())[0].decode()
    processed, per_second = _PROCESSED.search(printed), _PER_SECOND.search(printed)
    if process.returncode or processed is None or per_second is None:
        raise BaselineFailed(f"pgbench {script}:\n{printed}")
    claimed = int(processed[1]) * batch
    differing = abs(await _count_payouts(on) - before - claimed) + await _count_unheld(on)
    return SqlRun(float(per_second[1]) * batch, differing)


@asynccontextmanager
async def bare_handler(on: Scene) -> AsyncIterator[int]:
    """A handler that only answers; yields its port."""
    port = choose_port()
    async with _running(on, "bare-handler", port, str(FOLDER / "bare_handler.py"), str(port)):
        yield port


@asynccontextmanager
async def plain(on: Scene) -> AsyncIterator[int]:
    """What most teams would write; yields its port."""
    port = choose_port()
    variables = {
        "DATABASE_URL": driver_url(on.cluster.url(SUPERUSER, DATABASE)),
        "AMQP_URL": on.carriers[RABBITMQ],
    }
    arguments = (
        *("-m", "uvicorn", "plain_accept:app", "--app-dir", str(FOLDER)),
        *("--host", LOOPBACK, "--port", str(port), "--log-level", "warning", "--no-access-log"),
    )
    async with _running(on, "plain", port, *arguments, variables=variables):
        yield port


async def find_stored(on: Scene, prefix: str) -> dict[str, Row]:
    """The payouts of the plain implementation whose `external_id` begins so."""
    async with _engine(on).connect() as tx:
        rows = await tx.execute(
            text(
                "SELECT p.external_id, p.public_id, p.amount FROM payouts p"
                " JOIN postings x ON x.payout_id = p.id AND x.amount = p.amount WHERE p.external_id LIKE :pattern"
            ),
            {"pattern": f"{prefix}%"},
        )
        return {row.external_id: Row(str(row.public_id), row.amount) for row in rows}


async def count_published(on: Scene) -> int:
    """How many messages the plain implementation has published; takes them away."""
    async with await broker.connect(on.carriers[RABBITMQ]) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(_QUEUE)
        purged = await queue.purge()
        return int(purged.message_count or 0)


def _engine(on: Scene) -> Any:
    return create_async_engine(driver_url(on.cluster.url(SUPERUSER, DATABASE)), poolclass=NullPool)


async def _count_payouts(on: Scene) -> int:
    async with _engine(on).connect() as tx:
        return int(await tx.scalar(text("SELECT count(*) FROM payouts")))


async def _count_unheld(on: Scene) -> int:
    """How many accounts do not hold what their payouts say."""
    async with _engine(on).connect() as tx:
        found = await tx.scalar(
            text(
                "SELECT count(*) FROM balances b LEFT JOIN (SELECT shop_id, sum(amount)::bigint AS held FROM payouts"
                " GROUP BY shop_id) p USING (shop_id) WHERE b.held <> coalesce(p.held, 0)"
                " OR b.available <> :funds - b.held"
            ),
            {"funds": _FUNDS_MINOR},
        )
        return int(found)


@asynccontextmanager
async def _running(
    on: Scene, name: str, port: int, *arguments: str, variables: Mapping[str, str] | None = None
) -> AsyncIterator[None]:
    """A program that listens on that port, until it is told to end."""
    log = on.folder / "logs" / f"{name}.log"
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *arguments),
            stdout=file,
            stderr=file,
            cwd=CHECKOUT,
            env={"PATH": os.environ.get("PATH", os.defpath), **(variables or {})},
        )
    try:
        async with asyncio.timeout(_READY_SECONDS):
            while not await _listens(port):
                if process.returncode is not None:
                    raise BaselineFailed(f"{name} died:\n{_tail(log)}")
                await asyncio.sleep(_POLL_SECONDS)
        yield
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:
        return False
    writer.close()
    return True


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
