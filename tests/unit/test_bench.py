"""The arithmetic of measurements."""

import pytest

from bench.figures import percentile, spread_of, trend_of
from bench.isolation import Sample, summarize


def test_a_percentile_is_one_of_the_values_by_nearest_rank() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([7.0], 0.99) == 7


def test_the_spread_of_nothing_is_zeros() -> None:
    assert spread_of([]).count == 0
    assert (spread_of([1.0, 3.0, 2.0]).p50, spread_of([1.0, 3.0, 2.0]).max) == (2, 3)


@pytest.mark.parametrize(
    ("values", "flat"),
    [
        ([10, 60, 100, 100, 101, 100, 100, 101, 100], True),
        ([100, 100, 100, 110, 110, 110, 120, 120, 120], False),
        ([100, 100, 100, 100, 100, 100, 50, 50, 50], True),
        ([100, 100, 100], True),
    ],
)
def test_what_only_warms_up_is_flat_and_what_goes_on_growing_is_not(values: list[int], flat: bool) -> None:
    assert trend_of([(float(n), float(value)) for n, value in enumerate(values)]).flat is flat


def test_the_slope_is_per_hour_and_leaves_out_the_warming_up() -> None:
    trend = trend_of([(float(n), value) for n, value in enumerate([0.0, 50.0, 100.0, 101.0, 102.0, 103.0])])
    assert trend.slope_per_hour == pytest.approx(3600.0)
    assert (trend.first, trend.last, trend.max) == (0, 103, 103)


def test_what_began_under_a_wider_cap_is_told_apart_from_what_no_cap_allowed() -> None:
    samples = [Sample(0.0, 8, 8), Sample(1.0, 8, 2), Sample(2.0, 9, 2), Sample(30.0, 3, 2)]
    found = summarize(samples, timeout_seconds=17.0)
    assert (found["over"], found["over_any"]) == (3, 2)
    assert (found["in_flight_max"], found["cap_min"], found["cap_max"]) == (9, 2, 8)
