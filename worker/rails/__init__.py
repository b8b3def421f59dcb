"""What pays, and where payers pay in. A rail is asked to pay under one reference for the payout's whole life, and may be asked
what became of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from common.recipients import Recipient


class Outcome(StrEnum):
    """What a rail said. Definite about the money are `PAID`, `DECLINED`, `NOT_ACCEPTED` of a submit, `NOT_FOUND` of a look-up.

    `NOT_FOUND` is only said by a rail whose look-up is authoritative; any other ignorance is `UNKNOWN`.
    """

    PAID = "paid"
    DECLINED = "declined"
    SUBMITTED = "submitted"
    RETURNED = "returned"
    NOT_ACCEPTED = "not_accepted"
    NOT_FOUND = "not_found"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Answer:
    """A rail's answer. `failure_code` is one of `common.domain.payout.FAILURES`, and only with `DECLINED`.

    `amount_minor`, `currency`: what it says it is about; None: it did not say.
    """

    outcome: Outcome
    failure_code: str | None = None
    provider_reference: str | None = None
    detail: str | None = None
    amount_minor: int | None = None
    currency: str | None = None


@dataclass(frozen=True, slots=True)
class PaymentOrder:
    """What a rail is asked to pay. `amount_minor` in minor units of `currency`.

    `asked_at`: Unix seconds, from before it was seen that there is still time to ask; what a rail signs the request with. So a
    process that stands still between the two sends what is no longer taken.
    """

    reference: str
    amount_minor: int
    currency: str
    recipient: Recipient = field(repr=False)
    asked_at: float


@dataclass(frozen=True, slots=True)
class PayinTerms:
    """What a payer was asked to pay in, under a reference that the payer quotes. `amount_minor` in minor units."""

    reference: str
    amount_minor: int
    currency: str


class Rail(Protocol):
    """One provider. Calls may raise anything: the caller takes every exception as `UNKNOWN`."""

    @property
    def lag_seconds(self) -> float:
        """How long a look-up should wait after a submit whose answer was lost."""

    @property
    def denial_seconds(self) -> float:
        """For how long after `PaymentOrder.asked_at` "not found" may still mean "not yet", and is no proof; 0: never."""

    @property
    def calls_max(self) -> int | None:
        """How many calls may be in flight now; None: as many as the worker makes, 0: none for a while."""

    async def submit(self, order: PaymentOrder) -> Answer:
        """Ask to pay. Repeat: the same reference is never paid twice."""

    async def look_up(self, reference: str) -> Answer:
        """Ask what became of a reference."""

    async def look_up_payin(self, payin: PayinTerms) -> Answer:
        """Ask whether a payer has paid: `PAID` and `RETURNED` name the sum; `SUBMITTED`: it is under way; `NOT_FOUND`: by now
        nobody has.
        """


Rails = Mapping[str, Rail]
