"""A merchant's endpoint for callbacks: a real HTTP server that keeps what it gets, and can stall after getting it."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web
from standardwebhooks.webhooks import Webhook

from common.domain.signing import sign_body
from ops.ports import choose_port


@dataclass(frozen=True, slots=True)
class Delivery:
    """One POST as it came."""

    webhook_id: str
    body: bytes
    headers: Mapping[str, str]

    def assert_signed(self, webhook_secret: str) -> None:
        """Both signatures hold; the first is judged by the standard's own library."""
        Webhook(webhook_secret).verify(self.body, dict(self.headers))
        assert self.headers["X-Signature"] == sign_body(webhook_secret, self.headers["X-Timestamp"], self.body)


class Receiver:
    """Answers 200 to everything, as long as `answering` is set; what came is in `deliveries` before that."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/callbacks"
        self.deliveries: list[Delivery] = []
        self.answering = asyncio.Event()
        self.answering.set()

    async def receive(self, request: web.Request) -> web.Response:
        """The handler."""
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        headers |= {name: request.headers[name] for name in ("X-Timestamp", "X-Signature")}
        self.deliveries.append(Delivery(request.headers["webhook-id"], body, headers))
        await self.answering.wait()
        return web.Response(text="thank you")


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver for the length of a test."""
    port = choose_port()
    running = Receiver(port)
    app = web.Application()
    app.router.add_post("/callbacks", running.receive)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield running
    finally:
        running.answering.set()
        await runner.cleanup()
