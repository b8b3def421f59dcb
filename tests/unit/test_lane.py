"""The pace of a lane: more for who answers well and at once, less for who is slow, peace for who only fails."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.domain.lane import (
    ASKED_SECONDS_MAX,
    CAP_MAX,
    CAP_UNKNOWN,
    REST_SECONDS_MAX,
    REST_SECONDS_MIN,
    SLOW_MILLISECONDS,
    Exchange,
    Pace,
    learn,
)

WELL, ILL, NEUTRAL = Exchange(True, 20), Exchange(False, 20), Exchange(None, 20)
NEW = Pace()


def _rested(pace: Pace) -> Pace:
    """The same lane when its rest is over."""
    return replace(pace, resting=False, rest_seconds=0.0)


def _opened(times: int = 1) -> Pace:
    """A lane that has just opened for so many times in a row."""
    pace = learn(NEW, [ILL] * 12, 0.0)
    for _ in range(times - 1):
        pace = learn(_rested(pace), [ILL], 0.0)
    assert pace.opened == times
    return pace


def test_a_lane_that_nobody_knows_begins_small_and_counts_as_slow() -> None:
    assert (NEW.cap, NEW.slow, NEW.opened, NEW.failing, NEW.resting) == (8, True, 0, False, False)
    assert not learn(NEW, [WELL], 0.0).slow


def test_a_full_cap_of_successes_in_a_row_doubles_the_cap_up_to_its_bound() -> None:
    pace, caps = NEW, [CAP_UNKNOWN]
    for cap in (8, 16, 32, 64, 128, 256, 256):
        almost = learn(pace, [WELL] * (cap - 1), 0.0)
        assert almost.cap == pace.cap
        pace = learn(almost, [WELL], 0.0)
        caps.append(pace.cap)
    assert caps == [8, 16, 32, 64, 128, 256, 256, 256]


def test_a_failure_in_between_counts_successes_from_the_beginning() -> None:
    pace = learn(NEW, [*[WELL] * 7, ILL, *[WELL] * 7], 0.0)
    assert (pace.cap, pace.streak) == (8, 7)
    assert learn(pace, [WELL], 0.0).cap == 16


def test_twelve_failures_in_a_row_open_it_and_eleven_do_not() -> None:
    almost = learn(NEW, [ILL] * 11, 0.0)
    assert (almost.opened, almost.cap, almost.resting, almost.failing, almost.rest_seconds) == (0, 8, False, False, 0)
    pace = learn(almost, [ILL], 0.0)
    assert (pace.opened, pace.cap, pace.resting, pace.failing) == (1, 1, True, True)
    assert pace.rest_seconds == REST_SECONDS_MIN


def test_it_opens_as_well_when_failures_come_one_at_a_time() -> None:
    pace = NEW
    for _ in range(12):
        assert pace.opened == 0
        pace = learn(pace, [ILL], 0.0)
    assert pace.opened == 1


@pytest.mark.parametrize(("failures", "opens"), [(8, True), (5, False)])
def test_a_mix_opens_it_when_most_of_it_fails(failures: int, opens: bool) -> None:
    mixed = [*[ILL] * failures, *[WELL] * (10 - failures)] * 20
    pace = NEW
    opened = 0
    for exchange in mixed:
        pace = learn(pace, [exchange], 0.0)
        opened = max(opened, pace.opened)
    assert (opened > 0) is opens


def test_what_was_in_flight_when_it_opened_does_not_open_it_again() -> None:
    pace = _opened()
    assert learn(NEW, [ILL] * 200, 0.0).opened == 1, "in the same batch"
    later = learn(pace, [ILL] * 200, 0.0)
    assert (later.opened, later.rest_seconds, later.cap) == (1, 0.0, 1), "in a later one"


def test_after_a_rest_it_starts_slowly_and_is_well_again_at_the_usual_cap() -> None:
    pace, caps = _rested(_opened()), []
    while pace.opened:
        pace = learn(pace, [WELL], 0.0)
        caps.append(pace.cap)
    assert caps == [*[1] * 4, *[2] * 5, *[4] * 5, 8]
    assert (pace.failing, pace.trouble) == (False, 0.0)
    assert learn(pace, [ILL] * 11, 0.0).opened == 0, "it has the whole of its credit again"


@pytest.mark.parametrize("successes", [0, 1, 4, 5, 9, 14])
def test_a_failure_during_the_slow_start_opens_it_again(successes: int) -> None:
    pace = learn(_rested(_opened()), [WELL] * successes, 0.0)
    again = learn(pace, [ILL], 0.0)
    assert (again.opened, again.cap, again.resting, again.failing) == (2, 1, True, True)
    assert again.rest_seconds == 2 * REST_SECONDS_MIN


def test_each_rest_is_twice_as_long_as_the_one_before_up_to_an_hour() -> None:
    rests = [_opened(times).rest_seconds for times in range(1, 12)]
    assert rests == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600, 3600]
    assert learn(replace(_rested(_opened()), opened=1_000_000), [ILL], 0.0).rest_seconds == REST_SECONDS_MAX


def test_a_rest_that_ended_well_is_the_first_one_again() -> None:
    well = learn(_rested(_opened(5)), [WELL] * 15, 0.0)
    assert well.opened == 0
    assert learn(well, [ILL] * 12, 0.0).rest_seconds == REST_SECONDS_MIN


def test_one_success_says_that_it_no_longer_only_fails() -> None:
    pace = _rested(_opened(3))
    assert pace.failing
    heard = learn(pace, [WELL], 0.0)
    assert (heard.failing, heard.opened) == (False, 3)


@given(st.floats(0, 1, exclude_max=True))
def test_luck_lengthens_a_rest_by_at_most_a_tenth(luck: float) -> None:
    rest_seconds = learn(NEW, [ILL] * 12, luck).rest_seconds
    assert REST_SECONDS_MIN <= rest_seconds <= REST_SECONDS_MIN * 1.1
    assert rest_seconds == pytest.approx(REST_SECONDS_MIN * (1 + luck / 10))


def test_a_lane_that_became_slow_falls_back_and_one_that_is_slow_gets_no_more() -> None:
    fast = replace(NEW, cap=CAP_MAX, latency_ms=20)
    slow = learn(fast, [Exchange(True, 10_000)] * 2, 0.0)
    assert (slow.cap, slow.slow) == (CAP_UNKNOWN, True)
    assert learn(slow, [Exchange(True, 10_000)] * 500, 0.0).cap == CAP_UNKNOWN
    assert learn(replace(slow, cap=2, opened=1), [Exchange(True, 10_000)], 0.0).cap == 2, "nor is it given any"


def test_a_slow_lane_that_speeds_up_earns_its_cap_again() -> None:
    slow = learn(NEW, [Exchange(True, 10_000)] * 8, 0.0)
    fast = learn(slow, [WELL] * 30, 0.0)
    assert not fast.slow
    assert fast.cap > CAP_UNKNOWN


def test_who_never_answers_becomes_slow_and_who_refuses_at_once_does_not() -> None:
    fast = replace(NEW, latency_ms=20)
    assert learn(fast, [Exchange(False, 17_000)] * 3, 0.0).slow
    assert not learn(fast, [Exchange(False, 5)] * 3, 0.0).slow
    assert learn(NEW, [Exchange(False, 5)], 0.0).slow, "nothing is known of it still"


@pytest.mark.parametrize("healthy", [None, False, True])
@pytest.mark.parametrize(("asked", "rest"), [(1.0, 1.0), (120.0, 120.0), (1e9, ASKED_SECONDS_MAX)])
def test_what_a_receiver_asks_for_is_kept_within_bounds(healthy: bool | None, asked: float, rest: float) -> None:
    pace = learn(NEW, [Exchange(healthy, 5, asked), Exchange(healthy, 5, 0.5)], 0.0)
    assert pace.rest_seconds == rest


def test_of_a_rest_and_a_wish_the_longer_counts() -> None:
    assert learn(NEW, [*[ILL] * 11, Exchange(False, 5, 600.0)], 0.0).rest_seconds == 600
    assert learn(NEW, [*[ILL] * 11, Exchange(False, 5, 1.0)], 0.0).rest_seconds == 30
    assert learn(NEW, [Exchange(False, 5, 600.0), *[ILL] * 11], 0.0).rest_seconds == 600


@pytest.mark.parametrize("pace", [NEW, replace(NEW, cap=256, latency_ms=3, trouble=0.69), _opened(4)])
def test_what_says_nothing_of_the_receiver_changes_nothing(pace: Pace) -> None:
    assert learn(pace, [NEUTRAL] * 1_000, 0.5) == replace(pace, rest_seconds=0.0)


def test_what_was_learned_before_has_no_rest_left() -> None:
    assert learn(replace(NEW, rest_seconds=99.0), [], 0.0) == NEW


_exchanges = st.lists(
    st.builds(
        Exchange,
        st.sampled_from((True, False, None)),
        st.one_of(st.integers(0, 200), st.integers(0, 200_000)),
        st.one_of(st.just(0.0), st.floats(0, 1e12)),
    ),
    max_size=60,
)


@given(st.lists(st.tuples(_exchanges, st.booleans()), max_size=30), st.floats(0, 1, exclude_max=True))
def test_whatever_comes_all_stays_within_bounds(batches: list[tuple[list[Exchange], bool]], luck: float) -> None:
    pace = NEW
    for exchanges, rested in batches:
        before, pace = pace, learn(_rested(pace) if rested else pace, exchanges, luck)
        assert 1 <= pace.cap <= CAP_MAX
        assert 0 <= pace.streak <= max(5, pace.cap)
        assert 0.0 <= pace.trouble <= 1.0
        assert pace.latency_ms is None or 0 <= pace.latency_ms <= 200_000
        assert 0.0 <= pace.rest_seconds <= REST_SECONDS_MAX * 1.1
        assert not pace.failing or pace.opened
        assert not pace.slow or pace.cap <= max(CAP_UNKNOWN, before.cap)
        assert pace.opened <= before.opened + len(exchanges)
        answers = sum(exchange.healthy is True for exchange in exchanges)
        assert pace.cap <= max(before.cap, 1) * 2**answers


@given(_exchanges)
def test_batches_of_any_size_teach_the_same(exchanges: list[Exchange]) -> None:
    """But for the rest, which is of the last batch: how workers bundle what they record changes no pace."""
    together, apart = learn(NEW, exchanges, 0.3), NEW
    for exchange in exchanges:
        apart = learn(apart, [exchange], 0.3)
    assert replace(apart, rest_seconds=0.0) == replace(together, rest_seconds=0.0)


@given(st.integers(SLOW_MILLISECONDS + 1, 200_000), st.integers(1, 200))
def test_a_slow_answer_never_gives_more_than_the_unknown_have(duration_ms: int, count: int) -> None:
    assert learn(NEW, [Exchange(True, duration_ms)] * count, 0.0).cap <= CAP_UNKNOWN
