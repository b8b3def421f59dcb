"""A DNS server on loopback, as a machine's own: it answers what a test tells it to, or nothing at all."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, cast

SERVER_FAILURE: Final = 2
NO_SUCH_NAME: Final = 3

# The addresses of a name, an error of RFC 1035, 4.1.1, or None: the question is dropped.
Answer = Sequence[str] | int | None


@dataclass
class NameServer(asyncio.DatagramProtocol):
    """One that knows nothing but what `answer` says; addresses may be asked for again at once."""

    answer: Callable[[str], Answer]
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        host, port = transport.get_extra_info("sockname")
        self.address = f"{host}:{port}"

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """RFC 1035, 4.1: a header, one question, and its answers, each of which points back at the question's name."""
        labels, at = [], 12
        while length := data[at]:
            labels.append(data[at + 1 : at + 1 + length].decode())
            at += 1 + length
        family = {1: socket.AF_INET, 28: socket.AF_INET6}[int.from_bytes(data[at + 1 : at + 3])]
        name = ".".join(labels)
        if family == socket.AF_INET:
            self.asked.append(name)
        answer = self.answer(name)
        if answer is None:
            return
        error, addresses = (answer, []) if isinstance(answer, int) else (0, answer)
        packed = [
            socket.inet_pton(family, address)
            for address in addresses
            if (":" in address) == (family == socket.AF_INET6)
        ]
        head = data[:2] + struct.pack(">HHHHH", 0x8180 | error, 1, len(packed), 0, 0) + data[12 : at + 5]
        records = (b"\xc0\x0c" + data[at + 1 : at + 5] + struct.pack(">IH", 0, len(item)) + item for item in packed)
        self._transport.sendto(head + b"".join(records), addr)


@asynccontextmanager
async def name_server(answer: Callable[[str], Answer]) -> AsyncIterator[NameServer]:
    """One that answers for as long as the block lasts; after that nobody listens there."""
    transport, server = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: NameServer(answer), local_addr=("127.0.0.1", 0)
    )
    try:
        yield server
    finally:
        transport.close()
