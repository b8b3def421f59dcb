"""What a Debian or Ubuntu does not have, by apt-get: RabbitMQ installed, without a service that runs or will run because of
us; other programs unpacked into a folder of ours.
"""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from ops.servers import ServerFailed

PACKAGE: Final = "rabbitmq-server"
# For `make run` and `make test` alone: no process of the product knows it.
NO_INSTALL: Final = "PAYOUTS_NO_INSTALL"

_DEBIAN: Final = Path("/etc/debian_version")
_LOCK: Final = Path("/run/payouts-apt.lock")
_WANTED: Final = Path("/etc/systemd/system/multi-user.target.wants")
_OUR_UNITS: Final = (f"{PACKAGE}.service", "epmd.service")
# Its packages start services through this file's word. Source: invoke-rc.d(8), deb-systemd-invoke(1p).
_POLICY: Final = Path("/usr/sbin/policy-rc.d")
_EARLIER_POLICY: Final = Path("/usr/sbin/policy-rc.d.before-payouts")
_POLICY_TEXT: Final = f"""\
#!/bin/sh
# While {PACKAGE} is being installed for a private node, neither it nor epmd may start as a service. Removed when that is done.
case "$*" in *{PACKAGE}*|*epmd*) exit 101 ;; esac
if [ -x {_EARLIER_POLICY} ]; then exec {_EARLIER_POLICY} "$@"; fi
exit 0
"""
_LINES_SHOWN: Final = 8


def is_debian() -> bool:
    """Whether packages come by apt-get here."""
    return _DEBIAN.exists() and shutil.which("apt-get") is not None


def may_fetch(environ: Mapping[str, str]) -> bool:
    """Whether packages can be had, and nobody said that we must not."""
    return is_debian() and environ.get(NO_INSTALL, "0") in ("", "0")


def may_install(environ: Mapping[str, str]) -> bool:
    """Whether we can, and nobody said that we must not."""
    return os.geteuid() == 0 and may_fetch(environ)


def fetch(package: str, folder: Path) -> None:
    """Have a package's files in `folder`, which then is there as a whole; nothing is installed, nobody need be root. Blocks.

    Raises: `ServerFailed` with the end of what apt-get said.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as work:
        try:
            _run("apt-get", "-q", "download", package, folder=work)
        except ServerFailed:
            if os.geteuid() != 0:
                raise
            # Nobody has asked yet what packages there are.
            _run("apt-get", "-q", "update")
            _run("apt-get", "-q", "download", package, folder=work)
        (archive,) = Path(work).glob("*.deb")
        unpacked = Path(work, "unpacked")
        _run("dpkg-deb", "--extract", str(archive), str(unpacked))
        if not folder.exists():
            unpacked.replace(folder)


def install() -> None:
    """Install the server as root. Blocks, for a minute or so. Raises: `ServerFailed` with the end of what apt-get said."""
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = {unit for unit in _OUR_UNITS if _is_wanted(unit)}
        with _no_services():
            # A source of somebody else's that is away need not matter: the install will tell.
            with suppress(ServerFailed):
                _run("apt-get", "-q", "update")
            _run("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=120", "install", "--no-install-recommends", PACKAGE)
        if f"{PACKAGE}.service" not in wanted:
            _run("update-rc.d", PACKAGE, "disable")
        for unit in _OUR_UNITS:
            if unit not in wanted and _is_wanted(unit):
                (_WANTED / unit).unlink()


@contextmanager
def _no_services() -> Iterator[None]:
    """Let neither RabbitMQ nor epmd start as a service meanwhile; others ask whom they asked before."""
    if os.path.lexists(_POLICY) and _POLICY.read_text() != _POLICY_TEXT:
        _POLICY.replace(_EARLIER_POLICY)
    _POLICY.write_text(_POLICY_TEXT)
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        if os.path.lexists(_EARLIER_POLICY):
            _EARLIER_POLICY.replace(_POLICY)
        else:
            _POLICY.unlink()


def _is_wanted(unit: str) -> bool:
    """Whether systemd would start it with the machine."""
    return os.path.lexists(_WANTED / unit)


def _run(*command: str, folder: str | None = None) -> None:
    """Out of reach of Ctrl-C: a package that is half installed helps nobody."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        start_new_session=True,
        check=False,
    )
    if done.returncode:
        lines = done.stdout.decode(errors="replace").strip().splitlines()[-_LINES_SHOWN:]
        raise ServerFailed("\n    ".join([f"{' '.join(command)} failed:", *lines]))
