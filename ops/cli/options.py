"""Options and arguments that several commands share, and how their texts are read."""

import getpass
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final
from uuid import UUID

import click

from common.domain.ids import EVENT, parse_id

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
