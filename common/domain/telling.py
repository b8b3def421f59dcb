"""What a merchant is told: the bytes of an event, built once and sent with every attempt.

An event of a payout or a payin is rendered up to its time, which is that of the transaction that stores it: the database adds
it (`close_event`).
"""

import json
from datetime import datetime
from typing import Final
from uuid import UUID

from common.domain.ids import EVENT, PAYIN, PAYOUT, render_id
from common.domain.money import render_amount
from common.domain.payin import PayinState, render_payin_failure
from common.domain.payout import State, render_failure
from common.domain.times import render_time

TEST_EVENT_TYPE: Final = "test.ping"

_COMPACT: Final = json.JSONEncoder(separators=(",", ":"))


def event_type(state: State) -> str:
    """The type of the event that tells a payout's status."""
    return f"payout.{state.status}"


def payin_event_type(state: PayinState) -> str:
    """The type of the event that tells a payin's status."""
    return f"payin.{state}"


def open_payout_event(
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
) -> bytes:
    """Compact ASCII JSON, up to its time. `sequence` rises with every change of the payout; receivers keep the highest."""
    return _open(
        event_type(state),
        id=render_id(PAYOUT, payout_id),
        external_id=external_id,
        shop_code=shop_code,
        status=state.status,
        amount=render_amount(amount_minor, currency_exponent),
        currency=currency,
        sequence=sequence,
        failure=None if failure_code is None else render_failure(failure_code),
    )


def open_payin_event(
    *,
    payin_id: UUID,
    external_id: str,
    shop_code: str,
    state: PayinState,
    amount_minor: int,
    currency: str,
    currency_exponent: int,
    sequence: int,
    failure_code: str | None,
) -> bytes:
    """The same for a payin."""
    return _open(
        payin_event_type(state),
        id=render_id(PAYIN, payin_id),
        external_id=external_id,
        shop_code=shop_code,
        status=state.value,
        amount=render_amount(amount_minor, currency_exponent),
        currency=currency,
        sequence=sequence,
        failure=None if failure_code is None else render_payin_failure(failure_code),
    )


def render_test_event(*, event_id: UUID, shop_code: str, created_at: datetime) -> bytes:
    """An event of nothing but itself, for a merchant's server to try its checks on."""
    return _render(
        TEST_EVENT_TYPE, id=render_id(EVENT, event_id), shop_code=shop_code, created_at=render_time(created_at)
    )


def _open(type_: str, **fields: object) -> bytes:
    return _render(type_, **fields)[:-1] + b',"updated_at":"'


def _render(type_: str, **fields: object) -> bytes:
    body = {"type": type_, **{name: value for name, value in fields.items() if value is not None}}
    return _COMPACT.encode(body).encode("ascii")
