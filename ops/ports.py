"""Free ports on loopback."""

import errno
import random
import socket
from typing import Final

LOOPBACK: Final = "127.0.0.1"

# Below what Linux and macOS give to outgoing connections, so that none of ours is taken before its server starts.
_PORTS: Final = range(20_000, 30_000)


def loopback_url(port: int) -> str:
    """The URL of a server of ours."""
    return f"http://{LOOPBACK}:{port}"


def find_obstacle(host: str, port: int) -> str | None:
    """Why no server could listen there now, or None. Asks without SO_REUSEPORT: that would share with whoever is there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return "taken by another program" if error.errno == errno.EADDRINUSE else error.strerror
    return None


def choose_port(wanted: int | None = None) -> int:
    """The wanted port if it is free, else a random free one; random, so that two that choose at once differ."""
    if wanted is not None and find_obstacle(LOOPBACK, wanted) is None:
        return wanted
    return next(port for port in random.sample(_PORTS, len(_PORTS)) if find_obstacle(LOOPBACK, port) is None)
