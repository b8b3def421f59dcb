"""A collector of traces: a real receiver of OTLP over HTTP that keeps what it gets, to the byte and as spans."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue

from tests.stack import DEADLINE_SECONDS

_PATH: Final = "/v1/traces"


@dataclass(frozen=True, slots=True)
class Exported:
    """A span as it came; ids in hex, `parent_id` empty for the first of a trace, `links` as (trace id, span id)."""

    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    links: list[tuple[str, str]]
    attributes: dict[str, str | int]
    failed: bool


@dataclass(slots=True)
class Collector:
    """What came so far."""

    port: int = 0
    bodies: list[bytes] = field(default_factory=list)
    spans: list[Exported] = field(default_factory=list)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process export to it, soon."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.port}", "OTEL_BSP_SCHEDULE_DELAY": "50"}

    async def until(self, reached: Callable[[list[Exported]], bool]) -> None:
        """Wait until these spans have come."""
        async with asyncio.timeout(DEADLINE_SECONDS), self._changed:
            await self._changed.wait_for(lambda: reached(self.spans))

    def find(self, service: str, name: str) -> list[Exported]:
        """The spans of a service by a name."""
        return [span for span in self.spans if (span.service, span.name) == (service, name)]

    async def receive(self, request: web.Request) -> web.Response:
        """The handler."""
        body = await request.read()
        self.bodies.append(body)
        async with self._changed:
            self.spans += _parse(body)
            self._changed.notify_all()
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    """A collector for the length of a test."""
    running = Collector()
    app = web.Application(client_max_size=2**26)
    app.router.add_post(_PATH, running.receive)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        running.port = runner.addresses[0][1]
        yield running
    finally:
        await runner.cleanup()


def _parse(body: bytes) -> list[Exported]:
    return [
        Exported(
            service=str(_attributes(resource.resource.attributes)["service.name"]),
            name=span.name,
            kind=span.kind,
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
            attributes=_attributes(span.attributes),
            failed=span.status.code == span.status.STATUS_CODE_ERROR,
        )
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _attributes(pairs: "list[KeyValue]") -> dict[str, str | int]:
    return {pair.key: pair.value.string_value or pair.value.int_value for pair in pairs}
