"""Times as the contract writes them."""

from datetime import UTC, datetime


def render_time(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds, always six digits: `2025-12-05T10:00:00.000000Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
