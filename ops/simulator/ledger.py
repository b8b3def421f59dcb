"""The simulated bank's own books: what it was asked for, what it paid, what it still has to tell. SQLite, one file.

Each change is one transaction, committed before anybody hears of it, so that killing the bank loses and doubles nothing.
Statements take well under a millisecond and run in the event loop.
"""

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS payments (
  reference TEXT PRIMARY KEY, amount_minor INTEGER NOT NULL, currency TEXT NOT NULL, recipient_digest TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('asked', 'submitted', 'paid', 'declined', 'returned')),
  final_status TEXT, failure_code TEXT, settles_at REAL, submits INTEGER NOT NULL DEFAULT 0,
  times_paid INTEGER NOT NULL DEFAULT 0, booked_at REAL);
CREATE TABLE IF NOT EXISTS payins (
  reference TEXT PRIMARY KEY, amount_minor INTEGER NOT NULL, currency TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('paid', 'returned')), paid_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS events (
  id TEXT NOT NULL, body TEXT NOT NULL, due_at REAL NOT NULL, bad_signatures INTEGER NOT NULL DEFAULT 0,
  told_at REAL, number INTEGER PRIMARY KEY AUTOINCREMENT);
CREATE INDEX IF NOT EXISTS events_due ON events (due_at) WHERE told_at IS NULL;
CREATE INDEX IF NOT EXISTS payments_settling ON payments (settles_at) WHERE status = 'submitted';
"""


@dataclass(frozen=True, slots=True)
class Payment:
    """A payment as it stands; `submits` counts how often it was asked for, `times_paid` how often money left."""

    reference: str
    amount_minor: int
    currency: str
    recipient_digest: str
    status: str
    final_status: str | None
    failure_code: str | None
    submits: int
    times_paid: int


@dataclass(frozen=True, slots=True)
class PaidIn:
    """What somebody paid in under a reference; `returned`: it went back to them."""

    reference: str
    amount_minor: int
    currency: str
    status: str


@dataclass(frozen=True, slots=True)
class Untold:
    """An event that the other side has not confirmed yet. `bad_signatures`: how often it will be signed badly before."""

    number: int
    body: bytes
    bad_signatures: int


_LIST: Final = """
SELECT reference, amount_minor, currency, recipient_digest, status, final_status, failure_code, submits, times_paid
  FROM payments ORDER BY reference
"""
_FIND: Final = """
SELECT reference, amount_minor, currency, recipient_digest, status, final_status, failure_code, submits, times_paid
  FROM payments WHERE reference = ?
