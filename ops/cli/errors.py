"""How a command ends that does not end well: one line on stderr, and an exit code for programs."""

from typing import Final

import click
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from common.db.engine import sqlstate
from common.errors import AccountBusy, PayoutsError, Transient
from ops.onboarding import OnboardingRefused

# Of a change whose end nobody has heard.
LOOK_FIRST: Final = "it may have been done, look before you repeat it"


class CheckFailed(click.ClickException):
    """What was checked does not hold."""

    exit_code = 1


class Refused(click.ClickException):
    """What was asked makes no sense or is not allowed; nothing was changed."""

    exit_code = 2


class Unreachable(click.ClickException):
    """There is no way into the database, to the broker, or to whoever reads the output."""

    exit_code = 3


class NeverReached(Unreachable):
    """The same, and nothing had been asked yet."""


# What work on the database may raise, and `explain` knows.
EXPLAINED: Final = (PayoutsError, OnboardingRefused, SQLAlchemyError, OSError, TimeoutError)

# PostgreSQL, appendix A: connection, authorization, no such database, no free connection, shutdown or recovery.
_NO_WAY_IN: Final = ("08", "28", "3D", "53", "57")
# No such table, column, function; no such role.
_OTHER_SCHEMA: Final = frozenset({"42P01", "42703", "42883", "22023"})


def explain(error: Exception) -> click.ClickException:
    """The same error, for the person at the terminal."""
    if isinstance(error, AccountBusy):
        return Refused("the shop's account is locked by somebody else; repeat the command")
    if isinstance(error, Transient | OSError | TimeoutError):
        return Unreachable(f"the database cannot be reached: {_cause(error)}")
    if not isinstance(error, DBAPIError):
        return Refused(str(error))
    state = sqlstate(error)
    if state is None or state.startswith(_NO_WAY_IN):
        return Unreachable(f"the database cannot be reached: {_cause(error)}")
    if state in _OTHER_SCHEMA:
        return Refused(f"the schema is not of this version, `payouts migrate` brings it there: {_cause(error)}")
    return Refused(f"the database refused it: {_cause(error)}")


def _cause(error: Exception) -> str:
    """What the driver or the operating system said, in one line."""
    cause = error.__cause__ if isinstance(error, Transient) and error.__cause__ else error
    cause = getattr(cause, "orig", None) or cause
    return next(iter(str(cause).splitlines()), "") or type(cause).__name__
