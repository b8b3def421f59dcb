"""Traces: one payout followed from the request that brought it, through the database and the broker, to its callbacks.

Optional: without `payouts[otel]`, or with nothing asked of it in the environment, every span here is one and the same that does
nothing. What is traced is decided once, by the request: its `traceparent` is stored with the payout when it is sampled, and
whoever finds one there goes on. Where spans begin and what they say stands in our own code, word by word: libraries that trace
by themselves write down statements, URLs and headers, and hand our context on to merchants.

Source: W3C Trace Context, section 3.2, for `traceparent`; the semantic conventions of OpenTelemetry for the names.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from importlib import import_module
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeAlias

from common.log import LogEvent, get_logger

Attributes: TypeAlias = Mapping[str, str | int | float | bool | None]

# What turns it on, or off, in the environment; the rest of `OTEL_…` is for the library.
_EXPORTER: Final = "OTEL_TRACES_EXPORTER"
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_DISABLED: Final = "OTEL_SDK_DISABLED"


class Kind(Enum):
    """Which side of an exchange a span is."""

    SERVER = auto()
    CLIENT = auto()
    CONSUMER = auto()
    INTERNAL = auto()


class Span:
    """A piece of work, from entering it to leaving it; this one, the base, is what nobody traces.

    `traceparent` is its place for those who go on, None when it is not sampled.
    """

    __slots__ = ()

    traceparent: str | None = None

    def child(self, _name: str, _kind: Kind = Kind.INTERNAL, _attributes: Attributes | None = None) -> "Span":
        """A part of it."""
        return self

    def note(self, _attributes: Attributes) -> None:
        """Say more of it; what is None is left out."""

    def fail(self, _reason: str) -> None:
        """It went wrong, by a short code. Never an error's own text: that may hold anything."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> None:
        pass


NO_SPAN: Final = Span()


class Tracer(Protocol):
    """What makes spans: `common.opentelemetry`."""

    def span(
        self, name: str, kind: Kind, parent: str | None, links: Sequence[str], attributes: Attributes | None
    ) -> Span:
        """A span under `parent`, or the first of a trace, that points at `links`; both may be nonsense."""

    def close(self) -> None:
        """Export what is left."""


_tracer: Tracer | None = None


def begin(name: str, *, caller: str | None, attributes: Attributes | None = None) -> Span:
    """The first span of a trace: a request. Who calls is a stranger: its own context is pointed at, and decides nothing."""
    if _tracer is None:
        return NO_SPAN
    return _tracer.span(name, Kind.SERVER, None, () if caller is None else (caller,), attributes)


def follow(
    name: str,
    kind: Kind,
    traceparent: str | None,
    *,
    links: Sequence[str | None] = (),
    attributes: Attributes | None = None,
) -> Span:
    """Go on with what is traced; nothing where nothing is. `links` are others' spans that it also came of."""
    if _tracer is None or traceparent is None:
        return NO_SPAN
    return _tracer.span(name, kind, traceparent, [link for link in links if link is not None], attributes)


def receive(work: str, traceparents: Sequence[str]) -> Span:
    """Take what messages tell of, in one batch: under the first of their contexts, pointing at the others."""
    first, *others = traceparents or (None,)
    about = {"messaging.system": "rabbitmq", "messaging.operation.type": "receive"}
    return follow(f"receive {work}", Kind.CONSUMER, first, links=others, attributes=about)


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace that a context of ours belongs to, for log lines."""
    return None if traceparent is None else traceparent[3:35]


@contextmanager
def traced(environ: Mapping[str, str], process: str) -> Iterator[None]:
    """Trace while the context lasts, if the environment asks for it, and export what is left at its end.

    Standard variables decide: it is on with an OTLP endpoint, or `OTEL_TRACES_EXPORTER=otlp`; `none` there, or
    `OTEL_SDK_DISABLED=true`, turns it off. Where the extra is missing, the log says so and nothing is traced.
    """
    global _tracer  # noqa: PLW0603 the one switch of a process, like the configuration of its log
    if not _is_wanted(environ):
        yield
        return
    try:
        adapter: Any = import_module("common.opentelemetry")
    except ImportError:
        get_logger().warning(LogEvent.TRACING_MISSING, extra="payouts[otel]")
        yield
        return
    tracer: Tracer = adapter.open_tracer(environ, f"payouts-{process}")
    _tracer = tracer
    try:
        yield
    finally:
        _tracer = None
        tracer.close()


def _is_wanted(environ: Mapping[str, str]) -> bool:
    exporter = environ.get(_EXPORTER, "").strip().lower()
    if environ.get(_DISABLED, "").strip().lower() == "true" or exporter not in ("", "otlp"):
        return False
    return exporter == "otlp" or any(environ.get(name) for name in _ENDPOINTS)
