"""Options and arguments that several commands share, and how their texts are read."""

import getpass
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import UUID

import click

from common.domain.ids import EVENT, parse_id
from ops.cli.errors import Refused
from ops.spreadsheets import FileExists, WriteRow, new_csv_file

ACTOR_CHARACTERS_MAX: Final = 200
REASON_CHARACTERS_MAX: Final = 1000


def parse_line(characters_max: int) -> Callable[[str], str]:
    """Reads one line of text that is not empty."""

    def parse(text: str) -> str:
        line = text.strip()
        if not 1 <= len(line) <= characters_max or not line.isprintable():
            raise click.BadParameter(f"must be one line of 1 to {characters_max} printable characters")
        return line

    return parse


_DURATION: Final = re.compile(r"0|([0-9]{1,9})([smhd])", re.ASCII)
# Far from where the calendar of Python ends: what is looked for may begin days before a moment.
_YEARS: Final = range(2000, 3000)
_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def parse_duration(seconds_max: int) -> Callable[[str], int]:
    """Reads a number with a unit, `90s`, `30m`, `24h` or `7d`, or 0, as seconds."""

    def parse(text: str) -> int:
        found = _DURATION.fullmatch(text)
        seconds = int(found[1]) * _UNIT_SECONDS[found[2]] if found and found[1] else 0
        if found is None or seconds > seconds_max:
            raise click.BadParameter(f"must be 0 or like 90s, 30m, 24h or 7d, and at most {seconds_max // 86_400}d")
        return seconds

    return parse


def parse_moment(text: str) -> datetime:
    """A moment of these thousand years: ISO 8601, a date or more; in UTC unless it says otherwise."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not an ISO 8601 date or time") from error
    if moment.year not in _YEARS:
        raise click.BadParameter(f"the year must be {_YEARS[0]} to {_YEARS[-1]}")
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def parse_shop(text: str) -> tuple[str, str]:
    """The codes of `MERCHANT/SHOP`."""
    merchant, _, shop = text.partition("/")
    if not merchant or not shop:
        raise click.BadParameter("must look like MERCHANT/SHOP")
    return merchant, shop


def parse_event_id(text: str) -> UUID:
    """An event's id, as callbacks carry it (`evt_…`) or as the database shows it."""
    event_id = parse_id(EVENT, text) or parse_uuid(text)
    if event_id is None:
        raise click.BadParameter(f"{text!r} is not the id of an event")
    return event_id


def parse_uuid(text: str) -> UUID | None:
    """An id as the database shows it, or None."""
    with suppress(ValueError):
        return UUID(text)
    return None


def find_actor() -> str | None:
    """Who is at the terminal, if the system knows: the one who became somebody else by sudo, else the login."""
    with suppress(KeyError, OSError):
        return os.environ.get("SUDO_USER") or getpass.getuser()
    return None


@contextmanager
def new_file(path: Path, columns: Sequence[str], *, overwrite: bool) -> Iterator[WriteRow]:
    """Writes the rows of a CSV file that is there when all of them are. Raises: `Refused`."""
    try:
        with new_csv_file(path, columns, overwrite=overwrite) as write:
            yield write
    except FileExists as error:
        raise Refused(f"{error}; --force replaces it") from error
    except OSError as error:
        if error.filename is None:
            raise
        raise Refused(f"{path}: {error.strerror}") from error


force_option = click.option("--force", is_flag=True, help="Replace the file if there is one.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
merchant_option = click.option("--merchant", metavar="CODE", help="Of this merchant only.")
actor_option = click.option(
    "--actor",
    type=parse_line(ACTOR_CHARACTERS_MAX),
    metavar="NAME",
    default=find_actor,
    required=True,
    show_default="your login",
    help="Who does this; written down.",
)
reason_option = click.option(
    "--reason", type=parse_line(REASON_CHARACTERS_MAX), required=True, metavar="TEXT", help="Why; written down."
)
