"""When to try again: the delays of the contract exactly, jitter that only adds, and a `Retry-After` within bounds."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.domain.schedule import (
    CALLBACK_DELAYS,
    CALLBACK_RETRY_AFTER_MAX,
    LOOK_UP_DELAYS,
    SUBMIT_DELAYS,
    USUAL_PATIENCE,
    callback_delay,
)

MINUTE, HOUR, DAY = 60, 3600, 86_400

# `architecture.md`, "Callbacks": delays after the first attempt.
CONTRACT_DELAYS = [
    *(10, 30, 2 * MINUTE, 10 * MINUTE, 30 * MINUTE, 1 * HOUR, 2 * HOUR, 4 * HOUR, 6 * HOUR, 8 * HOUR, 10 * HOUR),
    *(12 * HOUR, 12 * HOUR, 16 * HOUR),
]

steps = st.integers(0, len(CONTRACT_DELAYS) - 1)
lucks = st.floats(0, 1, exclude_max=True)


def test_callbacks_wait_exactly_as_long_as_the_contract_says() -> None:
    assert [callback_delay(step, 0.0) for step in range(len(CONTRACT_DELAYS))] == CONTRACT_DELAYS
    assert list(CALLBACK_DELAYS) == CONTRACT_DELAYS


def test_callbacks_are_tried_for_about_72_hours() -> None:
    assert sum(CALLBACK_DELAYS) == pytest.approx(72 * HOUR, rel=0.01)


@pytest.mark.parametrize("beyond", [0, 1, 1000])
def test_a_callback_is_exhausted_after_its_last_delay(beyond: int) -> None:
    assert callback_delay(len(CONTRACT_DELAYS) + beyond, 0.5) is None
    assert callback_delay(len(CONTRACT_DELAYS) + beyond, 0.5, retry_after_seconds=60) is None


@given(steps, lucks)
def test_jitter_only_adds_and_at_most_a_tenth_or_a_second_or_a_quarter_of_an_hour(step: int, luck: float) -> None:
    base, delay = CONTRACT_DELAYS[step], callback_delay(step, luck)
    assert delay is not None
    assert base <= delay < base + min(max(base / 10, 1), 15 * MINUTE) + 1e-6


@given(steps, lucks, lucks)
def test_attempts_that_failed_together_are_spread(step: int, first: float, second: float) -> None:
    one, other = callback_delay(step, first), callback_delay(step, second)
    assert one is not None
    assert other is not None
    if abs(first - second) > 0.01:
        assert one != other


@given(steps, lucks, st.floats(-1e9, 1e9))
def test_retry_after_lengthens_a_delay_up_to_its_bound_and_never_shortens_it(
    step: int, luck: float, asked: float
) -> None:
    plain, delay = callback_delay(step, luck), callback_delay(step, luck, retry_after_seconds=asked)
    assert plain is not None
    assert delay is not None
    assert delay >= plain
    assert delay >= min(asked, CALLBACK_RETRY_AFTER_MAX)
    assert delay <= max(CONTRACT_DELAYS[step], CALLBACK_RETRY_AFTER_MAX) + 15 * MINUTE
    if asked <= CONTRACT_DELAYS[step]:
        assert delay == plain


@pytest.mark.parametrize("asked", [float("inf"), float("nan"), 1e300, -1.0])
def test_a_retry_after_that_makes_no_sense_does_no_harm(asked: float) -> None:
    delay = callback_delay(0, 0.0, retry_after_seconds=asked)
    assert delay in {CONTRACT_DELAYS[0], float(CALLBACK_RETRY_AFTER_MAX)}


def test_a_submit_is_repeated_along_its_schedule_and_then_given_up() -> None:
    count = len(SUBMIT_DELAYS)
    assert [USUAL_PATIENCE.submit_delay(refusals) for refusals in range(1, count + 1)] == list(SUBMIT_DELAYS)
    assert [USUAL_PATIENCE.submit_delay(count + more) for more in (1, 2, 100)] == [None] * 3


def test_a_look_up_is_repeated_for_ever_and_daily_in_the_end() -> None:
    assert [USUAL_PATIENCE.look_up_delay(count) for count in range(len(LOOK_UP_DELAYS))] == list(LOOK_UP_DELAYS)
    assert {USUAL_PATIENCE.look_up_delay(count) for count in (len(LOOK_UP_DELAYS), 10_000)} == {DAY}


@pytest.mark.parametrize(
    "delays", [CALLBACK_DELAYS, SUBMIT_DELAYS, LOOK_UP_DELAYS], ids=["callback", "submit", "look_up"]
)
def test_no_delay_is_shorter_than_the_one_before(delays: tuple[int, ...]) -> None:
    assert all(earlier <= later for earlier, later in itertools.pairwise(delays))
    assert delays[0] > 0
