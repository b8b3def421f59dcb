"""The spans of `common.tracing`, made by OpenTelemetry and exported by OTLP over HTTP. Imported only where they are wanted."""

import logging
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from threading import Timer
from types import TracebackType
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.log import LogEvent, get_logger
from common.tracing import Attributes, Kind, Span

# A collector that does not answer keeps no process from ending.
_CLOSE_SECONDS: Final = 2.0
_KINDS: Final = {kind: trace.SpanKind[kind.name] for kind in Kind}
_PROPAGATOR: Final = TraceContextTextMapPropagator()


def open_tracer(environ: Mapping[str, str], service: str) -> "OpenTelemetryTracer":
    """A tracer that exports to where `OTEL_EXPORTER_OTLP_…` says. `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` go before
    `service`; `OTEL_TRACES_SAMPLER` before the share of requests, from 0 to 1, that `OTEL_TRACES_SAMPLER_ARG` alone asks for.
    """
    is_named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if is_named else {"service.name": service})
    provider = TracerProvider(sampler=_sampler(environ), resource=resource, shutdown_on_exit=False)
    exporter = _Exporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    # What becomes of an export is told by our own event, once; the library tells it with every try.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    return OpenTelemetryTracer(provider, exporter)


class _Exporter(OTLPSpanExporter):
    """Tells what was lost."""

    def __init__(self) -> None:
        super().__init__()
        self._context = copy_context()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """In a thread of the library's own."""
        result = super().export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._context.run(get_logger().warning, LogEvent.SPANS_LOST, count=len(spans))
        return result


def _sampler(environ: Mapping[str, str]) -> Sampler | None:
    share = environ.get("OTEL_TRACES_SAMPLER_ARG", "")
    if environ.get("OTEL_TRACES_SAMPLER") or not share:
        # As the library reads it; without a word it takes everything whose parent it took.
        return None
    try:
        return ParentBased(TraceIdRatioBased(float(share)))
    except ValueError:
        raise SystemExit("OTEL_TRACES_SAMPLER_ARG: must be a share from 0 to 1") from None


class OpenTelemetryTracer:
    """Makes spans of a provider, and closes its exporter."""

    def __init__(self, provider: TracerProvider, exporter: SpanExporter) -> None:
        self._provider = provider
        self._exporter = exporter
        self._tracer = provider.get_tracer("payouts")

    def span(
        self, name: str, kind: Kind, parent: str | None, links: Sequence[str], attributes: Attributes | None
    ) -> Span:
        """As `common.tracing.Tracer` says."""
        known = [context for context in map(_read, links) if context.is_valid]
        above = None if parent is None else _read(parent)
        if above is not None and not above.is_valid:
            # Of a context that cannot be read nothing can be told; a trace of its own would only puzzle.
            return Span()
        span = self._tracer.start_span(
            name,
            # An empty context keeps away whatever some library may have made current.
            Context() if above is None else trace.set_span_in_context(trace.NonRecordingSpan(above), Context()),
            kind=_KINDS[kind],
            attributes=_known(attributes),
            links=[trace.Link(context) for context in known],
            record_exception=False,
            set_status_on_exception=False,
        )
        return _Recorded(self, span)

    def close(self) -> None:
        """Export what is left, for at most `_CLOSE_SECONDS`."""
        enough = Timer(_CLOSE_SECONDS, self._exporter.shutdown)
        enough.start()
        self._provider.shutdown()
        enough.cancel()


class _Recorded(Span):
    __slots__ = ("_span", "_tracer", "traceparent")

    def __init__(self, tracer: OpenTelemetryTracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span
        self.traceparent = _render(span.get_span_context())

    def child(self, name: str, kind: Kind = Kind.INTERNAL, attributes: Attributes | None = None) -> Span:
        parent = self.traceparent
        return Span() if parent is None else self._tracer.span(name, kind, parent, (), attributes)

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(_known(attributes))

    def fail(self, reason: str) -> None:
        self._span.set_attribute("error.type", reason)
        self._span.set_status(trace.StatusCode.ERROR)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is not None:
            self.fail(kind.__name__)
        self._span.end()


def _known(attributes: Attributes | None) -> dict[str, str | int | float | bool]:
    return {name: value for name, value in (attributes or {}).items() if value is not None}


def _read(traceparent: str) -> trace.SpanContext:
    """A context as it was written; an invalid one when it is nonsense."""
    return trace.get_current_span(_PROPAGATOR.extract({"traceparent": traceparent}, Context())).get_span_context()


def _render(context: trace.SpanContext) -> str | None:
    if not context.trace_flags.sampled:
        return None
    return f"00-{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}-{context.trace_flags:02x}"
