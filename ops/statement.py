"""A provider's statement: its CSV is read line by line and kept by reference in a temporary file, however long it is.

Columns, by the names in the first line, in any order; others are passed over:

* `reference`: ours, `po_…` or `pi_…`
* `amount`, `currency`: a plain positive decimal at most at the currency's scale; ISO 4217
* `status`: one of `STATUSES`
* `date`: ISO 8601, a day or a moment

What was paid and came back has two lines. Nothing that stands in the file is repeated in an error: it may be who was paid.
"""

import csv
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from common.domain.ids import PAYIN, PAYOUT, parse_id
from common.domain.money import CURRENCY_EXPONENTS, parse_amount
from common.domain.payout import mask_recipient

COLUMNS: Final = ("reference", "amount", "currency", "status", "date")
# A later one says more: of a reference with several lines, the last of these counts.
STATUSES: Final = ("submitted", "declined", "paid", "returned")
_REFERENCE_CHARACTERS_MAX: Final = 64
_CELL_CHARACTERS_MAX: Final = 4_096
_LINES_PER_WRITE: Final = 1_000


class StatementInvalid(Exception):
    """The file is no statement: the text says in which line, and what should stand there."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What a statement says of one reference, in minor units. `line`: its first.

    `times`: how often it says the same of money, paid or returned; `is_one`: whether all its lines name one amount.
    """

    reference: str
    line: int
    amount_minor: int
    currency: str
    status: str
    times: int
    is_one: bool


def show_reference(reference: str) -> str:
    """A reference as it may be shown: whole if it looks like ours; else it might be anything, and is masked."""
    ours = parse_id(PAYOUT, reference) or parse_id(PAYIN, reference)
    return reference if ours else mask_recipient(reference)


class Statement:
    """A statement that was read to its end without a fault. Constant memory; what is kept ends with it."""

    def __init__(self) -> None:
        # Without a name: a file of SQLite's own that nobody else sees.
        self._kept = sqlite3.connect("", isolation_level=None)
        self._kept.execute("BEGIN")
        self._kept.execute(
            "CREATE TABLE stated (reference TEXT PRIMARY KEY, line INTEGER, amount_minor INTEGER, currency TEXT,"
            " status INTEGER, paid INTEGER, returned INTEGER, is_one INTEGER) WITHOUT ROWID"
        )
        self.lines = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self._kept.close()

    def read(self, path: Path) -> None:
        """Keep what a file says. Raises: `StatementInvalid`, `OSError`."""
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                places = _find_columns(next(reader, []))
                pending: list[tuple[object, ...]] = []
                for cells in reader:
                    if not cells:
                        continue
                    pending.append(_parse(cells, places, reader.line_num))
                    if len(pending) == _LINES_PER_WRITE:
                        self._keep(pending)
                        pending = []
                self._keep(pending)
            except csv.Error:
                raise StatementInvalid(f"line {reader.line_num}: is not CSV as RFC 4180 has it") from None
            except UnicodeDecodeError:
                raise StatementInvalid(f"line {reader.line_num + 1} or one soon after: is not UTF-8") from None

    def pages(self, rows_max: int) -> Iterator[list[Stated]]:
        """Everything, in the order of the references."""
        behind = ""
        while rows := self._kept.execute(
            "SELECT reference, line, amount_minor, currency, status, max(paid, returned), is_one FROM stated"
            " WHERE reference > ? ORDER BY reference LIMIT ?",
            (behind, rows_max),
        ).fetchall():
            yield [
                Stated(reference, line, amount_minor, currency, STATUSES[status], times, bool(is_one))
                for reference, line, amount_minor, currency, status, times, is_one in rows
            ]
            behind = rows[-1][0]

    def find_status(self, reference: str) -> str | None:
        """What it says last of a reference; None: nothing."""
        row = self._kept.execute("SELECT status FROM stated WHERE reference = ?", (reference,)).fetchone()
        return None if row is None else STATUSES[row[0]]

    def _keep(self, parsed: Sequence[tuple[object, ...]]) -> None:
        self._kept.executemany(
            "INSERT INTO stated VALUES (?, ?, ?, ?, ?, ?, ?, 1) ON CONFLICT (reference) DO UPDATE SET"
            " status = max(status, excluded.status), paid = paid + excluded.paid, returned = returned + excluded.returned,"
            " is_one = is_one AND amount_minor = excluded.amount_minor AND currency = excluded.currency",
            parsed,
        )
        self.lines += len(parsed)


def _find_columns(header: Sequence[str]) -> list[int]:
    names = [name.strip().lower() for name in header]
    missing = [name for name in COLUMNS if names.count(name) != 1]
    if missing:
        raise StatementInvalid(f"line 1: must name each of these columns once: {', '.join(missing)}")
    return [names.index(name) for name in COLUMNS]


def _parse(cells: Sequence[str], places: Sequence[int], line: int) -> tuple[object, ...]:
    if len(cells) <= max(places) or max(map(len, cells)) > _CELL_CHARACTERS_MAX:
        raise StatementInvalid(f"line {line}: has too few cells, or one that is too long")
    reference, amount, currency, status, date = (cells[place].strip() for place in places)
    if not 1 <= len(reference) <= _REFERENCE_CHARACTERS_MAX or not reference.isprintable():
        raise StatementInvalid(f"line {line}: reference must be 1 to {_REFERENCE_CHARACTERS_MAX} printable characters")
    exponent = CURRENCY_EXPONENTS.get(currency)
    if exponent is None:
        raise StatementInvalid(f"line {line}: currency must be one of ISO 4217")
    amount_minor = parse_amount(amount, exponent)
    if amount_minor is None:
        raise StatementInvalid(f"line {line}: amount must be a positive decimal with at most {exponent} decimals")
    if status.lower() not in STATUSES:
        raise StatementInvalid(f"line {line}: status must be one of {', '.join(STATUSES)}")
    try:
        datetime.fromisoformat(date)
    except ValueError:
        raise StatementInvalid(f"line {line}: date must be ISO 8601") from None
    rank = STATUSES.index(status.lower())
    return reference, line, amount_minor, currency, rank, STATUSES[rank] == "paid", STATUSES[rank] == "returned"
