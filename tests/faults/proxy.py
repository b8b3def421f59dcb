"""A network that fails on demand: a TCP proxy in front of PostgreSQL, which knows enough of the protocol to fail at COMMIT.

Source: PostgreSQL, "Message Formats". asyncpg asks in the extended protocol, but for BEGIN, COMMIT and ROLLBACK, which
are a simple Query. A statement that writes outside of a transaction is its own COMMIT.
"""

import asyncio
import re
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from sqlalchemy.engine import make_url

from ops.ports import choose_port
from tests.stack import eventually

_PROTOCOL_3: Final = 3
# Our SQL has its words in capitals and its names in small letters, so that FOR UPDATE is none of these.
_WRITES: Final = re.compile(rb"\b(INSERT INTO|UPDATE|DELETE FROM) [a-z]|\b(accept|end)_unopposed\(")

# Words by which `Proxy.fail_commits` knows a transaction: a look that finds nothing to claim has written none of these.
CLAIM: Final = "INSERT INTO payout_attempts"
BOOKING: Final = "INSERT INTO sandbox.payments"
RECORD: Final = "end_unopposed("
CAREFUL_RECORD: Final = "INSERT INTO events"
CLAIM_OF_CALLBACK: Final = "UPDATE callback_due"
RECORD_OF_CALLBACK: Final = "INSERT INTO callback_attempts"
# Asked for each rail in turn, the first one by name first, whether there is anything to claim or not.
CLAIM_OF_PAYIN: Final = "look_ups = d.look_ups + 1"


class CommitFault(Enum):
    """What becomes of the COMMIT of a transaction that has written."""

    LOSE_ANSWER = auto()  # it happens; the connection is cut before the client hears of it
    LOSE_COMMIT = auto()  # the connection is cut before the server hears of it
    HOLD_ANSWER = auto()  # it happens; the answer comes when `release` is called
    HOLD_COMMIT = auto()  # it comes to the server when `release` is called


