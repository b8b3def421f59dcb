"""How payouts end on the word of their rail while they are being sent: all that belongs to it by one statement.

It locks, looks and writes in one round trip, where there is nothing to decide. What has met something since it was claimed is
for those who decide under its lock (`common.moving`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text

from common.db.callbacks import Event
from common.db.due import FinishedAttempt
from common.db.engine import Tx, arrays_of
from common.db.payouts import LockedPayout
from common.domain.payout import State


@dataclass(frozen=True, slots=True)
class Ending:
    """How a payout shall end that is as it was when it was claimed under `token`. `event.sequence`: its version at the end."""

    payout: LockedPayout
    token: UUID
    attempt: FinishedAttempt
    state: State
    failure_code: str | None
    provider_reference: str | None
    event: Event


_END_UNOPPOSED = text(
    """
    SELECT * FROM end_unopposed(
      CAST(:wait_ms AS integer), CAST(:payout_id AS uuid[]), CAST(:shop_id AS uuid[]), CAST(:account_id AS bigint[]),
      CAST(:amount_minor AS bigint[]), CAST(:token AS uuid[]), CAST(:attempt_no AS integer[]), CAST(:outcome AS text[]),
      CAST(:detail AS text[]), CAST(:state AS text[]), CAST(:failure_code AS text[]), CAST(:provider_reference AS text[]),
      CAST(:id AS uuid[]), CAST(:sequence AS integer[]), CAST(:type AS text[]), CAST(:opening AS bytea[]),
      CAST(:url AS text[]), CAST(:origin AS text[]), CAST(:traceparent AS text[]))
    """
)


async def end_unopposed(tx: Tx, endings: Sequence[Ending], *, wait_seconds: float) -> set[UUID]:
    """End the payouts that nothing speaks against, and leave the others as they are. One statement.

    Something does if the lease is another's, the payout is no longer as it was sent, or its callback would go elsewhere now.
    Returns: those that ended.
    Locks: due rows, payouts, accounts; each in id order. With `wait_seconds` 0, payouts whose account somebody else holds are
    left.
    Raises: `AccountBusy` (by `in_transaction`) when one is held for longer than `wait_seconds`.
    """
    events = [ending.event for ending in endings]
    ended = await tx.scalars(
        _END_UNOPPOSED,
        {
            "wait_ms": int(wait_seconds * 1000),
            "account_id": [ending.payout.account_id for ending in endings],
            "amount_minor": [ending.payout.amount_minor for ending in endings],
            "token": [ending.token for ending in endings],
            "state": [ending.state for ending in endings],
            "failure_code": [ending.failure_code for ending in endings],
            "provider_reference": [ending.provider_reference for ending in endings],
            **arrays_of([ending.attempt for ending in endings], FinishedAttempt),
            **arrays_of(events, Event),
            "origin": [event.origin for event in events],
        },
    )
    return set(ended)
