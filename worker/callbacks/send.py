"""One callback attempt on the wire: its headers, one POST, and what came of it. No database, no schedule, no wall clock."""

import asyncio
import errno
import re
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Final, cast
from weakref import WeakSet

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

from common.deadlines import TimeLimit
from common.domain.addresses import parse_callback_url
from common.domain.signing import sign_body, sign_webhook
from common.log import LogEvent, get_logger
from worker.callbacks.guard import AddressBlocked, NameServersUnreachable, Network, Resolver, socket_factory
from worker.connections import BoundedConnector

EXCERPT_BYTES_MAX: Final = 4096

_EXCERPT_SECONDS: Final = 1.0
_CONNECT_SECONDS: Final = 5.0
# The whole is bounded by the caller's deadline, with one timer instead of two.
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
_KEEPALIVE_SECONDS: Final = 4.0  # Shorter than most servers', so that we close first.
_DNS_CACHE_SECONDS: Final = 30
_DNS_CACHE_NAMES_MAX: Final = 10_000
_HEADER_BYTES_MAX: Final = 16_384
_HEADERS_MAX: Final = 128

# The verdict by the hundreds of the status; what is in no row is no final answer of HTTP.
_STATUS_ERRORS: Final[dict[int, str | None]] = {2: None, 3: "redirect", 4: "http_4xx", 5: "http_5xx"}
_STATUS_ERROR_UNKNOWN: Final = "response_invalid"

# The verdict when there is no status; the first row counts that the error, or the `OSError` it wraps, is an instance of.
_ERRORS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (AddressBlocked, "address_blocked"),
    (NameServersUnreachable, "dns_unreachable"),
    (aiohttp.ClientConnectorDNSError, "dns_failed"),
    (ssl.SSLError, "tls_failed"),
    (TimeoutError, "timeout"),
    (ConnectionRefusedError, "connection_refused"),
    (OSError, "connection_failed"),
    (aiohttp.ClientConnectionError, "connection_failed"),
    (aiohttp.ClientError, "response_invalid"),
)

# What this machine has run out of, by the error of the call that would have needed it.
_LACKING: Final = {
    errno.EMFILE: "files_exhausted",
    errno.ENFILE: "files_exhausted",
    errno.ENOBUFS: "memory_exhausted",
    errno.ENOMEM: "memory_exhausted",
}
# What says the same of us over IPv4 alone: a machine may well have no IPv6, and a receiver nothing else.
_PORTS_EXHAUSTED: Final = "ports_exhausted"
_NETWORK_DOWN: Final = "network_down"
_INTERNAL_ERROR: Final = "internal_error"
# Errors that are no fault of the receiver's.
_OURS: Final = frozenset({"dns_unreachable", *_LACKING.values(), _PORTS_EXHAUSTED, _NETWORK_DOWN, _INTERNAL_ERROR})
# A machine with a way out has one to here. RFC 5737: nobody is there.
_FAR_AWAY: Final = ("198.51.100.1", 9)

