"""One attempt against receivers that stall, lie and close."""

import asyncio
import datetime as dt
import errno
import gzip
import os
import re
import resource
import socket
import ssl
import warnings
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final, cast

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.deadlines import TimeLimit
from tests.receivers import OK, Peer, answers, answers_once, head, receiver, says_nothing
from tests.stack import eventually
from worker.callbacks import send as sending
from worker.callbacks.guard import AddressBlocked, Resolver, socket_factory
from worker.callbacks.send import EXCERPT_BYTES_MAX, Attempt, open_session, render_headers, send_callback

BODY: Final = '{"type":"payout.success","note":"é\u2028"}'.encode()
HEADERS: Final = render_headers("evt_1", ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], 1764929700.0, BODY)
ANY_PORT: Final[frozenset[int]] = frozenset()
# A public address; sockets are made for it in the tests, and never connected.
PUBLIC: Final = "2606:4700:4700::1111"


class Names(AbstractResolver):
    """Resolves the names of a table, each time to the next of its answers; the last answer stays."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self._answers = answers

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        answers = self._answers[host.partition(".")[0]]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)
            for address in addresses
        ]

    async def close(self) -> None:
        pass


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A session that may call this machine."""
    async with open_session(private_allowed=True, ports=ANY_PORT) as session:
        yield session


@pytest.fixture
async def guarded() -> AsyncIterator[aiohttp.ClientSession]:
    """A session as in production, but for the ports."""
    async with open_session(private_allowed=False, ports=ANY_PORT) as session:
        yield session


async def send(session: aiohttp.ClientSession, url: str, timeout_seconds: float = 5.0) -> Attempt:
    attempt = await send_callback(session, url, HEADERS, BODY, limit=TimeLimit(timeout_seconds))
    assert attempt.error is None or re.fullmatch(r"[a-z0-9_]{1,40}", attempt.error)
    assert len(attempt.response_excerpt) <= EXCERPT_BYTES_MAX
    assert attempt.delivered == (attempt.http_status is not None and 200 <= attempt.http_status < 300)
    assert attempt.duration_ms < (timeout_seconds + 2) * 1000
    return attempt


async def test_exactly_the_given_bytes_and_headers_are_posted(session: aiohttp.ClientSession) -> None:
    async with receiver(answers_once(OK)) as merchant:
        attempt = await send(session, merchant.url + "#part")
    [request] = merchant.requests
    assert request.line == "POST /hook?a=1 HTTP/1.1"
    assert request.body == BODY
    assert request.headers.items() >= {name.lower(): value for name, value in HEADERS.items()}.items()
    assert (attempt.http_status, attempt.error, attempt.response_excerpt) == (200, None, b"ok")
    assert attempt.address == "127.0.0.1"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        *((status, None) for status in (200, 201, 202, 204, 205, 226, 299)),
        *((status, "redirect") for status in (300, 304, 399)),
        *((status, "http_4xx") for status in (400, 401, 404, 408, 410, 422, 429, 499)),
        *((status, "http_5xx") for status in (500, 502, 503, 599)),
        *((status, "response_invalid") for status in (101, 600, 999)),
    ],
)
async def test_the_status_line_is_the_verdict(session: aiohttp.ClientSession, status: int, error: str | None) -> None:
    async with receiver(answers_once(head(f"{status} X", "Content-Length: 0"))) as merchant:
        attempt = await send(session, merchant.url)
    assert (attempt.http_status, attempt.error) == (status, error)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_a_failure_and_its_target_is_never_contacted(
    session: aiohttp.ClientSession, status: int
) -> None:
    async with receiver(says_nothing) as canary:
        redirect = head(
            f"{status} Moved", f"Location: {canary.url}", f"Refresh: 0; url={canary.url}", "Content-Length: 0"
        )
        async with receiver(answers_once(redirect)) as merchant:
            attempt = await send(session, merchant.url)
        assert (attempt.http_status, attempt.error) == (status, "redirect")
    assert (len(merchant.requests), canary.connections) == (1, 0)


async def test_the_deadline_ends_an_attempt_that_is_not_answered(session: aiohttp.ClientSession) -> None:
    async with receiver(says_nothing) as merchant:
        attempt = await send(session, merchant.url, timeout_seconds=0.2)
    assert (attempt.http_status, attempt.error, attempt.address) == (None, "timeout", "127.0.0.1")
    assert attempt.duration_ms >= 200


