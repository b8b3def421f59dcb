"""The one line that every request leaves in the log, and what a request turns out to be about on its way."""

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from aiohttp import web

from common.domain.ids import PAYIN, PAYOUT, render_id
from common.errors import PayoutsError
from common.log import LogEvent, get_logger, since_ms
from gateway.errors import http_error


@dataclass(slots=True)
class Subject:
    """What is known of a request so far; whoever learns more of it writes it here. `rail` only once it has proven itself."""

    merchant_id: UUID | None = None
    shop_id: UUID | None = None
    payout_id: UUID | None = None
    payin_id: UUID | None = None
    rail: str | None = None


SUBJECT: Final = web.RequestKey("SUBJECT", Subject)


def log_request(
    *,
    request_id: str,
    method: str = "-",
    route: str = "-",
    status: int | None,
    error: PayoutsError | None,
    subject: Subject,
    started: float,
    trace_id: str | None = None,
) -> None:
    """Every field is on every line, null where it is not known. `started` is monotonic.

    `status` None: nobody was answered, since the process left before. `route` is the pattern, never the path: paths carry
    merchants' ids.
    """
    get_logger().info(
        LogEvent.REQUEST_ANSWERED,
        method=method,
        route=route,
        status=status,
        code=None if error is None else http_error(error).code,
        reason=None if error is None else error.reason,
        duration_ms=since_ms(started),
        request_id=request_id,
        merchant_id=_text(subject.merchant_id),
        shop_id=_text(subject.shop_id),
        payout_id=None if subject.payout_id is None else render_id(PAYOUT, subject.payout_id),
        payin_id=None if subject.payin_id is None else render_id(PAYIN, subject.payin_id),
        rail=subject.rail,
        trace_id=trace_id,
    )


def _text(value: UUID | None) -> str | None:
    return None if value is None else str(value)
