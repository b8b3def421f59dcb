"""A network that fails on demand: a TCP proxy in front of RabbitMQ that sees AMQP frames, and fails at the n-th of a kind.

Source: AMQP 0-9-1, 4.2 "AMQP Wire-Level Format": after a header of eight bytes, frames of type, channel, size, payload and
an end octet; the payload of a method frame begins with its class and its method.
"""

import asyncio
import re
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from yarl import URL

from ops.ports import choose_port

_PROTOCOL_HEADER_BYTES: Final = 8
_FRAME_HEAD: Final = struct.Struct("!BHL")
_METHOD_HEAD: Final = struct.Struct("!HH")
_METHOD_FRAME: Final = 1
_READ_BYTES: Final = 65_536
# Kernel buffers stay small, so that a connection that is paused fills up within a few frames.
_BUFFER_BYTES: Final = 4_096
_NAME: Final = re.compile(rb"connection_nameS(....)", re.DOTALL)

Method = tuple[int, int]
START_OK: Final[Method] = (10, 11)
CONNECTION_CLOSE: Final[Method] = (10, 50)
CHANNEL_CLOSE: Final[Method] = (20, 40)
PUBLISH: Final[Method] = (60, 40)
DELIVER: Final[Method] = (60, 60)
ACK: Final[Method] = (60, 80)
REJECT: Final[Method] = (60, 90)
NACK: Final[Method] = (60, 120)


class Way(Enum):
    """Where a frame goes."""

    UP = auto()  # to the broker
    DOWN = auto()  # to us


