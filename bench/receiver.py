"""Merchants as cheap as they can be, so that they are not what is measured: `python -m bench.receiver`.

One port on all addresses of the machine: every address of 127.0.0.0/8 is a merchant's. The first part of the path says how
an endpoint behaves: `/ok` answers 200 at once, `/fail` 500, anything else takes the request and never answers. What
came is asked for on the other port: `/totals`, `/arrivals`, and `POST /forget`.
"""

import asyncio
import re
import time
from collections import defaultdict
from typing import Any, Final, cast

import click
import uvloop
from aiohttp import web

from common.process import stop_requested
from ops.ports import LOOPBACK

_EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 it is the many loopback addresses that are meant
_BACKLOG: Final = 4096
_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_WEBHOOK_ID: Final = re.compile(rb"\r\nwebhook-id: *([^\r]*)", re.IGNORECASE)
_ANSWERS: Final = {
    b"/ok": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"/fail": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\nno",
}


class Memory:
    """What came: for each `webhook-id` when, in Unix seconds. `held`: requests that wait for the answer that never comes."""

    def __init__(self) -> None:
        self.arrivals: defaultdict[str, list[float]] = defaultdict(list)
        self.held = 0
        self.forget()

    def forget(self) -> None:
        """Nothing has come yet."""
        self.arrivals.clear()
        self.received = 0
        self.first = self.last = 0.0
        self.held_max = self.held

    def note(self, webhook_id: str) -> None:
        """A request came, whole."""
        now = time.time()
        self.received += 1
        self.first = self.first or now
        self.last = now
        self.arrivals[webhook_id].append(now)

    def hold(self, change: int) -> None:
        """One more or one less waits for its answer."""
        self.held += change
        self.held_max = max(self.held_max, self.held)

    def totals(self) -> dict[str, Any]:
        """The sums."""
        names = ("received", "first", "last", "held", "held_max")
        return {name: getattr(self, name) for name in names}


class Endpoint(asyncio.Protocol):
    """One connection of a caller who sends well-formed requests with a `Content-Length`; it understands nothing else."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._received = b""
        self._held = 0
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It begins."""
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, _error: Exception | None) -> None:
        """It is over; nobody waits any more."""
        self._memory.hold(-self._held)

    def data_received(self, data: bytes) -> None:
        """Answer every request that is there as a whole."""
        self._received = received = self._received + data if self._received else data
        while (end := received.find(_END)) >= 0:
            head = received[:end]
            length = _LENGTH.search(head)
            size = end + len(_END) + (int(length[1]) if length else 0)
            if len(received) < size:
                return
            self._answer(head)
            self._received = received = received[size:]

    def _answer(self, head: bytes) -> None:
        found = _WEBHOOK_ID.search(head)
        self._memory.note(found[1].decode("latin-1") if found else "")
        path = head.split(b" ", 2)[1]
        answer = _ANSWERS.get(path[: path.find(b"/", 1)] if b"/" in path[1:] else path)
        if answer is None:
            self._held += 1
            self._memory.hold(1)
            return
        assert self._transport is not None
        self._transport.write(answer)


def create_app(memory: Memory) -> web.Application:
    """Where it is asked what came."""

    async def readyz(_request: web.Request) -> web.Response:
        return web.json_response({"status": "ready"})

    async def totals(_request: web.Request) -> web.Response:
        return web.json_response(memory.totals())

    async def arrivals(_request: web.Request) -> web.Response:
        return web.json_response(memory.arrivals)

    async def forget(_request: web.Request) -> web.Response:
        memory.forget()
        return web.Response(status=204)

    app = web.Application()
    app.add_routes(
        [
            web.get("/readyz", readyz),
            web.get("/totals", totals),
            web.get("/arrivals", arrivals),
            web.post("/forget", forget),
        ]
    )
    return app


async def serve(port: int, control_port: int) -> None:
    """Receive until told to stop."""
    stop, memory = stop_requested(), Memory()
    server = await asyncio.get_running_loop().create_server(
        lambda: Endpoint(memory), _EVERYWHERE, port, backlog=_BACKLOG
    )
    runner = web.AppRunner(create_app(memory), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, LOOPBACK, control_port).start()
    await stop.wait()
    server.close()
    await runner.cleanup()


@click.command()
@click.option("--port", type=int, required=True, help="Of the merchants.")
@click.option("--control-port", type=int, required=True, help="To ask what came.")
def main(port: int, control_port: int) -> None:
    """Be all the merchants, until told to stop."""
    uvloop.run(serve(port, control_port))


if __name__ == "__main__":
    main()
