"""Times as the contract writes them, and nothing else that Python's parser would take."""

from datetime import UTC, datetime

import pytest

from common.domain.times import parse_time, render_time


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("2025-12-05T10:00:00Z", "2025-12-05T10:00:00.000000Z"),
        ("2025-12-05T23:59:59.5-00:30", "2025-12-06T00:29:59.500000Z"),
        ("2025-12-05T00:00:00.000001+14:00", "2025-12-04T10:00:00.000001Z"),
        ("2025-12-05T10:00:00.1234567Z", "2025-12-05T10:00:00.123456Z"),
        ("2025-12-05T10:00:00.999999999Z", "2025-12-05T10:00:00.999999Z"),
    ],
)
def test_a_time_of_rfc_3339_is_read_with_its_offset(text: str, rendered: str) -> None:
    moment = parse_time(text)
    assert moment is not None
    assert moment.tzinfo is UTC
    assert render_time(moment) == rendered


@pytest.mark.parametrize(
    "text",
    [
        "2025-12-05T10:00:00",
        "2025-12-05T10:00Z",
        "2025-12-05",
        "20251205T100000Z",
        "2025-12-05t10:00:00Z",
        "2025-W49-5T10:00:00Z",
        "2025-12-05T24:00:00Z",
        "2025-12-05T10:00:60Z",
        "2025-12-05T10:60:00Z",
        "2025-02-30T10:00:00Z",
        "2025-13-05T10:00:00Z",
        "2025-12-05T10:00:00.1234567890Z",
        "2025-12-05T10:00:00.Z",
        "2025-12-05T10:00:00+24:00",
        "0001-01-01T00:00:00+01:00",
        "0000-01-01T00:00:00Z",
        "",
        " ",
        "2025-12-05 10:00:00Z",
        "2025-12-05T10:00:00Z\n",
        "\u0662025-12-05T10:00:00Z",
    ],
)
def test_what_is_no_time_of_rfc_3339_is_none(text: str) -> None:
    assert parse_time(text) is None


def test_a_time_is_written_with_six_digits() -> None:
    assert render_time(datetime(2025, 12, 5, 10, tzinfo=UTC)) == "2025-12-05T10:00:00.000000Z"
