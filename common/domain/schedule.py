"""When to try again: the schedules as data, in seconds. Each delay counts from the end of the attempt before it."""

from dataclasses import dataclass
from typing import Final

_MINUTE: Final = 60
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR

# Callbacks, after the first attempt: about 72 h, long enough for a weekend's outage at a merchant.
CALLBACK_DELAYS: Final = (
    10,
    30,
    2 * _MINUTE,
    10 * _MINUTE,
    30 * _MINUTE,
    1 * _HOUR,
    2 * _HOUR,
    4 * _HOUR,
    6 * _HOUR,
    8 * _HOUR,
    10 * _HOUR,
    12 * _HOUR,
    12 * _HOUR,
    16 * _HOUR,
)
CALLBACK_RETRY_AFTER_MAX: Final = 6 * _HOUR

# A submit that was provably not accepted: about 16 hours, then the payout fails with `provider_unavailable`.
SUBMIT_DELAYS: Final = (1, 5, 30, 2 * _MINUTE, 10 * _MINUTE, 30 * _MINUTE, 1 * _HOUR, 2 * _HOUR, 4 * _HOUR, 8 * _HOUR)

# A payout whose fate the rail has not told yet: minutes, then hours, then daily without end. Time never decides it.
LOOK_UP_DELAYS: Final = (
    5,
    15,
    _MINUTE,
    5 * _MINUTE,
    15 * _MINUTE,
    1 * _HOUR,
    3 * _HOUR,
    6 * _HOUR,
    12 * _HOUR,
    1 * _DAY,
)

# How long a rail may be silent about what it said it had taken, until that is in doubt and a matter for people.
SUBMITTED_SILENCE_SECONDS: Final = 1 * _DAY

# A payin that nobody told us of yet: sooner while its payer may still be at it, then daily. Events come by themselves.
PAYIN_LOOK_UP_DELAYS: Final = (
    10,
    30,
    _MINUTE,
    5 * _MINUTE,
    15 * _MINUTE,
    1 * _HOUR,
    3 * _HOUR,
    6 * _HOUR,
    12 * _HOUR,
    1 * _DAY,
)

_JITTER_SHARE: Final = 0.1
_JITTER_SECONDS_MIN: Final = 1.0
_JITTER_SECONDS_MAX: Final = 15.0 * _MINUTE


def callback_delay(step: int, luck: float, retry_after_seconds: float = 0.0) -> float | None:
    """Seconds until the callback attempt after step `step` (0 is the first attempt), or None after the last one.

    `luck` in [0, 1) spreads attempts that failed together: jitter is only ever added. `Retry-After` can lengthen a delay
    up to `CALLBACK_RETRY_AFTER_MAX` and never shortens it.
    """
    if step >= len(CALLBACK_DELAYS):
        return None
    base = CALLBACK_DELAYS[step]
    spread = min(max(base * _JITTER_SHARE, _JITTER_SECONDS_MIN), _JITTER_SECONDS_MAX)
    return max(base, min(retry_after_seconds, CALLBACK_RETRY_AFTER_MAX)) + luck * spread


@dataclass(frozen=True, slots=True)
class Patience:
    """When a rail is asked again, in seconds: to pay what it did not accept, and what became of what it may have taken; and for
    how long it may be silent about what it has taken.
    """

    submit_delays: tuple[float, ...] = SUBMIT_DELAYS
    look_up_delays: tuple[float, ...] = LOOK_UP_DELAYS
    silence_seconds: float = SUBMITTED_SILENCE_SECONDS

    def submit_delay(self, refusals: int) -> float | None:
        """Seconds until a payout is sent again after that many refusals (from 1), or None at the end of the schedule."""
        return self.submit_delays[refusals - 1] if refusals <= len(self.submit_delays) else None

    def look_up_delay(self, look_ups: int) -> float:
        """Seconds until the next look-up after that many (from 0); the last delay repeats for ever."""
        return self.look_up_delays[min(look_ups, len(self.look_up_delays) - 1)]


USUAL_PATIENCE: Final = Patience()
