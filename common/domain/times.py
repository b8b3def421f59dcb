"""Times as the contract writes them."""

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

# Hour 24 is refused: Python reads it from 3.14 on.
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT(?:[01]\d|2[0-3]):\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)", re.ASCII)


def parse_time(text: str) -> datetime | None:
    """A moment as RFC 3339 writes it, with an offset, down to a microsecond; None when it is none.

    Many write nanoseconds; what is below a microsecond is cut off. Source: RFC 3339, section 5.6.
    """
    if not _TIME.fullmatch(text):
        return None
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


@lru_cache(maxsize=1024)
def render_time(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds, always six digits: `2025-12-05T10:00:00.000000Z`."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
