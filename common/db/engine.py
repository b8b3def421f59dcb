"""The way into PostgreSQL: connections with their limits, transactions with a bounded repeat, errors translated once."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import uniform
from typing import Any, Final, TypeVar
from urllib.parse import urlencode

from asyncpg.exceptions import TargetServerAttributeNotMatched
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from common.errors import AccountBusy, DatabaseSlow, DatabaseUnavailable
from common.process import end_tasks
from common.settings import Settings

Tx = AsyncConnection
Engine = AsyncEngine
_T = TypeVar("_T")

# PostgreSQL, appendix A. Repeated as a whole: the transaction did not happen.
_REPEATABLE: Final = frozenset({"40001", "40P01"})
_LOCK_NOT_AVAILABLE: Final = "55P03"
# Connection exceptions, a server out of resources (disk, memory, connections), shutdown and crash recovery, a disk that fails;
# then a server that only reads, as a standby does.
_UNAVAILABLE_CLASSES: Final = ("08", "53", "57", "58")
_READ_ONLY: Final = "25006"
_STATEMENT_TIMED_OUT: Final = "57014"

# Everything these do goes by index; without statistics the planner may think otherwise.
_BY_INDEX_ONLY: Final = frozenset({"payouts_gateway", "payouts_worker", "payouts_sealer"})
# Their statements take arrays and probe an index for each element, so that one plan does whatever is in the arrays and in the
# tables: to plan them anew each time costs as much as to carry them out.
_BY_INDEX: Final = {"enable_seqscan": "off", "plan_cache_mode": "force_generic_plan"}
# A generic plan made while a table was small would stay until somebody analyses it.
_PLANNED_EACH_TIME: Final = {"plan_cache_mode": "force_custom_plan"}
_READER: Final = "payouts_readonly"

# How much longer than the server ourselves wait for a statement: for a server that no longer answers at all.
_CLIENT_PATIENCE_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 2.0
# Between two tries of a transaction, at random up to this; more from try to try.
_FIRST_PAUSE_SECONDS: Final = 0.02

ATTEMPTS_MAX: Final = 5
# Where somebody waits for an answer that asking again later would give as well.
READ_ATTEMPTS_MAX: Final = 2


def driver_url(database_url: str) -> str:
    """The URL as SQLAlchemy wants it, whatever PostgreSQL scheme it came with.

    SQLAlchemy makes each parameter an argument of asyncpg, which knows `sslmode` and those that go with it in a DSN alone.
    """
    url = make_url(database_url).set(drivername="postgresql+asyncpg")
    of_tls = [name for name in url.query if name.startswith("ssl") and name != "ssl"]
    if of_tls:
        dsn = f"postgresql://?{urlencode([(name, url.query[name]) for name in of_tls], doseq=True)}"
        url = url.difference_update_query(of_tls).update_query_dict({"dsn": dsn})
    return url.render_as_string(hide_password=False)


def create_engine(settings: Settings, *, role: str, application: str, pool_max: int = 2) -> Engine:
    """A pool whose sessions act as `role`, with time-outs on everything that can wait. Connects on first use."""
    milliseconds = {
        "lock_timeout": settings.database_lock_timeout_seconds,
        "statement_timeout": settings.database_statement_timeout_seconds,
        "idle_in_transaction_session_timeout": settings.database_statement_timeout_seconds,
    }
    return create_async_engine(
        driver_url(settings.database_url),
        pool_size=pool_max,
        max_overflow=0,
        hide_parameters=True,
        pool_timeout=settings.database_connect_timeout_seconds,
        connect_args={
            "timeout": settings.database_connect_timeout_seconds,
            "command_timeout": settings.database_statement_timeout_seconds + _CLIENT_PATIENCE_SECONDS,
            # Where the address moves to another server: never to one that only reads, unless that is all we do.
            "target_session_attrs": "any" if role == _READER else "primary",
            "server_settings": {
                "role": role,
                "application_name": application,
                "search_path": "public",
                "timezone": "UTC",
                "jit": "off",
                **(_BY_INDEX if role in _BY_INDEX_ONLY else _PLANNED_EACH_TIME),
                **{name: str(int(seconds * 1000)) for name, seconds in milliseconds.items()},
            },
        },
    )


async def close_engine(engine: Engine) -> None:
    """Close a pool, but not for long: a server that has fallen silent answers no good-bye."""
    await end_tasks([asyncio.create_task(engine.dispose())], _CLOSE_SECONDS)


async def in_transaction(engine: Engine, work: Callable[[Tx], Awaitable[_T]], attempts_max: int = ATTEMPTS_MAX) -> _T:
    """Commit what `work` returns, roll back what it raises. READ COMMITTED.

    Repeat: the whole of `work`, with jitter, after a serialization failure, a deadlock or a lost
    connection, at most `attempts_max` times. A connection lost during COMMIT leaves the outcome unknown, so `work` must be
    written for that: a row under its lock tells whether the first time counted.
    Raises: `DatabaseUnavailable`, `DatabaseSlow`, `AccountBusy` when a lock was not to be had, and what `work` raises.
    """
    try:
        # Nearly always this is all; to prepare for repeating it would cost a fifth of a short transaction.
        return await _try(engine, work)
    except Exception as error:
        if attempts_max == 1 or not _worth_repeating(error):
            raise
    await asyncio.sleep(uniform(0, _FIRST_PAUSE_SECONDS))  # noqa: S311 no secret
    async for attempt in AsyncRetrying(
        stop=stop_after_attempt(attempts_max - 1),
        wait=wait_random_exponential(multiplier=_FIRST_PAUSE_SECONDS, max=0.5),
        retry=retry_if_exception(_worth_repeating),
        reraise=True,
    ):
        with attempt:
            return await _try(engine, work)
    raise AssertionError("unreachable: the loop returns or raises")


async def _try(engine: Engine, work: Callable[[Tx], Awaitable[_T]]) -> _T:
    try:
        async with engine.begin() as tx:
            return await work(tx)
    except (DBAPIError, PoolTimeout, OSError, TimeoutError) as error:
        raise _translate(error) from error


def each_alone(engine: Engine) -> Engine:
    """The same pool, where each statement is a transaction of its own, in one round trip.

    Only for work that is one statement: `in_transaction` has nothing to roll back there.
    """
    return engine.execution_options(isolation_level="AUTOCOMMIT")


async def find_room(tx: Tx) -> int:
    """How many connections all our processes may have together: what is reserved for superusers is left out."""
    row = await tx.execute(
        text(
            "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
            # Since PostgreSQL 16.
            " - coalesce(current_setting('reserved_connections', true), '0')::int AS room"
        )
    )
    return int(row.scalar_one())


def arrays_of(rows: Sequence[Any], kind: type[Any]) -> dict[str, list[Any]]:
    """The rows of one dataclass as one array per field: the parameters of a statement that reads them with `unnest`."""
    return {name: [getattr(row, name) for row in rows] for name in kind.__dataclass_fields__}


def sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE of a database error, or None when there is none."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state if isinstance(state, str) else None


def constraint_name(error: BaseException) -> str | None:
    """The name of the constraint that refused a write, or None when it was none."""
    name = getattr(_cause(error), "constraint_name", None)
    return name if isinstance(name, str) else None


def _cause(error: BaseException) -> BaseException | None:
    """The driver's own error behind one of SQLAlchemy's."""
    return getattr(getattr(error, "orig", None), "__cause__", None)


def _worth_repeating(error: BaseException) -> bool:
    return sqlstate(error) in _REPEATABLE or isinstance(error, DatabaseUnavailable)


def _translate(error: Exception) -> Exception:
    state = sqlstate(error)
    if state == _LOCK_NOT_AVAILABLE:
        return AccountBusy()
    if isinstance(error, PoolTimeout | TimeoutError) or state == _STATEMENT_TIMED_OUT:
        return DatabaseSlow()
    if not isinstance(error, DBAPIError) or error.connection_invalidated or isinstance(error, InterfaceError):
        return DatabaseUnavailable()
    if isinstance(_cause(error), TargetServerAttributeNotMatched):
        return DatabaseUnavailable()
    if state is not None and (state.startswith(_UNAVAILABLE_CLASSES) or state == _READ_ONLY):
        return DatabaseUnavailable()
    return error