"""


class Ledger:
    """The books in a file; they survive the process."""

    def __init__(self, path: Path) -> None:
        self._books = sqlite3.connect(path, isolation_level=None)
        self._books.execute("PRAGMA journal_mode = WAL")
        self._books.execute("PRAGMA synchronous = NORMAL")
        self._books.executescript(_SCHEMA)

    def close(self) -> None:
        """Let go of the file."""
        self._books.close()

    def find(self, reference: str) -> Payment | None:
        """A payment that was asked for."""
        row = self._books.execute(_FIND, (reference,)).fetchone()
        return None if row is None else Payment(*row)

    def payments(self) -> list[Payment]:
        """Everything that was ever asked for."""
        return [Payment(*row) for row in self._books.execute(_LIST)]

    def ask(self, reference: str, amount_minor: int, currency: str, recipient_digest: str) -> Payment:
        """Note that somebody asks for a payment; the first terms stand."""
        self._books.execute(
            "INSERT INTO payments (reference, amount_minor, currency, recipient_digest, status, submits)"
            " VALUES (?, ?, ?, ?, 'asked', 1) ON CONFLICT (reference) DO UPDATE SET submits = submits + 1",
            (reference, amount_minor, currency, recipient_digest),
        )
        payment = self.find(reference)
        assert payment is not None, "it was just written"
        return payment

    def book(
        self,
        payment: Payment,
        status: str,
        *,
        final_status: str | None = None,
        failure_code: str | None = None,
        settles_at: float | None = None,
        now: float,
        tell: tuple[tuple[dict[str, Any], float, int], ...] = (),
    ) -> None:
        """Book a payment that was only asked for, and what will be told of it: body, time, bad signatures before."""
        with _Transaction(self._books):
            self._books.execute(
                "UPDATE payments SET status = ?, final_status = ?, failure_code = ?, settles_at = ?, booked_at = ?,"
                " times_paid = times_paid + ? WHERE reference = ? AND status = 'asked'",
                (status, final_status, failure_code, settles_at, now, status == "paid", payment.reference),
            )
            self._append_events(tell)

    def settle(self, now: float) -> None:
        """Bring what was submitted to its end, if its time has come."""
        self._books.execute(
            "UPDATE payments SET status = final_status, times_paid = times_paid + (final_status = 'paid')"
            " WHERE status = 'submitted' AND settles_at <= ?",
            (now,),
        )

    def give_back(self, reference: str, body: dict[str, Any], due_at: float) -> None:
        """The recipient's bank has returned a payment; tell so."""
        with _Transaction(self._books):
            self._books.execute(
                "UPDATE payments SET status = 'returned' WHERE reference = ? AND status = 'paid'", (reference,)
            )
            self._append_events(((body, due_at, 0),))

    def take_in(
        self,
        reference: str,
        amount_minor: int,
        currency: str,
        now: float,
        tell: tuple[tuple[dict[str, Any], float, int], ...],
    ) -> bool:
        """Book what somebody pays in, and what will be told of it. Returns whether it is the first under its reference."""
        with _Transaction(self._books):
            booked = self._books.execute(
                "INSERT INTO payins (reference, amount_minor, currency, status, paid_at) VALUES (?, ?, ?, 'paid', ?)"
                " ON CONFLICT (reference) DO NOTHING",
                (reference, amount_minor, currency, now),
            )
            if booked.rowcount:
                self._append_events(tell)
            return bool(booked.rowcount)

    def send_back(self, reference: str, body: dict[str, Any], due_at: float) -> bool:
        """Give a payer their money back, and tell so. Returns whether there was something to give back."""
        with _Transaction(self._books):
            returned = self._books.execute(
                "UPDATE payins SET status = 'returned' WHERE reference = ? AND status = 'paid'", (reference,)
            )
            if returned.rowcount:
                self._append_events(((body, due_at, 0),))
            return bool(returned.rowcount)

    def find_payin(self, reference: str) -> PaidIn | None:
        """What was paid in under a reference."""
        row = self._books.execute(
            "SELECT reference, amount_minor, currency, status FROM payins WHERE reference = ?", (reference,)
        ).fetchone()
        return None if row is None else PaidIn(*row)

    def find_untold(self, now: float, count_max: int) -> list[Untold]:
        """Events that are due, the oldest first."""
        rows = self._books.execute(
            "SELECT number, body, bad_signatures FROM events WHERE told_at IS NULL AND due_at <= ?"
            " ORDER BY due_at, number LIMIT ?",
            (now, count_max),
        )
        return [Untold(number, body.encode(), bad_signatures) for number, body, bad_signatures in rows]

    def told(self, number: int, now: float) -> None:
        """The other side has confirmed an event."""
        self._books.execute("UPDATE events SET told_at = ? WHERE number = ?", (now, number))

    def tell_again(self, number: int, due_at: float) -> None:
        """The other side has not confirmed an event."""
        self._books.execute(
            "UPDATE events SET due_at = ?, bad_signatures = max(0, bad_signatures - 1) WHERE number = ?",
            (due_at, number),
        )

    def tell_once_more(self, since: float) -> None:
        """Tell everything again that was told then or later, in Unix seconds: the other side has forgotten it."""
        self._books.execute("UPDATE events SET told_at = NULL, due_at = ? WHERE told_at >= ?", (since, since))

    def count_untold(self) -> int:
        """How many events nobody has confirmed."""
        (count,) = self._books.execute("SELECT count(*) FROM events WHERE told_at IS NULL").fetchone()
        return int(count)

    def _append_events(self, tell: tuple[tuple[dict[str, Any], float, int], ...]) -> None:
        self._books.executemany(
            "INSERT INTO events (id, body, due_at, bad_signatures) VALUES (?, ?, ?, ?)",
            [(body["id"], json.dumps(body), due_at, bad_signatures) for body, due_at, bad_signatures in tell],
        )


class _Transaction:
    """All of it or nothing."""

    def __init__(self, books: sqlite3.Connection) -> None:
        self._books = books

    def __enter__(self) -> None:
        self._books.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, _error: object, _trace: object) -> None:
        self._books.execute("COMMIT" if kind is None else "ROLLBACK")
