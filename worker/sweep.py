"""The sweep: looks at the whole once in a while, ends payouts whose time is over, and publishes how old the oldest work is."""

import math
from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID

from prometheus_client import Gauge

from common.canceling import expire_page
from common.db.ages import find_ages
from common.db.callbacks import ids_to_tell
from common.db.due import FIRST_TO_EXPIRE, Expiring
from common.db.engine import Engine, in_transaction

INTERVAL_SECONDS: Final = 5.0
_EXPIRED_MAX: Final = 128

Tell = Callable[[Sequence[tuple[UUID, UUID]]], None]

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
    """Sweeps every `INTERVAL_SECONDS`. `tell` hears of events whose callbacks can leave now."""

    def __init__(self, engine: Engine, *, tell: Tell = lambda _: None) -> None:
        self._engine = engine
        self._tell = tell

    async def run_round(self) -> bool:
        """Sweep once. There is never more to do at once."""
        behind: Expiring | None = FIRST_TO_EXPIRE
        while behind is not None:
            behind, events = await expire_page(self._engine, behind=behind, payouts_max=_EXPIRED_MAX)
            self._tell(ids_to_tell(events))
        ages = await in_transaction(self._engine, find_ages)
        OLDEST_PAYOUT.set(ages.payout_seconds)
        OLDEST_CALLBACK.set(ages.callback_seconds)
        return False

    def leave(self) -> None:
        """There is nothing that could be left alone."""

    async def drain(self, _deadline_seconds: float) -> None:
        """Nothing is ever under way between rounds."""
