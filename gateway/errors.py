"""The one table from our errors to HTTP, and the one shape of every error answer."""

from dataclasses import dataclass
from typing import Any, Final

import orjson
from aiohttp import web

from common.errors import (
    AccessDenied,
    BodyTooLarge,
    CallbackInProgress,
    CallbackMissing,
    DefaultShopMissing,
    EventIdReused,
    ExternalIdReused,
    InsufficientBalance,
    InvalidRequest,
    InvariantViolated,
    MethodNotAllowed,
    NotCancelable,
    NotFound,
    PayoutsError,
    RateLimited,
    ShopCurrencyMismatch,
    ShopNotFound,
    Transient,
    Unauthenticated,
    UnreadableRequest,
    UnsupportedMediaType,
)

REQUEST_ID: Final = "X-Request-Id"
# What we call ourselves; which versions we stand on is nobody's business.
SERVER: Final = "payouts"


@dataclass(frozen=True, slots=True)
class HttpError:
    """A status, the coarse `code` of its class, and when to come back (seconds; 0: not said)."""

    status: int
    code: str
    retry_after_seconds: int = 0


# A subclass without a row of its own is answered like its family.
HTTP_ERRORS: Final[dict[type[PayoutsError], HttpError]] = {
    UnreadableRequest: HttpError(400, "bad_request"),
    Unauthenticated: HttpError(401, "unauthorized"),
    AccessDenied: HttpError(403, "forbidden"),
    NotFound: HttpError(404, "not_found"),
    MethodNotAllowed: HttpError(405, "method_not_allowed"),
    BodyTooLarge: HttpError(413, "payload_too_large"),
    UnsupportedMediaType: HttpError(415, "unsupported_media_type"),
    InvalidRequest: HttpError(422, "validation_error"),
    ShopNotFound: HttpError(422, "shop_not_found"),
    DefaultShopMissing: HttpError(422, "shop_not_found"),
    ShopCurrencyMismatch: HttpError(422, "shop_currency_mismatch"),
    ExternalIdReused: HttpError(422, "external_id_reused"),
    InsufficientBalance: HttpError(422, "insufficient_balance"),
    NotCancelable: HttpError(422, "not_cancelable"),
    EventIdReused: HttpError(422, "event_id_reused"),
    CallbackMissing: HttpError(422, "callback_missing"),
    CallbackInProgress: HttpError(422, "callback_in_progress"),
    RateLimited: HttpError(429, "rate_limited", retry_after_seconds=1),
    InvariantViolated: HttpError(500, "server_error"),
    Transient: HttpError(503, "unavailable", retry_after_seconds=1),
}


def http_error(error: PayoutsError) -> HttpError:
    """The row of an error's own class, or of the nearest family that has one."""
    return next(HTTP_ERRORS[family] for family in type(error).__mro__ if family in HTTP_ERRORS)


def render_error(error: PayoutsError, *, request_id: str, server_time: str) -> web.Response:
    """The answer to an error, in the contract's shape. `server_time` is only told with a 401."""
    row = http_error(error)
    message = str(error)
    body: dict[str, Any] = {"message": message, "code": row.code}
    if isinstance(error, InvalidRequest):
        body["errors"] = [{"field": field.field, "message": field.message} for field in error.fields]
    body["error"] = {"code": row.code, "message": message, "reason": error.reason}
    if isinstance(error, ExternalIdReused):
        body["error"]["fields"] = error.fields
    if isinstance(error, Unauthenticated):
        body["server_time"] = server_time
    body["request_id"] = request_id
    headers = {"Retry-After": str(row.retry_after_seconds)} if row.retry_after_seconds else None
    return json_response(body, status=row.status, headers=headers)


def json_response(body: dict[str, Any], *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """JSON in UTF-8, compact."""
    return web.Response(
        body=orjson.dumps(body),
        status=status,
        headers=headers,
        content_type="application/json",
    )
