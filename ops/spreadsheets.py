"""CSV files for people: a spreadsheet takes nothing in them for a formula, and a file is whole or not there.

Source: RFC 4180; OWASP, "CSV Injection".
"""

import csv
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

from common.domain.times import render_time

# What a spreadsheet begins a formula with, in their wide forms as well.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_PLAIN_NUMBER: Final = re.compile(r"-?[0-9]+(\.[0-9]+)?", re.ASCII)

WriteRow = Callable[[Iterable[object]], None]


class FileExists(Exception):
    """There is a file of that name, and nobody said that it may go."""


def render_csv_cell(value: object) -> str:
    """A value as text: nothing for None, RFC 3339 for times; what would be a formula has an apostrophe before it.

    A plain decimal number, negative ones too, is none.
    """
    if value is None:
        return ""
    text = render_time(value) if isinstance(value, datetime) else str(value)
    return f"'{text}" if text.startswith(_FORMULA) and not _PLAIN_NUMBER.fullmatch(text) else text


@contextmanager
def new_csv_file(path: Path, columns: Sequence[str], *, overwrite: bool) -> Iterator[WriteRow]:
    """Writes rows to a file that appears under its name when all of it is on disk, for its owner's eyes alone.

    Raises: `FileExists` unless `overwrite`, before anything is written; `OSError`, so where a device or the like
    stands. Whatever ends it before its end leaves the file that was there as it was, and nothing behind, unless a signal ends
    the process itself.
    """
    _check_free(path, overwrite=overwrite)
    with NamedTemporaryFile(
        "w", encoding="utf-8", newline="", dir=path.parent, prefix=f".{path.name}.", suffix=".partial", delete=False
    ) as partial:
        try:
            writer = csv.writer(partial)
            writer.writerow(columns)
            yield lambda row: writer.writerow(map(render_csv_cell, row)) and None
            partial.flush()
            os.fsync(partial.fileno())
            _check_free(path, overwrite=overwrite)
            Path(partial.name).replace(path)
        except BaseException:
            Path(partial.name).unlink(missing_ok=True)
            raise


def _check_free(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "there is something that is no file", str(path))
    if path.exists() and not overwrite:
        raise FileExists(f"{path} exists already")