async def test_the_deadline_ends_an_attempt_whose_headers_drip(session: aiohttp.ClientSession) -> None:
    async def drip(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nX: ")
        while not await peer.hung_up(within_seconds=0.02):
            await peer.send(b"x")

    async with receiver(drip) as merchant:
        attempt = await send(session, merchant.url, timeout_seconds=0.3)
    assert (attempt.http_status, attempt.error) == (None, "timeout")


async def test_the_deadline_ends_an_attempt_that_is_only_told_to_continue(session: aiohttp.ClientSession) -> None:
    async def stall(peer: Peer) -> None:
        for _ in range(10):
            await peer.send(head("100 Continue"))
        await peer.hung_up(within_seconds=5)

    async with receiver(stall) as merchant:
        attempt = await send(session, merchant.url, timeout_seconds=0.3)
    assert attempt.error == "timeout"


@pytest.mark.parametrize("piece", [1, 100_000])
async def test_a_receiver_that_answers_without_end_and_never_finally_is_left(
    session: aiohttp.ClientSession, piece: int
) -> None:
    sent = 0

    async def flood(peer: Peer) -> None:
        nonlocal sent
        while not await peer.hung_up(within_seconds=0):
            await peer.send(head("102 Processing") * piece)
            sent += piece

    async with receiver(flood) as merchant:
        attempt = await send(session, merchant.url, timeout_seconds=20)
        assert (attempt.http_status, attempt.error) == (None, "response_invalid")
    assert sent <= 300_000, "what the sockets hold"


async def test_a_few_interim_answers_change_nothing_on_a_connection_that_is_used_again(
    session: aiohttp.ClientSession,
) -> None:
    async with receiver(answers(head("102 Processing") * 10 + OK)) as merchant:
        attempts = [await send(session, merchant.url) for _ in range(3)]
    assert [(attempt.http_status, attempt.reused) for attempt in attempts] == [(200, False), (200, True), (200, True)]


@pytest.mark.parametrize("stray", [OK, head("410 Gone", "Content-Length: 0"), b"x"], ids=["200", "410", "no HTTP"])
async def test_what_a_receiver_says_unasked_is_not_taken_for_the_answer_to_the_next_attempt(
    session: aiohttp.ClientSession, stray: bytes
) -> None:
    asked = asyncio.Event()

    async def speak_twice(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        if peer.number == 1:
            await asked.wait()
            await peer.send(stray)
        await peer.hung_up()

    async def read() -> bool:
        assert session.connector is not None
        idle = [protocol for connections in session.connector._conns.values() for protocol, _ in connections]
        return all(protocol.should_close for protocol in idle)

    async with receiver(speak_twice) as merchant:
        await send(session, merchant.url)
        assert not await read()
        asked.set()
        await eventually(read, "what was said unasked has been read")
        second = await send(session, merchant.url)
        assert (second.http_status, second.error, second.reused) == (200, None, False)
        assert len(merchant.requests) == 2


async def test_the_deadline_ends_an_attempt_whose_server_never_speaks_tls(session: aiohttp.ClientSession) -> None:
    async with receiver(says_nothing) as merchant:
        attempt = await send(session, merchant.url.replace("http:", "https:"), timeout_seconds=0.2)
    assert attempt.error == "timeout"


async def test_tls_that_is_never_spoken_ends_when_connecting_should_be_over(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_TIMEOUT", aiohttp.ClientTimeout(total=None, sock_connect=0.2))
    async with receiver(says_nothing) as merchant:
        attempt = await send(session, merchant.url.replace("http:", "https:"), timeout_seconds=60.0)
    assert (attempt.error, attempt.address) == ("timeout", None)
    assert attempt.duration_ms < 30_000, "it did not wait for the deadline"


async def test_what_is_said_of_a_failure_names_no_address_no_host_and_no_file(
    session: aiohttp.ClientSession, guarded: aiohttp.ClientSession
) -> None:
    """Merchants read it."""
    async with receiver(answers_once(b"nonsense")) as merchant:
        attempts = [
            await send(session, merchant.url),
            await send(session, merchant.url.replace("http:", "https:"), timeout_seconds=0.2),
            await send(guarded, merchant.url),
            await send(session, "http://localhost:1/"),
            await send(session, "http://nowhere.invalid/"),
        ]
    assert [attempt.error for attempt in attempts] == [
        "response_invalid",
        "timeout",
        "address_blocked",
        "connection_refused",
        "dns_failed",
    ]
    assert not any(attempt.response_excerpt for attempt in attempts)
    assert [attempt.address for attempt in attempts] == ["127.0.0.1", None, None, None, None]


async def test_a_body_that_drips_after_200_is_delivered_and_left_after_a_second(session: aiohttp.ClientSession) -> None:
    async def drip(peer: Peer) -> None:
        await peer.request()
        await peer.send(head("200 OK", "Content-Length: 1000000"))
        while not await peer.hung_up(within_seconds=0.02):
            await peer.send(b"x")

    async with receiver(drip) as merchant:
        attempt = await send(session, merchant.url)
    assert attempt.delivered
    assert 900 <= attempt.duration_ms < 4000
    assert 0 < len(attempt.response_excerpt) < 200


async def test_a_body_that_never_comes_does_not_outlast_the_deadline_and_stays_delivered(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_EXCERPT_SECONDS", 10.0)
    async with receiver(answers_once(head("200 OK", "Content-Length: 5"))) as merchant:
        attempt = await send(session, merchant.url, timeout_seconds=1.0)
    assert attempt.delivered
    assert attempt.duration_ms < 3000


async def test_of_an_endless_body_no_more_than_the_excerpt_is_kept(session: aiohttp.ClientSession) -> None:
    sent = 0

    async def flood(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(head("500 Oops", "Transfer-Encoding: chunked"))
        while True:
            await peer.send(b"10000\r\n" + b"y" * 65_536 + b"\r\n")
            sent += 65_536

    async with receiver(flood) as merchant:
        attempt = await send(session, merchant.url)
    assert (attempt.http_status, attempt.error) == (500, "http_5xx")
    assert attempt.response_excerpt == b"y" * EXCERPT_BYTES_MAX
    assert sent < 32 * 1024 * 1024


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
async def test_a_compressed_answer_is_kept_as_it_came(session: aiohttp.ClientSession, encoding: str) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    answer = head("200 OK", f"Content-Encoding: {encoding}", f"Content-Length: {len(bomb)}") + bomb
    async with receiver(answers_once(answer)) as merchant:
        attempt = await send(session, merchant.url)
    assert attempt.delivered
    assert attempt.response_excerpt == bomb[:EXCERPT_BYTES_MAX]


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("Transfer-Encoding: chunked", b"zz\r\n"),
        ("Transfer-Encoding: chunked", b"5\r\nabc"),
        ("Content-Length: 10", b"abc"),
        ("Content-Encoding: gzip", b"abc"),
    ],
)
async def test_a_body_that_breaks_changes_no_verdict(session: aiohttp.ClientSession, header: str, body: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(head("200 OK", header))
        await peer.hung_up(within_seconds=0.05)
        await peer.send(body)

    async with receiver(script) as merchant:
        attempt = await send(session, merchant.url)
    assert (attempt.http_status, attempt.delivered) == (200, True)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 1000,
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 20000 OK\r\n\r\n",
        b"HTTP/1.1 -20 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        head("200 OK", "Content-Length: -1"),
        head("200 OK", "Content-Length: 99999999999999999999999999"),
        head("200 OK", "Content-Length: 1", "Content-Length: 2"),
        head("200 OK", "no colon"),
        head("200 OK", "Bad\x00Name: x"),
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"h%d: v\r\n" % n for n in range(10_000)) + b"\r\n",
        head("200 OK", "X: " + "x" * 1_000_000),
        b"HTTP/1.1 200 " + b"x" * 1_000_000,
        b"\xff\xfe" * 50_000,
    ],
    ids=range(17),
)
async def test_what_is_not_http_is_an_invalid_response(session: aiohttp.ClientSession, garbage: bytes) -> None:
    async with receiver(answers_once(garbage)) as merchant:
        attempt = await send(session, merchant.url)
    assert (attempt.http_status, attempt.error) == (None, "response_invalid")
    assert attempt.address == "127.0.0.1"


async def test_headers_without_end_are_cut_off(session: aiohttp.ClientSession) -> None:
    async def flood(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            await peer.send(b"a: b\r\n" * 1000)

    async with receiver(flood) as merchant:
        attempt = await send(session, merchant.url)
    assert attempt.error == "response_invalid"


async def test_a_reset_is_a_failed_connection(session: aiohttp.ClientSession) -> None:
    async def reset(peer: Peer) -> None:
        await peer.request()
        peer.reset()

    async with receiver(reset) as merchant:
        attempt = await send(session, merchant.url)
    assert (attempt.error, attempt.address) == ("connection_failed", "127.0.0.1")


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nContent-Le"])
async def test_a_new_connection_that_closes_without_an_answer_is_a_failure_and_not_tried_again(
    session: aiohttp.ClientSession, part: bytes
) -> None:
    async def close(peer: Peer) -> None:
        await peer.request()
        await peer.send(part)

    async with receiver(close) as merchant:
        attempt = await send(session, merchant.url)
    assert attempt.error == "connection_failed"
    assert len(merchant.requests) == 1


async def test_a_port_where_nobody_listens_refuses(session: aiohttp.ClientSession) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        attempt = await send(session, f"http://127.0.0.1:{bound.getsockname()[1]}/")
    assert (attempt.error, attempt.address) == ("connection_refused", None)


async def test_a_name_that_does_not_exist_is_a_dns_failure() -> None:
    async with open_session(private_allowed=True, ports=ANY_PORT, resolver=Names(nowhere=[[]])) as session:
        attempt = await send(session, "http://nowhere.example/")
    assert (attempt.error, attempt.address) == ("dns_failed", None)


def certificate(folder: Path, host: str = "127.0.0.1", days: int = 1) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's TLS with a certificate of its own making, and a client's that trusts it and is strict otherwise."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody")])
    end = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(end - dt.timedelta(days=10))
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = folder / "tls.pem"
    path.write_bytes(key.private_bytes(encoding, private, serialization.NoEncryption()) + signed.public_bytes(encoding))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=path)


