"""From a host to a socket: names are resolved without threads to run out of, and every address is judged when it is about
to be called.
"""

import errno
import socket
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, TypeAlias

import aiodns
import pycares
from aiodns.error import ARES_ECONNREFUSED, ARES_ENOMEM
from aiohttp import AddrInfoType, AsyncResolver, SocketFactoryType
from aiohttp.abc import ResolveResult
from prometheus_client import Counter

from common.domain.addresses import is_public

# For the first answer of a server, and how often each server is asked; the second time it has twice as long.
DNS_TIMEOUT_SECONDS: Final = 2.0
DNS_TRIES: Final = 2

# A callback's name is whole: the machine's search domains are not for merchants. EDNS is what c-ares does by itself.
_FLAGS: Final = pycares.ARES_FLAG_NOSEARCH | pycares.ARES_FLAG_EDNS
# What is no answer, and not the lack of one: no server of ours is there, or we cannot even ask.
_NOT_ASKED: Final = frozenset({ARES_ECONNREFUSED, ARES_ENOMEM})

Network: TypeAlias = IPv4Network | IPv6Network

BLOCKED: Final = Counter(
    "payouts_callback_addresses_blocked", "Addresses that a callback was about to call and that may not be called"
)


class AddressBlocked(OSError):
    """The address may not be called.

    The text is the same for all: errors of several addresses stay this one error only while their texts are equal.
    """

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "address not allowed")


class NameServersUnreachable(OSError):
    """None of the DNS servers that this machine asks could be asked; it says nothing of the name."""

    def __init__(self) -> None:
        super().__init__(errno.EHOSTUNREACH, "no DNS server can be reached")


def socket_factory(*, private_allowed: bool, forbidden: Sequence[Network] = ()) -> SocketFactoryType:
    """A factory for `aiohttp.TCPConnector` that makes sockets for public addresses, for all of IP if `private_allowed`; but
    for none of the networks that are `forbidden` besides.

    It is the one place that every connection passes, whether its address came from a literal, from DNS or from a second,
    different answer of DNS. The factory raises: `AddressBlocked`.
    """

    def make_socket(addr_info: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, sockaddr = addr_info
        if not _allowed(str(sockaddr[0]), private_allowed, forbidden):
            BLOCKED.inc()
            raise AddressBlocked
        return socket.socket(family, kind, protocol)

    return make_socket


def _allowed(text: str, private_allowed: bool, forbidden: Sequence[Network]) -> bool:
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return (private_allowed or is_public(address)) and not any(address in network for network in forbidden)


class Resolver(AsyncResolver):
    """DNS by c-ares, and the names of this machine's hosts file. A zone that does not answer delays nobody but those who ask
    for it, and those for some seconds.
    """

    def __init__(
        self,
        nameservers: Sequence[str] | None = None,
        *,
        timeout_seconds: float = DNS_TIMEOUT_SECONDS,
        tries: int = DNS_TRIES,
    ) -> None:
        """`nameservers`: address and port of each, instead of the system's."""
        super().__init__(nameservers=nameservers, timeout=timeout_seconds, tries=tries, flags=_FLAGS)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a name. Raises: `NameServersUnreachable`, OSError when there are none, or nobody says."""
        try:
            return await super().resolve(host, port, family)
        except OSError as error:
            cause = error.__cause__
            if isinstance(cause, aiodns.error.DNSError) and cause.args[0] in _NOT_ASKED:
                raise NameServersUnreachable from error
            raise
