"""What the servers of ours have in common: a folder that is made here and found again, a thread of their own, a watch."""

import asyncio
import hashlib
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from ops.account import Account
from ops.processes import Say

_WATCH_SECONDS: Final = 0.5
# RabbitMQ takes these for patterns. Source: RabbitMQ, "File and Directory Locations".
_PATTERNS: Final = re.compile(r"[*?\[\]{}^!]")


class ServerFailed(Exception):
    """There is no such server, or it does not do what it must; the text is meant for the person at the terminal."""


class Server(Protocol):
    """A server of ours. Its calls block and raise `ServerFailed`; for one thread."""

    @property
    def process_id(self) -> int | None:
        """The running server's, else None."""

    def start(self) -> str:
        """Stop what an earlier run left behind, start, and return its URL, the same at every start."""

    def stop(self) -> None:
        """Stop it, whoever started it."""

    def kill(self) -> None:
        """Kill it as a crash would."""


class OwnServer:
    """A server of this checkout. Its calls block, so they run in one thread, one after the other."""

    def __init__(self, name: str, server: Server) -> None:
        self.name = name
        self._server = server
        self._thread = ThreadPoolExecutor(max_workers=1)

    @property
    def process_id(self) -> int | None:
        """The running server's, else None."""
        return self._server.process_id

    async def start(self) -> str:
        """Start it and return its URL. Raises: `ServerFailed`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._server.start)

    async def keep(self, say: Say) -> None:
        """Start it again whenever it dies, and say so; for ever."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if self._server.process_id is None:
                say(self.name, "died, starts again")
                try:
                    await self.start()
                    say(self.name, "ready again")
                except ServerFailed as failure:
                    say(self.name, str(failure))

    async def stop(self) -> None:
        """Stop it, after a start that may still be under way."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._server.stop)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._server.kill()


def choose_home(wanted: Path, account: Account) -> Path:
    """The folder for a server: the wanted one, or one named after it where every account gets to.

    The parent of the wanted folder must exist. Nothing is made.
    """
    if not _PATTERNS.search(str(wanted)) and account.reaches(wanted.parent):
        return wanted
    # A predictable name is safe: `make_home` refuses a folder that is not ours alone.
    return Path("/var/tmp", f"payouts-{hashlib.sha256(os.fsencode(wanted)).hexdigest()[:12]}")  # noqa: S108


def make_home(home: Path, account: Account) -> None:
    """Make the folder if need be: ours, and others may only pass through it.

    Raises: `ServerFailed` when it is somebody else's, or the account does not get there.
    """
    with suppress(FileExistsError):
        home.mkdir()
        home.chmod(0o711)
    status = home.lstat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o711:
        raise ServerFailed(f"{home} is not the folder that was made here; remove it, or have it removed")
    if not account.reaches(home):
        raise ServerFailed(f"the account that a server runs as cannot get into {home}")


def find_home(record: Path) -> Path | None:
    """Where an earlier run made the server's folder, since that may be outside of the checkout."""
    return Path(record.read_text()) if record.exists() else None


def find_or_choose_home(record: Path, choose: Callable[[], Path], remove: Callable[[Path], None]) -> Path:
    """Where the server's folder is, else where it shall be; remembered."""
    home = find_home(record)
    if home is None:
        home = choose()
        # Without a record it is of a checkout that was removed by hand, and what opens its secrets went with that.
        remove(home)
        record.write_text(str(home))
    return home
