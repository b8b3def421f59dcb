"""From a host to a socket: names are resolved in threads of our own, and every address is judged when it is about to be
called.
"""

import asyncio
import errno
import socket
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Final

from aiohttp import AddrInfoType, SocketFactoryType
from aiohttp.abc import AbstractResolver, ResolveResult

from common.domain.addresses import is_public

# One dead zone occupies one thread, for as long as the system's resolver tries.
_LOOKUPS_MAX: Final = 64


class AddressBlocked(OSError):
    """The address may not be called.

    The text is the same for all: errors of several addresses stay this one error only while their texts are equal.
    """

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "address not allowed")


def socket_factory(*, private_allowed: bool) -> SocketFactoryType:
    """A factory for `aiohttp.TCPConnector` that makes sockets for public addresses, for all of IP if `private_allowed`.

    It is the one place that every connection passes, whether its address came from a literal, from DNS or from a second,
    different answer of DNS. The factory raises: `AddressBlocked`.
    """

    def make_socket(addr_info: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, sockaddr = addr_info
        if not _allowed(str(sockaddr[0]), private_allowed=private_allowed):
            raise AddressBlocked
        return socket.socket(family, kind, protocol)

    return make_socket


def _allowed(address: str, *, private_allowed: bool) -> bool:
    try:
        return is_public(ip_address(address)) or private_allowed
    except ValueError:
        return False


class ThreadsResolver(AbstractResolver):
    """The system's resolver in threads of its own, so that names that do not answer delay neither each other nor anything else.

    aiohttp's resolver shares the event loop's: min(32, cores + 4) threads with asyncio, and with uvloop two of libuv's.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_LOOKUPS_MAX, thread_name_prefix="callback-dns")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a name. Raises: OSError, or UnicodeError for what cannot be a name."""
        infos = await asyncio.get_running_loop().run_in_executor(
            self._threads, socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG
        )
        return [
            ResolveResult(hostname=host, host=str(sockaddr[0]), port=port, family=found, proto=protocol, flags=0)
            for found, _, protocol, _, sockaddr in infos
        ]

    async def close(self) -> None:
        """Forget the lookups that wait; those under way end in their threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