_RETRY_AFTER_SECONDS_MAX: Final = 999_999_999.0
_DELAY_SECONDS: Final = re.compile(r"[0-9]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of one attempt.

    `error` is a short code and None exactly on 2xx. `address` is the peer that we were connected to, answered or not.
    `duration_ms` is the time a slot was taken, the reading of the excerpt included. `retry_after_seconds` is 0 when the
    receiver did not say.

    The phases are those of the last connection, each None when the attempt did not come to it: DNS, TCP with TLS (neither on
    a connection that is used again), and from there to the head of the answer. A phase that failed lasted until it failed.
    """

    http_status: int | None
    error: str | None
    response_excerpt: bytes
    address: str | None
    duration_ms: int
    retry_after_seconds: float
    dns_ms: int | None = None
    connect_ms: int | None = None
    first_byte_ms: int | None = None
    reused: bool = False

    @property
    def delivered(self) -> bool:
        """Whether the receiver took it: any 2xx."""
        return self.error is None

    @property
    def ours(self) -> bool:
        """Whether it failed by our fault, or our machine's: it says nothing of the receiver, who was not even asked."""
        return self.error in _OURS


@dataclass(slots=True)
class _Wire:
    """The connection of one attempt. aiohttp lets go of it with the last byte of an answer, so it is noted when it is got.

    Times are of the loop's clock, 0 for what did not happen: when a connection was asked for, when the first address of it
    was dialed, and when there was one.
    """

    address: str | None = None
    reused: bool = False
    fresh_only: bool = False
    asked_at: float = 0.0
    dialed_at: float = 0.0
    connected_at: float = 0.0
    over_v4: bool = False


_wire: ContextVar[_Wire] = ContextVar("wire")


class _Connector(BoundedConnector):
    """Connections that the guard has judged; keeps the policy that URLs are judged by, and notes which one an attempt got."""

    def __init__(
        self,
        resolver: AbstractResolver,
        *,
        private_allowed: bool,
        https_only: bool,
        ports: frozenset[int],
        forbidden: Sequence[Network],
    ) -> None:
        self._clock = asyncio.get_running_loop().time
        self._guarded = socket_factory(private_allowed=private_allowed, forbidden=forbidden)
        super().__init__(
            resolver=resolver,
            ttl_dns_cache=_DNS_CACHE_SECONDS,
            dns_cache_max_size=_DNS_CACHE_NAMES_MAX,
            keepalive_timeout=_KEEPALIVE_SECONDS,
            limit=0,
            socket_factory=self._make_socket,
        )
        self._private_allowed = private_allowed
        self._https_only = https_only
        self._ports = ports
        self._connections_used: WeakSet[ResponseHandler] = WeakSet()

    def allows(self, url: str, *, shop_http: bool, shop_ports: frozenset[int] | None) -> bool:
        """Whether a callback may be sent to the URL today; it may be older than the settings and the shop's exceptions."""
        ports = self._ports if shop_ports is None else shop_ports
        https_only = self._https_only and not shop_http
        judged = parse_callback_url(url, private_allowed=self._private_allowed, https_only=https_only, ports=ports)
        return judged is not None

    def _make_socket(self, addr_info: aiohttp.AddrInfoType) -> socket.socket:
        """The guard's socket; here DNS is over, and what follows is the connecting."""
        wire = _wire.get()
        wire.dialed_at = wire.dialed_at or self._clock()
        wire.over_v4 = wire.over_v4 or addr_info[0] == socket.AF_INET
        return self._guarded(addr_info)

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 aiohttp's signature
    ) -> Connection:
        """A connection from the pool or a new one. With `fresh_only` idle ones to the same host are closed on the way.

        So are, always, those on which the receiver has spoken unasked: it would be taken for the answer to this attempt.
        """
        wire = _wire.get()
        wire.asked_at, wire.dialed_at, wire.connected_at = self._clock(), 0.0, 0.0
        while True:
            connection = await super().connect(req, traces, timeout)
            assert connection.protocol is not None
            wire.reused = connection.protocol in self._connections_used
            if not (wire.reused and (wire.fresh_only or connection.protocol.should_close)):
                break
            connection.close()
        self._connections_used.add(connection.protocol)
        wire.connected_at = self._clock()
        wire.address = _peer_of(connection)
        return connection


def _peer_of(connection: Connection) -> str | None:
    """The address at the other end; None when it has gone already."""
    peer = connection.transport and connection.transport.get_extra_info("peername")
    return peer[0] if peer else None


