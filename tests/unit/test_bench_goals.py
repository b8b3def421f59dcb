"""What figures are held against, and what work costs."""

import pytest

from bench.costs import Usage
from bench.goals import Goal


@pytest.mark.parametrize(
    ("goal", "wanted", "met"),
    [
        (Goal("rate", 20.0, least=20.0), "≥ 20", True),
        (Goal("rate", 19.9, least=20.0), "≥ 20", False),
        (Goal("p99", 15.0, "ms", most=15.0), "≤ 15 ms", True),
        (Goal("p99", 15.1, "ms", most=15.0), "≤ 15 ms", False),
        (Goal("settled", 9000.0, "per second", least=8000.0), "≥ 8,000 per second", True),
    ],
)
def test_a_goal_is_met_at_its_bound_and_beyond(goal: Goal, wanted: str, met: bool) -> None:
    assert (goal.wanted, goal.met) == (wanted, met)


def test_costs_are_of_a_thousand_and_of_what_was_there_at_the_beginning() -> None:
    before = Usage({"gateway-1": 1.0}, {"log": 100})
    costs = Usage({"gateway-1": 3.0, "late": 5.0}, {"log": 5100}).since(before, 500)
    assert costs.cpu_ms == {"gateway-1": 4000.0}
    assert costs.disk_bytes == {"log": 10_000}
