"""The bytes of events: JSON in ASCII, compact, whatever is in it."""

import json
from datetime import UTC, datetime
from uuid import UUID

import pytest

from common.domain.telling import render_test_event

AT = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)


@pytest.mark.parametrize("shop_code", ["shop-001", 'quote " and \\', "line\nend\x00\x7f", "m\u00fcnzen", "\U0001f4b6"])
def test_an_event_is_compact_ascii_and_says_what_it_was_given(shop_code: str) -> None:
    body = render_test_event(event_id=UUID(int=1), shop_code=shop_code, created_at=AT)
    assert body.isascii()
    told = json.loads(body)
    assert told["shop_code"] == shop_code
    assert len(body) == len(json.dumps(told, separators=(",", ":")))
