"""What commands print on stdout: tables for people, one JSON document for programs.

Both are made from the same records. For people every value is made printable first: some of it, such as what a
merchant's server answered, was written by strangers.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from common.domain.times import render_time

# As good as unlimited.
_COLUMNS_MAX: Final = 10_000

Record = Mapping[str, Any]


def print_json(document: Record) -> None:
    """The document, alone on stdout."""
    click.echo(json.dumps(document, default=_render_json, indent=2))


def print_record(record: Record) -> None:
    """A name and a value per line, so that ids and secrets can be copied; what is absent is left out."""
    present = {name: value for name, value in record.items() if value is not None}
    width = max(map(len, present))
    for name, value in present.items():
        click.echo(f"{name:<{width}}  {render_cell(value)}".rstrip())


def print_table(records: Sequence[Record]) -> None:
    """A row per record; the first one names the columns."""
    if not records:
        click.echo("none")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in records[0]:
        table.add_column(name, overflow="fold")
    for record in records:
        table.add_row(*(Text(render_cell(value)) for value in record.values()))
    # What goes into a pipe or a file is not wrapped.
    Console(highlight=False, width=None if sys.stdout.isatty() else _COLUMNS_MAX).print(table)


def show_record(record: Record, *, as_json: bool) -> None:
    """One record, for a person or a program."""
    if as_json:
        print_json(record)
    else:
        print_record(record)


def show_records(name: str, records: Iterable[Record], *, as_json: bool) -> None:
    """Records of one kind, for a person or a program; to a program as the one list of that name."""
    listed = list(records)
    if as_json:
        print_json({name: listed})
    else:
        print_table(listed)


def progress_bar() -> Progress:
    """A line of progress on stderr, for whoever sits at a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def render_cell(value: object) -> str:
    """A value as people read it: nothing for None, UTC without a zone, and no character that moves the cursor."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(" ", "milliseconds").removesuffix("+00:00")
    if isinstance(value, Mapping):
        return render_cell(json.dumps(value, default=_render_json, ensure_ascii=False))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(render_cell, value))
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(value))


def _render_json(value: object) -> str:
    return render_time(value) if isinstance(value, datetime) else str(value)


def show_secret(record: Record, *, as_json: bool) -> None:
    """A record with a secret that is never shown again."""
    show_record(record, as_json=as_json)
    if not as_json:
        click.echo("Keep the secret now: it is not shown again.")
