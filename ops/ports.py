"""Free ports on loopback."""

import random
import socket
from typing import Final

LOOPBACK: Final = "127.0.0.1"

# Below what Linux and macOS give to outgoing connections, so that none of ours is taken before its server starts.
_PORTS: Final = range(20_000, 30_000)


def loopback_url(port: int) -> str:
    """The URL of a server of ours."""
    return f"http://{LOOPBACK}:{port}"


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. Asks without SO_REUSEPORT: that would share with whoever is there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def choose_port(wanted: int | None = None) -> int:
    """The wanted port if it is free, else a random free one; random, so that two that choose at once differ."""
    if wanted is not None and is_free(LOOPBACK, wanted):
        return wanted
    return next(port for port in random.sample(_PORTS, len(_PORTS)) if is_free(LOOPBACK, port))