async def test_a_certificate_that_nobody_vouches_for_fails_before_a_byte_of_the_callback_is_sent(
    session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    async with receiver(answers_once(OK), certificate(tmp_path)[0]) as merchant:
        attempt = await send(session, merchant.url.replace("http:", "https:"))
    assert attempt.error == "tls_failed"
    assert not attempt.ours
    assert merchant.requests == []


@pytest.mark.parametrize(
    ("made", "error"),
    [
        ({}, None),
        ({"days": -1}, "tls_failed"),
        ({"host": "127.0.0.2"}, "tls_failed"),
    ],
    ids=["good", "expired", "another host's"],
)
async def test_a_certificate_that_is_vouched_for_must_be_of_today_and_of_the_host(
    session: aiohttp.ClientSession, tmp_path: Path, made: dict[str, Any], error: str | None
) -> None:
    server, trusting = certificate(tmp_path, **made)
    assert session.connector is not None
    cast(Any, session.connector)._ssl = trusting
    async with receiver(answers(OK), server) as merchant:
        attempt = await send(session, merchant.url.replace("http:", "https:"))
    assert attempt.error == error
    assert len(merchant.requests) == (error is None)


@pytest.mark.parametrize(
    ("newest", "error"),
    [
        (ssl.TLSVersion.TLSv1, "tls_failed"),
        (ssl.TLSVersion.TLSv1_1, "tls_failed"),
        (ssl.TLSVersion.TLSv1_2, "connection_failed"),
    ],
)
async def test_tls_that_is_too_old_is_not_spoken(
    session: aiohttp.ClientSession, tmp_path: Path, newest: ssl.TLSVersion, error: str
) -> None:
    """The server hangs up after the handshake. It blocks, since asyncio's would not say why it refuses one."""
    server, trusting = certificate(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        server.set_ciphers("ALL:@SECLEVEL=0")
        server.minimum_version, server.maximum_version = ssl.TLSVersion.TLSv1, newest
    cast(Any, session.connector)._ssl = trusting

    def shake_hands(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer, suppress(OSError), server.wrap_socket(peer, server_side=True):
            pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        attempt, _ = await asyncio.gather(
            send(session, f"https://127.0.0.1:{port}/"), asyncio.to_thread(shake_hands, listener)
        )
    assert attempt.error == error


async def test_a_server_that_speaks_plain_http_on_a_tls_port_fails_tls(session: aiohttp.ClientSession) -> None:
    async def plain(peer: Peer) -> None:
        await peer.reader.read(1)
        await peer.send(OK)

    async with receiver(plain) as merchant:
        attempt = await send(session, merchant.url.replace("http:", "https:"))
    assert attempt.error == "tls_failed"


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001", "0177.0.0.1", "0x7f.0.0.1", "127.0.0.1."),
        *(
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[::1]",
            "[::1%25lo]",
            "0.0.0.0",
        ),
        *(
            "\uff11\uff12\uff17.0.0.1",
            "127\u30020\u30020\u30021",
            "\u2460\u2461\u2466.0.0.1",
            "localhost",
            "localhost.",
        ),
    ],
)
async def test_this_machine_is_not_called_by_any_spelling(guarded: aiohttp.ClientSession, host: str) -> None:
    async with receiver(says_nothing) as canary:
        attempt = await send(guarded, f"http://{host}:{canary.port}/")
    assert (attempt.error, attempt.address) == ("address_blocked", None)
    assert canary.connections == 0


@pytest.mark.parametrize(
    "url", ["not a url", "", "ftp://127.0.0.1/", "http://user:password@127.0.0.1/", "http://\ud800/"]
)
async def test_a_stored_url_that_is_none_is_blocked(session: aiohttp.ClientSession, url: str) -> None:
    assert (await send(session, url)).error == "address_blocked"


async def test_a_stored_url_whose_port_is_no_longer_allowed_is_blocked() -> None:
    async with receiver(says_nothing) as canary, open_session(private_allowed=True, ports=frozenset({443})) as session:
        assert (await send(session, canary.url)).error == "address_blocked"
    assert canary.connections == 0


@pytest.mark.parametrize(
    "addresses",
    [
        *(["127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["0.0.0.0"], ["10.0.0.1"], ["169.254.169.254"]),
        *(["fe80::1%lo"], ["not an address"], ["127.0.0.1", "127.0.0.2"], ["::1", "127.0.0.1", "10.0.0.1", "fd00::1"]),
    ],
)
async def test_a_name_that_resolves_to_private_addresses_is_blocked_when_it_is_called(addresses: list[str]) -> None:
    names = Names(merchant=[addresses])
    async with (
        receiver(says_nothing) as canary,
        open_session(private_allowed=False, ports=ANY_PORT, resolver=names) as session,
    ):
        attempt = await send(session, f"http://merchant.example:{canary.port}/")
    assert (attempt.error, attempt.address) == ("address_blocked", None)
    assert canary.connections == 0


async def test_a_name_that_resolves_to_this_machine_the_second_time_is_blocked_then() -> None:
    names = Names(merchant=[[], ["127.0.0.1"]])
    async with (
        receiver(says_nothing) as canary,
        open_session(private_allowed=False, ports=ANY_PORT, resolver=names) as session,
    ):
        url = f"http://merchant.example:{canary.port}/"
        first = await send(session, url)
        second = await send(session, url)
    assert first.error == "dns_failed"
    assert second.error == "address_blocked"
    assert canary.connections == 0


def test_of_mixed_addresses_only_the_public_ones_get_a_socket() -> None:
    guarded = socket_factory(private_allowed=False)
    guarded((socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (PUBLIC, 443, 0, 0))).close()
    for private in ("::1", "::ffff:127.0.0.1", "fd00::1", "fe80::1"):
        with pytest.raises(AddressBlocked):
            guarded((socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (private, 443, 0, 0)))


@pytest.mark.parametrize("host", ["127.0.0.1", "[::ffff:127.0.0.1]", "localhost"])
async def test_networks_that_are_forbidden_besides_are_not_called_either(host: str) -> None:
    """Here as if this machine's own network were public: it is let through but for the setting."""
    forbidden = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    async with (
        receiver(says_nothing) as canary,
        open_session(private_allowed=True, ports=ANY_PORT, forbidden=forbidden) as session,
    ):
        attempt = await send(session, f"http://{host}:{canary.port}/")
    assert (attempt.error, attempt.address) == ("address_blocked", None)
    assert canary.connections == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "[::ffff:127.0.0.1]", "localhost"])
async def test_the_guard_blocks_at_connect_whatever_the_url_said(host: str) -> None:
    """The guard alone, without the check of the URL in front of it."""
    connector = aiohttp.TCPConnector(socket_factory=socket_factory(private_allowed=False), resolver=Resolver())
    async with receiver(says_nothing) as canary, aiohttp.ClientSession(connector=connector) as session:
        with pytest.raises(aiohttp.ClientConnectorError) as caught:
            await session.post(f"http://{host}:{canary.port}/")
    assert isinstance(caught.value.os_error, AddressBlocked)
    assert canary.connections == 0


async def test_cookies_are_never_sent_back() -> None:
    cookies = head("200 OK", "Set-Cookie: a=b; Path=/", "Set-Cookie: c=d; Domain=example", "Content-Length: 0")
    names = Names(a=[["127.0.0.1"]], b=[["127.0.0.1"]])
    async with (
        receiver(answers(cookies)) as merchant,
        open_session(private_allowed=True, ports=ANY_PORT, resolver=names) as session,
    ):
        for host in ("a.example", "a.example", "b.example"):
            assert (await send(session, f"http://{host}:{merchant.port}/")).delivered
    assert len(merchant.requests) == 3
    assert not any("cookie" in request.headers for request in merchant.requests)


async def test_proxies_and_passwords_of_the_environment_are_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\ndefault login anybody password secret\n")
    netrc.chmod(0o600)
    async with receiver(says_nothing) as canary, receiver(answers(OK)) as merchant:
        for variable in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{canary.port}")
        monkeypatch.setenv("NETRC", str(netrc))
        monkeypatch.setenv("HOME", str(tmp_path))
        async with open_session(private_allowed=True, ports=ANY_PORT) as session:
            assert (await send(session, merchant.url)).delivered
    assert canary.connections == 0
    assert "authorization" not in merchant.requests[0].headers


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([], 0),
        (["Retry-After: 120"], 120),
        (["Retry-After:   7  "], 7),
        (["Retry-After: 0"], 0),
        (["Retry-After: 999999999"], 999_999_999),
        (["Date: Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After: Wed, 21 Oct 2015 07:30:05 GMT"], 125),
        (["Date: Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After: Wed Oct 21 07:30:05 2015"], 125),
        (["Date: Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After: Wednesday, 21-Oct-15 07:30:05 GMT"], 125),
        (["Date: Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After: Wed, 21 Oct 2015 07:27:00 GMT"], 0),
        (["Retry-After: Wed, 21 Oct 2015 07:30:05 GMT"], 0),
        (["Date: yesterday", "Retry-After: Wed, 21 Oct 2015 07:30:05 GMT"], 0),
        (["Retry-After: -5"], 0),
        (["Retry-After: +5"], 0),
        (["Retry-After: 1.5"], 0),
        (["Retry-After: 1e9"], 0),
        (["Retry-After: \uff15"], 0),
        (["Retry-After: 1234567890"], 999_999_999),
        (["Retry-After: " + "9" * 5000], 999_999_999),
        (["Retry-After: soon"], 0),
        (["Date: Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After: Wed,21 Oct 9990000099 07:23:00 <999"], 0),
        (["Date: Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After: Wed, 32 Oct 2015 27:28:00 GMT"], 0),
    ],
)
async def test_retry_after_is_read_in_every_form_and_garbage_is_ignored(
    session: aiohttp.ClientSession, headers: list[str], seconds: float
) -> None:
    async with receiver(answers_once(head("503 Busy", *headers, "Content-Length: 0"))) as merchant:
        attempt = await send(session, merchant.url)
    assert (attempt.error, attempt.retry_after_seconds) == ("http_5xx", seconds)


