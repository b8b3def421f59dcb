"""What is said of the whole way: whether anything falls behind, and what several turns come to."""

from typing import Any

import pytest

from bench.end_to_end import is_flat, summarize


@pytest.mark.parametrize(
    ("ages", "flat"),
    [
        ([0.0] * 9, True),
        ([0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.9, 0.9, 0.9], True),
        ([1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 5.0, 5.0, 5.0], False),
        ([9.0, 9.0, 9.0, 5.0, 5.0, 5.0, 5.1, 5.1, 5.1], True),
        ([2.0], False),
        ([], True),
    ],
)
def test_ages_are_flat_when_short_or_when_they_do_not_go_on_growing(ages: list[float], flat: bool) -> None:
    assert is_flat(ages) is flat


def _turn(rate: float, *, failed: int = 0, differing: int = 0, flat: bool = True) -> dict[str, Any]:
    return {
        "told": {"per_second": rate, "p50_ms": rate, "p99_ms": rate, "p99.9_ms": rate, "failed": failed},
        "delivered_per_second": rate - 1,
        "lag": {"p50": rate, "p99": rate, "max": rate},
        "differing": differing,
        "flat": flat,
        "costs": {"cpu_ms": {"gateway-1": rate, "settle": 1000.0}},
    }


def test_of_several_turns_the_median_counts_but_what_was_wrong_in_any_of_them_is_told() -> None:
    turns = [_turn(9.0), _turn(1.0, failed=2, flat=False), _turn(5.0, differing=3)]
    found = summarize("one", turns)
    assert (found["accepted_per_second"], found["delivered_per_second"], found["p99_ms"]) == (5.0, 4.0, 5.0)
    assert found["lag"] == {"p50": 5.0, "p99": 5.0, "max": 5.0}
    assert found["cost_ms"] == pytest.approx(1.005)
    assert (found["failed"], found["differing"], found["growing"]) == (2, 3, 1)
    assert found["turns"] == turns
