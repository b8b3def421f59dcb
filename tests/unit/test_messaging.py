"""Messages as bytes: what we write we read, what we cannot read is said, and anything at all can be parked."""

import json
from datetime import UTC
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from aio_pika import IncomingMessage
from aiormq.abc import DeliveredMessage
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from common.errors import UnreadableMessage
from common.messaging.codec import (
    BODY_BYTES_MAX,
    IDS_MAX,
    WorkMessage,
    parse_message,
    parse_work,
    render_message,
    split,
)
from common.messaging.parking import FROM, REASON, parked_properties, parse_parked
from common.messaging.topology import Topology, Work

messages = st.builds(
    WorkMessage,
    work=st.sampled_from(Work),
    ids=st.lists(st.uuids(), min_size=1, max_size=IDS_MAX).map(tuple),
    traceparents=st.lists(st.text(max_size=60), max_size=8).map(tuple),
)
# What a stranger may have put into headers, as pamqp reads it; some of it pamqp does not write.
field_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.binary(max_size=20).map(bytearray)
    | st.decimals(allow_nan=False, allow_infinity=False).map(Decimal)
    | st.datetimes().map(lambda value: value.replace(tzinfo=UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=10), inner, max_size=3),
    max_leaves=6,
)
header_names = st.text(min_size=1, max_size=20).filter(lambda name: not name.startswith(("CC", "BCC")))


def delivered(body: bytes, properties: Basic.Properties) -> DeliveredMessage:
    """A message as aiormq hands it over."""
    return DeliveredMessage(
        delivery=Basic.Deliver("consumer", 1, False, "payouts", "payouts.settle.0"),
        header=ContentHeader(body_size=len(body), properties=properties),
        body=body,
        channel=None,  # type: ignore[arg-type]  # nothing here uses it
    )


@given(messages)
def test_what_is_written_is_read(message: WorkMessage) -> None:
    body, properties = render_message(message)

    assert parse_message(delivered(body, properties)) == message
    assert len(body) <= BODY_BYTES_MAX
    assert properties.delivery_mode == 2


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(body: bytes) -> None:
    with pytest.raises(UnreadableMessage):
        parse_work(Work.SETTLE, body, None)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_no_document_crashes_the_reader(document: Any) -> None:
    for body in (document, {"v": 1, "ids": document}, {"v": document, "ids": [uuid4().hex]}):
        try:
            parse_work(Work.SETTLE, json.dumps(body).encode(), {"traceparents": document})
        except UnreadableMessage as error:
            assert str(error)


def test_a_batch_is_cut_into_messages_that_together_hold_every_id_once() -> None:
    ids = [uuid4() for _ in range(2 * IDS_MAX + 3)]

    cut = split(Work.SETTLE, ids, ["a", "b", "a"])

    assert [value for message in cut for value in message.ids] == ids
    assert [len(message.ids) for message in cut] == [IDS_MAX, IDS_MAX, 3]
    assert {message.traceparents for message in cut} == {("a", "b")}


def test_every_publishing_has_an_id_of_its_own() -> None:
    message = WorkMessage(Work.SETTLE, (uuid4(),))

    assert render_message(message)[1].message_id != render_message(message)[1].message_id


def test_a_shop_keeps_its_shard() -> None:
    """The same in every version and process: a change would let two releases disagree."""
    shops = [UUID(int=number) for number in range(6)]

    assert [Topology("", 4).shard_of(shop) for shop in shops] == [1, 3, 1, 3, 0, 2]
    assert {Topology("", 1).shard_of(shop) for shop in shops} == {0}


@given(st.dictionaries(header_names, field_values, max_size=4))
def test_anything_can_be_parked(headers: dict[str, Any]) -> None:
    sent = Basic.Properties(headers=headers, message_type="payout.settle.v9")

    properties = parked_properties(delivered(b"poison", sent), "unknown type", "payouts.settle.0")

    assert properties.marshal()
    assert properties.headers is not None
    assert (properties.headers[REASON], properties.headers[FROM]) == ("unknown type", "payouts.settle.0")
    assert set(headers) <= set(properties.headers)


def test_messages_without_an_id_are_known_by_their_bytes() -> None:
    parked = [
        parse_parked(IncomingMessage(delivered(body, Basic.Properties()))) for body in (b"poison", b"venom", b"poison")
    ]

    assert parked[0].id == parked[2].id != parked[1].id
    assert all(each.id.startswith("sha256-") for each in parked)
    assert {(each.reason, each.queue) for each in parked} == {("unknown", None)}


def test_a_parked_message_goes_nowhere_else() -> None:
    sent = Basic.Properties(headers={"CC": ["payouts.settle.0"], "BCC": ["x"], "kept": 1})

    headers = parked_properties(delivered(b"poison", sent), "not JSON", "payouts.settle.0").headers

    assert headers == {"kept": 1, REASON: "not JSON", FROM: "payouts.settle.0"}
