"""The load generator: `python -m bench.load FOLDER` creates payouts as merchants do, and keeps what was answered.

Closed loop for rates: so many connections, each sends its next request when the last one is answered. Open loop for
latencies: requests have their times, drawn before (a Poisson process), whatever the server does; what finds no free
connection waits here, and each latency counts from the time that was drawn, so a server that stalls cannot hide it
(coordinated omission). Every request is signed for real, with an `external_id` of its own, and sent once.

It must not be what is measured: a process of its own, uvloop, one object for each connection and none for a request,
everything rendered and signed before the first is sent as far as the window of signatures allows, no garbage collection.
What it took of its processor, and how late it was itself, stands in its results.
"""

import asyncio
import gc
import json
import random
import re
import time
from array import array
from collections import deque
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, cast

import click
import uvloop

from common.domain.signing import sign_v1
from ops.ports import LOOPBACK

PLAN, ANSWERS = "plan.json", "answers.json"
# What no answer came for, or what was not whole.
UNANSWERED: Final = 0

_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_ID: Final = b'"id":"'
_AMOUNTS_MINOR: Final = (100, 1000)
_SHOW_SECONDS: Final = 0.5
_GRACE_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.01
# What the loop can sleep at least; asked for less it spins, and takes the processor of what is measured.
_TICK_SECONDS: Final = 0.001
# Rendered before the start in closed loop: more than any server here answers.
_RENDERED_PER_SECOND: Final = 12_000


@dataclass(frozen=True, slots=True)
class Sender:
    """A merchant as the generator knows it."""

    api_key: str
    api_secret: str = field(repr=False)
    callback_url: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send. `rate` per second in open loop; without it, closed loop. Nobody counts what came in `warm_seconds`.

    `count`: in closed loop, stop after so many, whatever the time.
    `zipf`: the exponent by which the first senders are busier than the last; 0: all alike.
    """

    port: int
    path: str
    prefix: str
    senders: list[Sender] = field(repr=False)
    connections: int
    seconds: float
    warm_seconds: float = 1.0
    rate: float | None = None
    count: int | None = None
    zipf: float = 0.0
    seed: int = 1

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """The plan that is in a folder."""
        known = json.loads((folder / PLAN).read_text())
        return cls(**{**known, "senders": [Sender(**sender) for sender in known["senders"]]})

    def write(self, folder: Path) -> None:
        """Put it into a folder, which others must not read: it holds secrets."""
        (folder / PLAN).write_text(json.dumps(asdict(self)))

    @property
    def whole_seconds(self) -> float:
        """The warming up, and what counts."""
        return self.warm_seconds + self.seconds


def render_request(plan: Plan, number: int, sender: Sender, amount_minor: int, timestamp: int) -> bytes:
    """One signed create, as it goes over the wire."""
    body = (
        f'{{"external_id":"{plan.prefix}{number}","amount":"{amount_minor // 100}.{amount_minor % 100:02}",'
        f'"currency":"BDT","card_number":"017{number % 10_000:04}5678","callback_url":"{sender.callback_url}"}}'
    ).encode()
    signature = sign_v1(sender.api_secret, str(timestamp), "POST", plan.path, "", body)
    head = (
        f"POST {plan.path} HTTP/1.1\r\nHost: {LOOPBACK}:{plan.port}\r\nContent-Type: application/json\r\n"
        f"X-API-Key: {sender.api_key}\r\nX-Timestamp: {timestamp}\r\nX-Signature: {signature}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Book:
    """All requests of a plan by their number: who sends what when, and what came of it. Times are Unix seconds."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._chance = random.Random(plan.seed)  # noqa: S311 no secret
        self._weights = list(accumulate(1 / (place**plan.zipf) for place in range(1, len(plan.senders) + 1)))
        self._rendered: list[bytes] = []
        self.senders = array("l")
        self.amounts = array("l")
        self.intended = array("d")
        self.sent = array("d")
        self.done = array("d")
        self.statuses = array("l")
        self.ids: list[str] = []
        self.rendered_late = 0

    def prepare(self, moments: list[float]) -> None:
        """Render a request for each of these moments, signed for it."""
        for moment in moments:
            self._append(moment)

    def take(self, number: int) -> bytes:
        """The bytes of a request that is sent now; those that are asked for beyond what was prepared are made at once."""
        if number == len(self._rendered):
            self._append(time.time())
            self.rendered_late += 1
        data = self._rendered[number]
        self._rendered[number] = b""
        return data

    def _append(self, moment: float) -> None:
        number = len(self._rendered)
        (who,) = self._chance.choices(range(len(self._plan.senders)), cum_weights=self._weights)
        amount_minor = self._chance.randrange(*_AMOUNTS_MINOR)
        sender = self._plan.senders[who]
        self._rendered.append(render_request(self._plan, number, sender, amount_minor, int(moment)))
        self.senders.append(who)
        self.amounts.append(amount_minor)
        for column in (self.intended, self.sent, self.done):
            column.append(0.0)
        self.statuses.append(UNANSWERED)
        self.ids.append("")

    def columns(self) -> dict[str, Any]:
        """All that were meant to be sent, column by column; what was prepared and not needed is left out."""
        count = sum(moment > 0 for moment in self.intended)
        names = ("senders", "amounts", "intended", "sent", "done", "statuses", "ids")
        return {name: list(getattr(self, name)[:count]) for name in names}


