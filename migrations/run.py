"""Applies the schema: roles first, then every numbered migration, under one advisory lock.

The login of the given URL creates the roles and becomes a member of them; everything else is done as, and owned by,
`payouts_owner`. Statements wait for a lock at most `LOCK_TIMEOUT` and run at most `STATEMENT_TIMEOUT`: a migration that
would stop the traffic fails instead.
"""

import asyncio
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from common.db.engine import driver_url

ROLES = ("payouts_owner", "payouts_gateway", "payouts_worker", "payouts_ops", "payouts_readonly", "payouts_sealer")

# Any constant will do, as long as every version of ours uses the same one.
ADVISORY_LOCK = 0x7061796F757473
ADVISORY_LOCK_WAIT_SECONDS = 120
LOCK_TIMEOUT = "5s"
STATEMENT_TIMEOUT = "60s"

# Since PostgreSQL 16 a member need not be allowed to become the role; before, every member was.
MAY_BECOME = """
SELECT pg_has_role(current_user, :role,
                   CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END)
"""
_CREATE_ROLE = """
DO $$ BEGIN
  CREATE ROLE {role} NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END $$
"""
# `CREATE ON DATABASE` lets the owner make the sandbox rail's schema.
_GRANT_OWNER = """
DO $$ BEGIN
  EXECUTE format('GRANT CREATE ON DATABASE %I TO payouts_owner', current_database());
  GRANT USAGE, CREATE ON SCHEMA public TO payouts_owner;
  GRANT USAGE ON SCHEMA public TO payouts_gateway, payouts_worker, payouts_ops, payouts_readonly, payouts_sealer;
END $$
"""


async def upgrade(database_url: str) -> str:
    """Bring the database to the newest schema and return its revision. A second call changes nothing.

    Raises: `sqlalchemy.exc.DBAPIError` when the database is out of reach or refuses, `TimeoutError` when another
    migration holds the lock for longer than `ADVISORY_LOCK_WAIT_SECONDS`.
    """
    engine = create_async_engine(driver_url(database_url), poolclass=NullPool)
    try:
        async with engine.connect() as lock:
            autocommit = await lock.execution_options(isolation_level="AUTOCOMMIT")
            async with asyncio.timeout(ADVISORY_LOCK_WAIT_SECONDS):
                # Another process holds it; there is nothing here to wait on.
                while not await autocommit.scalar(text(f"SELECT pg_try_advisory_lock({ADVISORY_LOCK})")):  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
            async with engine.begin() as connection:
                await connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
                await connection.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}'"))
                await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()
    return newest_revision()


def newest_revision() -> str:
    """The revision this version of the code was written for."""
    return ScriptDirectory.from_config(_config()).get_current_head() or ""


def _upgrade(connection: Connection) -> None:
    for role in ROLES:
        if not connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}):
            connection.execute(text(_CREATE_ROLE.format(role=role)))
        if not connection.scalar(text(MAY_BECOME), {"role": role}):
            connection.execute(text(f"GRANT {role} TO CURRENT_USER"))
    connection.execute(text(_GRANT_OWNER))
    connection.execute(text("SET LOCAL ROLE payouts_owner"))
    if MigrationContext.configure(connection).get_current_revision() == newest_revision():
        return
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return config
