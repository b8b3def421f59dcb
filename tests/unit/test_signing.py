# ruff: noqa: SIM905 words are easier to read than a list of literals
import base64
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from common.domain.signing import (
    canonical_v1,
    parse_timestamp,
    sign_body,
    sign_v1,
    sign_webhook,
    signatures_equal,
)
from worker.callbacks.send import render_headers

VECTORS: Final[dict[str, list[dict[str, str]]]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "signing.json").read_text("utf-8")
)
NEWEST: Final = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OLDER: Final = "whsec_" + base64.b64encode(bytes(range(32))).decode()
EVENT: Final = "evt_01jeb7qh2v5m8c3d6f9g0xktrb"


def named(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", VECTORS[kind], ids=[vector["name"] for vector in VECTORS[kind]])


@named("requests")
def test_requests_sign_as_the_contract_s_vectors_do(vector: dict[str, str]) -> None:
    body = vector["body"].encode()
    parts = vector["timestamp"], vector["method"], vector["path"], vector["query"], body
    assert canonical_v1(*parts) == vector["canonical_v1"].encode()
    assert sign_v1(vector["secret"], *parts) == vector["x_signature_v1"]
    assert sign_body(vector["secret"], vector["timestamp"], body) == vector["x_signature_body_formula"]


@named("callbacks")
def test_callbacks_sign_as_the_contract_s_vectors_do(vector: dict[str, str]) -> None:
    body, secret = vector["body"].encode(), vector["webhook_secret"]
    headers = render_headers(vector["webhook_id"], [secret], float(vector["webhook_timestamp"]), body)
    assert headers["webhook-id"] == vector["webhook_id"]
    assert headers["webhook-timestamp"] == vector["webhook_timestamp"]
    assert headers["webhook-signature"] == vector["webhook_signature"]
    assert headers["X-Timestamp"] == vector.get("x_timestamp", headers["X-Timestamp"])
    assert headers["X-Signature"] == vector.get("x_signature", headers["X-Signature"])


def test_a_callback_says_what_it_is_and_what_it_cannot_read() -> None:
    headers = render_headers(EVENT, [NEWEST], 1764929700.999, b"{}")
    assert headers["X-Timestamp"] == "2025-12-05T10:15:00Z"
    assert headers["webhook-timestamp"] == "1764929700"
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity"
    assert headers["user-agent"].startswith("payouts/")


def test_the_reference_signature_stands_first_or_second_as_its_secret_is_newer_or_older() -> None:
    (vector,) = [vector for vector in VECTORS["callbacks"] if vector["webhook_id"].startswith("msg_")]
    signed = vector["webhook_id"], int(vector["webhook_timestamp"]), vector["body"].encode()
    other = sign_webhook([OLDER], *signed)
    assert vector["webhook_signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert sign_webhook([NEWEST, OLDER], *signed) == f"{vector['webhook_signature']} {other}"
    assert sign_webhook([OLDER, NEWEST], *signed) == f"{other} {vector['webhook_signature']}"


@pytest.fixture(params=["Asia/Bangkok", "America/St_Johns"])
def far_from_utc(request: pytest.FixtureRequest) -> Iterator[None]:
    """The process in another time zone."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_from_utc")
def test_headers_are_the_same_in_every_time_zone() -> None:
    assert datetime.now().astimezone().utcoffset() != timedelta(0)
    headers = render_headers(EVENT, [NEWEST], 1764929700.0, b"{}")
    assert (headers["webhook-timestamp"], headers["X-Timestamp"]) == ("1764929700", "2025-12-05T10:15:00Z")
    assert Webhook(NEWEST).verify("{}", render_headers(EVENT, [NEWEST], time.time(), b"{}")) == {}


def test_both_timestamps_of_a_callback_are_one_moment() -> None:
    headers = render_headers(EVENT, [NEWEST], 1764929700.5, b"{}")
    assert parse_timestamp(headers["X-Timestamp"]) == float(headers["webhook-timestamp"])


@pytest.mark.parametrize("secret", [NEWEST, OLDER])
@pytest.mark.parametrize("body", [b'{"a":1}', '{"name":"\u2028 é 😀"}'.encode(), b'{"long":"' + b"x" * 19_999 + b'"}'])
def test_every_live_secret_verifies_a_callback_with_the_standard_library_of_webhooks(secret: str, body: bytes) -> None:
    headers = render_headers(EVENT, [NEWEST, OLDER], time.time(), body)
    assert Webhook(secret).verify(body, headers) == json.loads(body)


@pytest.mark.parametrize("header", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_changed_header_fails_verification(header: str) -> None:
    headers = render_headers(EVENT, [NEWEST], time.time(), b"{}")
    changed = {
        "webhook-id": EVENT + "0",
        "webhook-timestamp": str(int(time.time()) - 1),
        "webhook-signature": "v1,AAAA",
    }
    with pytest.raises(WebhookVerificationError):
        Webhook(NEWEST).verify(b"{}", headers | {header: changed[header]})


def test_a_secret_that_is_not_live_fails_verification() -> None:
    headers = render_headers(EVENT, [NEWEST], time.time(), b"{}")
    with pytest.raises(WebhookVerificationError):
        Webhook(OLDER).verify(b"{}", headers)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_one_flipped_bit_of_a_body_changes_every_signature(body: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, len(body) * 8 - 1))
    flipped = bytearray(body)
    flipped[bit // 8] ^= 1 << bit % 8
    for signed, tampered in (
        (sign_v1("key", "1764928800", "POST", "/p", "", content) for content in (body, bytes(flipped))),
        (sign_body("key", "1764928800", content) for content in (body, bytes(flipped))),
        (sign_webhook([NEWEST], EVENT, 1764928800, content) for content in (body, bytes(flipped))),
    ):
        assert not signatures_equal(signed, tampered)


@pytest.mark.parametrize(
    "changed",
    [
        {"timestamp": "1764928801"},
        {"method": "GET"},
        {"path": "/api/v1/payouts/cancel"},
        {"path": "/api/v1/payout%73"},
        {"query": "shop_code=b"},
        {"query": ""},
        {"body": b""},
    ],
)
def test_v1_binds_every_part_of_a_request(changed: dict[str, Any]) -> None:
    parts: dict[str, Any] = {
        "timestamp": "1764928800",
        "method": "POST",
        "path": "/api/v1/payouts",
        "query": "shop_code=a",
        "body": b"{}",
    }
    assert sign_v1("secret", **parts) != sign_v1("secret", **parts | changed)
    assert sign_v1("secret", **parts) != sign_v1("other", **parts)


@pytest.mark.parametrize("received", ["", "v1=", "é", "\udcff\udc80", "\x00", "v1=" + "0" * 64])
def test_any_text_can_be_compared_with_a_signature(received: str) -> None:
    assert not signatures_equal("v1=" + "a" * 64, received)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1764928800", 1764928800.0),
        ("0", 0.0),
        ("2025-12-05T10:00:00Z", 1764928800.0),
        ("2025-12-05T10:00:00.5Z", 1764928800.5),
        ("2025-12-05T10:00:00.123456Z", 1764928800.123456),
        ("2025-12-05T10:00:00.123456789Z", 1764928800.123456),
    ],
)
def test_both_forms_of_a_timestamp_are_understood(text: str, seconds: float) -> None:
    assert parse_timestamp(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *"now -1 +1 1.5 1e9 1_000 \uff11\uff17 123456789012 2025-12-05 2025-12-05T10:00:00".split(),
        *"2025-12-05T10:00:00z 2025-12-05T10:00:00+00:00 2025-13-05T10:00:00Z 2025-02-30T10:00:00Z".split(),
        *"2025-12-05T24:00:00Z 2025-12-05T10:00:60Z 2025-12-05T10:00:00.1234567890Z 0000-01-01T00:00:00Z".split(),
        *("", " ", "2025-12-05 10:00:00Z", "2025-12-05T10:00:00Z\n", "\n1764928800", "1764928800\n", "\x00", "\udcff"),
    ],
)
def test_what_is_no_timestamp_is_none(text: str) -> None:
    assert parse_timestamp(text) is None


@given(st.integers(0, 10**11 - 1))
def test_a_timestamp_means_the_same_in_both_forms(seconds: int) -> None:
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert parse_timestamp(text) == parse_timestamp(str(seconds)) == seconds
