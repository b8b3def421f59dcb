"""The http rail: a bank, or an adapter in front of one, that speaks `PROTOCOL.md`.

Whatever is not an answer that the bank has signed for this very request says nothing about the money: `UNKNOWN`. Only a
connection that could not be opened is `NOT_ACCEPTED` by itself, since nothing was sent.
"""

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from yarl import URL

from common.domain.signing import RAIL_WINDOW_SECONDS, parse_timestamp, sign_answer, sign_v1, signatures_equal
from worker.connections import BoundedConnector
from worker.rails import Answer, Outcome, PayinTerms, PaymentOrder
from worker.rails.breaker import Breaker

ANSWER_BYTES_MAX: Final = 64 * 1024

# What a bank may say to a submit, and to a look-up.
_TO_SUBMIT: Final = {
    "paid": Outcome.PAID,
    "declined": Outcome.DECLINED,
    "submitted": Outcome.SUBMITTED,
    "not_accepted": Outcome.NOT_ACCEPTED,
}
_TO_LOOK_UP: Final = {"paid": Outcome.PAID, "declined": Outcome.DECLINED, "submitted": Outcome.SUBMITTED}

_TO_PAYIN_LOOK_UP: Final = {**_TO_LOOK_UP, "returned": Outcome.RETURNED}


class _NoAnswer(Exception):
    """The bank's answer is none; the text says why, in a word."""


@asynccontextmanager
async def open_rail_session(
    *, connect_timeout_seconds: float, timeout_seconds: float
) -> AsyncIterator[aiohttp.ClientSession]:
    """What all http rails of a process call through: no cookies, no proxy of the environment, every wait bounded."""
    timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=connect_timeout_seconds)
    async with aiohttp.ClientSession(
        connector=BoundedConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=timeout,
        trust_env=False,
    ) as session:
        yield session


