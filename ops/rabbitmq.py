"""RabbitMQ of our own, from a server that the machine has: one private node, made once, started, stopped, hurt by tests.

Private means: its own folder, account, cookie, ports and epmd, all on loopback, so that it meets no other node. What belongs
to it is known by a variable in its environment, which epmd and whatever else it starts inherit.
"""

import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

import psutil

from ops.account import Account, find_account
from ops.ports import LOOPBACK, choose_port
from ops.servers import ServerFailed, make_home
from ops.servers import choose_home as choose_home_of

_LOGIN: Final = "payouts"
_SERVER: Final = "rabbitmq-server"
_CONTROL: Final = "rabbitmqctl"
# Debian's own scripts (those of /usr/sbin want to be root or rabbitmq), then Homebrew's.
_FOLDERS: Final = (
    "/usr/lib/rabbitmq/bin",
    "/opt/homebrew/opt/rabbitmq/sbin",
    "/usr/local/opt/rabbitmq/sbin",
    "/home/linuxbrew/.linuxbrew/opt/rabbitmq/sbin",
)

_START_SECONDS: Final = 90.0
_STOP_SECONDS: Final = 20.0
_KILL_SECONDS: Final = 5.0
_CONTROL_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.05

_MARK: Final = "RABBITMQ_MNESIA_BASE"
_EPMD: Final = "epmd"
_PROTOCOL_HEADER: Final = b"AMQP\0\0\x09\x01"
_METHOD_FRAME: Final = b"\x01"
_PORT_TAKEN: Final = b"eaddrinuse"

# Queues are as durable as anywhere. Small: a log of 512 MiB before the first compaction is not for one machine's work.
_CONFIGURATION: Final = """\
listeners.tcp.default = {host}:{port}
default_user = {login}
default_pass = {password}
disk_free_limit.absolute = 50MB
vm_memory_high_watermark.absolute = 512MB
raft.wal_max_size_bytes = 67108864
"""


def find_server() -> Path | None:
    """The folder of an installed server's scripts that its account can run: Debian's, Homebrew's, conda's, or of PATH."""
    account = _account()
    on_path = shutil.which(_SERVER)
    conda = os.environ.get("CONDA_PREFIX")
    folders = [
        *map(Path, _FOLDERS),
        *([Path(conda, "bin"), Path(conda, "sbin")] if conda else []),
        *([Path(on_path).parent] if on_path else []),
    ]
    return next((folder for folder in folders if _is_server(folder, account)), None)


def choose_home(wanted: Path) -> Path:
    """The folder for a node: the wanted one, or one that the node's account gets to. Raises: `ServerFailed`."""
    return choose_home_of(wanted, _account())


