"""Keeping the log of callback attempts: its weeks are made ahead, and dropped when nobody needs them any more."""

from typing import Final

from common.db.attempts import add_attempt_weeks, drop_attempt_weeks
from common.db.engine import Engine, in_transaction

INTERVAL_SECONDS: Final = 3600.0


class Keeper:
    """Looks every `INTERVAL_SECONDS`."""

    def __init__(self, engine: Engine, *, keep_days: int) -> None:
        self._engine = engine
        self._keep_days = keep_days

    async def run_round(self) -> bool:
        """Make what is missing, then drop what is over. There is never more to do at once."""
        await in_transaction(self._engine, add_attempt_weeks)
        await in_transaction(self._engine, lambda tx: drop_attempt_weeks(tx, keep_days=self._keep_days))
        return False

    def leave(self) -> None:
        """There is nothing that could be left alone."""

    async def drain(self, _deadline_seconds: float) -> None:
        """Nothing is ever under way between rounds."""
