"""How long the checker rests between two steps."""

import pytest

from worker.checking import rest_seconds


@pytest.mark.parametrize(("step_seconds", "rest"), [(0.0, 0.2), (0.01, 0.2), (0.05, 1.0), (0.25, 2.0), (15.0, 2.0)])
def test_the_rest_grows_with_the_step_before_it_within_bounds(step_seconds: float, rest: float) -> None:
    assert rest_seconds(step_seconds) == pytest.approx(rest)
