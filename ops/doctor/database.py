"""The database of `DATABASE_URL`: reachable, of this version, and one that keeps its word."""

import time
from collections.abc import AsyncIterator
from typing import Final

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from common.db.engine import driver_url, find_room
from common.db.recovering import awaits_recovery
from common.settings import Settings
from migrations.run import MAY_BECOME, ROLES, newest_revision
from ops.doctor import Finding, Verdict, good_if

_POSTGRESQL_MIN: Final = (14, 140_000)
_CLOCK_SECONDS_MAX: Final = 1.0
_TIMEOUT_SECONDS: Final = 10.0

# What makes an answered commit survive a crash.
_DURABILITY: Final = ("fsync", "full_page_writes", "synchronous_commit")
_UNSAFE: Final = frozenset({"off"})


async def check_database(settings: Settings) -> AsyncIterator[Finding]:
    """Everything about it, or that it cannot be reached."""
    engine = create_async_engine(
        driver_url(settings.database_url),
        poolclass=NullPool,
        connect_args={"timeout": settings.database_connect_timeout_seconds, "command_timeout": _TIMEOUT_SECONDS},
    )
    try:
        async with engine.connect() as connection:
            async for finding in _check_database(connection, settings):
                yield finding
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        cause = getattr(error, "orig", None) or error
        yield Finding(
            "PostgreSQL", Verdict.WRONG, next(iter(str(cause).splitlines()), type(cause).__name__), "DATABASE_URL"
        )
    finally:
        await engine.dispose()


async def _check_database(connection: AsyncConnection, settings: Settings) -> AsyncIterator[Finding]:
    asked = time.time()
    row = (await connection.execute(text("SELECT extract(epoch FROM clock_timestamp())::float8 AS now"))).one()
    answered = time.time()
    version = await _show(connection, "server_version")
    yield good_if(
        int(await _show(connection, "server_version_num")) >= _POSTGRESQL_MIN[1],
        "PostgreSQL",
        f"{version}, answers in {(answered - asked) * 1000:.1f} ms",
        f"version {_POSTGRESQL_MIN[0]} or newer",
        Verdict.WRONG,
    )
    off_seconds = max(row.now - answered, asked - row.now, 0.0)
    yield good_if(
        off_seconds <= _CLOCK_SECONDS_MAX,
        "clock",
        f"at most {off_seconds:.1f} s off the database's",
        "signed requests may be refused; have both clocks set by NTP",
    )
    found = await connection.scalar(text("SELECT to_regclass('alembic_version') IS NOT NULL"))
    revision = await connection.scalar(text("SELECT version_num FROM alembic_version")) if found else None
    yield good_if(
        revision == newest_revision(),
        "schema",
        f"at revision {revision or 'none'}",
        "payouts migrate",
        Verdict.WRONG,
    )
    if revision == newest_revision():
        restored = await connection.scalar(text("SELECT restored_as()"))
        yield good_if(
            not await awaits_recovery(connection),
            "restore",
            f"restored: {restored}" if restored else "the server was not restored to an earlier moment",
            "nothing is sent before `payouts recover`: deploy/restore.md",
            Verdict.WRONG,
        )
    missing = [role for role in ROLES[1:] if not await _may_become(connection, role)]
    yield good_if(
        not missing,
        "roles",
        f"this login cannot become {', '.join(missing)}" if missing else "this login can become each",
        "each process needs its own role alone; `payouts migrate` creates them, GRANT gives them to a login",
    )
    risky = {name: value for name in _DURABILITY if (value := await _show(connection, name)) in _UNSAFE}
    yield good_if(
        not risky,
        "durability",
        ", ".join(f"{name} {value}" for name, value in risky.items()) or f"{', '.join(_DURABILITY)} hold",
        "an answered 201 may be lost in a crash",
        Verdict.WRONG,
    )
    yield _judge_room(await find_room(connection), settings)


def _judge_room(room: int, settings: Settings) -> Finding:
    """Whether the pools of all processes fit. How many there are only a setting tells."""
    pool, told = settings.database_pool_max, settings.database_processes
    fitting = f"{room}, enough for {room // pool} processes of {pool}"
    if not told:
        return good_if(
            room // pool >= 2,
            "connections",
            fitting,
            "the sum of PAYOUTS_DATABASE_POOL_MAX over all processes must fit max_connections: say PAYOUTS_DATABASE_PROCESSES",
        )
    return good_if(
        told * pool <= room,
        "connections",
        f"{fitting}; {told} processes may take {told * pool}",
        "raise max_connections, or lower PAYOUTS_DATABASE_POOL_MAX or the number of processes",
        Verdict.WRONG,
    )


async def _show(connection: AsyncConnection, name: str) -> str:
    return str(await connection.scalar(text("SELECT current_setting(:name)"), {"name": name}))


async def _may_become(connection: AsyncConnection, role: str) -> bool:
    known = await connection.scalar(text("SELECT count(*) FROM pg_roles WHERE rolname = :role"), {"role": role})
    return bool(known and await connection.scalar(text(MAY_BECOME), {"role": role}))
