"""Two ledgers side by side: equal ones say nothing, and each difference is told in words."""

from dataclasses import replace

import pytest

from ops.reconciliation import OurPayout, compare
from ops.simulator.ledger import Payment

OURS = OurPayout("PAY-1", "po_1", "success", 1000, "BDT")
THEIRS = Payment("po_1", 1000, "BDT", "digest", "paid", "paid", None, submits=1, times_paid=1)


@pytest.mark.parametrize(
    ("state", "status"),
    [
        *(("success", "paid"), ("refunded", "returned"), ("failed", "declined")),
        *(("failed", "asked"), ("canceled", "asked"), ("expired", "asked")),
    ],
)
def test_ledgers_that_agree_differ_in_nothing(state: str, status: str) -> None:
    assert compare([replace(OURS, state=state)], [replace(THEIRS, status=status, times_paid=0)]) == []


@pytest.mark.parametrize("state", ["failed", "canceled", "expired"])
def test_what_was_never_sent_needs_no_bank(state: str) -> None:
    assert compare([replace(OURS, state=state, reference=None)], []) == []
    assert compare([replace(OURS, state=state)], []) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "fault"),
    [
        (replace(OURS, state="failed"), THEIRS, "PAY-1 (po_1): it is failed here, paid there"),
        (replace(OURS, state="canceled"), THEIRS, "PAY-1 (po_1): it is canceled here, paid there"),
        (OURS, replace(THEIRS, status="declined"), "PAY-1 (po_1): it is success here, declined there"),
        (OURS, replace(THEIRS, status="asked"), "PAY-1 (po_1): it is success here, unbooked there"),
        (OURS, replace(THEIRS, status="returned"), "PAY-1 (po_1): it is success here, returned there"),
        (replace(OURS, state="verifying"), THEIRS, "PAY-1 (po_1): it is still verifying here, paid there"),
        (OURS, replace(THEIRS, times_paid=2), "PAY-1 (po_1): the bank has paid it 2 times"),
        (OURS, replace(THEIRS, amount_minor=999), "PAY-1 (po_1): 1000 BDT here, 999 BDT there"),
        (OURS, replace(THEIRS, currency="USD"), "PAY-1 (po_1): 1000 BDT here, 1000 USD there"),
    ],
)
def test_a_difference_is_told_in_words(ours: OurPayout, theirs: Payment, fault: str) -> None:
    assert compare([ours], [theirs]) == [fault]


def test_what_only_one_side_knows_is_told() -> None:
    assert compare([OURS], []) == ["PAY-1 (po_1): it is success here, unbooked there"]
    assert compare([], [THEIRS]) == ["po_1: the bank has booked what is none of ours"]
    assert compare([], [replace(THEIRS, status="asked", times_paid=0)]) == []


def test_every_payout_is_compared() -> None:
    many = [replace(OURS, external_id=f"PAY-{n}", reference=f"po_{n}") for n in range(5)]
    there = [replace(THEIRS, reference=f"po_{n}") for n in range(4)]
    assert compare(many, there) == ["PAY-4 (po_4): it is success here, unbooked there"]
