"""The moves, failures and masks of payouts are those of the contract, all of them and no others."""

import itertools
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.domain.payout import FAILURES, MOVES, STAGES, State, mask_recipient, render_failure
from common.domain.telling import event_type

# The contract's table "Statuses", row by row: from, to.
CONTRACT_MOVES = [
    ("queued", "canceled"),
    ("queued", "expired"),
    ("queued", "sending"),
    ("queued", "failed"),
    ("sending", "queued"),
    ("sending", "failed"),
    ("sending", "success"),
    ("submitted", "success"),
    ("submitted", "failed"),
    ("sending", "submitted"),
    ("sending", "verifying"),
    ("submitted", "verifying"),
    ("verifying", "submitted"),
    ("verifying", "success"),
    ("verifying", "failed"),
    ("verifying", "queued"),
    ("success", "refunded"),
]

CONTRACT_FAILURES = {
    "recipient_not_found",
    "recipient_account_closed",
    "recipient_account_blocked",
    "recipient_limit_reached",
    "invalid_recipient_details",
    "provider_declined",
    "provider_unavailable",
    "compliance_rejected",
    "returned_by_bank",
    "no_route",
    "other",
}
CONTRACT_SOURCES = {"recipient", "provider", "merchant", "platform"}
CONTRACT_STATUSES = {"pending", "success", "failed", "canceled", "expired", "refunded"}
CONTRACT_STAGES = {"queued", "sending", "submitted", "verifying"}


def test_the_moves_are_those_of_the_contract_and_no_others() -> None:
    assert len(CONTRACT_MOVES) == len(MOVES)
    assert {(State(source), State(target)) for source, target in CONTRACT_MOVES} == MOVES


def test_nothing_leaves_a_final_status() -> None:
    """But what a bank returns, together with the entry that brings its money."""
    assert {move for move in MOVES if move[0].is_final} == {(State.SUCCESS, State.REFUNDED)}


def test_every_state_can_be_reached_from_queued_and_every_stage_can_end() -> None:
    def reachable(start: State) -> set[State]:
        found = {start}
        while more := {target for source, target in MOVES if source in found} - found:
            found |= more
        return found

    assert reachable(State.QUEUED) == set(State)
    assert all(State.SUCCESS in reachable(stage) and State.FAILED in reachable(stage) for stage in STAGES)


def test_no_state_moves_to_itself() -> None:
    assert not [move for move in MOVES if move[0] == move[1]]


def test_statuses_and_stages_are_those_of_the_contract() -> None:
    assert {state.status for state in State} == CONTRACT_STATUSES
    assert {state.stage for state in State} == CONTRACT_STAGES | {None}


@pytest.mark.parametrize("state", State)
def test_a_state_shows_a_stage_exactly_while_it_is_pending(state: State) -> None:
    assert state.is_final == (state.stage is None) == (state.status != "pending") == (state not in STAGES)
    assert event_type(state) == f"payout.{state.status}"


def test_the_failures_are_those_of_the_contract_and_complete() -> None:
    assert FAILURES.keys() == CONTRACT_FAILURES
    assert {failure.source for failure in FAILURES.values()} <= CONTRACT_SOURCES
    assert all(failure.message for failure in FAILURES.values())


@pytest.mark.parametrize("code", sorted(CONTRACT_FAILURES))
def test_a_failure_is_shown_with_exactly_the_fields_of_the_contract(code: str) -> None:
    shown = render_failure(code)
    assert shown.keys() == {"code", "message", "source", "retryable"}
    assert (shown["code"], type(shown["retryable"])) == (code, bool)


@pytest.mark.parametrize(
    ("recipient", "masked"),
    [
        ("", ""),
        ("1", "*"),
        ("1234", "****"),
        ("1234567", "*******"),
        ("12345678", "****5678"),
        ("01712345678", "*******5678"),
        ("4111111111111111", "411111******1111"),
        ("4111111111111112", "************1112"),
        ("378282246310005", "378282*****0005"),
        ("4222222222222", "422222***2222"),
        ("6304000000000000000", "630400*********0000"),
        ("422222222222", "********2222"),
        ("+4111111111111111", "*************1111"),
        ("user@bank", "*****bank"),
    ],
)
def test_a_recipient_is_masked_as_the_contract_says(recipient: str, masked: str) -> None:
    assert mask_recipient(recipient) == masked


def luhn_holds(digits: str) -> bool:
    """The definition, not the product's table: double every second digit from the right and add the digits."""
    doubled = [int(digit) * (1 + position % 2) for position, digit in enumerate(reversed(digits))]
    return sum(sum(divmod(value, 10)) for value in doubled) % 10 == 0


@given(st.text(string.digits, min_size=8, max_size=24))
def test_first_six_are_shown_of_card_numbers_and_of_nothing_else(digits: str) -> None:
    masked = mask_recipient(digits)
    is_card = 13 <= len(digits) <= 19 and luhn_holds(digits)
    head = digits[:6] if is_card else ""
    assert masked == head + "*" * (len(digits) - len(head) - 4) + digits[-4:]


@given(st.text(string.ascii_letters + string.digits + "._:@+-", max_size=128))
def test_a_mask_keeps_the_length_and_shows_ten_characters_at_most(recipient: str) -> None:
    masked = mask_recipient(recipient)
    shown = [
        letter
        for letter, (mask, original) in zip(recipient, zip(masked, recipient, strict=True), strict=True)
        if mask == original
    ]
    assert len(masked) == len(recipient)
    assert len(shown) <= (10 if len(recipient) >= 13 else 4 if len(recipient) >= 8 else 0)


def test_every_pair_of_states_is_judged_once() -> None:
    assert len(MOVES) + len(set(itertools.product(State, State)) - MOVES) == len(State) ** 2
