"""Two ledgers side by side: what we say of the payouts of a rail, and what its bank says, payout by payout."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from sqlalchemy import text

from common.db.engine import Tx
from ops.simulator.ledger import Payment


@dataclass(frozen=True, slots=True)
class OurPayout:
    """A payout as we have it, under the reference that its rail knows. `reference` None: it was never sent."""

    external_id: str
    reference: str | None
    state: str
    amount_minor: int
    currency: str


# How a payment of the bank's may stand when we say that; None: the bank was never asked, or never booked it.
FITTING: Final[dict[str, frozenset[str | None]]] = {
    "success": frozenset({"paid"}),
    "refunded": frozenset({"returned"}),
    "failed": frozenset({"declined", None}),
    "canceled": frozenset({None}),
    "expired": frozenset({None}),
}

_OURS: Final = text(
    """
    SELECT p.external_id, p.state, p.amount_minor, p.currency,
           (SELECT min(a.reference) FROM payout_attempts a WHERE a.payout_id = p.id AND a.shop_id = p.shop_id) AS reference
      FROM payouts p JOIN shops s ON s.id = p.shop_id WHERE s.rail = :rail ORDER BY p.id
    """
)


async def find_ours(tx: Tx, rail: str) -> list[OurPayout]:
    """Every payout of the shops that name the rail."""
    rows = await tx.execute(_OURS, {"rail": rail})
    return [OurPayout(row.external_id, row.reference, row.state, row.amount_minor, row.currency) for row in rows]


def compare(ours: Iterable[OurPayout], theirs: Iterable[Payment]) -> list[str]:
    """Where the two ledgers differ, in words; nothing when they are equal.

    Nothing paid twice, nothing paid and released, nothing held for ever, nothing paid that we know nothing of, every amount
    the same. To be asked when everything has come to rest.
    """
    payments = {payment.reference: payment for payment in theirs}
    differences = []
    for payout in ours:
        payment = payments.pop(payout.reference, None) if payout.reference is not None else None
        differences += [f"{payout.external_id} ({payout.reference}): {fault}" for fault in _faults(payout, payment)]
    booked = [payment for payment in payments.values() if payment.status != "asked"]
    return differences + [f"{payment.reference}: the bank has booked what is none of ours" for payment in booked]


def _faults(payout: OurPayout, payment: Payment | None) -> Iterable[str]:
    booked = payment is not None and payment.status != "asked"
    status = payment.status if payment is not None and booked else None
    if payout.state not in FITTING:
        yield f"it is still {payout.state} here, {status or 'unbooked'} there"
    elif status not in FITTING[payout.state]:
        yield f"it is {payout.state} here, {status or 'unbooked'} there"
    if payment is None:
        return
    if payment.times_paid > 1:
        yield f"the bank has paid it {payment.times_paid} times"
    if (payment.amount_minor, payment.currency) != (payout.amount_minor, payout.currency):
        yield f"{payout.amount_minor} {payout.currency} here, {payment.amount_minor} {payment.currency} there"