class Fate(Enum):
    """What becomes of the frame that a rule waits for, and of its connection."""

    RESET = auto()  # the frame is lost; both sides get a reset
    BLACK_HOLE = auto()  # from this frame on, that way, everything vanishes; the connection stays open
    DROP = auto()  # this frame vanishes, the next ones pass


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it passes. `method` is None for headers, bodies and heartbeats."""

    way: Way
    channel: int
    method: Method | None
    payload: bytes


@dataclass(eq=False, slots=True)
class Rule:
    """Lets something happen at the `nth` frame of a method; on connections of that name only, if one is given."""

    fate: Fate
    way: Way
    method: Method
    nth: int = 1
    link: str = ""
    fired: asyncio.Event = field(default_factory=asyncio.Event)

    def meets(self, name: str, frame: Frame) -> bool:
        """Count a frame; True at the one to fail at."""
        if self.fired.is_set() or frame.way is not self.way or frame.method != self.method or self.link not in name:
            return False
        self.nth -= 1
        if self.nth == 0:
            self.fired.set()
        return self.nth == 0


@dataclass(eq=False, slots=True)
class _Link:
    """One connection of ours, and the proxy's to the broker; with the deliveries that wait for a word, by channel."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    name: str = ""
    gone: set[Way] = field(default_factory=set)
    flowing: dict[Way, asyncio.Event] = field(default_factory=lambda: {way: asyncio.Event() for way in Way})
    unsettled: dict[int, set[int]] = field(default_factory=dict)
    published: dict[int, int] = field(default_factory=dict)
    unconfirmed: dict[int, set[int]] = field(default_factory=dict)

    def reset(self) -> None:
        """End both connections with a reset, whatever is still under way."""
        for writer in (self.client, self.server):
            with suppress(OSError, AttributeError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class AmqpProxy:
    """Listens on a port of its own and carries frames to a broker and back, unless told otherwise.

    `counts` says how many frames of each method passed each way. `unconfirmed` and `unacknowledged` count publishes and
    deliveries that the other side gave no word on. `foreign_acks` are acknowledgements of tags that were not delivered, or
    no longer wait, on their channel. `closes` is why the broker closed channels and connections.
    """

    def __init__(self, broker_url: str) -> None:
        target = URL(broker_url)
        assert target.host is not None
        assert target.port is not None
        self._target = target.host, target.port
        self._port = choose_port()
        self.url: Final = str(target.with_host("127.0.0.1").with_port(self._port))
        self.counts: Counter[tuple[Way, Method]] = Counter()
        self.unconfirmed = 0
        self.unacknowledged = 0
        self.foreign_acks: list[str] = []
        self.closes: list[tuple[int, str]] = []
        self._rules: list[Rule] = []
        self._dark = False
        self._listener: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def links(self) -> list[str]:
        """The names of the connections that are open."""
        return sorted(link.name for link in self._links)

    def at(self, fate: Fate, way: Way, method: Method, *, nth: int = 1, link: str = "") -> Rule:
        """Let something happen at a frame to come; `fired` of the rule is set when it did."""
        rule = Rule(fate, way, method, nth, link)
        self._rules.append(rule)
        return rule

    def reset(self, link: str = "") -> None:
        """Reset the connections of that name, or all."""
        for each in [each for each in self._links if link in each.name]:
            each.reset()

    def pause(self, way: Way) -> None:
        """Carry nothing that way any more; what is sent piles up."""
        for link in self._links:
            link.flowing[way].clear()

    def go_dark(self) -> None:
        """Everything vanishes, both ways, and new connections are taken and left alone, until `flow`."""
        self._dark = True
        for link in self._links:
            link.gone.update(Way)

    def flow(self) -> None:
        """Carry everything again that is sent from now on, and what was paused. What vanished is gone."""
        self._dark = False
        for link in self._links:
            for event in link.flowing.values():
                event.set()

    async def listen(self) -> None:
        """Take connections."""
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        listening.bind(("127.0.0.1", self._port))
        self._listener = await asyncio.start_server(self._carry, sock=listening, limit=_BUFFER_BYTES)

    async def close(self) -> None:
        """End everything."""
        assert self._listener is not None
        self._listener.close()
        self.flow()
        self.reset()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _carry(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._dark:
                await from_client.read()
                return
            with suppress(OSError):
                from_server, to_server = await asyncio.open_connection(*self._target, limit=_BUFFER_BYTES)
                await self._carry_link(from_client, from_server, _Link(to_client, to_server))
        except asyncio.CancelledError:
            # The end of the test; asyncio's server would log a cancelled task as an error.
            pass
        finally:
            to_client.transport.abort()
            self._tasks.discard(task)

    async def _carry_link(
        self, from_client: asyncio.StreamReader, from_server: asyncio.StreamReader, link: _Link
    ) -> None:
        self._links.add(link)
        for event in link.flowing.values():
            event.set()
        ways = [
            asyncio.create_task(self._carry_way(Way.UP, from_client, link.server, link)),
            asyncio.create_task(self._carry_way(Way.DOWN, from_server, link.client, link)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(link)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            link.server.transport.abort()
            link.client.transport.abort()

    async def _carry_way(
        self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link
    ) -> None:
        if way is Way.UP:
            writer.write(await reader.readexactly(_PROTOCOL_HEADER_BYTES))
        pending = b""
        with suppress(OSError):
            while data := await reader.read(_READ_BYTES):
                pending += data
                used, passing = 0, bytearray()
                for size, frame in _frames(way, pending):
                    self._note(frame, link)
                    fate = self._fate(frame, link)
                    if fate is Fate.RESET:
                        return
                    if not link.flowing[way].is_set():
                        writer.write(bytes(passing))
                        passing.clear()
                        await link.flowing[way].wait()
                    if way not in link.gone and fate is not Fate.DROP:
                        passing += pending[used : used + size]
                    used += size
                pending = pending[used:]
                writer.write(bytes(passing))
                await writer.drain()

    def _fate(self, frame: Frame, link: _Link) -> Fate | None:
        for rule in self._rules:
            if rule.meets(link.name, frame):
                if rule.fate is Fate.RESET:
                    link.reset()
                elif rule.fate is Fate.BLACK_HOLE:
                    link.gone.add(frame.way)
                return rule.fate
        return None

    def _note(self, frame: Frame, link: _Link) -> None:
        if frame.method is None:
            return
        self.counts[frame.way, frame.method] += 1
        if frame.method == START_OK and (found := _NAME.search(frame.payload)):
            (length,) = struct.unpack("!L", found[1])
            link.name = frame.payload[found.end() : found.end() + length].decode()
        elif frame.way is Way.DOWN and frame.method in (CHANNEL_CLOSE, CONNECTION_CLOSE):
            code, length = struct.unpack_from("!HB", frame.payload, 4)
            self.closes.append((code, frame.payload[7 : 7 + length].decode()))
        elif frame.way is Way.DOWN and frame.method == DELIVER:
            link.unsettled.setdefault(frame.channel, set()).add(_delivered_tag(frame.payload))
            self.unacknowledged += 1
        elif frame.way is Way.UP and frame.method == PUBLISH:
            number = link.published[frame.channel] = link.published.get(frame.channel, 0) + 1
            link.unconfirmed.setdefault(frame.channel, set()).add(number)
            self.unconfirmed += 1
        elif frame.way is Way.DOWN and frame.method in (ACK, NACK):
            waiting = link.unconfirmed[frame.channel]
            self.unconfirmed -= len(waiting)
            waiting -= _settled(frame, waiting)
            self.unconfirmed += len(waiting)
        elif frame.way is Way.UP and frame.method in (ACK, NACK, REJECT):
            waiting = link.unsettled.setdefault(frame.channel, set())
            settled = _settled(frame, waiting)
            if not settled:
                self.foreign_acks.append(f"{link.name}: channel {frame.channel}, waiting {sorted(waiting)}")
            waiting -= settled
            self.unacknowledged -= len(settled)


@asynccontextmanager
async def amqp_proxy(broker_url: str) -> AsyncIterator[AmqpProxy]:
    """A proxy for the length of a test."""
    proxy = AmqpProxy(broker_url)
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.close()


def _frames(way: Way, data: bytes) -> Iterator[tuple[int, Frame]]:
    """The whole frames at the start of some bytes, each with its size on the wire."""
    start = 0
    while len(data) - start >= _FRAME_HEAD.size:
        kind, channel, size = _FRAME_HEAD.unpack_from(data, start)
        end = start + _FRAME_HEAD.size + size + 1
        if end > len(data):
            return
        payload = data[start + _FRAME_HEAD.size : end - 1]
        method = None
        if kind == _METHOD_FRAME:
            class_id, method_id = _METHOD_HEAD.unpack_from(payload)
            method = (class_id, method_id)
        yield end - start, Frame(way, channel, method, payload)
        start = end


def _settled(frame: Frame, waiting: set[int]) -> set[int]:
    """The tags of those that wait that an ack, nack or reject speaks of; none when its own tag does not wait."""
    tag, bits = struct.unpack_from("!QB", frame.payload, 4)
    multiple = frame.method != REJECT and bool(bits & 1)
    return {each for each in waiting if each == tag or (multiple and each <= tag)} if tag in waiting else set()


def _delivered_tag(payload: bytes) -> int:
    (tag,) = struct.unpack_from("!Q", payload, 5 + payload[4])
    return int(tag)
