"""What merchants see of attempts: few words for errors, and excerpts that are harmless text of a bounded length."""

from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.db.deliveries import Delivery, ToldCallback
from gateway.callbacks import ERROR_UNKNOWN, ERRORS_SHOWN, render_callback, render_excerpt
from worker.callbacks import send

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
SHOWN = {"connection_failed", "tls_failed", "timeout", "redirect", "http_4xx", "http_5xx", "response_invalid", "other"}


def rendered(**values: object) -> dict[str, object]:
    """The one attempt of a callback as merchants see it."""
    fields = {
        "attempt_no": 1,
        "started_at": NOW,
        "duration_ms": 5,
        "http_status": None,
        "error": None,
        "response_excerpt": b"",
        "late": False,
    }
    delivery = Delivery(**fields | values)  # type: ignore[arg-type]
    event_id = UUID(int=1)
    callback = ToldCallback(event_id, "payout.success", 3, "https://x", "pending", NOW, None, None, False, [delivery])
    (attempt,) = render_callback(callback)["attempts"]
    return dict(attempt)


def test_merchants_hear_of_every_error_that_the_sender_can_tell() -> None:
    """The sender's tables, and the code it gives when it is wrong itself."""
    told = {code for _, code in send._ERRORS} | {code for code in send._STATUS_ERRORS.values() if code}
    told |= {send._STATUS_ERROR_UNKNOWN, *send._OURS}
    assert set(ERRORS_SHOWN) == told


def test_the_words_that_merchants_hear_are_a_closed_list() -> None:
    assert {*ERRORS_SHOWN.values(), ERROR_UNKNOWN} == SHOWN


@pytest.mark.parametrize("error", ["address_blocked", "dns_failed", "connection_refused", "connection_failed"])
def test_where_a_connection_failed_is_not_told(error: str) -> None:
    assert rendered(error=error) == rendered(error="connection_failed")


def test_an_error_that_nobody_has_thought_of_is_not_told() -> None:
    assert rendered(error="secret_unsealable")["error"] == "other"


def test_nothing_of_a_connection_that_was_refused_is_shown() -> None:
    attempt = rendered(error="address_blocked", response_excerpt=b"of somebody else")
    assert attempt == {
        "attempt": 1,
        "started_at": "2026-01-31T12:00:00.000000Z",
        "duration_ms": 5,
        "error": "connection_failed",
        "late": False,
    }


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (b"ok", "ok"),
        ("schön 🦆".encode(), "schön 🦆"),
        (b"a\r\n\tb", "a   b"),
        (b"a\x00b\x1b[31m", "a\ufffdb\ufffd[31m"),
        (b"caf\xe9", "caf\ufffd"),
        ("a\u202eb\u200bc\x85d\u2028e".encode(), "a\ufffdb\ufffdc d e"),
        (b"x" * 4096, "x" * 1024),
        (b"\xff" * 1024, "\ufffd" * 341),
    ],
)
def test_an_excerpt_is_shown_as_text(sent: bytes, shown: str) -> None:
    assert render_excerpt(sent) == shown
    assert rendered(http_status=500, error="http_5xx", response_excerpt=sent)["response_excerpt"] == shown


@given(st.binary(max_size=4096))
def test_an_excerpt_is_printable_and_short_whatever_was_sent(sent: bytes) -> None:
    shown = render_excerpt(sent)
    assert len(shown.encode()) <= 1024
    assert not {letter for letter in shown if not letter.isprintable()} - {"\ufffd"}
