"""The sweep: looks at the whole once in a while and publishes how old the oldest work is."""

import math
from typing import Final

from prometheus_client import Gauge

from common.db.ages import find_ages
from common.db.engine import Engine, in_transaction

INTERVAL_SECONDS: Final = 5.0

OLDEST_PAYOUT: Final = Gauge(
    "payouts_oldest_due_payout_age_seconds", "How long the oldest due payout has been waiting to be taken by a worker"
)
OLDEST_CALLBACK: Final = Gauge(
    "payouts_oldest_due_callback_age_seconds",
    "How long the oldest due callback has been waiting to be taken by a worker",
)
# Until a sweep has looked, and in processes that never do, nothing is known.
OLDEST_PAYOUT.set(math.nan)
OLDEST_CALLBACK.set(math.nan)


class Sweeper:
    """Refreshes the gauges every `INTERVAL_SECONDS`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def run_round(self) -> bool:
        """Look once. There is never more to do at once."""
        ages = await in_transaction(self._engine, find_ages)
        OLDEST_PAYOUT.set(ages.payout_seconds)
        OLDEST_CALLBACK.set(ages.callback_seconds)
        return False

    def leave(self) -> None:
        """There is nothing that could be left alone."""

    async def drain(self, _deadline_seconds: float) -> None:
        """Nothing is ever under way between rounds."""
