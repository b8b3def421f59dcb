"""`POST /rails/{rail}/events`: what a bank says by itself is stored before it is answered. `worker/rails/PROTOCOL.md`."""

from dataclasses import replace
from typing import Any, Final

from aiohttp import web

from common.db.engine import Tx, in_transaction
from common.db.rail_events import NewRailEvent, append_rail_events, find_rail_event
from common.errors import EventIdReused, FieldError, InvalidRequest
from gateway.errors import json_response
from gateway.log import SUBJECT
from gateway.resources import RESOURCES
from gateway.schemas import parse_json_object

# As the schema has them.
_EVENT_ID_CHARACTERS_MAX: Final = 200
_REFERENCE_CHARACTERS_MAX: Final = 64
_PROVIDER_REFERENCE_CHARACTERS_MAX: Final = 200
_FAILURE_CODE_CHARACTERS_MAX: Final = 64
_AMOUNT_MINOR_MAX: Final = 10**15
_WORDS: Final = ("paid", "declined", "submitted", "returned")


async def receive_event(request: web.Request, timestamp: str, signature: str, body: bytes) -> web.Response:
    """200 when the event is stored, now or before.

    Raises: `InvalidSignature`, also for a rail that does not exist; `InvalidRequest`, `EventIdReused`.
    """
    name = request.match_info["rail"]
    await request.app[RESOURCES].rail_secrets.check(name, request, timestamp, signature, body)
    request[SUBJECT].rail = name
    event = parse_rail_event(name, body)

    async def store(tx: Tx) -> NewRailEvent | None:
        await append_rail_events(tx, [event])
        return await find_rail_event(tx, name, event.event_id)

    stored = await in_transaction(request.app[RESOURCES].engine, store)
    if stored is None or replace(stored, due_in_seconds=event.due_in_seconds) != event:
        raise EventIdReused
    return json_response({"id": event.event_id})


def parse_rail_event(rail: str, body: bytes) -> NewRailEvent:
    """The event that a body holds. Raises: `InvalidRequest` with every field that is wrong."""
    values = parse_json_object(body)
    errors: list[FieldError] = []
    event = NewRailEvent(
        rail=rail,
        event_id=_text(values, "id", _EVENT_ID_CHARACTERS_MAX, errors) or "",
        reference=_text(values, "reference", _REFERENCE_CHARACTERS_MAX, errors) or "",
        outcome=_word(values, errors),
        failure_code=_text(values, "failure_code", _FAILURE_CODE_CHARACTERS_MAX, errors, required=False),
        provider_reference=_text(
            values, "provider_reference", _PROVIDER_REFERENCE_CHARACTERS_MAX, errors, required=False
        ),
        amount_minor=_amount(values, errors),
        currency=_currency(values, errors),
    )
    if errors:
        raise InvalidRequest(*errors)
    return event


def _text(
    values: dict[str, Any], name: str, characters_max: int, errors: list[FieldError], *, required: bool = True
) -> str | None:
    value = values.get(name)
    if value is None and not required:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= characters_max:
        errors.append(FieldError(name, f"{name} must be a string of 1 to {characters_max} characters"))
        return None
    return value


def _word(values: dict[str, Any], errors: list[FieldError]) -> str:
    value = values.get("status")
    if value not in _WORDS:
        errors.append(FieldError("status", f"status must be one of {', '.join(_WORDS)}"))
    return str(value)


def _amount(values: dict[str, Any], errors: list[FieldError]) -> int | None:
    value = values.get("amount_minor")
    if type(value) is not int or not 1 <= value <= _AMOUNT_MINOR_MAX:
        errors.append(FieldError("amount_minor", f"amount_minor must be a whole number of 1 to {_AMOUNT_MINOR_MAX}"))
        return None
    return value


def _currency(values: dict[str, Any], errors: list[FieldError]) -> str | None:
    value = values.get("currency")
    if (
        not isinstance(value, str)
        or len(value) != 3
        or not value.isascii()
        or not value.isupper()
        or not value.isalpha()
    ):
        errors.append(FieldError("currency", "currency must be an ISO 4217 code"))
        return None
    return value