@dataclass(eq=False, slots=True)
class _Link:
    """One client's connection and ours to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    writing_statements: dict[bytes, bytes] = field(default_factory=dict)
    began: bool = False
    written: list[bytes] = field(default_factory=list)
    fault: CommitFault | None = None
    sent: list[bytes] = field(default_factory=list)

    def read(self, message: bytes) -> list[bytes]:
        """Follow what the client asks for; at a COMMIT, however it is said, the statements by which its transaction wrote."""
        kind, content = message[:1], message[5:]
        if kind == b"P":
            name, query, *_ = content.split(b"\0")
            self.writing_statements.pop(name, None)
            if _WRITES.search(query):
                self.writing_statements[name] = query
        elif kind == b"B":
            _portal, name, *_ = content.split(b"\0", 2)
            writing = [self.writing_statements[name]] if name in self.writing_statements else []
            if not self.began:
                return writing
            self.written += writing
        elif kind == b"Q":
            self.began = content.startswith(b"BEGIN")
            written, self.written = self.written, []
            return written if content.startswith(b"COMMIT") else []
        return []

    def cut(self) -> None:
        """End both connections at once, whatever is still under way."""
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()


class Proxy:
    """Listens on a port of its own and carries bytes to a server, unless told otherwise."""

    def __init__(self, database_url: str) -> None:
        self._target = _address_of(database_url)
        self._port = choose_port()
        self.url: Final = (
            make_url(database_url).set(host="127.0.0.1", port=self._port).render_as_string(hide_password=False)
        )
        self.faults_done = 0
        self._faults: list[CommitFault | None] = []
        self._fault_of = b""
        self._statements_left = 0
        self._statement_fault = CommitFault.LOSE_ANSWER
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._released = asyncio.Event()
        self._delay_seconds = 0.0
        self._then_refuse = False
        self._listener: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def fail_commits(
        self, fault: CommitFault, *, count: int = 1, after: int = 0, of: str = "", then_refuse: bool = False
    ) -> None:
        """Let the next few COMMITs of transactions that have written go wrong, after some that pass.

        `of`: words of a statement; only transactions that have written by such a one count, whether it found anything or not.
        `faults_done` counts those that went wrong. `then_refuse`: with an answer that is lost, everything else is cut and
        refused.
        """
        self._released.clear()
        self._then_refuse = then_refuse
        self._fault_of = of.encode()
        self._faults = [*[None] * after, *[fault] * count]

    def fail_statement(self, number: int, fault: CommitFault) -> None:
        """Let the so-manyth statement from now on go wrong, 1 being the next one: `LOSE_ANSWER`, or `LOSE_COMMIT` before it."""
        self.faults_done, self._statements_left, self._statement_fault = 0, number, fault

    def stop_failing(self) -> None:
        """Let everything to come pass."""
        self._faults.clear()
        self._statements_left = 0

    def release(self) -> None:
        """Let held answers go on."""
        self._released.set()

    def cut(self) -> None:
        """Cut every connection."""
        for link in set(self._links):
            link.cut()

    def black_hole(self) -> None:
        """Carry nothing any more, and tell nobody: connections stay open, new ones are taken and left alone."""
        self._flowing.clear()

    def flow(self) -> None:
        """Carry everything again, also what was held."""
        self._flowing.set()

    def lead_to(self, database_url: str) -> None:
        """Answer with another server from now on; connections to the one before are cut."""
        self._target = _address_of(database_url)
        self.cut()

    def delay(self, seconds: float) -> None:
        """Carry what the server says that much later: a round trip takes as long."""
        self._delay_seconds = seconds

    def refuse(self) -> None:
        """Cut every connection and refuse new ones."""
        assert self._listener is not None
        self._listener.close()
        self.cut()

    async def listen(self) -> None:
        """Take connections (again)."""
        self._listener = await asyncio.start_server(self._carry, self._target[0], self._port)

    async def close(self) -> None:
        """End everything."""
        self.flow()
        self.release()
        self.refuse()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _carry(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        link = _Link(to_client)
        self._links.add(link)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._flowing.wait()
            with suppress(OSError):
                from_server, link.server = await asyncio.open_connection(*self._target)
                ways = [
                    asyncio.create_task(self._carry_up(from_client, link)),
                    asyncio.create_task(self._carry_down(from_server, link)),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
        finally:
            link.cut()
            self._links.discard(link)
            self._tasks.discard(task)

    async def _carry_up(self, reader: asyncio.StreamReader, link: _Link) -> None:
        assert link.server is not None
        started = False
        while True:
            # Until the startup message there are none but such without a type: requests for encryption, cancel requests.
            message = await _read_message(reader, typed=started)
            started = started or struct.unpack_from("!H", message, 4)[0] == _PROTOCOL_3
            commits = any(self._fault_of in statement for statement in link.read(message))
            if self._is_the_statement(message) or (commits and self._faults):
                link.fault = self._faults.pop(0) if self._faults else self._statement_fault
                if link.fault in (CommitFault.LOSE_COMMIT, CommitFault.HOLD_COMMIT):
                    self.faults_done += 1
                    if link.fault is CommitFault.LOSE_COMMIT:
                        link.cut()
                        return
                    await self._released.wait()
                    link.fault = None
            await self._flowing.wait()
            link.server.write(message)

    def _is_the_statement(self, message: bytes) -> bool:
        """Whether a client's message is the statement that was waited for: a Bind or a simple Query."""
        if not self._statements_left or message[:1] not in (b"B", b"Q"):
            return False
        self._statements_left -= 1
        return self._statements_left == 0

    async def _carry_down(self, reader: asyncio.StreamReader, link: _Link) -> None:
        first = await reader.readexactly(1)
        while first == b"N":
            # The answer to a request for encryption is one byte; a notice never comes first.
            await self._forward(first, link)
            first = await reader.readexactly(1)
        message = first + await _read_rest(reader)
        while True:
            if link.fault is not None and message.startswith(b"Z"):
                # Ready for query: whatever there was to commit is committed.
                self.faults_done += 1
                if link.fault is CommitFault.LOSE_ANSWER:
                    link.cut()
                    if self._then_refuse:
                        self.refuse()
                    return
                await self._released.wait()
                for held in link.sent:
                    await self._forward(held, link)
                link.fault, link.sent = None, []
            if link.fault is None:
                await self._forward(message, link)
            else:
                link.sent.append(message)
            message = await _read_message(reader, typed=True)

    async def _forward(self, message: bytes, link: _Link) -> None:
        await self._flowing.wait()
        asyncio.get_running_loop().call_later(self._delay_seconds, link.client.write, message)


def _address_of(database_url: str) -> tuple[str, int]:
    url = make_url(database_url)
    assert url.host is not None
    assert url.port is not None
    return url.host, url.port


async def _read_message(reader: asyncio.StreamReader, *, typed: bool) -> bytes:
    kind = await reader.readexactly(1) if typed else b""
    return kind + await _read_rest(reader)


async def _read_rest(reader: asyncio.StreamReader) -> bytes:
    length = await reader.readexactly(4)
    return length + await reader.readexactly(struct.unpack("!I", length)[0] - 4)


@asynccontextmanager
async def proxy(database_url: str) -> AsyncIterator[Proxy]:
    """A proxy for the length of a test."""
    running = Proxy(database_url)
    await running.listen()
    try:
        yield running
    finally:
        await running.close()


async def until_failed(network: Proxy) -> None:
    """Return once the network has done what it was told."""

    async def failed() -> bool:
        return network.faults_done >= 1

    await eventually(failed, "the network failed at COMMIT")
