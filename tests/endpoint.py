"""A merchant's endpoint that keeps every request to the byte, and answers what a test tells it to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Received:
    """One request: its lines before the body, as they came, and the body."""

    lines: list[str]
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        """The headers, names as they came."""
        return {name: value for name, _, value in (line.partition(": ") for line in self.lines[1:])}


@dataclass(slots=True)
class Endpoint:
    """Answers every request with `answer`, a status and a reason, and `content`."""

    port: int = 0
    answer: str = "200 OK"
    content: bytes = b"ok"
    received: list[Received] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/told?by=us"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until it is closed."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
                request = Received(lines, b"")
                body = await reader.readexactly(int(request.headers["Content-Length"]))
                self.received.append(Received(lines, body))
                head = f"HTTP/1.1 {self.answer}\r\nContent-Length: {len(self.content)}\r\n\r\n"
                writer.write(head.encode() + self.content)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def endpoint() -> AsyncIterator[Endpoint]:
    """An endpoint for the length of a test."""
    running = Endpoint()
    server = await asyncio.start_server(running.serve, "127.0.0.1", 0)
    running.port = server.sockets[0].getsockname()[1]
    async with server:
        yield running
