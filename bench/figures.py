"""The arithmetic of measurements: the spread of many, the trend of what is measured again and again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression, median
from typing import Final

# Of what came before; less is the noise of allocators and of pages that are filled for the first time.
_GROWTH_MAX: Final = 0.05
_SECONDS_PER_HOUR: Final = 3600.0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all do not exceed (the nearest rank). There must be one."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def counted(number: int, what: str) -> str:
    """`1 gateway`, `2 gateways`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Spread:
    """What there is to say about many measurements of one thing; zeros when there were none."""

    count: int
    p50: float
    p99: float
    max: float


def spread_of(values: Sequence[float]) -> Spread:
    """The spread of these."""
    if not values:
        return Spread(0, 0.0, 0.0, 0.0)
    return Spread(len(values), percentile(values, 0.5), percentile(values, 0.99), max(values))


@dataclass(frozen=True, slots=True)
class Trend:
    """How one thing went. `flat`: its last third is hardly above the third before; the first third is the warming up."""

    first: float
    last: float
    max: float
    slope_per_hour: float
    flat: bool


def trend_of(samples: Sequence[tuple[float, float]]) -> Trend:
    """The trend of samples of (seconds, value) in the order of time, at least two. The slope is that behind the first third."""
    values = [value for _, value in samples]
    third = len(samples) // 3
    settled = samples[third:]
    slope = linear_regression(*zip(*settled, strict=True)).slope * _SECONDS_PER_HOUR
    before, after = values[third : 2 * third] or values[:1], values[2 * third :]
    flat = median(after) <= median(before) * (1 + _GROWTH_MAX)
    return Trend(values[0], values[-1], max(values), slope, flat)
