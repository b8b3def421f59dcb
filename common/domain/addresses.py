"""Where a callback may go: which addresses are public, and which URLs may be called at all.

URLs are judged by their text alone, without DNS. What a name resolves to is judged when it is about to be called
(`worker.callbacks.guard`), by the same table.
"""

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from yarl import URL

URL_CHARACTERS_MAX: Final = 2048

# An explicit table, because `ipaddress.is_global` lets multicast, NAT64 and relays through and changes with patch releases.
# Sources: IANA's registries of special-purpose addresses (RFC 6890) and of multicast addresses, for both versions.
_FORBIDDEN_V4: Final = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host on this network: RFC 791
        "10.0.0.0/8",  # private: RFC 1918
        "100.64.0.0/10",  # shared behind carrier-grade NAT: RFC 6598
        "127.0.0.0/8",  # loopback: RFC 1122
        "168.63.129.16/32",  # public by number, the host's own services on Azure: "What is IP address 168.63.129.16?"
        "169.254.0.0/16",  # link-local, and the clouds' metadata: RFC 3927
        "172.16.0.0/12",  # private: RFC 1918
        "192.0.0.0/24",  # protocol assignments: RFC 6890
        "192.0.2.0/24",  # documentation: RFC 5737
        "192.31.196.0/24",  # AS112: RFC 7535
        "192.52.193.0/24",  # AMT: RFC 7450
        "192.88.99.0/24",  # 6to4 relays: RFC 7526
        "192.168.0.0/16",  # private: RFC 1918
        "192.175.48.0/24",  # AS112: RFC 7534
        "198.18.0.0/15",  # benchmarking: RFC 2544
        "198.51.100.0/24",  # documentation: RFC 5737
        "203.0.113.0/24",  # documentation: RFC 5737
        "224.0.0.0/4",  # multicast: RFC 5771
        "240.0.0.0/4",  # reserved, and the limited broadcast: RFC 1112, RFC 919
    )
)

# All else of version 6 is local, multicast, a translation of version 4 (NAT64, compatible) or not given out: RFC 4291, 2.4.
_GLOBAL_V6: Final = IPv6Network("2000::/3")
_FORBIDDEN_V6: Final = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo and ORCHID among them: RFC 2928, RFC 4380, RFC 7343
        "2001:db8::/32",  # documentation: RFC 3849
        "2002::/16",  # 6to4, which carries an address of version 4: RFC 3056
        "2620:4f:8000::/48",  # AS112: RFC 7534
        "3fff::/20",  # documentation: RFC 9637
    )
)

# RFC 3986, 3.2, without the user info: a host, bracketed or not, and at most five digits of port. yarl is laxer.
_SHAPE: Final = re.compile(
    r"https?://(?:\[[^\]/?#@]+\]|[^\[\]:/?#@]+)(?::[0-9]{0,5})?(?:[/?#].*)?", re.ASCII | re.IGNORECASE
)
# Spaces of any script, controls (C0, DEL, C1), and the surrogates that UTF-8 cannot carry.
_UNPRINTABLE: Final = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# RFC 1035, 2.3.4, after IDNA; with the underscore that real names have, and the dot that may end a name.
_NAME: Final = re.compile(r"(?=.{1,254}\Z)(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?")
# WHATWG URL, "ends in a number": `inet_aton` would read such a host as an address.
_NUMBER_LAST: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")
_LOCAL_NAME: Final = re.compile(r"(?:.*\.)?localhost\.?")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether the address belongs to somebody on the internet; a version 4 address in a mapped one is judged as itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            return address in _GLOBAL_V6 and not any(address in network for network in _FORBIDDEN_V6)
        address = address.ipv4_mapped
    return not any(address in network for network in _FORBIDDEN_V4)


def parse_callback_url(
    text: object, *, private_allowed: bool, ports: frozenset[int], https_only: bool = False
) -> str | None:
    """The URL as given when a callback may be sent to it, else None. Raises nothing, whatever `text` is.

    It must be an absolute http(s) URL without user info (`https_only`: no http), of at most `URL_CHARACTERS_MAX` characters
    and none of them unprintable, with a port of `ports` (empty: any). A fragment may stand there; HTTP does not send it
    (RFC 9110, 4.2.5).

    Hosts are read as the sender reads them, after IDNA. An address must be public unless `private_allowed`, and must be
    spelled in full and in decimal: the sender refuses all other spellings (`2130706433`, `0x7f.1`, `127.1`, a zone) too.
    `localhost` and the names under it (RFC 6761, 6.3) count as private.
    """
    if not isinstance(text, str) or len(text) > URL_CHARACTERS_MAX:
        return None
    return text if _may_be_called(text, private_allowed, ports, https_only) else None


@lru_cache(maxsize=4096)
def _may_be_called(text: str, private_allowed: bool, ports: frozenset[int], https_only: bool) -> bool:
    """Remembered, since most merchants give the same URL again and again."""
    if _UNPRINTABLE.search(text) or not _SHAPE.fullmatch(text):
        return False
    try:
        url = URL(text)
    except ValueError:
        return False
    if not url.port or (ports and url.port not in ports) or (https_only and url.scheme != "https"):
        return False
    return _host_allowed(url.raw_host or "", private_allowed=private_allowed)


@lru_cache(maxsize=4096)
def origin_of(url: str) -> str:
    """Scheme, host and port of a URL that `parse_callback_url` has let pass, in one spelling (RFC 6454)."""
    return str(URL(url).origin())


def spellings_of(origin: str) -> list[str]:
    """How the URLs of an origin may begin, in lower case: with the port that goes without saying or none, and before IDNA."""
    url = URL(origin)
    host = url.host or ""
    hosts = {url.host_subcomponent or host, f"[{host}]" if ":" in host else host.lower()}
    ports = {f":{url.port}", *(("", ":") if url.is_default_port() else ())}
    return sorted(f"{url.scheme}://{name}{port}" for name in hosts for port in ports)


def _host_allowed(host: str, *, private_allowed: bool) -> bool:
    """Judge a host that went through IDNA."""
    if ":" in host or _NUMBER_LAST.fullmatch(host):
        address = _parse_address(host)
        return address is not None and (private_allowed or is_public(address))
    return _NAME.fullmatch(host) is not None and (private_allowed or not _LOCAL_NAME.fullmatch(host))


def _parse_address(host: str) -> IPv4Address | IPv6Address | None:
    """The address of a host in its canonical spelling, without a zone, else None."""
    try:
        address = IPv6Address(host) if ":" in host else IPv4Address(host)
    except ValueError:
        return None
    return None if "%" in host else address
