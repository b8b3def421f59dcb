"""The simulated bank over HTTP: `worker/rails/PROTOCOL.md` from the bank's side, as well or as badly as its mood says."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Final

import aiohttp
from aiohttp import web
from yarl import URL

from common.domain.signing import parse_timestamp, sign_answer, sign_v1, signatures_equal
from common.process import end_tasks
from ops.simulator.ledger import Ledger, PaidIn, Payment, Untold
from ops.simulator.moods import Behaviour, Fate, Manner, Mood, Telling

WINDOW_SECONDS: Final = 60.0

_TELL_INTERVAL_SECONDS: Final = 0.05
_TELL_BATCH_MAX: Final = 64
_TELL_TIMEOUT_SECONDS: Final = 5.0

_BAD_SIGNATURE: Final = "v1=" + "0" * 64

_FINAL: Final = {
    Fate.PAID: "paid",
    Fate.RETURNED: "paid",
    Fate.DECLINED: "declined",
    Fate.SUBMITTED_PAID: "paid",
    Fate.SUBMITTED_DECLINED: "declined",
}
_SUBMITTED: Final = (Fate.SUBMITTED_PAID, Fate.SUBMITTED_DECLINED)
_UNBOOKED: Final = (Manner.DROP_BEFORE, Manner.ERROR_BEFORE)
_STATUSES: Final = {Manner.ERROR_BEFORE: 503, Manner.ERROR_AFTER: 500}


class Bank:
    """One bank. `pace_seconds`: its unit of time: when it settles and tells. `slow_seconds`: longer than anybody waits."""

    def __init__(
        self,
        ledger: Ledger,
        mood: Mood,
        *,
        secret: str,
        events_url: str | None,
        pace_seconds: float,
        slow_seconds: float,
    ) -> None:
        self._ledger = ledger
        self._mood = mood
        self.secret = secret
        self._events_url = events_url
        self._pace_seconds = pace_seconds
        self._slow_seconds = slow_seconds

    def app(self) -> web.Application:
        """The bank's side of the protocol; it tells its events as long as the application runs."""
        app = web.Application()
        app.router.add_get("/readyz", _ready)
        app.router.add_post("/payouts", self._submit)
        app.router.add_get("/payouts/{reference}", self._look_up)
        app.router.add_get("/payins/{reference}", self._look_up_payin)
        # The payers' counter, which is no part of the protocol.
        app.router.add_post("/counter/{reference}", self._pay_in)
        app.router.add_post("/counter/{reference}/return", self._send_back)
        app.cleanup_ctx.append(self._telling)
        return app

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if not self._is_signed(request, body):
            return web.Response(status=401)
        asked = json.loads(body)
        digest = hashlib.sha256(json.dumps(asked["recipient"], sort_keys=True).encode()).hexdigest()
        payment = self._ledger.ask(asked["reference"], asked["amount_minor"], asked["currency"], digest)
        if (payment.amount_minor, payment.currency, payment.recipient_digest) != (
            asked["amount_minor"],
            asked["currency"],
            digest,
        ):
            return self._answer(request, 409, {"reference": payment.reference, "status": "conflict"})
        behaviour = self._mood.submit(payment.reference, payment.submits)
        if payment.status == "asked" and behaviour.manner not in _UNBOOKED and behaviour.fate is not Fate.NOT_ACCEPTED:
            self._book(payment, behaviour)
        return await self._behave(request, behaviour.manner, 200, self._describe(payment.reference))

    async def _look_up(self, request: web.Request) -> web.StreamResponse:
        if not self._is_signed(request, b""):
            return web.Response(status=401)
        reference = request.match_info["reference"]
        self._ledger.settle(time.time())
        described = self._describe(reference)
        status = 200
        if described["status"] == "not_accepted":
            status, described = 404, {"reference": reference, "status": "not_found"}
        return await self._behave(request, self._mood.look_up(reference), status, described)

    async def _look_up_payin(self, request: web.Request) -> web.StreamResponse:
        if not self._is_signed(request, b""):
            return web.Response(status=401)
        reference = request.match_info["reference"]
        payin = self._ledger.find_payin(reference)
        described = {"reference": reference, "status": "not_found"} if payin is None else self._describe_payin(payin)
        return await self._behave(request, self._mood.look_up(reference), 404 if payin is None else 200, described)

    async def _pay_in(self, request: web.Request) -> web.Response:
        """Somebody pays: `{"amount_minor": 500000, "currency": "BDT"}`. 409: it was paid already."""
        reference, paid = request.match_info["reference"], await request.json()
        payin = PaidIn(reference, int(paid["amount_minor"]), str(paid["currency"]), "paid")
        now = time.time()
        behaviour = self._mood.submit(reference, 1)
        tell = self._tellings(payin, behaviour.telling, "paid", submitted=False, first_at=now)
        is_first = self._ledger.take_in(reference, payin.amount_minor, payin.currency, now, tell)
        return web.json_response({"reference": reference, "status": "paid"}, status=200 if is_first else 409)

    async def _send_back(self, request: web.Request) -> web.Response:
        """The bank gives a payer their money back. 409: there is nothing to give back."""
        reference = request.match_info["reference"]
        payin = self._ledger.find_payin(reference)
        told = None if payin is None else self._event(payin, "R", "returned")
        if told is None or not self._ledger.send_back(reference, told, time.time()):
            return web.json_response({"reference": reference, "status": "not_found"}, status=409)
        return web.json_response({"reference": reference, "status": "returned"})

    def _describe_payin(self, payin: PaidIn) -> dict[str, Any]:
        return {
            "reference": payin.reference,
            "status": payin.status,
            "amount_minor": payin.amount_minor,
            "currency": payin.currency,
            "provider_reference": f"B-{payin.reference}",
        }

    def _book(self, payment: Payment, behaviour: Behaviour) -> None:
        """Do what the fate says, and write down what will be told of it."""
        now, fate = time.time(), behaviour.fate
        final = _FINAL[fate]
        submitted = fate in _SUBMITTED
        settles_at = now + self._pace_seconds if submitted else None
        self._ledger.book(
            payment,
            "submitted" if submitted else final,
            final_status=final,
            failure_code="provider_declined" if final == "declined" else None,
            settles_at=settles_at,
            now=now,
            tell=self._tellings(payment, behaviour.telling, final, submitted=submitted, first_at=settles_at or now),
        )
        if fate is Fate.RETURNED:
            self._ledger.give_back(
                payment.reference, self._event(payment, "R", "returned"), now + 2 * self._pace_seconds
            )

    def _tellings(
        self, payment: Payment | PaidIn, telling: Telling, final: str, *, submitted: bool, first_at: float
    ) -> tuple[tuple[dict[str, Any], float, int], ...]:
        """Events by body, time, and how often they are signed badly first. What is told twice has one id, or two."""
        if telling is Telling.NOT:
            return ()
        pace = self._pace_seconds
        first = self._event(payment, "1", final)
        at = first_at + (5 * pace if telling is Telling.LATE else 0)
        events = [(first, at, 2 if telling is Telling.BADLY_SIGNED_FIRST else 0)]
        if telling is Telling.TWICE:
            events += [(first, at, 0), (self._event(payment, "2", final), at + pace, 0)]
        if telling is Telling.OUT_OF_ORDER and submitted:
            events.append((self._event(payment, "0", "submitted"), at + pace, 0))
        if telling is Telling.ANOTHER_SUM_BESIDE:
            wrong = {**self._event(payment, "X", final), "amount_minor": payment.amount_minor + 1}
            events.insert(0, (wrong, at, 0))
        return tuple(events)

    def _event(self, payment: Payment | PaidIn, suffix: str, status: str) -> dict[str, Any]:
        return {
            "id": f"{payment.reference}-{suffix}",
            "reference": payment.reference,
            "status": status,
            "amount_minor": payment.amount_minor,
            "currency": payment.currency,
            "provider_reference": f"B-{payment.reference}",
            **({"failure_code": "provider_declined"} if status == "declined" else {}),
        }

    def _describe(self, reference: str) -> dict[str, Any]:
        payment = self._ledger.find(reference)
        if payment is None or payment.status == "asked":
            return {"reference": reference, "status": "not_accepted"}
        return {
            "reference": reference,
            "status": "paid" if payment.status == "returned" else payment.status,
            "amount_minor": payment.amount_minor,
            "currency": payment.currency,
            "provider_reference": f"B-{reference}",
            "failure_code": payment.failure_code,
        }

    async def _behave(
        self, request: web.Request, manner: Manner, status: int, body: dict[str, Any]
    ) -> web.StreamResponse:
        if manner is Manner.SLOW:
            await asyncio.sleep(self._slow_seconds)
        if manner in (Manner.DROP_BEFORE, Manner.DROP_AFTER):
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)
        if manner is Manner.ANOTHER_SUM and "amount_minor" in body:
            body = {**body, "amount_minor": body["amount_minor"] + 1}
        if manner in _STATUSES:
            return self._answer(request, _STATUSES[manner], {"status": "error"})
        response = self._answer(request, status, body)
        if manner is Manner.BADLY_SIGNED:
            response.headers["X-Signature"] = _BAD_SIGNATURE
        if manner is Manner.GARBAGE:
            response.body = b"<html>"
        return response

    def _answer(self, request: web.Request, status: int, body: dict[str, Any]) -> web.Response:
        content, timestamp = json.dumps(body).encode(), str(int(time.time()))
        signature = sign_answer(self.secret, timestamp, request.headers["X-Signature"], status, content)
        return web.Response(
            status=status,
            body=content,
            content_type="application/json",
            headers={"X-Timestamp": timestamp, "X-Signature": signature},
        )

    def _is_signed(self, request: web.Request, body: bytes) -> bool:
        timestamp = request.headers.get("X-Timestamp", "")
        signed_at = parse_timestamp(timestamp)
        path, _, query = request.raw_path.partition("?")
        expected = sign_v1(self.secret, timestamp, request.method, path, query, body)
        return (
            signed_at is not None
            and abs(time.time() - signed_at) <= WINDOW_SECONDS
            and signatures_equal(expected, request.headers.get("X-Signature", ""))
        )

    async def _telling(self, _app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self._tell_for_ever()) if self._events_url else None
        yield
        if task is not None:
            await end_tasks([task], 0)

    async def _tell_for_ever(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TELL_TIMEOUT_SECONDS)) as session:
            while True:
                self._ledger.settle(time.time())
                due = self._ledger.find_untold(time.time(), _TELL_BATCH_MAX)
                await asyncio.gather(*(self._tell(session, event) for event in due))
                if len(due) < _TELL_BATCH_MAX:
                    await asyncio.sleep(_TELL_INTERVAL_SECONDS)

    async def _tell(self, session: aiohttp.ClientSession, event: Untold) -> None:
        assert self._events_url is not None
        url, timestamp = URL(self._events_url), str(int(time.time()))
        signature = sign_v1(self.secret, timestamp, "POST", url.raw_path, url.raw_query_string, event.body)
        headers = {
            "Content-Type": "application/json",
            "X-Timestamp": timestamp,
            "X-Signature": _BAD_SIGNATURE if event.bad_signatures else signature,
        }
        with suppress(aiohttp.ClientError, OSError):
            async with session.post(url, data=event.body, headers=headers) as response:
                if response.status == 200:
                    self._ledger.told(event.number, time.time())
                    return
        self._ledger.tell_again(event.number, time.time() + self._pace_seconds)


async def _ready(_request: web.Request) -> web.Response:
    return web.json_response({"status": "ready"})
