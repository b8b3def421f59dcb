"""A payout: its states, the moves between them, how they look outside, and why it may fail."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """Where a payout stands. Merchants see it as `status` and, while it is pending, as `stage`."""

    QUEUED = "queued"
    SENDING = "sending"
    SUBMITTED = "submitted"
    VERIFYING = "verifying"
    SUCCESS = "success"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"
    REFUNDED = "refunded"

    @property
    def is_final(self) -> bool:
        """Whether the hold is resolved: the money was paid out or is available again."""
        return self not in STAGES

    @property
    def status(self) -> str:
        """What code should look at; every stage is `pending`."""
        return str(self) if self.is_final else "pending"

    @property
    def stage(self) -> str | None:
        """What people may look at while the status is pending."""
        return None if self.is_final else str(self)


STAGES: Final = frozenset({State.QUEUED, State.SENDING, State.SUBMITTED, State.VERIFYING})

# Every move there is. The database refuses all others (`payouts_moves`).
MOVES: Final[frozenset[tuple[State, State]]] = frozenset(
    (source, target)
    for source, targets in {
        State.QUEUED: (State.SENDING, State.FAILED, State.CANCELED, State.EXPIRED),
        State.SENDING: (State.QUEUED, State.SUBMITTED, State.VERIFYING, State.SUCCESS, State.FAILED),
        State.SUBMITTED: (State.VERIFYING, State.SUCCESS, State.FAILED),
        State.VERIFYING: (State.QUEUED, State.SUBMITTED, State.SUCCESS, State.FAILED),
        State.SUCCESS: (State.REFUNDED,),
    }.items()
    for target in targets
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a payout or payin failed, in words for people and a source for code."""

    message: str
    source: str
    retryable: bool

    def render(self, code: str) -> dict[str, object]:
        """The `failure` object under its code."""
        return {"code": code, "message": self.message, "source": self.source, "retryable": self.retryable}


FAILURES: Final[dict[str, Failure]] = {
    "recipient_not_found": Failure("The recipient does not exist", "recipient", retryable=False),
    "recipient_account_closed": Failure("The recipient's account is closed", "recipient", retryable=False),
    "recipient_account_blocked": Failure("The recipient's account is blocked", "recipient", retryable=False),
    "recipient_limit_reached": Failure("The recipient's limit is reached", "recipient", retryable=True),
    "invalid_recipient_details": Failure("The recipient's details are not valid", "merchant", retryable=False),
    "provider_declined": Failure("The provider declined the payout", "provider", retryable=False),
    "provider_unavailable": Failure("The provider did not accept the payout in time", "provider", retryable=True),
    "compliance_rejected": Failure("The payout was rejected by compliance", "platform", retryable=False),
    "returned_by_bank": Failure("The recipient's bank returned the money", "recipient", retryable=False),
    "no_route": Failure("No rail can carry the payout", "platform", retryable=True),
    "other": Failure("The payout failed", "provider", retryable=False),
}


def render_failure(code: str) -> dict[str, object]:
    """The `failure` object of a payout, for answers and callbacks."""
    return FAILURES[code].render(code)


_SHOWN_AT_LEAST: Final = 8  # Nothing is shown of a recipient shorter than this.
_CARD_NUMBER: Final = re.compile(r"[0-9]{13,19}", re.ASCII)


def mask_recipient(recipient: str) -> str:
    """A recipient as it may be shown: the last four; first six and last four of a card number (PCI DSS 3.4.1)."""
    length = len(recipient)
    if length < _SHOWN_AT_LEAST:
        return "*" * length
    if _CARD_NUMBER.fullmatch(recipient) and _passes_luhn(recipient):
        return recipient[:6] + "*" * (length - 10) + recipient[-4:]
    return "*" * (length - 4) + recipient[-4:]


def _passes_luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812-1, annex B."""
    doubled = "0246813579"
    total = sum(int(doubled[int(d)]) if i % 2 else int(d) for i, d in enumerate(reversed(digits)))
    return total % 10 == 0
