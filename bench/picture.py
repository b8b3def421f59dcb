"""Results as a picture: charts one below the other, an SVG that any browser shows. Bars for figures, lines for what changes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

_WIDTH: Final = 960
_MARGIN: Final = 24
_LABELS: Final = 340
_ROW: Final = 22
_TITLE: Final = 44
_PLOT: Final = 180
_LEFT: Final = 70
_OURS, _BASELINE, _GOAL, _GRID, _TEXT = "#1f6feb", "#9aa4b2", "#d1242f", "#e3e6ea", "#1f2328"
_LINES: Final = ("#1f6feb", "#e16f24", "#2da44e", "#8250df", "#bf3989", "#57606a", "#b08800", "#0969da")
_ROUND: Final = (1.0, 2.0, 2.5, 5.0, 10.0)
_TICKS: Final = 4


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure; `goal` is where it should get to, and `ours` tells the product from its baselines."""

    label: str
    value: float
    ours: bool = True
    goal: float | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """A chart with a bar for each figure."""

    title: str
    bars: Sequence[Bar]

    @property
    def height(self) -> int:
        """In pixels."""
        return _TITLE + _ROW * len(self.bars) + _MARGIN

    def draw(self) -> Iterator[str]:
        """Its elements, the first at the top."""
        yield _title(self.title)
        most = max((max(bar.value, bar.goal or 0.0) for bar in self.bars), default=0.0) or 1.0
        length = _WIDTH - _LABELS - 2 * _MARGIN - 90
        for place, bar in enumerate(self.bars):
            top = _TITLE + place * _ROW
            left = _MARGIN + _LABELS
            width = max(1.0, bar.value / most * length)
            yield _text(left - 8, top + 14, bar.label, anchor="end")
            yield f'<rect x="{left}" y="{top + 3}" width="{width:.1f}" height="{_ROW - 7}" fill="{_color(bar)}"/>'
            yield _text(left + width + 6, top + 14, f"{bar.value:,.4g}" if bar.value < 100 else f"{bar.value:,.0f}")
            if bar.goal is not None:
                x = left + bar.goal / most * length
                yield _line(x, top + 1, x, top + _ROW - 2, _GOAL, 2)


@dataclass(frozen=True, slots=True)
class Lines:
    """A chart with a line for each series of (x, y)."""

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    x_unit: str = "s"

    @property
    def height(self) -> int:
        """In pixels."""
        return _TITLE + _PLOT + 24 + 18 * math.ceil(len(self.series) / 3) + _MARGIN

    def draw(self) -> Iterator[str]:
        """Its elements, the first at the top."""
        yield _title(self.title)
        points = [point for line in self.series.values() for point in line] or [(0.0, 0.0)]
        first, last = min(x for x, _ in points), max(x for x, _ in points)
        step = round_step(max(y for _, y in points) / _TICKS)
        most, width = step * _TICKS, _WIDTH - _LEFT - 2 * _MARGIN
        left = _MARGIN + _LEFT
        for tick in range(_TICKS + 1):
            y = _TITLE + _PLOT - tick / _TICKS * _PLOT
            yield _line(left, y, left + width, y, _GRID, 1)
            yield _text(left - 8, y + 4, f"{tick * step:,g}", anchor="end")
        yield _text(left + width, _TITLE + _PLOT + 16, f"{last - first:,.0f} {self.x_unit}", anchor="end")
        for place, (name, line) in enumerate(self.series.items()):
            color = _LINES[place % len(_LINES)]
            drawn = " ".join(
                f"{left + (x - first) / ((last - first) or 1.0) * width:.1f},{_TITLE + _PLOT - y / most * _PLOT:.1f}"
                for x, y in line
            )
            yield f'<polyline points="{drawn}" fill="none" stroke="{color}" stroke-width="1.5"/>'
            x, y = left + place % 3 * (width / 3), _TITLE + _PLOT + 34 + place // 3 * 18
            yield _line(x, y - 4, x + 16, y - 4, color, 3)
            yield _text(x + 22, y, name)


Chart = Bars | Lines


def round_step(least: float) -> float:
    """The smallest round number that is not below this; for what is nothing, 1."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in _ROUND if factor * power >= least * (1 - 1e-9))


def render_picture(heading: str, charts: Sequence[Chart]) -> str:
    """An SVG document with all of them."""
    height = 2 * _MARGIN + 24 + sum(chart.height for chart in charts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
        ' font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(_MARGIN, _MARGIN + 4, heading),
    ]
    top = _MARGIN + 24
    for chart in charts:
        parts += [f'<g transform="translate(0 {top})">', *chart.draw(), "</g>"]
        top += chart.height
    return "\n".join([*parts, "</svg>", ""])


def _color(bar: Bar) -> str:
    return _OURS if bar.ours else _BASELINE


def _title(words: str) -> str:
    return f'<text x="{_MARGIN}" y="26" font-size="15" font-weight="600" fill="{_TEXT}">{escape(words)}</text>'


def _text(x: float, y: float, words: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_TEXT}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: int) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width}"/>'