class Node:
    """One node in `home`, a folder that is made here, by the scripts in `server`. Blocks; for one thread.

    Only the data in it belong to the node's account, so that root never writes where somebody else may.
    `definitions`, if any, are imported at each start, as RabbitMQ exports them.
    """

    def __init__(self, home: Path, log: Path, server: Path, definitions: str = "") -> None:
        self.home = home
        self._definitions = definitions
        self._log = log
        self._server = server
        self._account = _account()
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: _Ports | None = None

    def start(self) -> str:
        """Make the node if there is none, end what an earlier run left behind, start; return the broker's URL.

        The password, and the ports as long as they are free, are the same at every start.
        Raises: `ServerFailed` with the end of the node's log.
        """
        make_home(self.home, self._account)
        self.stop_leftover()
        self.kill()
        if not self._data.exists():
            self._make_data()
        while not self._try_to_start(is_told=self._ports is not None):
            self._ports = None
        if self._definitions:
            self.ctl("import_definitions", text=self._definitions)
        return self.url

    @property
    def url(self) -> str:
        """The broker's URL, of its default virtual host."""
        return f"amqp://{_LOGIN}:{self._password()}@{LOOPBACK}:{self._known_ports().amqp}/"

    @property
    def process_id(self) -> int | None:
        """The running node's, else None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def stop(self) -> None:
        """Let it write everything down and end; harder when that takes too long. Nothing of it is left, epmd included."""
        self.resume()
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        self.kill()
        self.stop_leftover()

    def stop_leftover(self) -> bool:
        """End everything that is of this node, whoever started it. Returns whether there was something."""
        return end_processes(self.home)

    def kill(self) -> None:
        """Kill it as a crash would; `start` recovers."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it fall silent, with all its connections open, until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def stop_app(self) -> None:
        """Stop the broker in orderly fashion, and leave its virtual machine running."""
        self.ctl("stop_app")

    def start_app(self) -> None:
        """Start the broker again after `stop_app`, and wait until it speaks."""
        self.ctl("start_app")

    def wipe(self) -> None:
        """Stop it and forget every queue, message and user; the URL stays the same."""
        self.stop()
        shutil.rmtree(self._data)

    def ctl(self, *arguments: str, text: str = "") -> str:
        """What `rabbitmqctl` prints when it reads this text. Raises: `ServerFailed` with its complaint."""
        try:
            done: subprocess.CompletedProcess[bytes] = subprocess.run(
                [str(self._server / _CONTROL), "--quiet", *arguments],
                input=text.encode(),
                capture_output=True,
                cwd=self._data,
                env=self.environment,
                timeout=_CONTROL_SECONDS,
                check=False,
                **self._account.popen_arguments(),
            )
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"{_CONTROL} {arguments[0]} takes more than {_CONTROL_SECONDS:g} s") from None
        if done.returncode:
            raise ServerFailed(f"{_CONTROL} {arguments[0]} failed:\n{done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode()

    @property
    def environment(self) -> dict[str, str]:
        """What the scripts of RabbitMQ need in order to mean this node. Nothing of ours but PATH, where Erlang is.

        Source: RabbitMQ, "File and Directory Locations" and "Configuration"; Erlang, `epmd`.
        """
        ports, local_only = self._known_ports(), "-kernel inet_dist_use_interface {127,0,0,1}"
        return {
            "PATH": f"{self._server}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "LC_ALL": "C.UTF-8",
            "HOME": str(self._data),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_EPMD_PORT": str(ports.epmd),
            "RABBITMQ_NODENAME": f"payouts-{hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": LOOPBACK,
            "RABBITMQ_NODE_PORT": str(ports.amqp),
            "RABBITMQ_DIST_PORT": str(ports.distribution),
            _MARK: _mark(self.home),
            "RABBITMQ_LOG_BASE": str(self._data / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(self._data / "node.pid"),
            "RABBITMQ_CONFIG_FILE": str(self._configuration / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(self._configuration / "none"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self._configuration / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(self._configuration / "environment"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._configuration / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"+S 1:1 {local_only}",
            "RABBITMQ_CTL_ERL_ARGS": local_only,
        }

    @property
    def _data(self) -> Path:
        return self.home / "data"

    @property
    def _configuration(self) -> Path:
        return self.home / "configuration"

    def _make_data(self) -> None:
        """The account's own folder, with a cookie: Erlang's would be easy to guess. It gets its name last."""
        unfinished = self.home / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        cookie = unfinished / ".erlang.cookie"
        cookie.touch(mode=0o600)
        cookie.write_text(secrets.token_urlsafe(32))
        cookie.chmod(0o400)
        self._account.give(cookie)
        self._account.give(unfinished)
        unfinished.rename(self._data)

    def _write_configuration(self) -> None:
        """Files that the account reads and only we write; the environment names each, or those of the system would count."""
        shutil.rmtree(self._configuration, ignore_errors=True)
        (self._configuration / "none").mkdir(parents=True, mode=0o755)
        configuration = _CONFIGURATION.format(
            host=LOOPBACK, port=self._known_ports().amqp, login=_LOGIN, password=self._password()
        )
        for name, text in (
            ("rabbitmq.conf", configuration),
            ("advanced.config", "[].\n"),
            ("environment", ""),
            ("plugins", "[].\n"),
        ):
            path = self._configuration / name
            path.touch(mode=0o400)
            path.chmod(0o600)
            path.write_text(text)
            self._account.give(path)

    def _password(self) -> str:
        path = self.home / "password"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_urlsafe(24))
        return path.read_text()

    def _choose_ports(self) -> "_Ports":
        """Those of the last start, unless somebody has taken one since; else free ones."""
        last = self._last_ports()
        ports = _Ports(*(choose_port(port) for port in (astuple(last) if last else [None] * 3)))
        while len(set(astuple(ports))) < 3:
            ports = _Ports(*(choose_port() for _ in range(3)))
        self._memory.write_text(" ".join(map(str, astuple(ports))))
        return ports

    def _last_ports(self) -> "_Ports | None":
        return _Ports(*map(int, self._memory.read_text().split())) if self._memory.exists() else None

    def _known_ports(self) -> "_Ports":
        """Those it runs on, also when another process started it."""
        ports = self._ports or self._last_ports()
        if ports is None:
            raise ServerFailed("the node was never started")
        return ports

    @property
    def _memory(self) -> Path:
        return self.home / "ports"

    def _try_to_start(self, *, is_told: bool) -> bool:
        """Start, and return whether it runs. Not: somebody was quicker to take one of the ports; unless they are told, try
        others. Raises: `ServerFailed`.
        """
        self._ports = self._ports or self._choose_ports()
        self._write_configuration()
        said_before = self._log.stat().st_size if self._log.exists() else 0
        self._process = self._spawn()
        try:
            self._wait_until_ready(self._process)
        except ServerFailed:
            if is_told or _PORT_TAKEN not in self._log.read_bytes()[said_before:]:
                raise
            return False
        return True

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [str(self._server / _SERVER)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._data,
                env=self.environment,
                start_new_session=True,
                **self._account.popen_arguments(),
            )

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not _speaks(self._known_ports().amqp):
            if process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ServerFailed(f"RabbitMQ does not start:\n{_tail(self._log)}")
            time.sleep(_POLL_SECONDS)

    def _signal(self, number: signal.Signals) -> None:
        """To the script and the virtual machine it runs, which are one group; the script outlives no death of the other."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


@dataclass(frozen=True, slots=True)
class _Ports:
    amqp: int
    distribution: int
    epmd: int


def end_processes(home: Path) -> bool:
    """End everything that is of the node of this folder. Returns whether there was something. Raises: `ServerFailed`."""
    found = _find_processes(home)
    _end([process for process in found if process.info["name"] != _EPMD], signal.SIGTERM, _STOP_SECONDS)
    # epmd has nothing to write down, what remains had its time, and either may have started something meanwhile.
    stubborn = _end(_find_processes(home), signal.SIGKILL, _KILL_SECONDS)
    if stubborn:
        raise ServerFailed(f"RabbitMQ (process {stubborn[0].pid}) does not stop")
    return bool(found)


def _find_processes(home: Path) -> list[psutil.Process]:
    mark = _mark(home)
    everything = psutil.process_iter(["name", "environ"])
    return [process for process in everything if (process.info["environ"] or {}).get(_MARK) == mark]


def _end(processes: Sequence[psutil.Process], wish: signal.Signals, seconds: float) -> list[psutil.Process]:
    """Signal them, paused or not, and wait. Returns those that still run."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(wish)
            process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + seconds
    while (running := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return running


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended; one that nobody has reaped yet has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _mark(home: Path) -> str:
    return str(home / "data" / "mnesia")


def _is_server(folder: Path, account: Account) -> bool:
    scripts = [str(folder / _SERVER), str(folder / _CONTROL)]
    return account.can_run(["/bin/sh", "-c", 'test -x "$1" && test -x "$2"', "sh", *scripts])


def _speaks(port: int) -> bool:
    """Whether a broker answers there; that the port is open comes too early."""
    with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1) as probe:
        probe.sendall(_PROTOCOL_HEADER)
        return probe.recv(1) == _METHOD_FRAME
    return False


def _account() -> Account:
    account = find_account("rabbitmq", "_rabbitmq")
    if account is None:
        raise ServerFailed("RabbitMQ shall not run as root, and there is no account such as rabbitmq or nobody")
    return account


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"
