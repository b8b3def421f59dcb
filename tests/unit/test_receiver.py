import time

import pytest
from multidict import CIMultiDict
from standardwebhooks import Webhook

from ops.receiver import is_authentic
from worker.callbacks.send import render_headers

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER_SECRET = "whsec_plJ3nmyCDGBKInavdOK15jsl6NuJMpGE"
BODY = b'{"type":"payout.success"}'
NOW = 1_795_376_004.5


def callback(secret: str = SECRET, at: float = NOW) -> CIMultiDict[str]:
    return CIMultiDict(render_headers("evt_1", [secret], at, BODY))


def test_the_receiver_believes_what_the_worker_signs() -> None:
    assert is_authentic(callback(), BODY, SECRET, now=NOW)


def test_the_receiver_s_verdict_is_that_of_standard_webhooks() -> None:
    headers = callback(at=time.time())

    Webhook(SECRET).verify(BODY, dict(headers))
    assert is_authentic(headers, BODY, SECRET, now=time.time())


def test_another_body_is_not_believed() -> None:
    assert not is_authentic(callback(), BODY + b" ", SECRET, now=NOW)


def test_another_secret_is_not_believed() -> None:
    assert not is_authentic(callback(OTHER_SECRET), BODY, SECRET, now=NOW)


@pytest.mark.parametrize("seconds", [-301, 301])
def test_a_callback_of_another_time_is_not_believed(seconds: float) -> None:
    assert not is_authentic(callback(at=NOW + seconds), BODY, SECRET, now=NOW)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature", "X-Timestamp", "X-Signature"])
@pytest.mark.parametrize("value", [None, "", "1", "v1,AAAA"])
def test_every_header_counts(name: str, value: str | None) -> None:
    headers = callback()
    del headers[name]
    if value is not None:
        headers[name] = value

    assert not is_authentic(headers, BODY, SECRET, now=NOW)
