"""Where the stack on this machine has its database: `DATABASE_URL` when it is set, else a cluster of its own."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from common.db.engine import driver_url
from migrations.run import upgrade
from ops.postgres import Cluster, choose_home
from ops.servers import OwnServer, find_home, find_or_choose_home

NAME: Final = "PostgreSQL"
_CONNECT_SECONDS: Final = 5


class DatabaseUnusable(Exception):
    """What the stack was given does not serve; the text is for the person at the terminal."""


async def migrate(database_url: str) -> str:
    """Bring the schema up to date and return its revision. Raises: `DatabaseUnusable`."""
    try:
        return await upgrade(database_url)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        raise DatabaseUnusable(f"the schema cannot be brought up to date: {_cause(error)}") from error


async def check_given(database_url: str) -> None:
    """Connect once. Raises: `DatabaseUnusable`."""
    try:
        engine = create_async_engine(
            driver_url(database_url), poolclass=NullPool, connect_args={"timeout": _CONNECT_SECONDS}
        )
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        cause = getattr(error, "orig", None) or error
        raise DatabaseUnusable(f"DATABASE_URL is set, and cannot be used: {type(cause).__name__}: {cause}") from error


def _cause(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {cause}"


def own_database(folder: Path) -> OwnServer:
    """The server of this checkout. Blocks for a moment. Raises: `ServerFailed`."""
    return OwnServer(NAME, own_cluster(folder))


def own_cluster(folder: Path, settings: Mapping[str, str] = MappingProxyType({})) -> Cluster:
    """The cluster of this checkout, with more settings of PostgreSQL's own. Blocks for a moment. Raises: `ServerFailed`."""
    home = find_or_choose_home(_record(folder), lambda: choose_home(folder / "postgres"), _remove)
    return Cluster(home, _log(folder), settings=settings)


def stop_leftover(folder: Path) -> list[str]:
    """Stop the cluster of this checkout if an earlier run left it running; return its name if so. Blocks."""
    cluster = _find_cluster(folder)
    return [NAME] if cluster is not None and cluster.stop_leftover() else []


def remove_own(folder: Path) -> None:
    """Stop the cluster of this checkout, if there is one, and remove it with all its data. Blocks."""
    cluster = _find_cluster(folder)
    if cluster is not None:
        _remove(cluster.home)


def _find_cluster(folder: Path) -> Cluster | None:
    home = find_home(_record(folder))
    return Cluster(home, _log(folder)) if home is not None else None


def _record(folder: Path) -> Path:
    return folder / "cluster"


def _log(folder: Path) -> Path:
    return folder / "logs" / "postgresql.log"


def _remove(home: Path) -> None:
    if home.exists():
        Cluster(home, home / "postgresql.log").stop()
        shutil.rmtree(home)
