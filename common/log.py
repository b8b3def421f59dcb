"""Logs: one line per request, per attempt and per thing that went wrong. A closed list of events; never a body, a secret,
a signature or a recipient.
"""

import asyncio
import atexit
import json
import logging
import sys
from enum import StrEnum
from functools import cache, lru_cache
from threading import Lock
from time import monotonic
from typing import Any, Final, TextIO, cast

import orjson
import structlog


class LogEvent(StrEnum):
    """Every event a line may be about."""

    PROCESS_STARTED = "process.started"
    PROCESS_STOPPED = "process.stopped"
    REQUEST_ANSWERED = "request.answered"
    REQUEST_CRASHED = "request.crashed"
    ACCEPT_BATCH_FAILED = "accept.batch_failed"
    PAYOUT_ATTEMPTED = "payout.attempted"
    PAYOUT_LEASE_EXPIRED = "payout.lease_expired"
    PAYOUT_LEASE_LOST = "payout.lease_lost"
    PAYOUT_CONTRADICTED = "payout.contradicted"
    PAYOUT_EXPIRED = "payout.expired"
    PAYOUT_EXPIRY_REFUSED = "payout.expiry_refused"
    PAYIN_ASKED = "payin.asked"
    RAIL_CRASHED = "rail.crashed"
    RAIL_BREAKER_CLOSED = "rail.breaker_closed"
    RAIL_BREAKER_OPENED = "rail.breaker_opened"
    RAIL_EVENT_APPLIED = "rail.event_applied"
    RAIL_EVENT_REFUSED = "rail.event_refused"
    RAIL_UNUSABLE = "rail.unusable"
    CALLBACK_ATTEMPTED = "callback.attempted"
    CALLBACK_PUT_ASIDE = "callback.put_aside"
    LANE_HELD = "lane.held"
    LANE_MENDED = "lane.mended"
    SECRET_UNSEALABLE = "secret.unsealable"  # noqa: S105 an event
    BROKER_CONNECTED = "broker.connected"
    BROKER_LOST = "broker.lost"
    BROKER_UNREACHABLE = "broker.unreachable"
    MESSAGE_UNCONFIRMED = "message.unconfirmed"
    MESSAGE_RETURNED = "message.returned"
    MESSAGE_REFUSED = "message.refused"
    MESSAGE_PARKED = "message.parked"
    MESSAGE_CLAIMED = "message.claimed"
    TOPOLOGY_UNREPAIRED = "topology.unrepaired"
    CONNECTIONS_SHORT = "connections.short"
    ROUND_FAILED = "round.failed"
    SPANS_LOST = "spans.lost"
    TRACING_MISSING = "tracing.missing"
    DATABASE_RESTORED = "database.restored"
    INVARIANT_BROKEN = "invariant.broken"


_JSON_OPTIONS: Final = orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS

# A second line of defence: whatever is logged under such a key is dropped.
_FORBIDDEN_PARTS: Final = ("secret", "signature", "card", "recipient", "password", "authorization", "body")


def _drop_forbidden(_logger: Any, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key in _forbidden_of(tuple(line)):
        line[key] = "[dropped]"
    return line


@lru_cache(maxsize=1024)
def _forbidden_of(keys: tuple[str, ...]) -> list[str]:
    """Those that must not be told. Lines of one event have the same keys, so they are judged once."""
    return [key for key in keys if any(part in key.lower() for part in _FORBIDDEN_PARTS)]


def _render_json(_logger: Any, _method: str, line: structlog.typing.EventDict) -> str:
    """One line of JSON in ASCII, whatever is in it; the fast way where that is enough. Our classes are told by their `repr`."""
    try:
        told = orjson.dumps(line, default=repr, option=_JSON_OPTIONS)
    except TypeError:
        return _render_slowly(line)
    return told.decode() if told.isascii() else _render_slowly(line)


def _render_slowly(line: structlog.typing.EventDict) -> str:
    return json.dumps(line, default=repr, sort_keys=True, separators=(",", ":"))


class _Together:
    """A stream for lines. Those of one turn of the event loop are written by one call to the system, when it is over; where no
    loop runs, each at once. A process that is killed takes those of its last turn along.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._awaits: asyncio.AbstractEventLoop | None = None
        self._lock = Lock()
        atexit.register(self._write_out)

    def write(self, line: str) -> int:
        """Take a line; `flush` follows."""
        with self._lock:
            self._lines.append(line)
        return len(line)

    def flush(self) -> None:
        """See that what was taken is written."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._write_out()
            return
        if self._awaits is not loop:
            self._awaits = loop
            loop.call_soon(self._write_out)

    def _write_out(self) -> None:
        self._awaits = None
        with self._lock:
            lines, self._lines = self._lines, []
            if lines:
                self._stream.write("".join(lines))
                self._stream.flush()


def configure_logging(log_format: str, log_level: str = "info", **bound: str) -> None:
    """Send our lines from a level on, and the libraries' from `warning` on, to stdout, as JSON or for people.

    With `debug` libraries say everything. `bound` is on every line.
    """
    ours: int = logging.getLevelNamesMapping()[log_level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
        _drop_forbidden,
    ]
    stdout = cast(TextIO, _Together(sys.stdout))
    renderer: structlog.typing.Processor = structlog.dev.ConsoleRenderer() if log_format == "console" else _render_json
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(ours),
        logger_factory=structlog.WriteLoggerFactory(stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stdout)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(
        handlers=[handler], level=ours if ours == logging.DEBUG else max(ours, logging.WARNING), force=True
    )
    for name in ("aio_pika", "aiormq", "sqlalchemy.pool"):
        # What becomes of a connection is told by our own events, once; these tell it with tracebacks, several times.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _bound.cache_clear()
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """The logger; call it with a `LogEvent` and named fields."""
    logger: structlog.typing.FilteringBoundLogger = _bound() if structlog.is_configured() else structlog.get_logger()
    return logger


def since_ms(started: float) -> float:
    """The milliseconds since a monotonic time, as lines tell them."""
    return round((monotonic() - started) * 1000, 1)


@cache
def _bound() -> structlog.typing.FilteringBoundLogger:
    """The logger as it is configured: put together once, not for every line."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger().bind()
    return logger
