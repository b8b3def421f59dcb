"""Names of merchants, asked of a DNS server that is slow, silent, changes its mind or is not there."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address
from time import monotonic
from typing import Any, Final

import aiohttp
import pytest

from common.deadlines import TimeLimit
from common.domain.addresses import is_public
from tests.names import NO_SUCH_NAME, SERVER_FAILURE, Answer, NameServer, name_server
from tests.receivers import OK, answers, answers_once, receiver, says_nothing
from tests.unit.test_addresses import FORBIDDEN
from worker.callbacks import guard
from worker.callbacks.guard import DNS_TIMEOUT_SECONDS, DNS_TRIES, NameServersUnreachable, Resolver
from worker.callbacks.send import Attempt, open_session, render_headers, send_callback

BODY: Final = b"{}"
HEADERS: Final = render_headers("evt_1", ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], 1764929700.0, BODY)
CLOSING: Final = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
ANY_PORT: Final[frozenset[int]] = frozenset()


@asynccontextmanager
async def asking(
    answer: Callable[[str], Answer], *, private_allowed: bool = True, **patience: Any
) -> AsyncIterator[tuple[NameServer, aiohttp.ClientSession]]:
    """A session whose machine asks that server."""
    async with (
        name_server(answer) as server,
        open_session(
            private_allowed=private_allowed, ports=ANY_PORT, resolver=Resolver([server.address], **patience)
        ) as session,
    ):
        yield server, session


async def send(session: aiohttp.ClientSession, url: str) -> Attempt:
    return await send_callback(session, url, HEADERS, BODY, limit=TimeLimit(10.0))


def blocked() -> float:
    value = guard.BLOCKED._value.get()
    assert isinstance(value, float)
    return value


async def test_a_zone_that_does_not_answer_delays_nobody_else() -> None:
    """More names of it at once than any pool of threads would have threads."""

    unanswered: set[str] = set()
    asked = asyncio.Semaphore(0)

    def answer(name: str) -> Answer:
        if not name.endswith("dead.example"):
            return ["127.0.0.1"]
        if name not in unanswered:
            unanswered.add(name)
            asked.release()
        return None

    async with (
        receiver(answers(OK)) as merchant,
        asking(answer, timeout_seconds=0.5, tries=2) as (_, session),
    ):
        dead = []
        # In waves that the socket of the zone's server can hold.
        for first in range(0, 300, 50):
            urls = [f"http://m{n}.dead.example:{merchant.port}/" for n in range(first, first + 50)]
            dead += [asyncio.create_task(send(session, url)) for url in urls]
            for _ in urls:
                await asked.acquire()
        began = monotonic()
        alive = await asyncio.gather(*(send(session, f"http://m{n}.live.example:{merchant.port}/") for n in range(50)))
        assert all(attempt.delivered for attempt in alive)
        assert monotonic() - began < 5
        assert not any(task.done() and task.result().delivered for task in dead)
        for attempt in await asyncio.gather(*dead):
            assert (attempt.error, attempt.ours, attempt.connect_ms) == ("dns_failed", False, None)
            assert attempt.dns_ms is not None
            assert attempt.dns_ms >= 400
    assert len(merchant.requests) == 50


def test_the_patience_with_a_zone_is_shorter_than_an_attempt() -> None:
    """Each try of c-ares is twice as long as the one before."""
    assert sum(DNS_TIMEOUT_SECONDS * 2**n for n in range(DNS_TRIES)) < 10


@pytest.mark.parametrize("answer", [NO_SUCH_NAME, SERVER_FAILURE, []], ids=["no such name", "failure", "no address"])
async def test_a_name_without_an_address_is_the_merchants_fault(answer: Answer) -> None:
    async with asking(lambda _: answer) as (server, session):
        attempt = await send(session, "http://nowhere.example/")
        assert (attempt.error, attempt.ours, attempt.address) == ("dns_failed", False, None)
        assert set(server.asked) == {"nowhere.example"}, "and no search domain of ours is tried"


@pytest.mark.parametrize("name", ["a" * 63 + ".example", "mer_chant.example", "xn--bcher-kva.example", "single"])
async def test_names_are_asked_for_as_they_stand_in_the_url(name: str) -> None:
    async with receiver(answers(OK)) as merchant, asking(lambda _: ["127.0.0.1"]) as (server, session):
        assert (await send(session, f"http://{name}:{merchant.port}/")).delivered
        assert set(server.asked) == {name}


async def test_a_dns_server_of_ours_that_is_not_there_is_our_fault() -> None:
    async with name_server(lambda _: ["127.0.0.1"]) as server:
        pass
    async with open_session(private_allowed=True, ports=ANY_PORT, resolver=Resolver([server.address])) as session:
        attempt = await send(session, "http://merchant.example/")
        assert (attempt.error, attempt.ours) == ("dns_unreachable", True)


async def test_addresses_and_the_names_of_this_machine_are_not_asked_for() -> None:
    async with receiver(answers(OK)) as merchant, asking(lambda _: NO_SUCH_NAME) as (server, session):
        for host in ("127.0.0.1", "[::ffff:127.0.0.1]", "localhost"):
            assert (await send(session, f"http://{host}:{merchant.port}/")).delivered, host
        assert server.asked == []


async def test_the_system_resolver_finds_names_and_says_when_there_are_none() -> None:
    resolver = Resolver()
    found = await resolver.resolve("localhost", 80, socket.AF_INET)
    assert {(result["host"], result["port"]) for result in found} == {("127.0.0.1", 80)}
    with pytest.raises(OSError, match="Misformatted domain name") as refused:
        await resolver.resolve("no..name", 80)
    assert not isinstance(refused.value, NameServersUnreachable)
    await resolver.close()


async def test_a_name_that_is_public_at_first_and_this_machine_later_is_not_called_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rebinding. 127.0.0.2 plays a public address, and no answer is remembered."""
    let_pass(monkeypatch, "127.0.0.2")
    monkeypatch.setattr("worker.callbacks.send._DNS_CACHE_SECONDS", 0)
    turns = [["127.0.0.2"], ["127.0.0.1"], ["127.0.0.1", "::1"]]
    turn = 0
    async with (
        receiver(says_nothing) as canary,
        receiver(answers_once(CLOSING), host="127.0.0.2", port=canary.port) as merchant,
        asking(lambda _: turns[turn], private_allowed=False) as (_, session),
    ):
        url = f"http://merchant.example:{canary.port}/"
        first = await send(session, url)
        for turn in (1, 2):  # noqa: B007 the server's turn
            assert (await send(session, url)).error == "address_blocked"
    assert (first.error, first.address) == (None, "127.0.0.2")
    assert (len(merchant.requests), canary.connections) == (1, 0)