async def test_a_connection_whose_answer_was_read_is_used_again(session: aiohttp.ClientSession) -> None:
    async with receiver(answers(OK)) as merchant:
        attempts = [await send(session, merchant.url) for _ in range(3)]
    assert [attempt.address for attempt in attempts] == ["127.0.0.1"] * 3
    assert (merchant.connections, len(merchant.requests)) == (1, 3)


async def test_a_connection_whose_answer_was_not_read_to_the_end_is_closed(session: aiohttp.ClientSession) -> None:
    async with receiver(answers(head("200 OK", "Content-Length: 100000") + bytes(50_000))) as merchant:
        assert (await send(session, merchant.url)).delivered
        async with asyncio.timeout(1):
            await merchant.until(lambda: merchant.hangups == 1)


@pytest.mark.parametrize("by_reset", [False, True])
async def test_a_callback_on_connections_that_the_server_has_left_is_sent_again_on_a_new_one(
    session: aiohttp.ClientSession, by_reset: bool
) -> None:
    """The first three connections answer once and end at their second request, as a server does that stops being idle."""
    together = asyncio.Barrier(3)

    async def leave(peer: Peer) -> None:
        await peer.request()
        if peer.number <= 3:
            await together.wait()
            await peer.send(OK)
            await peer.request()
            if by_reset:
                peer.reset()
        else:
            await peer.send(OK)
            await peer.hung_up()

    async with receiver(leave) as merchant:
        await asyncio.gather(*(send(session, merchant.url) for _ in range(3)))
        attempt = await send(session, merchant.url)
    assert attempt.delivered
    assert (merchant.connections, len(merchant.requests)) == (4, 5)
    assert {request.body for request in merchant.requests} == {BODY}


