"""What became of the callbacks of a payout or a payin, and sending one again."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from aiohttp import web

from common.db.callbacks import resend_callback
from common.db.deliveries import (
    EXCERPT_BYTES_MAX,
    Delivery,
    ToldCallback,
    find_callbacks,
    find_payin_callbacks,
)
from common.db.engine import READ_ATTEMPTS_MAX, Tx, in_transaction
from common.db.merchants import Shop
from common.db.payins import find_payin
from common.db.payouts import find_payout
from common.domain.ids import EVENT, parse_id, render_id
from common.domain.times import render_time
from common.errors import (
    CallbackInProgress,
    CallbackMissing,
    EventNotFound,
    FieldError,
    InvalidRequest,
    PayinNotFound,
    PayoutNotFound,
)
from gateway.auth import Caller
from gateway.errors import json_response
from gateway.log import SUBJECT
from gateway.resources import RESOURCES
from gateway.schemas import parse_json_object

ATTEMPTS_SHOWN_MAX: Final = 100

# What merchants hear of an attempt's error, by the sender's code. What happened before an answer came would tell of our network
# and our resolver, so that it is one word; only TLS and silence are a host's own, which the guard has let us call.
ERRORS_SHOWN: Final = {
    "address_blocked": "connection_failed",
    "dns_failed": "connection_failed",
    "connection_refused": "connection_failed",
    "connection_failed": "connection_failed",
    "tls_failed": "tls_failed",
    "timeout": "timeout",
    "redirect": "redirect",
    "http_4xx": "http_4xx",
    "http_5xx": "http_5xx",
    "response_invalid": "response_invalid",
    "dns_unreachable": "other",
    "files_exhausted": "other",
    "memory_exhausted": "other",
    "ports_exhausted": "other",
    "network_down": "other",
    "internal_error": "other",
}
ERROR_UNKNOWN: Final = "other"


async def list_payout_callbacks(request: web.Request, caller: Caller, _body: bytes) -> web.Response:
    """`GET /payouts/{external_id}/callbacks`: its callbacks, oldest first, with the attempts made so far."""
    shop, external_id = await request.app[RESOURCES].authenticator.resolve_subject(request, caller, PayoutNotFound)

    async def work(tx: Tx) -> list[ToldCallback]:
        return await _find_callbacks(tx, request, shop, external_id)

    return await _list(request, work)


async def list_payin_callbacks(request: web.Request, caller: Caller, _body: bytes) -> web.Response:
    """`GET /payins/{external_id}/callbacks`: the same of a payin."""
    shop, external_id = await request.app[RESOURCES].authenticator.resolve_subject(request, caller, PayinNotFound)

    async def work(tx: Tx) -> list[ToldCallback]:
        payin = await find_payin(tx, shop.id, external_id)
        if payin is None:
            raise PayinNotFound
        request[SUBJECT].payin_id = payin.id
        return await find_payin_callbacks(tx, payin.id, shop.id, attempts_max=ATTEMPTS_SHOWN_MAX)

    return await _list(request, work)


async def resend_payout_callback(request: web.Request, caller: Caller, body: bytes) -> web.Response:
    """`POST /payouts/{external_id}/callbacks/resend`: the newest event's callback is due now, or that of the event named.

    It sends the same bytes under the same `webhook-id`, whatever became of it before.
    Raises: `EventNotFound`, `CallbackMissing`; `CallbackInProgress` while it is being sent and for a second after.
    """
    asked = _parse_resend(body)
    shop, external_id = await request.app[RESOURCES].authenticator.resolve_subject(request, caller, PayoutNotFound)

    async def work(tx: Tx) -> ToldCallback:
        callbacks = await _find_callbacks(tx, request, shop, external_id)
        callback = _choose(callbacks, asked)
        if callback.called_lately or not await resend_callback(tx, callback.event_id):
            raise CallbackInProgress
        return _choose(await _find_callbacks(tx, request, shop, external_id), render_id(EVENT, callback.event_id))

    callback = await in_transaction(request.app[RESOURCES].engine, work)
    request.app[RESOURCES].tell_callbacks([(callback.event_id, shop.id)])
    return json_response(render_callback(callback))


async def _list(request: web.Request, work: Callable[[Tx], Awaitable[list[ToldCallback]]]) -> web.Response:
    callbacks = await in_transaction(request.app[RESOURCES].engine, work, attempts_max=READ_ATTEMPTS_MAX)
    return json_response({"data": [render_callback(callback) for callback in callbacks]})


async def _find_callbacks(tx: Tx, request: web.Request, shop: Shop, external_id: str) -> list[ToldCallback]:
    """Raises: `PayoutNotFound`."""
    payout = await find_payout(tx, shop.id, external_id)
    if payout is None:
        raise PayoutNotFound
    request[SUBJECT].payout_id = payout.id
    return await find_callbacks(tx, payout.id, shop.id, attempts_max=ATTEMPTS_SHOWN_MAX)


def _parse_resend(body: bytes) -> str | None:
    """The event that a resend names. Raises: `InvalidRequest`."""
    event_id = parse_json_object(body).get("event_id") if body else None
    if event_id is not None and not isinstance(event_id, str):
        raise InvalidRequest(FieldError("event_id", "event_id must be a string"))
    return event_id


def _choose(callbacks: Sequence[ToldCallback], event: str | None) -> ToldCallback:
    """The callback of the event of that id, else the newest one. Raises: `EventNotFound`, `CallbackMissing`."""
    if event is None:
        if not callbacks:
            raise CallbackMissing
        return callbacks[-1]
    event_id = parse_id(EVENT, event)
    for callback in callbacks:
        if callback.event_id == event_id:
            return callback
    raise EventNotFound


def render_callback(callback: ToldCallback) -> dict[str, Any]:
    """A callback as merchants see it; what is absent is left out."""
    shown = {
        "event_id": render_id(EVENT, callback.event_id),
        "type": callback.type,
        "sequence": callback.sequence,
        "url": callback.url,
        "state": callback.state,
        "created_at": render_time(callback.created_at),
        "finished_at": None if callback.finished_at is None else render_time(callback.finished_at),
        "next_attempt_at": None if callback.next_attempt_at is None else render_time(callback.next_attempt_at),
        "attempts": [_render_delivery(delivery) for delivery in callback.deliveries],
    }
    return {name: value for name, value in shown.items() if value is not None}


def _render_delivery(delivery: Delivery) -> dict[str, Any]:
    shown = {
        "attempt": delivery.attempt_no,
        "started_at": render_time(delivery.started_at),
        "duration_ms": delivery.duration_ms,
        "http_status": delivery.http_status,
        "error": None if delivery.error is None else ERRORS_SHOWN.get(delivery.error, ERROR_UNKNOWN),
        "late": delivery.late,
        # Without a status nobody has answered, so that nothing of what was there is the merchant's.
        "response_excerpt": None if delivery.http_status is None else render_excerpt(delivery.response_excerpt or b""),
    }
    return {name: value for name, value in shown.items() if value is not None}


def render_excerpt(excerpt: bytes) -> str:
    """The beginning of an answer as text of at most `EXCERPT_BYTES_MAX` bytes of UTF-8.

    What is no UTF-8 and what does not print becomes U+FFFD, every white space a space.
    """
    text = excerpt[:EXCERPT_BYTES_MAX].decode("utf-8", "replace")
    printable = "".join(" " if letter.isspace() else letter if letter.isprintable() else "\ufffd" for letter in text)
    return printable.encode()[:EXCERPT_BYTES_MAX].decode("utf-8", "ignore")
