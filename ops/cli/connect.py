"""The way from a command to the database: which one, as whom, with which keys."""

import asyncio
import base64
import os
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, TypeVar

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from common.db.engine import Engine, create_engine
from common.sealing import KEY_BYTES, Keyring
from common.settings import Settings, SettingsInvalid
from ops.apt import NO_INSTALL
from ops.cli.errors import EXPLAINED, LOOK_FIRST, NeverReached, Refused, Unreachable, explain
from ops.state import FOLDER, LOCAL_DEFAULTS, find_demo, find_or_make_keys

OPS: Final = "payouts_ops"
WORKER: Final = "payouts_worker"
SEALER: Final = "payouts_sealer"
READONLY: Final = "payouts_readonly"

_T = TypeVar("_T")


def run_connected(work: Callable[[Engine], Awaitable[_T]], *, role: str = OPS) -> _T:
    """What `work` returns; its sessions act as `role`. Raises: `Refused`, `Unreachable`."""
    return _run(read_settings(), role, work)


def run_changing(work: Callable[[Engine], Awaitable[_T]]) -> _T:
    """What `work` returns, which changes something, as `payouts_ops`. Raises: `Refused`, `Unreachable`."""
    with _unsure_when_unreachable():
        return run_connected(work)


def run_sealing(work: Callable[[Engine, Keyring], Awaitable[_T]]) -> _T:
    """The same, for work that seals secrets. Raises: `Refused`, also without keys; `Unreachable`."""
    settings = _parse_settings(read_environment())
    with _unsure_when_unreachable():
        return _run(settings, OPS, lambda engine: work(engine, settings.keyring))


def run_opening(work: Callable[[Engine, Settings], Awaitable[_T]]) -> _T:
    """What `work` returns, which opens webhook secrets and changes nothing.

    As `payouts_worker`: no other role may read a sealed one, and so whoever is to look needs that role and the keys.
    Raises: `Refused`, also without keys; `Unreachable`.
    """
    settings = _parse_settings(read_environment())
    return _run(settings, WORKER, lambda engine: work(engine, settings))


def run_resealing(work: Callable[[Engine, Keyring], Awaitable[_T]]) -> tuple[_T, frozenset[int]]:
    """What `work` returns, which seals anew what is sealed, and the ids of the master keys that are not the newest.

    As `payouts_sealer`: it reads and exchanges seals, and does nothing else. Raises: `Refused`, also without keys;
    `Unreachable`.
    """
    settings = _parse_settings(read_environment())
    keyring = settings.keyring
    done = _run(settings, SEALER, lambda engine: work(engine, keyring))
    return done, frozenset(settings.master_keys) - {keyring.current_id}


def run_explained(work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns. Raises: `Refused` or `Unreachable`, when the database says no or nothing."""
    try:
        return asyncio.run(work)
    except EXPLAINED as error:
        raise explain(error) from error


def read_settings() -> Settings:
    """The settings of a command that seals and opens nothing. Raises: `Refused`."""
    return _parse_settings(_no_keys() | read_environment())


def read_environment() -> dict[str, str]:
    """The environment; without a `DATABASE_URL`, with database, broker and keys of the stack on this machine.

    Raises: `Refused` when there is neither, or the URL is none.
    """
    environment = {name: value for name, value in os.environ.items() if name != NO_INSTALL}
    if not environment.get("DATABASE_URL"):
        demo = find_demo(FOLDER)
        if demo is None:
            raise Refused("DATABASE_URL is not set, and no stack has run on this machine (`make run` starts one)")
        theirs = {**LOCAL_DEFAULTS, **find_or_make_keys(FOLDER), "AMQP_URL": demo.amqp_url or ""}
        environment = {**theirs, **environment, "DATABASE_URL": demo.database_url}
    try:
        make_url(environment["DATABASE_URL"])
    except (ArgumentError, ValueError) as error:
        raise Refused("DATABASE_URL is not the URL of a database") from error
    return environment


@contextmanager
def _unsure_when_unreachable() -> Iterator[None]:
    """A commit whose answer was lost may have happened; whoever simply repeats it may do it twice."""
    try:
        yield
    except NeverReached:
        raise
    except Unreachable as error:
        raise Unreachable(f"{error.message}; {LOOK_FIRST}") from error


def _no_keys() -> dict[str, str]:
    """For commands that seal and open nothing: who may look at balances need not hold the keys. These are nobody's."""
    master, content = (base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode() for _ in range(2))
    return {"PAYOUTS_MASTER_KEYS": f"1:{master}", "PAYOUTS_CONTENT_KEY": content}


def _parse_settings(environment: dict[str, str]) -> Settings:
    try:
        return Settings.from_environ(environment)
    except SettingsInvalid as error:
        raise Refused(str(error)) from error


def _run(settings: Settings, role: str, work: Callable[[Engine], Awaitable[_T]]) -> _T:
    async def connected() -> _T:
        engine = create_engine(_patient(settings), role=role, application="payouts-cli")
        try:
            return await work(engine)
        finally:
            await engine.dispose()

    return run_explained(connected())


def _patient(settings: Settings) -> Settings:
    """For commands: they outwait a process that stands still in a transaction, whose session PostgreSQL ends in the end."""
    ends_seconds = settings.database_statement_timeout_seconds
    lock_seconds = ends_seconds + settings.database_lock_timeout_seconds
    return replace(
        settings,
        database_lock_timeout_seconds=lock_seconds,
        database_statement_timeout_seconds=lock_seconds + ends_seconds,
    )
