"""The memory of the sandbox rail: what a bank would know of the payments it was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import text

from common.db.engine import Tx


@dataclass(frozen=True, slots=True)
class SandboxPayment:
    """One payment, by our reference. `submits` counts how often it was asked for."""

    reference: str
    amount_minor: int
    currency: str
    state: str
    failure_code: str | None
    settles_in_seconds: float | None
    authoritative: bool
    submits: int = 1


# The first submit decides; a repeat is only counted, and may settle what was absent so far.
_SUBMIT = text(
    """
    INSERT INTO sandbox.payments AS p (reference, amount_minor, currency, state, failure_code, authoritative, settles_at)
    SELECT reference, amount_minor, currency, state, failure_code, authoritative,
           now() + make_interval(secs => settles_in_seconds)
      FROM unnest(CAST(:reference AS text[]), CAST(:amount_minor AS bigint[]), CAST(:currency AS text[]),
                  CAST(:state AS text[]), CAST(:failure_code AS text[]), CAST(:authoritative AS boolean[]),
                  CAST(:settles_in_seconds AS float8[]))
        AS s (reference, amount_minor, currency, state, failure_code, authoritative, settles_in_seconds)
     ORDER BY reference
        ON CONFLICT (reference) DO UPDATE SET submits = p.submits + 1
    RETURNING reference, amount_minor, currency, state, failure_code, authoritative, submits
    """
)

_SETTLE = text("UPDATE sandbox.payments SET state = :state WHERE reference = :reference AND state = 'absent'")

_FIND = text(
    """
    UPDATE sandbox.payments SET state = CASE WHEN state = 'submitted' AND settles_at <= now() THEN 'paid' ELSE state END
     WHERE reference = :reference RETURNING reference, amount_minor, currency, state, failure_code, authoritative, submits
    """
)


async def save_submitted(tx: Tx, payments: Sequence[SandboxPayment]) -> dict[str, SandboxPayment]:
    """Remember payments as they were asked for; what stands now, by reference. Idempotent by reference."""
    names = ("reference", "amount_minor", "currency", "state", "failure_code", "authoritative", "settles_in_seconds")
    rows = await tx.execute(_SUBMIT, {name: [getattr(payment, name) for payment in payments] for name in names})
    return {row.reference: SandboxPayment(**row._mapping, settles_in_seconds=None) for row in rows}


async def save_settled(tx: Tx, reference: str, state: str) -> None:
    """Settle a payment that was absent so far."""
    await tx.execute(_SETTLE, {"reference": reference, "state": state})


async def find_sandbox_payment(tx: Tx, reference: str) -> SandboxPayment | None:
    """What the bank knows of a reference now; a submitted payment may have settled in the meantime."""
    row = (await tx.execute(_FIND, {"reference": reference})).one_or_none()
    return None if row is None else SandboxPayment(**row._mapping, settles_in_seconds=None)
