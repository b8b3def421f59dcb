"""`GET /events`: the feed of everything that a callback would have said, whether or not there is anybody to call."""

import base64
import binascii
import hashlib
import json
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from aiohttp import web

from common.db.engine import READ_ATTEMPTS_MAX, in_transaction
from common.db.feed import FEED_BEGIN, FeedEvent, Place, read_feed
from common.domain.ids import EVENT, render_id
from common.domain.times import render_time
from common.errors import FieldError, InvalidRequest
from gateway.auth import Caller
from gateway.errors import json_response
from gateway.resources import RESOURCES

LIMIT_MAX: Final = 200
LIMIT_DEFAULT: Final = 50
PARAMETERS: Final = ("shop_code", "after", "limit")

CURSOR_INVALID: Final = FieldError("after", "after must be the next_cursor of an answer about the same shop")
LIMIT_INVALID: Final = FieldError("limit", f"limit must be a whole number from 1 to {LIMIT_MAX}")
QUERY_INVALID: Final = FieldError("query", f"the query may have {', '.join(PARAMETERS)} and nothing else")

# A place, and the beginning of a digest of it and its shop: a cursor of another shop would pass over events silently.
# `sequence` is an int of PostgreSQL.
_PLACE: Final = struct.Struct(">Qi16s")
_CHECK_BYTES: Final = 5


@dataclass(frozen=True, slots=True)
class FeedQuery:
    """What is asked of the feed. `after` is still text: it is judged by the shop."""

    shop_code: str | None
    after: str | None
    limit: int


async def list_events(request: web.Request, caller: Caller, _body: bytes) -> web.Response:
    """`GET /events`: events of the resolved shop behind a cursor, oldest first; of payins only for who may read payins.

    A page has at most `limit` events, and may have fewer, even none, where `has_more` says that it goes on.
    """
    query = parse_feed_query(request)
    shop = await request.app[RESOURCES].authenticator.resolve_shop(request, caller, query.shop_code)
    after = FEED_BEGIN if query.after is None else parse_cursor(query.after, shop.id)
    events = await in_transaction(
        request.app[RESOURCES].engine,
        lambda tx: read_feed(
            tx, shop.id, after=after, with_payins="payins:read" in caller.key.scopes, rows_max=query.limit + 1
        ),
        attempts_max=READ_ATTEMPTS_MAX,
    )
    if events is None:
        raise InvalidRequest(CURSOR_INVALID)
    page = events[: query.limit]
    return json_response(
        {
            "data": [_render_event(event, event.body) for event in page if event.body is not None],
            "has_more": len(events) > len(page),
            "next_cursor": render_cursor(page[-1].place if page else after, shop.id),
        }
    )


def parse_feed_query(request: web.Request) -> FeedQuery:
    """The query of the feed. Raises: `InvalidRequest` with everything that is wrong; nothing is ignored."""
    errors = []
    values: dict[str, str] = {}
    for name in PARAMETERS:
        given = request.query.getall(name, [])
        if len(given) > 1:
            errors.append(FieldError(name, f"{name} must be given once"))
        elif given:
            values[name] = given[0]
    limit = _parse_limit(values.get("limit"))
    if limit is None:
        errors.append(LIMIT_INVALID)
    if not _known(request.query.keys()):
        errors.append(QUERY_INVALID)
    if errors:
        raise InvalidRequest(*errors)
    return FeedQuery(values.get("shop_code"), values.get("after"), limit or LIMIT_DEFAULT)


def _known(names: Collection[str]) -> bool:
    return set(names) <= set(PARAMETERS)


def _parse_limit(text: str | None) -> int | None:
    """None when it is not one."""
    if text is None:
        return LIMIT_DEFAULT
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(LIMIT_MAX)) and not text.startswith("0")
    return int(text) if is_number and int(text) <= LIMIT_MAX else None


def render_cursor(place: Place, shop_id: UUID) -> str:
    """A place in the feed of a shop, as merchants carry it."""
    packed = _PLACE.pack(place.txid, place.sequence, place.event_id.bytes)
    check = hashlib.sha256(shop_id.bytes + packed).digest()[:_CHECK_BYTES]
    return base64.urlsafe_b64encode(packed + check).decode()


def parse_cursor(text: str, shop_id: UUID) -> Place:
    """The place behind a cursor. Raises: `InvalidRequest` for anything but what `render_cursor` gives for that shop."""
    try:
        data = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
        txid, sequence, event_id = _PLACE.unpack(data[: _PLACE.size])
    except (UnicodeEncodeError, binascii.Error, struct.error):
        raise InvalidRequest(CURSOR_INVALID) from None
    place = Place(txid, sequence, UUID(bytes=event_id))
    if render_cursor(place, shop_id) != text:
        raise InvalidRequest(CURSOR_INVALID)
    return place


def _render_event(event: FeedEvent, body: bytes) -> dict[str, Any]:
    return {
        "id": render_id(EVENT, event.place.event_id),
        "type": event.type,
        "created_at": render_time(event.created_at),
        "data": json.loads(body),
    }
