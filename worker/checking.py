"""Checking: the rules of the ledger, page by page and again and again. What is broken is told; nothing is mended."""

from time import monotonic
from typing import Final

from prometheus_client import Counter, Gauge

from common.db.checks import begin_checks, check_step, find_progress
from common.db.engine import Engine, in_transaction
from common.log import LogEvent, get_logger

# One step of so many rows, then a rest, so many times as long as the step took: work that nobody waits for takes a small part
# of the time, and gives way while the database is busy; but not for ever, since a pass shall come to its end.
STEP_ROWS_MAX: Final = 1000
_RESTS_PER_STEP: Final = 20
_REST_SECONDS_MIN: Final = 0.2
_REST_SECONDS_MAX: Final = 2.0

OFFENDERS: Final = Gauge(
    "payouts_invariant_offenders",
    "How many break a rule of the ledger, in this pass or the last complete one",
    ["rule"],
)
CHECKED: Final = Counter("payouts_invariant_checked_rows", "Rows that this process has checked", ["table"])
PASS_ROWS: Final = Gauge("payouts_invariant_checked_pass_rows", "Rows that the present pass has checked", ["table"])
PASS_AGE: Final = Gauge(
    "payouts_invariant_checked_pass_age_seconds",
    "How long ago a pass over the whole table was complete, or the first one began",
    ["table"],
)


class Checker:
    """Looks at one page of one table in each round; any number of checkers share the work."""

    def __init__(self, engine: Engine, *, rows_max: int = STEP_ROWS_MAX) -> None:
        self._engine = engine
        self._rows_max = rows_max
        self._begun = False
        self.pause_seconds = _REST_SECONDS_MIN

    async def run_round(self) -> bool:
        """Make one step, to be followed by `pause_seconds`; haste would be at the cost of the work."""
        if not self._begun:
            await in_transaction(self._engine, begin_checks)
            self._begun = True
        started = monotonic()
        step = await in_transaction(self._engine, lambda tx: check_step(tx, rows_max=self._rows_max))
        self.pause_seconds = rest_seconds(monotonic() - started)
        if step is not None:
            CHECKED.labels(step.table).inc(step.rows)
            for broken in step.broken:
                get_logger().error(
                    LogEvent.INVARIANT_BROKEN,
                    rule=broken.rule.name,
                    guards=broken.rule.guards,
                    offenders=list(broken.offenders),
                )
        await self._publish()
        return False

    def leave(self) -> None:
        """There is nothing that could be left alone."""

    async def drain(self, _deadline_seconds: float) -> None:
        """Nothing is ever under way between rounds."""

    async def _publish(self) -> None:
        """How all tables stand, whoever checked them. What is not known yet is not said."""
        for progress in await in_transaction(self._engine, find_progress):
            PASS_ROWS.labels(progress.table).set(progress.rows_seen)
            PASS_AGE.labels(progress.table).set(progress.age_seconds)
            for rule, count in progress.offenders.items():
                OFFENDERS.labels(rule).set(count)


def rest_seconds(step_seconds: float) -> float:
    """How long to rest after a step that took so long."""
    return min(max(_REST_SECONDS_MIN, step_seconds * _RESTS_PER_STEP), _REST_SECONDS_MAX)