async def test_a_callback_that_the_new_connection_loses_too_is_a_failure(session: aiohttp.ClientSession) -> None:
    async def leave(peer: Peer) -> None:
        await peer.request()
        if peer.number == 1:
            await peer.send(OK)
            await peer.request()

    async with receiver(leave) as merchant:
        assert (await send(session, merchant.url)).delivered
        attempt = await send(session, merchant.url)
    assert attempt.error == "connection_failed"
    assert (merchant.connections, len(merchant.requests)) == (2, 3)


async def test_the_deadline_spans_both_connections(session: aiohttp.ClientSession) -> None:
    async def leave_late(peer: Peer) -> None:
        await peer.request()
        if peer.number == 1:
            await peer.send(OK)
            await peer.request()
            await peer.hung_up(within_seconds=1.5)
        else:
            await peer.hung_up()

    async with receiver(leave_late) as merchant:
        assert (await send(session, merchant.url)).delivered
        attempt = await send(session, merchant.url, timeout_seconds=2.0)
    assert attempt.error == "timeout"
    # With a deadline of its own the second one would take until 3,500.
    assert attempt.duration_ms < 3000
    assert merchant.connections == 2


async def test_a_callback_is_not_sent_again_once_an_answer_began(session: aiohttp.ClientSession) -> None:
    async def break_off(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        await peer.send(b"HTTP/1.1 2")

    async with receiver(break_off) as merchant:
        assert (await send(session, merchant.url)).delivered
        attempt = await send(session, merchant.url)
    assert attempt.error == "connection_failed"
    assert (merchant.connections, len(merchant.requests)) == (1, 2)


async def test_an_error_of_our_own_is_ours_and_does_not_raise(session: aiohttp.ClientSession) -> None:
    await session.close()
    attempt = await send(session, "http://127.0.0.1/")
    assert (attempt.error, attempt.ours) == ("internal_error", True)


async def test_without_a_file_to_open_the_fault_is_ours(session: aiohttp.ClientSession) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with receiver(answers(OK)) as merchant:
        with ExitStack() as files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 20, hard))
            files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            with suppress(OSError):
                while True:
                    files.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            attempt = await send(session, merchant.url)
        assert (attempt.error, attempt.ours) == ("files_exhausted", True)
        assert (await send(session, merchant.url)).delivered
    assert merchant.connections == 1


