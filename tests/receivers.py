"""Receivers of callbacks: real servers that stall, lie and close. What paces them is waiting for the sender to hang up."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass(frozen=True, slots=True)
class Request:
    """What a receiver got, byte for byte; header names in lower case."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """A server on 127.0.0.1 and what it saw."""

    port: int
    connections: int = 0
    hangups: int = 0
    requests: list[Request] = field(default_factory=list)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?a=1"

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait for something that the receiver counts."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(reached)

    async def note(self, **counted: int) -> None:
        async with self._changed:
            for name, number in counted.items():
                setattr(self, name, getattr(self, name) + number)
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Peer:
    """The receiver's side of one connection; `number` counts from 1."""

    receiver: Receiver
    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def request(self) -> Request:
        line, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        request = Request(line, headers, await self.reader.readexactly(int(headers["content-length"])))
        self.receiver.requests.append(request)
        await self.receiver.note()
        return request

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def hung_up(self, within_seconds: float | None = None) -> bool:
        """Whether the sender closed the connection, in that time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_seconds):
                await self.reader.read()
                return True
        return False

    def reset(self) -> None:
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def receiver(
    script: Script, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Receiver]:
    """Runs the script on each connection, then closes it."""
    scripts: set[asyncio.Task[object] | None] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        scripts.add(task)
        await seen.note(connections=1)
        try:
            await script(Peer(seen, seen.connections, reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            scripts.discard(task)
            writer.close()
            with suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()
            await seen.note(hangups=1)

    server = await asyncio.start_server(accept, host, port, ssl=tls)
    seen = Receiver(server.sockets[0].getsockname()[1])
    async with server:
        yield seen
        for task in tuple(scripts):
            assert task is not None
            task.cancel()
        await seen.until(lambda: seen.hangups == seen.connections)


def answers(data: bytes) -> Script:
    """Answers every request of a connection with these bytes."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(data)

    return script


def answers_once(data: bytes) -> Script:
    """Answers one request with these bytes and waits for the sender to close."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(data)
        await peer.hung_up()

    return script


async def says_nothing(peer: Peer) -> None:
    await peer.hung_up()


def head(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "\r\n"]).encode()
