"""The log of callback attempts as a whole: its weeks, made ahead and dropped when they are over."""

from typing import Final

from sqlalchemy import text

from common.db.engine import Tx

_ADD_WEEKS: Final = text("SELECT add_callback_attempts_weeks()")
_DROP: Final = text("SELECT drop_callback_attempts(:keep_days)")


async def add_attempt_weeks(tx: Tx) -> None:
    """Have a partition for this week and for the four after it; attempts of other weeks go to the default partition.

    Repeat: what is there stays.
    Locks: the log, against another of its kind alone.
    """
    await tx.execute(_ADD_WEEKS)


async def drop_attempt_weeks(tx: Tx, *, keep_days: int) -> int:
    """Drop the weeks that ended more than `keep_days` ago, which are 30 at least; how many there were.

    Locks: the log, for as long as a drop takes; whoever reads it for longer than a second comes first.
    """
    dropped: int = (await tx.execute(_DROP, {"keep_days": keep_days})).scalar_one()
    return dropped