@asynccontextmanager
async def open_session(
    *,
    private_allowed: bool,
    ports: frozenset[int],
    https_only: bool = False,
    forbidden: Sequence[Network] = (),
    resolver: AbstractResolver | None = None,
) -> AsyncIterator[aiohttp.ClientSession]:
    """The one session of a process, for `send_callback` alone.

    It keeps no cookies, reads no proxy and no password from the environment, unpacks nothing, and bounds what it reads.
    `forbidden` are networks that are not called though they are public. `resolver` replaces the system's; how many callbacks
    are in flight is limited before they come here.
    """
    resolver = resolver or Resolver()
    try:
        async with aiohttp.ClientSession(
            connector=_Connector(
                resolver, private_allowed=private_allowed, https_only=https_only, ports=ports, forbidden=forbidden
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            read_bufsize=EXCERPT_BYTES_MAX,
            max_line_size=_HEADER_BYTES_MAX,
            max_field_size=_HEADER_BYTES_MAX,
            max_headers=_HEADERS_MAX,
        ) as session:
            yield session
    finally:
        await resolver.close()


def render_headers(webhook_id: str, secrets: list[str], timestamp: float, body: bytes) -> dict[str, str]:
    """The headers of one attempt at Unix time `timestamp`. `secrets` are the live `whsec_` texts, newest first, at least one.

    Sources: Standard Webhooks 1.0.0 for `webhook-*`; the HTTP contract, "Callbacks", for `X-*`, which the newest secret signs.
    """
    seconds = int(timestamp)
    x_timestamp = _iso_utc(seconds)
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(seconds),
        "webhook-signature": sign_webhook(secrets, webhook_id, seconds, body),
        "X-Timestamp": x_timestamp,
        "X-Signature": sign_body(secrets[0], x_timestamp, body),
        "content-type": "application/json",
        "user-agent": _user_agent(),
        "accept-encoding": "identity",
    }