async def test_of_a_name_with_public_and_private_addresses_only_the_public_one_is_called_and_the_others_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_pass(monkeypatch, "127.0.0.2")
    before = blocked()
    async with (
        receiver(says_nothing) as canary,
        receiver(answers_once(OK), host="127.0.0.2", port=canary.port) as merchant,
        asking(lambda _: ["127.0.0.1", "10.0.0.1", "127.0.0.2"], private_allowed=False) as (_, session),
    ):
        attempt = await send(session, f"http://merchant.example:{canary.port}/")
    assert (attempt.error, attempt.address) == (None, "127.0.0.2")
    assert (len(merchant.requests), canary.connections) == (1, 0)
    assert blocked() > before


async def test_no_socket_is_made_for_any_forbidden_address_be_it_a_literal_or_what_a_name_resolves_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    addresses = [address.partition("%")[0] for address in FORBIDDEN]
    made: list[socket.socket] = []
    make = socket.socket

    def make_and_note(*args: Any) -> socket.socket:
        made.append(make(*args))
        return made[-1]

    def answer(name: str) -> Answer:
        return [addresses[int(name.partition(".")[0])]]

    async with asking(answer, private_allowed=False) as (server, session):
        monkeypatch.setattr("worker.callbacks.guard.socket.socket", make_and_note)
        for number, address in enumerate(addresses):
            literal = f"[{address}]" if ":" in address else address
            for host in (literal, f"{number}.merchant.example"):
                attempt = await send(session, f"http://{host}:8080/")
                assert (attempt.error, attempt.ours, attempt.address) == ("address_blocked", False, None), host
        assert len(server.asked) == len(addresses)
    assert made == []


def let_pass(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Have one address of this machine count as public."""

    def public(given: IPv4Address | IPv6Address) -> bool:
        return str(given) == address or is_public(given)

    monkeypatch.setattr(guard, "is_public", public)