@pytest.mark.parametrize(
    ("number", "host", "cut_off", "error"),
    [
        (errno.ENFILE, "127.0.0.1", False, "files_exhausted"),
        (errno.ENOBUFS, "127.0.0.1", False, "memory_exhausted"),
        (errno.EADDRNOTAVAIL, "127.0.0.1", False, "ports_exhausted"),
        (errno.ENETUNREACH, "127.0.0.1", True, "network_down"),
        (errno.ENETUNREACH, "127.0.0.1", False, None),
        (errno.EHOSTUNREACH, "127.0.0.1", True, None),
        # To have no IPv6 is nothing that a later attempt would change.
        (errno.EADDRNOTAVAIL, "[::1]", True, None),
        (errno.ENETUNREACH, "[::1]", True, None),
    ],
)
async def test_what_the_system_says_of_us_is_ours_and_what_it_says_of_the_way_is_not(
    session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    host: str,
    cut_off: bool,
    error: str | None,
) -> None:
    def refuse(_: object) -> socket.socket:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(session.connector, "_guarded", refuse)
    monkeypatch.setattr(sending, "_is_cut_off", lambda: cut_off)
    attempt = await send(session, f"http://{host}:9/")
    assert (attempt.error, attempt.ours) == (error or "connection_failed", error is not None)


