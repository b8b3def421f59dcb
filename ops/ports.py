"""Free ports on loopback."""

import errno
import random
import socket
from collections import deque
from typing import Final

LOOPBACK: Final = "127.0.0.1"

# Below what Linux and macOS give to outgoing connections, so that none of ours is taken before its server starts.
_PORTS: Final = range(20_000, 30_000)
_kept: Final = deque[int](maxlen=100)


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
    """The wanted port if it is free, else a random free one that was neither chosen nor kept just before.

    Who chose that one may not listen yet. If two got it, one would die, and the other would answer for its health.
    """
    if wanted is None or find_obstacle(LOOPBACK, wanted) is not None:
        candidates = random.sample(_PORTS, len(_PORTS))
        wanted = next(port for port in candidates if port not in _kept and find_obstacle(LOOPBACK, port) is None)
    keep_port(wanted)
    return wanted


def keep_port(port: int) -> None:
    """Have nobody choose a port that somebody will listen on."""
    _kept.append(port)
