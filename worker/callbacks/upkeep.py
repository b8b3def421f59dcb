"""Keeping lanes: those that have done nothing but fail for days are held for people; what a row says wrongly is put right."""

from typing import Final

from prometheus_client import Counter, Gauge

from common.db.engine import Engine, in_transaction
from common.db.lane_upkeep import count_lanes, hold_failing, mend_lanes
from common.db.lanes import FIRST_LANE
from common.log import LogEvent, get_logger

INTERVAL_SECONDS: Final = 5.0
_LANES_MAX: Final = 500

HELD: Final = Gauge("payouts_callback_lanes_held", "Lanes that are held for people; what waits in them is kept")
FAILING: Final = Gauge("payouts_callback_lanes_failing", "Lanes whose receiver has answered nothing well for a while")
MENDED: Final = Counter("payouts_callback_lanes_mended", "Lanes whose row said something else than their callbacks")


class LaneKeeper:
    """Looks at a page of lanes in each round, every `INTERVAL_SECONDS`."""

    def __init__(self, engine: Engine, *, hold_seconds: float) -> None:
        self._engine = engine
        self._hold_seconds = hold_seconds
        self._behind = FIRST_LANE

    async def run_round(self) -> bool:
        """Keep one page. There is never more to do at once."""
        held = await in_transaction(
            self._engine, lambda tx: hold_failing(tx, failing_seconds=self._hold_seconds, lanes_max=_LANES_MAX)
        )
        for lane_id in held:
            get_logger().error(LogEvent.LANE_HELD, lane=str(lane_id), failing_hours=self._hold_seconds / 3600)
        behind, mended = await in_transaction(
            self._engine, lambda tx: mend_lanes(tx, behind=self._behind, lanes_max=_LANES_MAX)
        )
        self._behind = behind or FIRST_LANE
        for lane_id in mended:
            get_logger().error(LogEvent.LANE_MENDED, lane=str(lane_id))
        MENDED.inc(len(mended))
        counts = await in_transaction(self._engine, count_lanes)
        HELD.set(counts.held)
        FAILING.set(counts.failing)
        return False

    def leave(self) -> None:
        """There is nothing that could be left alone."""

    async def drain(self, _deadline_seconds: float) -> None:
        """Nothing is ever under way between rounds."""