def test_a_machine_that_reaches_the_far_address_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_FAR_AWAY", ("127.0.0.1", 9))
    assert not sending._is_cut_off()


async def test_an_attempt_says_how_long_its_phases_took(session: aiohttp.ClientSession) -> None:
    async def slow(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.hung_up(within_seconds=0.5)
            await peer.send(OK)

    async with receiver(slow) as merchant:
        first, second = [await send(session, merchant.url) for _ in range(2)]
    assert (first.reused, second.reused) == (False, True)
    assert first.dns_ms is not None
    assert first.connect_ms is not None
    assert first.dns_ms < 400
    assert first.connect_ms < 400
    assert (second.dns_ms, second.connect_ms) == (None, None)
    for attempt in (first, second):
        assert attempt.first_byte_ms is not None
        assert 495 <= attempt.first_byte_ms <= attempt.duration_ms


async def test_a_phase_that_fails_lasted_until_it_failed(session: aiohttp.ClientSession) -> None:
    async with receiver(says_nothing) as merchant:
        silent = await send(session, merchant.url, timeout_seconds=1.0)
        without_tls = await send(session, merchant.url.replace("http:", "https:"), timeout_seconds=1.0)
    assert silent.connect_ms is not None
    assert without_tls.connect_ms is not None
    assert silent.connect_ms < 800
    assert (silent.first_byte_ms or 0) > 150
    assert without_tls.connect_ms >= 990
    assert without_tls.first_byte_ms is None
    blocked = await send(session, "http://user:password@127.0.0.1/")
    assert (blocked.dns_ms, blocked.connect_ms, blocked.first_byte_ms) == (None, None, None)


@pytest.mark.parametrize(
    ("demanded", "excepted", "error"),
    [
        ({"https_only": True, "ports": ANY_PORT}, {}, "address_blocked"),
        ({"https_only": True, "ports": ANY_PORT}, {"shop_http": True}, None),
        ({"ports": frozenset({443})}, {}, "address_blocked"),
        ({"ports": frozenset({443})}, {"shop_ports": ANY_PORT}, None),
        ({"ports": ANY_PORT}, {"shop_ports": frozenset({443})}, "address_blocked"),
    ],
)
async def test_scheme_and_port_are_those_of_the_settings_unless_the_shop_is_an_exception(
    demanded: dict[str, Any], excepted: dict[str, Any], error: str | None
) -> None:
    async with receiver(answers(OK)) as merchant, open_session(private_allowed=True, **demanded) as session:
        attempt = await send_callback(session, merchant.url, HEADERS, BODY, limit=TimeLimit(5.0), **excepted)
    assert attempt.error == error
    assert merchant.connections == (error is None)


async def test_cancelled_attempts_leave_no_connection_and_no_file_behind(session: aiohttp.ClientSession) -> None:
    async def stall(peer: Peer) -> None:
        await peer.request()
        if peer.number % 2:
            await peer.send(head("200 OK", "Content-Length: 5"))
        await peer.hung_up()

    async with receiver(stall) as merchant:
        files = open_files()
        for waves in range(1, 6):
            sends = [asyncio.create_task(send(session, merchant.url)) for _ in range(50)]
            unsent = [asyncio.create_task(send(session, merchant.url)) for _ in range(10)]
            await asyncio.gather(*(_cancelled(task) for task in unsent))
            await merchant.until(lambda: len(merchant.requests) == 50 * waves)  # noqa: B023 awaited within the round
            await asyncio.gather(*(_cancelled(task) for task in sends))
        await merchant.until(lambda: merchant.hangups == merchant.connections)
        assert open_files() <= files


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


async def _cancelled(task: "asyncio.Task[Attempt]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
