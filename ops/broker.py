"""Where the stack on this machine has its broker: `AMQP_URL` when it is set, else a node of its own, else nowhere."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import aio_pika
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import AMQPError
from yarl import URL

from ops import apt
from ops.processes import Say
from ops.rabbitmq import Node, choose_home, end_processes, find_server
from ops.servers import OwnServer, ServerFailed, find_home, find_or_choose_home
from ops.state import CHECKOUT

NAME: Final = "RabbitMQ"
_DEFINITIONS: Final = CHECKOUT / "deploy" / "rabbitmq" / "definitions.json"
_CONNECT_SECONDS: Final = 5.0
_HEARTBEAT_SECONDS: Final = 5

# What connecting may raise: aiormq raises `RuntimeError` when the peer hangs up in the middle of it, `ValueError` for a URL.
CONNECT_ERRORS: Final = (AMQPError, OSError, TimeoutError, RuntimeError, ValueError)


class BrokerUnusable(Exception):
    """What the stack was given does not serve; the text is for the person at the terminal."""


async def connect(url: str) -> AbstractConnection:
    """A connection to this host. Raises: one of `CONNECT_ERRORS`."""
    # It says all this again, on its own; the caller says it.
    logging.getLogger("aiormq").addHandler(logging.NullHandler())
    return await aio_pika.connect(URL(url).update_query(heartbeat=_HEARTBEAT_SECONDS), timeout=_CONNECT_SECONDS)


def name_error(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


async def connect_any(urls: Sequence[str]) -> AbstractConnection:
    """A connection to the first of them that answers. Raises: `BrokerUnusable` when none does."""
    complaints = []
    for url in urls:
        try:
            return await connect(url)
        except CONNECT_ERRORS as error:
            complaints.append(name_error(error))
    raise BrokerUnusable("; ".join(complaints))


async def check_given(urls: Sequence[str], variable: str = "AMQP_URL") -> None:
    """Connect to one of them. Raises: `BrokerUnusable` when none answers."""
    try:
        connection = await connect_any(urls)
    except BrokerUnusable as error:
        raise BrokerUnusable(f"{variable} is set, and cannot be used: {error}") from error
    await connection.close()


def find_or_install(environ: Mapping[str, str], say: Say) -> Path:
    """The folder of a server's scripts: what the machine has, else what root may install on Debian and Ubuntu. Blocks.

    Raises: `ServerFailed`, which says how to have one.
    """
    found = find_server()
    if found is not None:
        return found
    if not apt.may_install(environ):
        raise ServerFailed(f"none on this machine; to have it: {_advice()}")
    say(NAME, f"not here: apt-get installs {apt.PACKAGE} now, without a system service ({apt.NO_INSTALL}=1 forbids it)")
    apt.install()
    installed = find_server()
    if installed is None:
        raise ServerFailed(f"{apt.PACKAGE} is installed, and there is no server that an account here can run")
    return installed


def own_broker(folder: Path, server: Path) -> OwnServer:
    """The node of this checkout, with the limits of production. Blocks for a moment. Raises: `ServerFailed`."""
    home = find_or_choose_home(_record(folder), lambda: choose_home(folder / "rabbitmq"), _remove)
    return OwnServer(NAME, Node(home, _log(folder), server, _policies()))


def stop_leftover(folder: Path) -> list[str]:
    """Stop the node of this checkout if an earlier run left it running; return its name if so. Blocks."""
    home = find_home(_record(folder))
    return [NAME] if home is not None and end_processes(home) else []


def find_own(folder: Path) -> Node | None:
    """The node of this checkout, if it has one; whether it runs or not."""
    home, server = find_home(_record(folder)), find_server()
    return None if home is None or server is None else Node(home, _log(folder), server)


def remove_own(folder: Path) -> None:
    """Stop the node of this checkout, if there is one, and remove it with all its data. Blocks."""
    home = find_home(_record(folder))
    if home is not None:
        _remove(home)


def _policies() -> str:
    """The policies of `deploy/rabbitmq`, for the virtual host that a node of our own has."""
    definitions = json.loads(_DEFINITIONS.read_text())
    return json.dumps({"policies": [{**policy, "vhost": "/"} for policy in definitions["policies"]]})


def _record(folder: Path) -> Path:
    return folder / "node"


def _log(folder: Path) -> Path:
    return folder / "logs" / "rabbitmq.log"


def _remove(home: Path) -> None:
    if home.exists():
        end_processes(home)
        shutil.rmtree(home)


def _advice() -> str:
    if apt.is_debian():
        return f"{'' if os.geteuid() == 0 else 'sudo '}apt-get install --no-install-recommends {apt.PACKAGE}"
    if sys.platform == "darwin":
        return "brew install rabbitmq"
    return "install rabbitmq-server (conda-forge has one), or set AMQP_URL"
