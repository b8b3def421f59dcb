"""The HTTP server under the application: what never becomes a request is answered in the contract's shape too.

aiohttp answers and logs such input by repeating it; it may hold a signature or a card number, so here it is neither.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from http import HTTPStatus
from time import monotonic
from typing import Any

from aiohttp import web
from uuid_utils import uuid4

from common.domain.times import render_time
from common.errors import InvariantViolated, PayoutsError, UnreadableRequest
from gateway.errors import REQUEST_ID, SERVER, render_error
from gateway.log import Subject, log_request

Handle = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class GatewayRunner(web.AppRunner):
    """Runs an application whose every answer has the contract's shape. Bodies stay as received: they are what was signed."""

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(app, access_log=None, auto_decompress=False, **options)

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return _Server(_in_shape(server.request_handler), request_factory=server.request_factory, **self._kwargs)


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Refuse what could not be parsed, and close; the input is neither repeated nor logged."""
        del exc, message
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was begun already")
        return _refuse(UnreadableRequest() if status < HTTPStatus.INTERNAL_SERVER_ERROR else InvariantViolated())


def _in_shape(handle: Handle) -> Handle:
    """The application, with what aiohttp itself refuses before any middleware put into shape."""

    async def shaped(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handle(request)
        except web.HTTPException:
            return _refuse(UnreadableRequest())

    return shaped


def _refuse(error: PayoutsError) -> web.Response:
    request_id = uuid4().hex
    response = render_error(error, request_id=request_id, server_time=render_time(datetime.now(UTC)))
    response.headers[REQUEST_ID] = request_id
    response.headers["Server"] = SERVER
    response.force_close()
    log_request(request_id=request_id, status=response.status, error=error, subject=Subject(), started=monotonic())
    return response
