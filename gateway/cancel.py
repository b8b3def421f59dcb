"""Cancels, few at a time: one busy account must not take the connections that authenticate and read."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Final
from uuid import UUID

from sqlalchemy.exc import DBAPIError

from common.canceling import cancel
from common.db.callbacks import Event
from common.db.engine import Engine, constraint_name, in_transaction
from common.db.payouts import Payout
from common.errors import AccountBusy, NotCancelable

# How long a cancel waits for its account before others get their turn.
_TURN_SECONDS: Final = 0.2
# What the schema says of a release when the rail has the payout, or may have it.
_FATE_UNKNOWN: Final = "entries_release_is_definite"


class Canceler:
    """Cancels payouts, `slots` at the same time. `tell` hears after the commit of the events that came of it."""

    def __init__(
        self, engine: Engine, *, slots: int, busy_seconds_max: float, tell: Callable[[Sequence[Event]], None]
    ) -> None:
        self._engine = engine
        self._slots = asyncio.Semaphore(slots)
        self._busy_seconds_max = busy_seconds_max
        self._tell = tell

    async def cancel(self, shop_id: UUID, external_id: str) -> Payout:
        """Cancel one payout, waiting for its account in short turns. Repeat: a canceled payout stays as it is.

        Raises: as `common.canceling.cancel`; `AccountBusy` when somebody else holds its account for too long.
        """
        until = monotonic() + self._busy_seconds_max
        wait_seconds = 0.0
        while True:
            async with self._slots:
                try:
                    payout, events = await in_transaction(
                        self._engine,
                        partial(cancel, shop_id=shop_id, external_id=external_id, wait_seconds=wait_seconds),
                    )
                except AccountBusy:
                    if monotonic() >= until:
                        raise
                except DBAPIError as error:
                    if constraint_name(error) != _FATE_UNKNOWN:
                        raise
                    raise NotCancelable from None
                else:
                    self._tell(events)
                    return payout
            wait_seconds = _TURN_SECONDS
