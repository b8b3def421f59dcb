"""Connections to peers who may talk without ever answering: receivers of callbacks, and banks."""

import asyncio
from functools import partial
from typing import Any, Final, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError, RawResponseMessage
from aiohttp.streams import StreamReader

# Answers of 1xx before the one that counts: RFC 9110, 15.2, allows any number, and each costs time that others wait for.
_INTERIM_MAX: Final = 16
_SLICE_BYTES: Final = 16_384


class _Handler(ResponseHandler):
    """A connection that gives up on a peer that talks without ever answering. aiohttp itself would listen for ever."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._interim = 0

    def data_received(self, data: bytes) -> None:
        """In slices: what came in one piece may be thousands of answers."""
        for begin in range(0, len(data), _SLICE_BYTES):
            if not self.is_connected():
                return
            super().data_received(data[begin : begin + _SLICE_BYTES])

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """One answer's head was read."""
        is_interim = data[0].code // 100 == 1
        self._interim = self._interim + 1 if is_interim else 0
        if self._interim <= _INTERIM_MAX:
            super().feed_data(data, size)
        elif self.transport is not None and self.exception() is None:
            self.set_exception(HttpProcessingError(message="too many interim answers"))
            self.transport.abort()


class BoundedConnector(aiohttp.TCPConnector):
    """aiohttp's, whose connections end when nothing but interim answers comes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # aiohttp has no public way to name the protocol of its connections.
        self._factory = cast(partial[ResponseHandler], partial(_Handler, loop=asyncio.get_running_loop()))
