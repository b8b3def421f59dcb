"""Locks that a test holds, and processes that wait for them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg

from common.db.engine import Engine
from tests.stack import eventually

Superuser: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@asynccontextmanager
async def locked(owner: Engine, statement: str, *values: Any) -> AsyncIterator[None]:
    """Hold what the statement locks for the length of the context."""
    connection = await asyncpg.connect(owner.url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        async with connection.transaction():
            await connection.execute("SET LOCAL ROLE payouts_owner")
            await connection.execute(statement, *values)
            yield
    finally:
        await connection.close()


async def until_waiting(superuser: Superuser, application: str, table: str) -> None:
    """Return once a statement of `payouts-{application}` on a table waits for a lock."""

    async def waiting() -> bool:
        found: bool = await superuser.fetchval(
            """
            SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
               AND application_name = $1 AND wait_event_type = 'Lock' AND query LIKE '%' || $2 || '%')
            """,
            f"payouts-{application}",
            table,
        )
        return found

    await eventually(waiting, f"{application} waits for {table}")