@dataclass(frozen=True, slots=True)
class HttpRail:
    """One bank.

    Repeat: the bank pays a reference at most once; that is its part of the protocol.
    """

    session: aiohttp.ClientSession
    base_url: URL
    secret: str = field(repr=False)
    authoritative: bool
    lag_seconds: float
    concurrency: int | None
    breaker: Breaker
    clock: Callable[[], float] = time.time

    @property
    def denial_seconds(self) -> float:
        """For how long "not found" may mean "not yet": until the request is too old, whichever way the clocks are apart."""
        return self.lag_seconds + 2 * RAIL_WINDOW_SECONDS

    @property
    def calls_max(self) -> int | None:
        """How many calls may be in flight; fewer while the bank does not answer."""
        return self.concurrency if self.breaker.calls_max is None else self.breaker.calls_max

    async def submit(self, order: PaymentOrder) -> Answer:
        """Ask the bank to pay."""
        body = {
            "reference": order.reference,
            "amount_minor": order.amount_minor,
            "currency": order.currency,
            "recipient": {"number": order.recipient.number, **_payment_data(order)},
        }
        try:
            status, answer = await self._exchange(
                "POST", self.base_url / "payouts", json.dumps(body).encode(), at=order.asked_at
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return Answer(Outcome.NOT_ACCEPTED, detail="not connected")
        except _NoAnswer as error:
            return Answer(Outcome.UNKNOWN, detail=str(error))
        if status != 200:
            return Answer(Outcome.UNKNOWN, detail=f"status {status}")
        return _read(answer, order.reference, _TO_SUBMIT)

    async def look_up(self, reference: str) -> Answer:
        """Ask the bank what became of a reference."""
        answer = await self._look_up("payouts", reference, _TO_LOOK_UP)
        if answer.outcome is Outcome.NOT_FOUND and not self.authoritative:
            return Answer(Outcome.UNKNOWN, detail="not known there")
        return answer

    async def look_up_payin(self, payin: PayinTerms) -> Answer:
        """Ask the bank whether somebody has paid in under a reference."""
        return await self._look_up("payins", payin.reference, _TO_PAYIN_LOOK_UP)

    async def _look_up(self, what: str, reference: str, words: dict[str, Outcome]) -> Answer:
        try:
            status, answer = await self._exchange("GET", self.base_url / what / reference, b"")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return Answer(Outcome.UNKNOWN, detail="not connected")
        except _NoAnswer as error:
            return Answer(Outcome.UNKNOWN, detail=str(error))
        if status == 404 and answer.get("status") == "not_found" and answer.get("reference") == reference:
            return Answer(Outcome.NOT_FOUND)
        if status != 200:
            return Answer(Outcome.UNKNOWN, detail=f"status {status}")
        return _read(answer, reference, words)

    async def _exchange(
        self, method: str, url: URL, body: bytes, *, at: float | None = None
    ) -> tuple[int, dict[str, Any]]:
        """One request, signed for a moment in Unix seconds, now if none is named, and the bank's signed answer to it.

        Raises: `_NoAnswer`; `ClientConnectorError` and `ConnectionTimeoutError` when there was no connection to send it on.
        """
        answered = False
        timestamp = str(int(self.clock() if at is None else at))
        signature = sign_v1(self.secret, timestamp, method, url.raw_path, url.raw_query_string, body)
        headers = {"Content-Type": "application/json", "X-Timestamp": timestamp, "X-Signature": signature}
        try:
            async with self.session.request(
                method, url, data=body or None, headers=headers, allow_redirects=False
            ) as response:
                content = await _read_body(response)
                self._check_signature(response, signature, content)
                answered = True
                return response.status, _parse(content)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise
        except TimeoutError:
            raise _NoAnswer("time-out") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _NoAnswer(f"connection lost: {type(error).__name__}") from None
        finally:
            (self.breaker.answered if answered else self.breaker.unanswered)()

    def _check_signature(self, response: aiohttp.ClientResponse, request_signature: str, content: bytes) -> None:
        timestamp = response.headers.get("X-Timestamp", "")
        signed_at = parse_timestamp(timestamp)
        expected = sign_answer(self.secret, timestamp, request_signature, response.status, content)
        if not signatures_equal(expected, response.headers.get("X-Signature", "")):
            raise _NoAnswer(f"status {response.status}, not signed by the bank")
        if signed_at is None or abs(self.clock() - signed_at) > RAIL_WINDOW_SECONDS:
            raise _NoAnswer("signed at another time")


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > ANSWER_BYTES_MAX:
            raise _NoAnswer("answer too large")
    return bytes(content)


def _payment_data(order: PaymentOrder) -> dict[str, Any]:
    data = order.recipient.payment_data
    return {} if data is None else {"data": data}


def _parse(content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except ValueError:
        raise _NoAnswer("answer is no JSON") from None
    if not isinstance(answer, dict):
        raise _NoAnswer("answer is no object")
    return answer


def _read(answer: dict[str, Any], reference: str, words: dict[str, Outcome]) -> Answer:
    """What the bank's answer says; `UNKNOWN` when it is about something else, or says what it cannot say here."""
    outcome = words.get(str(answer.get("status")))
    if outcome is None or answer.get("reference") != reference:
        return Answer(Outcome.UNKNOWN, detail="answer does not fit")
    amount_minor, currency = answer.get("amount_minor"), answer.get("currency")
    if outcome is not Outcome.NOT_ACCEPTED and (type(amount_minor) is not int or not isinstance(currency, str)):
        return Answer(Outcome.UNKNOWN, detail="answer names no sum")
    return Answer(
        outcome,
        failure_code=_text(answer.get("failure_code")) if outcome is Outcome.DECLINED else None,
        provider_reference=_text(answer.get("provider_reference")),
        amount_minor=amount_minor if type(amount_minor) is int else None,
        currency=currency if isinstance(currency, str) else None,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
