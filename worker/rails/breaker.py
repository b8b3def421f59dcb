"""A breaker: a rail that does not answer is left in peace for a while, then asked by one call alone.

It decides nothing about money: what it keeps back stays due.
"""

from collections.abc import Callable
from time import monotonic


class Breaker:
    """Opens after `failures_max` calls in a row without an answer, for `rest_seconds`; then one call at a time may try.

    The first answer closes it. `changed` hears when it opens and closes.
    """

    def __init__(
        self,
        *,
        failures_max: int,
        rest_seconds: float,
        changed: Callable[[bool], None] = lambda _: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._failures_max = failures_max
        self._rest_seconds = rest_seconds
        self._changed = changed
        self._clock = clock
        self._failures = 0
        self._try_again_at: float | None = None

    @property
    def calls_max(self) -> int | None:
        """How many calls may be in flight now; None: as many as there are."""
        if self._try_again_at is None:
            return None
        return 1 if self._clock() >= self._try_again_at else 0

    def answered(self) -> None:
        """A call had an answer, whatever it said."""
        self._failures = 0
        if self._try_again_at is not None:
            self._try_again_at = None
            self._changed(False)

    def unanswered(self) -> None:
        """A call had no answer."""
        self._failures += 1
        if self._failures < self._failures_max:
            return
        was_closed = self._try_again_at is None
        self._try_again_at = self._clock() + self._rest_seconds
        if was_closed:
            self._changed(True)
