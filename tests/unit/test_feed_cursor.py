"""Cursors of the feed: each names one place of one shop, and nothing else is one."""

from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.db.feed import FEED_BEGIN, Place
from common.errors import InvalidRequest
from gateway.events import parse_cursor, render_cursor

SHOP = UUID(int=7)
PLACES = st.builds(Place, st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1), st.uuids())


@given(PLACES, st.uuids())
def test_a_cursor_is_read_as_it_was_written(place: Place, shop_id: UUID) -> None:
    cursor = render_cursor(place, shop_id)
    assert parse_cursor(cursor, shop_id) == place
    assert cursor.replace("-", "").replace("_", "").isalnum(), "it needs no escaping in a query"


@given(PLACES)
def test_a_cursor_of_another_shop_is_none(place: Place) -> None:
    with pytest.raises(InvalidRequest, match="after must be the next_cursor"):
        parse_cursor(render_cursor(place, uuid4()), SHOP)


@given(st.text(max_size=80))
def test_a_text_is_no_cursor(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_cursor(text, SHOP)


def test_a_cursor_with_another_letter_is_none() -> None:
    cursor = render_cursor(FEED_BEGIN, SHOP)
    for position, letter in enumerate(cursor):
        for other in {"A", "b", "-", "_", "é", " ", "="} - {letter}:
            with pytest.raises(InvalidRequest):
                parse_cursor(cursor[:position] + other + cursor[position + 1 :], SHOP)
    for other in (cursor[:-1], cursor + "A", cursor + "AAAA", cursor + "=", " " + cursor, cursor + "\n"):
        with pytest.raises(InvalidRequest):
            parse_cursor(other, SHOP)
