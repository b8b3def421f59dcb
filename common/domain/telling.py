"""What a merchant is told: the bytes of an event, built once and sent with every attempt."""

import json
from datetime import datetime
from uuid import UUID

from common.domain.ids import PAYOUT, render_id
from common.domain.money import render_amount
from common.domain.payout import State, render_failure
from common.domain.times import render_time


def event_type(state: State) -> str:
    """The type of the event that tells a payout's status."""
    return f"payout.{state.status}"


def render_payout_event(
    *,
    payout_id: UUID,
    external_id: str,
    shop_code: str,
    state: State,
    amount_minor: int,
    currency: str,
    currency_exponent: int,
    sequence: int,
    failure_code: str | None,
    updated_at: datetime,
) -> bytes:
    """Compact ASCII JSON. `sequence` rises with every change of the payout; receivers keep the highest."""
    body = {
        "type": event_type(state),
        "id": render_id(PAYOUT, payout_id),
        "external_id": external_id,
        "shop_code": shop_code,
        "status": state.status,
        "amount": render_amount(amount_minor, currency_exponent),
        "currency": currency,
        "sequence": sequence,
        **({} if failure_code is None else {"failure": render_failure(failure_code)}),
        "updated_at": render_time(updated_at),
    }
    return json.dumps(body, separators=(",", ":")).encode("ascii")
