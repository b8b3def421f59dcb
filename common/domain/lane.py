"""The pace of a lane: how many callbacks may be in flight to one origin, and when it is left in peace.

A lane begins small. It is given more while it answers well and at once, less when it is slow; when it fails and fails it is
left in peace for a while, longer each time, and then begins with a single callback again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

CAP_UNKNOWN: Final = 8
CAP_MAX: Final = 256
# What a merchant may have in flight besides what its lanes have earned: many origins that nobody knows are no way to more.
MERCHANT_UNPROVEN_MAX: Final = 16
SLOW_MILLISECONDS: Final = 2_000

# The first rest after it opens, and the longest one; each is twice as long as the one before.
REST_SECONDS_MIN: Final = 30.0
REST_SECONDS_MAX: Final = 3_600.0
# How long one `Retry-After` may hold up a whole lane.
ASKED_SECONDS_MAX: Final = 600.0

# Each failure takes a tenth of the way to 1, each success a tenth of the way to 0: twelve failures in a row open the breaker,
# and so does any mix in which seven of ten fail for long.
_WEIGHT: Final = 0.1
_TROUBLE_MAX: Final = 0.7
# Successes in a row that double the cap: so many at least, or a full cap of them.
_STREAK: Final = 5
_REST_JITTER: Final = 0.1


@dataclass(frozen=True, slots=True)
class Exchange:
    """How one attempt went.

    `healthy` None: it says nothing of the receiver. `asked_seconds`: the wait that a 429 or 503 asked for.
    """

    healthy: bool | None
    duration_ms: int
    asked_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """What is known of a lane.

    `cap`: callbacks in flight at the most. `streak`: successes in a row since the cap last changed. `trouble`: the share of
    failures, the latest counting most. `latency_ms`: of answers, likewise; None: it has never answered. `opened`: how often
    the breaker has opened in a row; 0 when all is well. `failing`: it has answered nothing well since it opened. `resting`: it
    is left in peace now; `rest_seconds`: for so long from now on.
    """

    cap: int = CAP_UNKNOWN
    streak: int = 0
    trouble: float = 0.0
    latency_ms: int | None = None
    opened: int = 0
    failing: bool = False
    resting: bool = False
    rest_seconds: float = 0.0

    @property
    def slow(self) -> bool:
        """Whether it takes long to answer, or nobody knows."""
        return self.latency_ms is None or self.latency_ms > SLOW_MILLISECONDS


def learn(pace: Pace, exchanges: Iterable[Exchange], luck: float) -> Pace:
    """What attempts teach about their lane, in the order they ended. `luck` in [0, 1) is the rest's share of the jitter."""
    pace = replace(pace, rest_seconds=0.0)
    for exchange in exchanges:
        if exchange.healthy:
            pace = _succeeded(pace, exchange.duration_ms)
        elif exchange.healthy is False:
            pace = _failed(pace, exchange.duration_ms, luck)
        if exchange.asked_seconds > 0:
            pace = replace(pace, rest_seconds=max(pace.rest_seconds, min(exchange.asked_seconds, ASKED_SECONDS_MAX)))
    return pace


def _succeeded(pace: Pace, duration_ms: int) -> Pace:
    latency_ms = _toward(duration_ms, pace.latency_ms)
    cap, streak, opened, trouble = pace.cap, pace.streak + 1, pace.opened, pace.trouble * (1 - _WEIGHT)
    if streak >= max(_STREAK, cap):
        cap, streak = min(cap * 2, CAP_MAX), 0
    if opened and cap >= CAP_UNKNOWN:
        opened, trouble = 0, 0.0
    if latency_ms > SLOW_MILLISECONDS:
        cap = min(cap, CAP_UNKNOWN)
    return Pace(cap, streak, trouble, latency_ms, opened, resting=pace.resting, rest_seconds=pace.rest_seconds)


def _failed(pace: Pace, duration_ms: int, luck: float) -> Pace:
    trouble = pace.trouble + (1 - pace.trouble) * _WEIGHT
    latency_ms = pace.latency_ms if duration_ms <= SLOW_MILLISECONDS else _toward(duration_ms, pace.latency_ms)
    pace = replace(pace, streak=0, trouble=trouble, latency_ms=latency_ms)
    if pace.resting or (not pace.opened and trouble < _TROUBLE_MAX):
        return pace
    # It opens, or what was tried after a rest failed as well. What was in flight beside it tells nothing new.
    rest_seconds = min(REST_SECONDS_MIN * 2.0 ** min(pace.opened, 16), REST_SECONDS_MAX) * (1 + luck * _REST_JITTER)
    opened = pace.opened + 1
    return replace(
        pace, cap=1, opened=opened, failing=True, resting=True, rest_seconds=max(pace.rest_seconds, rest_seconds)
    )


def _toward(duration_ms: int, latency_ms: int | None) -> int:
    return duration_ms if latency_ms is None else round(latency_ms + (duration_ms - latency_ms) * _WEIGHT * 2)
