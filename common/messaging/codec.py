"""Messages as bytes: ids only, a versioned type, and the trace contexts of the requests that asked for the work."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID, uuid4

from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from common.errors import UnreadableMessage
from common.messaging.topology import Work

IDS_MAX: Final = 128
BODY_BYTES_MAX: Final = 8 * 1024
# A batch can have as many requests as ids; traces need a few to find the rest.
TRACEPARENTS_MAX: Final = 8
TRACEPARENTS: Final = "traceparents"
_PERSISTENT: Final = 2
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class WorkMessage:
    """Work for ids of one shard. `traceparents` as W3C Trace Context writes them."""

    work: Work
    ids: tuple[UUID, ...]
    traceparents: tuple[str, ...] = ()


def split(work: Work, ids: Sequence[UUID], traceparents: Iterable[str] = ()) -> list[WorkMessage]:
    """As many messages as the ids need."""
    traces = tuple(dict.fromkeys(traceparents))[:TRACEPARENTS_MAX]
    return [WorkMessage(work, tuple(ids[i : i + IDS_MAX]), traces) for i in range(0, len(ids), IDS_MAX)]


def render_message(message: WorkMessage) -> tuple[bytes, Basic.Properties]:
    """Body and properties: persistent, and with a `message_id` of this very publishing (returns are matched by it)."""
    body = json.dumps({"v": _VERSION, "ids": [value.hex for value in message.ids]}, separators=(",", ":")).encode()
    return body, Basic.Properties(
        content_type="application/json",
        delivery_mode=_PERSISTENT,
        message_id=uuid4().hex,
        message_type=message.work.value,
        timestamp=datetime.now(UTC),
        app_id="payouts",
        headers={TRACEPARENTS: list(message.traceparents)} if message.traceparents else None,
    )


def parse_message(delivered: DeliveredMessage) -> WorkMessage:
    """A message as it was delivered. Raises: `UnreadableMessage`, saying what is wrong with it."""
    properties = delivered.header.properties
    return parse_work(properties.message_type, delivered.body, properties.headers)


def parse_work(message_type: str | None, body: bytes, headers: Any) -> WorkMessage:
    """The work that a message asks for. Raises: `UnreadableMessage`, saying what is wrong with it."""
    try:
        work = Work(message_type or "")
    except ValueError:
        raise UnreadableMessage("unknown type") from None
    if len(body) > BODY_BYTES_MAX:
        raise UnreadableMessage("body too large")
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise UnreadableMessage("not JSON") from None
    if not isinstance(value, dict) or value.get("v") != _VERSION:
        raise UnreadableMessage("unknown version")
    return WorkMessage(work, _ids(value.get("ids")), _traceparents(headers))


def _ids(value: Any) -> tuple[UUID, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= IDS_MAX:
        raise UnreadableMessage("ids missing or too many")
    try:
        return tuple(UUID(hex=text) for text in value)
    except (ValueError, TypeError, AttributeError):
        raise UnreadableMessage("an id that is none") from None


def _traceparents(headers: Any) -> tuple[str, ...]:
    found = headers.get(TRACEPARENTS) if isinstance(headers, dict) else None
    return tuple(text for text in found if isinstance(text, str)) if isinstance(found, list) else ()
