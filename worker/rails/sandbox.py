"""The sandbox rail: pays nobody, decides by the last four characters of the recipient, and remembers like a bank.

Its memory is its own: the tables of the schema `sandbox`, written in its own transactions. What it was asked for while a
transaction was in flight goes into the next one.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from common.batching import Batcher
from common.db.engine import Engine, Tx, each_alone, in_transaction
from common.db.rail_events import NewRailEvent, append_rail_events
from common.db.sandbox import SandboxPayment, find_sandbox_payment, save_settled, save_submitted
from worker.rails import Answer, Outcome, PayinTerms, PaymentOrder

NAME: Final = "sandbox"

_BATCH_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class _Script:
    """How a magic recipient fares: what the bank books, whether it answers, what a look-up is worth, what it says later."""

    books: str = "paid"
    failure_code: str | None = None
    answers: bool = True
    refusals: int = 0
    authoritative: bool = True
    # What the bank says by itself, `settle_seconds` after the submit and a second apart: number and word of each event.
    events: tuple[tuple[int, Outcome], ...] = ()


SCRIPTS: Final[dict[str, _Script]] = {
    "0001": _Script(books="submitted"),
    "0100": _Script(books="declined", failure_code="other"),
    "0101": _Script(books="declined", failure_code="recipient_not_found"),
    "0102": _Script(books="declined", failure_code="recipient_account_closed"),
    "0103": _Script(books="declined", failure_code="recipient_account_blocked"),
    "0104": _Script(books="declined", failure_code="recipient_limit_reached"),
    "0105": _Script(books="declined", failure_code="compliance_rejected"),
    "0120": _Script(refusals=2),
    "0200": _Script(books="absent", answers=False, authoritative=False),
    "0201": _Script(answers=False),
    "0202": _Script(books="absent", answers=False),
    "0203": _Script(books="declined", failure_code="provider_declined", answers=False),
    "0300": _Script(events=((1, Outcome.RETURNED),)),
    "0301": _Script(books="declined", failure_code="provider_declined", events=((1, Outcome.PAID),)),
    "0400": _Script(books="submitted", events=((1, Outcome.PAID), (1, Outcome.PAID), (2, Outcome.PAID))),
    "0401": _Script(books="submitted", events=((2, Outcome.PAID), (1, Outcome.SUBMITTED))),
}
_USUAL: Final = _Script()


@dataclass(frozen=True, slots=True)
class _PayinScript:
    """How a magic amount fares: what a look-up says, how much more was paid, what the bank says later by itself."""

    outcome: Outcome = Outcome.PAID
    excess_minor: int = 0
    events: tuple[tuple[int, Outcome], ...] = ()


# By the last two digits of the amount in minor units.
PAYIN_SCRIPTS: Final[dict[int, _PayinScript]] = {
    1: _PayinScript(Outcome.NOT_FOUND),
    2: _PayinScript(Outcome.DECLINED),
    3: _PayinScript(excess_minor=1),
    4: _PayinScript(events=((1, Outcome.RETURNED),)),
    5: _PayinScript(Outcome.SUBMITTED, events=((1, Outcome.PAID), (1, Outcome.PAID), (2, Outcome.PAID))),
    6: _PayinScript(Outcome.UNKNOWN),
}
_USUAL_PAYIN: Final = _PayinScript()

# What a booked state means, told at once or by a look-up.
_OUTCOMES: Final = {"paid": Outcome.PAID, "declined": Outcome.DECLINED, "submitted": Outcome.SUBMITTED}


class SandboxRail:
    """A bank in a schema. `settle_seconds`: from submitted to paid for recipient 0001."""

    lag_seconds: Final = 0.0
    # It books in the transaction that asks it, and nobody's request is under way to it for longer than a lease.
    denial_seconds: Final = 0.0
    calls_max: Final = None

    def __init__(self, engine: Engine, *, settle_seconds: float) -> None:
        self._engine = engine
        self._engine_of_one = each_alone(engine)
        self._settle_seconds = settle_seconds
        self._submits: Batcher[_Booking, SandboxPayment] = Batcher(self._book, batch_max=_BATCH_MAX)

    async def submit(self, order: PaymentOrder) -> Answer:
        """Book a payment, and answer unless the script says to keep silent; then this never returns."""
        script = SCRIPTS.get(order.recipient.number[-4:], _USUAL)
        payment = await self._submits.submit(
            _Booking(
                SandboxPayment(
                    reference=order.reference,
                    amount_minor=order.amount_minor,
                    currency=order.currency,
                    state="absent" if script.refusals else script.books,
                    failure_code=script.failure_code,
                    settles_in_seconds=self._settle_seconds if script.books == "submitted" else None,
                    authoritative=script.authoritative,
                ),
                [self._event(order, place, *event) for place, event in enumerate(script.events)],
            )
        )
        if payment.submits <= script.refusals:
            return Answer(Outcome.NOT_ACCEPTED, detail="throttled")
        if payment.state == "absent" and (script.answers or (payment.submits > 1 and script.authoritative)):
            await in_transaction(self._engine, lambda tx: save_settled(tx, order.reference, "paid"))
            return Answer(Outcome.PAID, provider_reference=_provider_reference(order.reference))
        if not script.answers:
            await asyncio.Event().wait()
        return _answer(payment)

    async def look_up(self, reference: str) -> Answer:
        """What the bank knows of a reference by now."""
        payment = await in_transaction(self._engine, lambda tx: find_sandbox_payment(tx, reference))
        if payment is None:
            return Answer(Outcome.NOT_FOUND)
        if payment.state == "absent":
            return (
                Answer(Outcome.NOT_FOUND) if payment.authoritative else Answer(Outcome.UNKNOWN, detail="not known here")
            )
        return _answer(payment)

    async def look_up_payin(self, payin: PayinTerms) -> Answer:
        """Somebody has paid, or not, as the last two digits of the amount in minor units say."""
        script = PAYIN_SCRIPTS.get(payin.amount_minor % 100, _USUAL_PAYIN)
        amount_minor = payin.amount_minor + script.excess_minor
        events = [
            NewRailEvent(
                rail=NAME,
                event_id=f"{payin.reference}-{number}",
                reference=payin.reference,
                outcome=outcome,
                provider_reference=_provider_reference(payin.reference),
                amount_minor=amount_minor,
                currency=payin.currency,
                due_in_seconds=place,
            )
            for place, (number, outcome) in enumerate(script.events, 1)
        ]
        if events:
            await in_transaction(self._engine, lambda tx: append_rail_events(tx, events))
        return Answer(
            script.outcome,
            failure_code="provider_declined" if script.outcome is Outcome.DECLINED else None,
            provider_reference=_provider_reference(payin.reference),
            amount_minor=amount_minor,
            currency=payin.currency,
        )

    async def _book(self, bookings: Sequence["_Booking"]) -> list[SandboxPayment]:
        events = [event for booking in bookings for event in booking.events]

        async def book(tx: Tx) -> dict[str, SandboxPayment]:
            await append_rail_events(tx, events)
            return await save_submitted(tx, [booking.payment for booking in bookings])

        booked = await in_transaction(self._engine if events else self._engine_of_one, book)
        return [booked[booking.payment.reference] for booking in bookings]

    def _event(self, order: PaymentOrder, place: int, number: int, outcome: Outcome) -> NewRailEvent:
        return NewRailEvent(
            rail=NAME,
            event_id=f"{order.reference}-{number}",
            reference=order.reference,
            outcome=outcome,
            provider_reference=_provider_reference(order.reference),
            amount_minor=order.amount_minor,
            currency=order.currency,
            due_in_seconds=self._settle_seconds + place,
        )


@dataclass(frozen=True, slots=True)
class _Booking:
    """A payment as it was asked for, and what the bank will say of it by itself."""

    payment: SandboxPayment
    events: list[NewRailEvent]


def _answer(payment: SandboxPayment) -> Answer:
    return Answer(
        _OUTCOMES[payment.state],
        failure_code=payment.failure_code,
        provider_reference=_provider_reference(payment.reference),
    )


def _provider_reference(reference: str) -> str:
    return f"sandbox-{reference}"
