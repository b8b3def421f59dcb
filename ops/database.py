"""Where the stack on this machine has its database: `DATABASE_URL` when it is set, else a cluster of its own."""

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from common.db.engine import driver_url
from migrations.run import upgrade
from ops.postgres import Cluster, PostgresFailed, choose_home
from ops.processes import Say

NAME: Final = "PostgreSQL"
_CONNECT_SECONDS: Final = 5
_WATCH_SECONDS: Final = 0.5


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


class OwnDatabase:
    """The cluster of this checkout. Its calls block, so they run in one thread, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._cluster = Cluster(_find_or_choose_home(folder), folder / "logs" / "postgresql.log")
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def start(self) -> str:
        """Start it and return its URL. Raises: `PostgresFailed`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._cluster.start)

    async def keep(self, say: Say) -> None:
        """Start it again whenever it dies, and say so; for ever."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if self._cluster.process_id is None:
                say(NAME, "died, starts again")
                try:
                    await self.start()
                    say(NAME, "ready again")
                except PostgresFailed as failure:
                    say(NAME, str(failure))

    async def stop(self) -> None:
        """Stop it, after a start that may still be under way."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._cluster.stop)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._cluster.kill()


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
    record = _record(folder)
    return Cluster(Path(record.read_text()), folder / "logs" / "postgresql.log") if record.exists() else None


def _find_or_choose_home(folder: Path) -> Path:
    """Where the cluster is, else where it shall be; recorded, since that may be outside of the folder."""
    record = _record(folder)
    if not record.exists():
        home = choose_home(folder / "postgres")
        # Without a record it is of a folder that was removed by hand, and what opens its secrets went with that.
        _remove(home)
        record.write_text(str(home))
    return Path(record.read_text())


def _record(folder: Path) -> Path:
    return folder / "cluster"


def _remove(home: Path) -> None:
    if home.exists():
        Cluster(home, home / "postgresql.log").stop()
        shutil.rmtree(home)
