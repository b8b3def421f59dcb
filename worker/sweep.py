"""The sweep: looks at the whole once in a while, publishes how old the oldest work is and how much waits for people, and ends
payouts whose time is over.
"""

import math
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final

from prometheus_client import Gauge

from common.canceling import expire_page
from common.db.ages import find_ages, find_load
from common.db.callbacks import Event
from common.db.due import FIRST_TO_EXPIRE, Expiring
from common.db.engine import Engine, in_transaction
from common.db.resolutions import count_doubts
from common.domain.ids import PAYOUT, render_id
from common.log import LogEvent, get_logger
from common.tracing import trace_id_of

INTERVAL_SECONDS: Final = 5.0
_EXPIRED_MAX: Final = 128

Tell = Callable[[Sequence[Event]], None]

OLDEST_PAYOUT: Final = Gauge(
    "payouts_oldest_due_payout_age_seconds", "How long the oldest due payout has been waiting to be taken by a worker"
)
OLDEST_CALLBACK: Final = Gauge(
    "payouts_oldest_due_callback_age_seconds",
    "How long the oldest due callback has been waiting to be taken by a worker",
)
VERIFYING: Final = Gauge("payouts_verifying", "Payouts whose fate is not known; their money stays held")
OLDEST_VERIFYING: Final = Gauge(
    "payouts_oldest_verifying_age_seconds", "How long the oldest of these has been verifying"
)
OPEN_DISCREPANCIES: Final = Gauge("payouts_open_discrepancies", "Words of rails against what we know, for people")
OPEN_RESOLUTIONS: Final = Gauge("payouts_open_resolutions", "What one operator said and another has not confirmed")
CONNECTIONS: Final = Gauge("payouts_database_connections", "Connections to the database's server, of everybody")
CONNECTIONS_MAX: Final = Gauge("payouts_database_connections_max", "How many it takes")
OLDEST_TRANSACTION: Final = Gauge(
    "payouts_database_oldest_transaction_age_seconds",
    "For how long, as this process has seen, the oldest transaction that writes has been open; 0 when none is",
)
_GAUGES: Final = (
    *(OLDEST_PAYOUT, OLDEST_CALLBACK, VERIFYING, OLDEST_VERIFYING, OPEN_DISCREPANCIES, OPEN_RESOLUTIONS),
    *(CONNECTIONS, CONNECTIONS_MAX, OLDEST_TRANSACTION),
)


def _forget() -> None:
    """Say that nothing is known: no comparison of an alarm holds for NaN, and `absent(… >= 0)` does."""
    for gauge in _GAUGES:
        gauge.set(math.nan)


# Before the first look, and in processes that never do.
_forget()


class Sweeper:
    """Sweeps every `INTERVAL_SECONDS`. `tell` hears of events whose callbacks can leave now."""

    def __init__(self, engine: Engine, *, tell: Tell = lambda _: None) -> None:
        self._engine = engine
        self._tell = tell
        self._oldest_transaction: int | None = None
        self._oldest_since = 0.0

    async def run_round(self) -> bool:
        """Sweep once. There is never more to do at once.

        A look that fails leaves nothing known, since what was seen before would tell alarms that all is well; payouts expire
        all the same. Raises: what it failed of.
        """
        try:
            await self._look()
        except Exception:
            _forget()
            await self._expire()
            raise
        await self._expire()
        return False

    async def _look(self) -> None:
        ages = await in_transaction(self._engine, find_ages)
        OLDEST_PAYOUT.set(ages.payout_seconds)
        OLDEST_CALLBACK.set(ages.callback_seconds)
        doubts = await in_transaction(self._engine, count_doubts)
        VERIFYING.set(doubts.verifying)
        OLDEST_VERIFYING.set(doubts.verifying_seconds)
        OPEN_DISCREPANCIES.set(doubts.discrepancies)
        OPEN_RESOLUTIONS.set(doubts.resolutions)
        await self._look_at_server()

    async def _look_at_server(self) -> None:
        load = await in_transaction(self._engine, find_load)
        CONNECTIONS.set(load.connections)
        CONNECTIONS_MAX.set(load.connections_max)
        if load.oldest_transaction != self._oldest_transaction:
            self._oldest_transaction, self._oldest_since = load.oldest_transaction, monotonic()
        OLDEST_TRANSACTION.set(0.0 if load.oldest_transaction is None else monotonic() - self._oldest_since)

    async def _expire(self) -> None:
        behind: Expiring | None = FIRST_TO_EXPIRE
        while behind is not None:
            behind, events = await expire_page(self._engine, behind=behind, payouts_max=_EXPIRED_MAX)
            self._tell(events)
            for event in events:
                _log_expired(event)

    def leave(self) -> None:
        """There is nothing that could be left alone."""

    async def drain(self, _deadline_seconds: float) -> None:
        """Nothing is ever under way between rounds."""


def _log_expired(event: Event) -> None:
    """The one line of a payout whose time was over."""
    assert event.payout_id is not None, "payins expire by a rail's word"
    get_logger().info(
        LogEvent.PAYOUT_EXPIRED,
        payout_id=render_id(PAYOUT, event.payout_id),
        shop_id=str(event.shop_id),
        trace_id=trace_id_of(event.traceparent),
    )
