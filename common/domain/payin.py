"""A payin: its statuses, the moves between them, and why it may fail."""

from enum import StrEnum
from typing import Final

from common.domain.payout import Failure


class PayinState(StrEnum):
    """Where a payin stands; merchants see it as `status`."""

    PENDING = "pending"
    SUCCESS = "success"
    FAILED = "failed"
    EXPIRED = "expired"
    REFUNDED = "refunded"

    @property
    def is_final(self) -> bool:
        """Whether the rail has told how it ended."""
        return self is not PayinState.PENDING


# Every move there is. The database refuses all others (`payins_moves`).
MOVES: Final[frozenset[tuple[PayinState, PayinState]]] = frozenset(
    {
        (PayinState.PENDING, PayinState.SUCCESS),
        (PayinState.PENDING, PayinState.FAILED),
        (PayinState.PENDING, PayinState.EXPIRED),
        (PayinState.SUCCESS, PayinState.REFUNDED),
    }
)

FAILURES: Final[dict[str, Failure]] = {
    "provider_declined": Failure("The provider declined the payment", "provider", retryable=True),
    "compliance_rejected": Failure("The payment was rejected by compliance", "platform", retryable=False),
    "other": Failure("The payin failed", "provider", retryable=True),
}


def render_payin_failure(code: str) -> dict[str, object]:
    """The `failure` object of a payin, for answers and callbacks."""
    return FAILURES[code].render(code)
