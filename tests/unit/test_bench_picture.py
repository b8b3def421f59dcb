"""Results as a picture."""

from xml.etree import ElementTree as ET

import pytest

from bench.picture import Bar, Bars, Chart, Lines, render_picture, round_step

_SVG = "{http://www.w3.org/2000/svg}"


def _elements(*charts: Chart) -> list[ET.Element]:
    document = ET.fromstring(render_picture("a < b & c", charts))
    return list(document.iter())


def test_bars_are_as_long_as_their_values_and_goals_stand_at_theirs() -> None:
    found = _elements(Bars("rates", [Bar("bare <client>", 200.0, ours=False), Bar("ours", 100.0, goal=50.0)]))
    bare, ours = [e for e in found if e.tag == f"{_SVG}rect" and e.get("x") is not None]
    assert float(bare.get("width", 0)) == pytest.approx(2 * float(ours.get("width", 0)), rel=0.01)
    assert bare.get("fill") != ours.get("fill")
    (goal,) = [e for e in found if e.tag == f"{_SVG}line"]
    left, middle = float(ours.get("x", 0)), float(goal.get("x1", 0))
    assert middle - left == pytest.approx(float(ours.get("width", 0)) / 2, rel=0.01)
    assert {"a < b & c", "bare <client>", "200", "100"} <= {e.text for e in found}


def test_lines_stay_within_their_plot_and_each_is_named() -> None:
    found = _elements(Lines("ages", {"payouts": [(10.0, 0.0), (20.0, 3.1)], "callbacks": [(10.0, 7.9), (20.0, 1.0)]}))
    lines = [e.get("points", "") for e in found if e.tag == f"{_SVG}polyline"]
    assert len(lines) == 2
    heights = [float(point.split(",")[1]) for line in lines for point in line.split()]
    assert all(44 <= height <= 224 for height in heights)
    assert {"payouts", "callbacks", "0", "8"} <= {e.text for e in found}


@pytest.mark.parametrize("charts", [(), (Bars("nothing", []), Lines("nothing", {}))])
def test_what_was_not_measured_can_be_drawn(charts: tuple[Chart, ...]) -> None:
    assert _elements(*charts)


@pytest.mark.parametrize(
    ("least", "step"), [(0.0, 1.0), (0.3, 0.5), (1.0, 1.0), (2.2, 2.5), (7.0, 10.0), (2500.0, 2500.0)]
)
def test_steps_are_round_and_not_too_short(least: float, step: float) -> None:
    assert round_step(least) == pytest.approx(step)
