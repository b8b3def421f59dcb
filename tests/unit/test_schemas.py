"""The strict JSON of requests, against a reference that judges every rule by itself and takes no short cut."""

import json
import math
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest
from gateway.schemas import DEPTH_MAX, parse_create_payout, parse_json_object


class Refused(Exception):
    """What the reference does not accept."""


def reference(body: bytes) -> dict[str, Any]:
    """RFC 8259 and the contract, rule by rule, over what the standard library reads."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        for position, (key, _) in enumerate(items):
            if key in [other for other, _ in items[:position]]:
                raise Refused("twice")
        return dict(items)

    def judge(value: Any, depth: int) -> None:
        if isinstance(value, str) and re.search("[\x00\ud800-\udfff]", value):
            raise Refused("letter")
        if isinstance(value, float) and not math.isfinite(value):
            raise Refused("number")
        if isinstance(value, dict | list) and depth > DEPTH_MAX:
            raise Refused("depth")
        for child in value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else ():
            judge(child, depth + 1)

    try:
        text = body.decode("utf-8", "strict")
        if text.startswith("\ufeff"):
            raise Refused("mark")
        value = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise Refused("json") from error
    if not isinstance(value, dict):
        raise Refused("object")
    judge(value, 1)
    return value


def verdict(read: Any, body: bytes) -> Any:
    """What a reader makes of a body: its value, written so that 1, 1.0 and true differ; or that it refuses."""
    try:
        return json.dumps(read(body))
    except (Refused, InvalidRequest):
        return "refused"


texts = st.text(max_size=8)
numbers = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | texts
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=20
)
objects = st.dictionaries(texts, trees, max_size=6)
FRAGMENTS = [
    *(
        '{"',
        '"}',
        '":',
        '","',
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        "a",
        "b",
        "1",
        "-",
        ".",
        "e",
        "E",
        "0",
        "true",
        "false",
        "null",
        " ",
    ),
    *(
        "NaN",
        "Infinity",
        "\\",
        "\\u0000",
        "\\ud800",
        "\\ud83d\\ude00",
        "\\u0061",
        "\x00",
        "\n",
        "\ufeff",
        '{"a":1}',
        '"a":1,"a":2',
        "é",
    ),
    *('{"a":', "[[[[[[[[[[[[[[[[", "]]]]]]]]]]]]]]]]", "1e400", "1e5", "٣", "'"),
]


def nested(depth: int, kinds: list[bool]) -> bytes:
    """An object that deep, of objects and lists by turns."""
    text, closing = "", ""
    for level in range(depth):
        is_object = level == 0 or kinds[level % len(kinds)]
        text += '{"a":' if is_object else "["
        closing = ("}" if is_object else "]") + closing
    return f"{text}1{closing}".encode()


@given(objects, st.booleans(), st.sampled_from([None, 0, 2]))
def test_a_plain_object_reads_as_what_was_written(
    value: dict[str, Any], ensure_ascii: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
    body = text.encode("utf-8", "surrogatepass")
    assert verdict(parse_json_object, body) == verdict(reference, body)


@settings(max_examples=500)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
@example('{"a":1,"\\u0061":2}')
@example('{"a":{"b":1,"b":1}}')
@example('{"a":"\\ud83d\\ude00"}')
@example('{"a":"\\ude00\\ud83d"}')
@example('{"":[],"":[]}')
def test_whatever_is_made_of_json_is_judged_like_the_reference_judges_it(text: str) -> None:
    for body in (text.encode(), f'{{"a":{text}}}'.encode(), f'{{"a":"{text}"}}'.encode()):
        assert verdict(parse_json_object, body) == verdict(reference, body)


@given(st.binary(max_size=50))
def test_any_bytes_are_an_object_or_refused_and_never_a_crash(body: bytes) -> None:
    for sent in (body, b'{"a":"' + body + b'"}', b'{"' + body + b'":1}'):
        assert verdict(parse_json_object, sent) == verdict(reference, sent)


@given(st.integers(1, 2 * DEPTH_MAX), st.lists(st.booleans(), min_size=1, max_size=5))
def test_depth_is_counted_alike_in_objects_and_lists(depth: int, kinds: list[bool]) -> None:
    body = nested(depth, kinds)
    assert verdict(parse_json_object, body) == verdict(reference, body)
    assert (verdict(parse_json_object, body) == "refused") == (depth > DEPTH_MAX)


@given(
    objects,
    st.integers(0, 20),
    st.sampled_from(['"\\u0000"', '"\\ud800"', '{"k":1,"k":1}', "NaN", "1e999", "[" * 33 + "]" * 33]),
)
def test_one_fault_anywhere_in_a_good_tree_is_found(value: dict[str, Any], depth: int, fault: str) -> None:
    marked: Any = "\u2603mark"
    for _ in range(depth):
        marked = [marked]
    body = json.dumps(value | {"m": marked}).replace(json.dumps("\u2603mark"), fault)
    assert verdict(parse_json_object, body.encode()) == "refused"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\xff", "Request body must be UTF-8"),
        (b"", "Request body must be valid JSON"),
        (b"[" * 100_000, "Request body must be valid JSON"),
        (b'{"a":' * 100_000, "Request body must be valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "Request body must be valid JSON"),
        (b"[]", "Request body must be a JSON object"),
        (b'{"a":1,"a":1}', "Request body must not have a key twice"),
        (nested(33, [True]), "Request body must not be nested deeper than 32"),
        (b'{"a":"\\u0000"}', "Request body must not contain NUL or lone surrogates"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else None,
)
def test_what_is_wrong_with_a_body_is_said_of_the_field_body(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_json_object(body)
    assert [(field.field, field.message) for field in raised.value.fields] == [("body", message)]


values = scalars | st.lists(texts, max_size=2) | st.dictionaries(texts, scalars, max_size=2)
NAMES = [
    *("external_id", "amount", "currency", "card_number", "callback_url", "shop_code", "description", "metadata"),
    *("merchant_user_id", "merchant_user_ip", "paymentData", "x"),
]


@given(st.dictionaries(st.sampled_from(NAMES), values))
def test_fields_of_any_type_are_taken_or_refused_by_name_and_never_a_crash(fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    if verdict(parse_json_object, body) == "refused":
        return
    try:
        create = parse_create_payout(body, private_callbacks=False)
    except InvalidRequest as refused:
        named = [field.field for field in refused.fields]
        assert len(set(named)) == len(named)
        assert set(named) <= set(NAMES) - {"x"}
        required = [name for name in NAMES[:4] if name in named]
        assert named[: len(required)] == required
    else:
        assert create.external_id == fields["external_id"]
        assert create.recipient == fields["card_number"].replace(" ", "")