@lru_cache(maxsize=2)
def _iso_utc(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@cache
def _user_agent() -> str:
    return f"payouts/{version('payouts')}"


async def send_callback(
    session: aiohttp.ClientSession,
    url: str,
    headers: dict[str, str],
    body: bytes,
    *,
    limit: TimeLimit,
    shop_http: bool = False,
    shop_ports: frozenset[int] | None = None,
) -> Attempt:
    """POST exactly these bytes, once, and say what came of it. `session` is one of `open_session`.

    `shop_http` and `shop_ports` are the shop's exceptions from what the session demands of a URL.

    The status line is the verdict, unless what came in one piece with it is not HTTP. What can be read of the answer's body
    within a second is kept as an excerpt and changes nothing. Redirects are not followed. It all ends within
    `limit.seconds`. A URL that may not be called, or no longer, is `address_blocked`.

    Repeat: the receiver sees another attempt under the same `webhook-id`. Two POSTs may happen here as well, when a server
    closes an idle connection just as we use it (RFC 9112, 9.3.1 and 9.5).
    Raises nothing but CancelledError.
    """
    clock = asyncio.get_running_loop().time
    started = clock()
    deadline = started + limit.seconds
    wire = _Wire()
    status, error, excerpt, retry_after_seconds = None, None, b"", 0.0
    try:
        if not cast(_Connector, session.connector).allows(url, shop_http=shop_http, shop_ports=shop_ports):
            raise AddressBlocked
        response = await limit.keep(_post(session, url, headers, body, wire))
        answered = clock()
    except (aiohttp.ClientError, OSError) as failure:
        answered = clock()
        error = _error_of(failure, wire)
    except Exception:
        # We or a library are wrong. An attempt that raised would leave its callback to the end of the lease.
        answered = clock()
        get_logger().exception(LogEvent.ROUND_FAILED, round="send")
        error = _INTERNAL_ERROR
    else:
        status = response.status
        error = _STATUS_ERRORS.get(status // 100, _STATUS_ERROR_UNKNOWN)
        retry_after_seconds = _parse_retry_after(response.headers)
        excerpt = await _read_excerpt(response, min(deadline, clock() + _EXCERPT_SECONDS))
    return Attempt(
        status,
        error,
        excerpt,
        wire.address,
        round((clock() - started) * 1000),
        retry_after_seconds,
        None if wire.reused else _phase_ms(wire.asked_at, wire.dialed_at or wire.connected_at or answered),
        _phase_ms(wire.dialed_at, wire.connected_at or answered),
        _phase_ms(wire.connected_at, answered),
        wire.reused,
    )


def _phase_ms(began: float, ended: float) -> int | None:
    return round((ended - began) * 1000) if began else None


async def _post(
    session: aiohttp.ClientSession, url: str, headers: dict[str, str], body: bytes, wire: _Wire
) -> aiohttp.ClientResponse:
    """The answer up to its headers; the caller closes it. Raises what aiohttp raises."""
    token = _wire.set(wire)
    try:
        try:
            return await session.post(url, data=body, headers=headers, allow_redirects=False, timeout=_TIMEOUT)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError) as failure:
            if not wire.reused or _answer_begun(failure):
                raise
        wire.fresh_only = True
        return await session.post(url, data=body, headers=headers, allow_redirects=False, timeout=_TIMEOUT)
    finally:
        _wire.reset(token)


def _answer_begun(failure: Exception) -> bool:
    """Whether the connection broke within an answer: aiohttp then hands over what it had parsed, in place of a text."""
    return isinstance(failure, aiohttp.ServerDisconnectedError) and not isinstance(failure.message, str)


async def _read_excerpt(response: aiohttp.ClientResponse, deadline: float) -> bytes:
    """What came of the answer's body in time, at most `EXCERPT_BYTES_MAX`.

    A connection whose answer was read to the end is in the pool again; any other is closed here.
    """
    excerpt = bytearray()
    try:
        with suppress(Exception):
            if response.content.is_eof():
                # It came in one piece with the head, as most do: there is nothing to wait for.
                return response.content.read_nowait(EXCERPT_BYTES_MAX)
            async with asyncio.timeout_at(deadline):
                while chunk := await response.content.read(EXCERPT_BYTES_MAX - len(excerpt)):
                    excerpt += chunk
    finally:
        response.close()
    return bytes(excerpt)


def _error_of(failure: Exception, wire: _Wire) -> str:
    wrapped = failure.os_error if isinstance(failure, aiohttp.ClientConnectorError) else failure
    if isinstance(wrapped, OSError) and (lacking := _lacking(wrapped.errno, over_v4=wire.over_v4)):
        return lacking
    return next(code for kind, code in _ERRORS if isinstance(failure, kind) or isinstance(wrapped, kind))


def _lacking(number: int | None, *, over_v4: bool) -> str | None:
    """What this machine lacks, when that is what an error of the operating system says."""
    if over_v4 and number == errno.EADDRNOTAVAIL:
        return _PORTS_EXHAUSTED
    if over_v4 and number in (errno.ENETUNREACH, errno.ENETDOWN) and _is_cut_off():
        return _NETWORK_DOWN
    return _LACKING.get(number or 0)


def _is_cut_off() -> bool:
    """Whether this machine has no way out; the same error comes from networks on the way. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(_FAR_AWAY) in (errno.ENETUNREACH, errno.ENETDOWN)


def _parse_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the receiver asks us to wait (RFC 9110, 10.2.3), 0 when it does not or says something else.

    A date counts from the answer's own `Date`: both are of the receiver's clock, so that ours does not matter.
    """
    retry_after = headers.get("Retry-After")
    if retry_after is None:
        return 0.0
    if _DELAY_SECONDS.fullmatch(retry_after):
        return min(float(retry_after), _RETRY_AFTER_SECONDS_MAX)
    until, sent = _parse_date(retry_after), _parse_date(headers.get("Date", ""))
    return min(max(0.0, (until - sent).total_seconds()), _RETRY_AFTER_SECONDS_MAX) if until and sent else 0.0


def _parse_date(text: str) -> datetime | None:
    """An HTTP date (RFC 9110, 5.6.7), which is always UTC."""
    try:
        return parsedate_to_datetime(text).replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