class Connection(asyncio.Protocol):
    """One connection, kept alive, with at most one request on its way."""

    def __init__(self, load: "Load") -> None:
        self._load = load
        self._received = b""
        self._transport: asyncio.WriteTransport | None = None
        self.number: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It can be used."""
        self._transport = cast(asyncio.WriteTransport, transport)

    def send(self, number: int, data: bytes) -> None:
        """Send a request."""
        assert self._transport is not None
        self.number = number
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        """Go on once the answer is whole. Answers without a `Content-Length` are not what we ask for."""
        received = self._received + data if self._received else data
        end = received.find(_END)
        length = _LENGTH.search(received, 0, end) if end >= 0 else None
        if length is None or len(received) < end + len(_END) + int(length[1]):
            self._received = received
            return
        self._received = b""
        self._load.note(self, int(received[9:12]), received[end + len(_END) :])

    def connection_lost(self, _error: Exception | None) -> None:
        """What was on its way stays unanswered: nobody knows what became of it."""
        self._load.lose(self)

    def close(self) -> None:
        """Hang up."""
        assert self._transport is not None
        self._transport.close()


class Load:
    """The run itself."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._book = Book(plan)
        self._idle: deque[Connection] = deque()
        self._queue: deque[int] = deque()
        self._next = 0
        self._under_way = 0
        self._answered = 0
        self._lost = 0
        self._ends_at = 0.0
        self._leaving = False
        # Unix time from the steady clock: what others wrote down can be compared, and nothing jumps.
        self._epoch = time.time() - time.monotonic()

    async def run(self) -> dict[str, Any]:
        """Send it all, wait for the answers; returns what there is to know."""
        plan, book = self._plan, self._book
        times = [] if plan.rate is None else draw_times(plan.rate, plan.whole_seconds, plan.seed)
        now = self._now()
        # Signed for when they will be sent, but for the seconds that this takes.
        book.prepare([now + moment for moment in times] if times else self._middles(now))
        for _ in range(plan.connections):
            await self._connect()
        cpu, began = time.process_time(), self._now()
        self._ends_at = began + plan.whole_seconds
        showing = asyncio.create_task(self._show())
        if plan.rate is None:
            for _ in range(plan.connections):
                self._go_on(self._now())
            while self._wants_more(self._now()):  # noqa: ASYNC110 - answers send the next ones
                await asyncio.sleep(_POLL_SECONDS)
        else:
            await self._send_on_time([began + moment for moment in times])
        await self._until_answered()
        cpu, ended = time.process_time() - cpu, self._now()
        showing.cancel()
        self._leaving = True
        for connection in self._idle:
            connection.close()
        return {
            "began": began + plan.warm_seconds,
            "ended": self._ends_at,
            "cpu_share": cpu / (ended - began),
            "rendered_late": book.rendered_late,
            "connections_lost": self._lost,
            **book.columns(),
        }

    def _middles(self, now: float) -> list[float]:
        count = self._plan.count or int(self._plan.whole_seconds * _RENDERED_PER_SECOND)
        return [now + self._plan.whole_seconds / 2] * count

    async def _until_answered(self) -> None:
        """Wait for what is still on its way, for a while."""
        until = self._ends_at + _GRACE_SECONDS
        while (self._under_way or self._queue) and self._now() < until:  # noqa: ASYNC110 - nothing is measured any more
            await asyncio.sleep(_POLL_SECONDS)

    async def _show(self) -> None:
        """Tell how far it is, a line each time; for ever."""
        while True:
            seconds = self._now() - self._ends_at + self._plan.whole_seconds
            print(json.dumps({"seconds": round(seconds, 1), "answered": self._answered}), flush=True)
            await asyncio.sleep(_SHOW_SECONDS)

    def note(self, connection: Connection, status: int, body: bytes) -> None:
        """An answer came."""
        number, now = connection.number, self._now()
        assert number is not None, "a server speaks when it is asked"
        book = self._book
        connection.number = None
        book.done[number] = now
        book.statuses[number] = status
        start = body.find(_ID)
        if start >= 0:
            start += len(_ID)
            book.ids[number] = body[start : body.find(b'"', start)].decode()
        self._under_way -= 1
        self._answered += 1
        self._idle.append(connection)
        self._go_on(now)

    def lose(self, connection: Connection) -> None:
        """A connection is gone; another takes its place."""
        if self._leaving:
            return
        self._lost += 1
        if connection.number is not None:
            self._under_way -= 1
        else:
            self._idle.remove(connection)
        self._reconnecting = asyncio.create_task(self._reconnect())

    async def _reconnect(self) -> None:
        await self._connect()
        self._go_on(self._now())

    async def _connect(self) -> None:
        loop, port = asyncio.get_running_loop(), self._plan.port
        _, connection = await loop.create_connection(lambda: Connection(self), LOOPBACK, port)
        self._idle.append(connection)

    async def _send_on_time(self, times: list[float]) -> None:
        """Send each when its time has come, at once when that has passed."""
        for number, moment in enumerate(times):
            while (ahead := moment - self._now()) > 0:  # noqa: ASYNC110 - a clock
                await asyncio.sleep(max(ahead, _TICK_SECONDS))
            self._book.intended[number] = moment
            if self._idle:
                self._send(number, self._now())
            else:
                self._queue.append(number)

    def _go_on(self, now: float) -> None:
        """A connection is free: for what waits, or in closed loop for the next one."""
        if self._queue:
            self._send(self._queue.popleft(), now)
        elif self._wants_more(now):
            number = self._next
            self._next += 1
            self._send(number, now)

    def _wants_more(self, now: float) -> bool:
        """Whether, in closed loop, another one is to be sent."""
        plan = self._plan
        return plan.rate is None and now < self._ends_at and (plan.count is None or self._next < plan.count)

    def _send(self, number: int, now: float) -> None:
        data = self._book.take(number)
        self._book.sent[number] = now
        if self._plan.rate is None:
            self._book.intended[number] = now
        self._under_way += 1
        self._idle.popleft().send(number, data)

    def _now(self) -> float:
        return self._epoch + time.monotonic()


def draw_times(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests are sent, in seconds from the start: a Poisson process of that many a second."""
    chance, moment, times = random.Random(seed), 0.0, list[float]()  # noqa: S311 no secret
    while (moment := moment + chance.expovariate(rate)) < seconds:
        times.append(moment)
    return times


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Carry out the plan in a folder, and leave the answers there; progress is printed as JSON, line by line."""
    gc.disable()
    answers = uvloop.run(Load(Plan.read(folder)).run())
    (folder / ANSWERS).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
