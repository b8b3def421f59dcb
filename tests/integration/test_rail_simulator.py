"""The simulated bank as a process: its books outlive kill -9, a reference is paid once, its events are told until heard."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from common.domain.signing import parse_timestamp, sign_answer, sign_v1
from ops.ports import choose_port
from ops.simulator.ledger import Ledger
from ops.simulator.moods import MOODS, Fate, Manner, SeededMood, Telling
from tests.stack import ROOT, eventually

SECRET = "rk_simulated"
PAY = {"reference": "po_1", "amount_minor": 1000, "currency": "BDT", "recipient": {"number": "01712345678"}}


@dataclass(slots=True)
class Simulator:
    """The command, started and killed at will on one port and one file."""

    port: int
    books: Path
    options: tuple[str, ...] = ()
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it and wait until it answers."""
        command = ("-m", "ops.simulator", "--port", str(self.port), "--ledger", str(self.books), *self.options)
        environment = {**os.environ, "RAIL_SECRET": SECRET}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, *command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.DEVNULL
        )
        await eventually(self._answers, "the bank answers")

    async def _answers(self) -> bool:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}/readyz") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Kill it, or ask it to leave; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return await self.process.wait()

    @property
    def url(self) -> str:
        """Below it the bank answers."""
        return f"http://127.0.0.1:{self.port}"

    async def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, secret: str = SECRET, ago: int = 0
    ) -> tuple[int, dict[str, Any]]:
        """A signed request; what it answers, after its own signature was judged."""
        content = b"" if body is None else json.dumps(body).encode()
        timestamp = str(int(time.time()) - ago)
        signature = sign_v1(secret, timestamp, method, path, "", content)
        headers = {"X-Timestamp": timestamp, "X-Signature": signature}
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.url + path, data=content or None, headers=headers) as response,
        ):
            answer = await response.read()
            if response.status == 401:
                return 401, {}
            signed_at = response.headers["X-Timestamp"]
            assert parse_timestamp(signed_at) is not None
            assert response.headers["X-Signature"] == sign_answer(SECRET, signed_at, signature, response.status, answer)
            return response.status, json.loads(answer)


@pytest.fixture
async def simulator(tmp_path: Path) -> AsyncIterator[Simulator]:
    made = Simulator(choose_port(), tmp_path / "bank.sqlite")
    yield made
    if made.process is not None and made.process.returncode is None:
        await made.end()


@asynccontextmanager
async def listener(*statuses: int) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """Where a bank tells: answers with these statuses, then with 200; what it was told, signatures judged."""
    heard: list[dict[str, Any]] = []
    left = list(statuses)

    async def hear(request: web.Request) -> web.Response:
        body = await request.read()
        expected = sign_v1(SECRET, request.headers["X-Timestamp"], "POST", request.path, "", body)
        heard.append({**json.loads(body), "is_signed": request.headers["X-Signature"] == expected})
        return web.Response(status=left.pop(0) if left else 200 if heard[-1]["is_signed"] else 401)

    app = web.Application()
    app.router.add_post("/events", hear)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/events", heard
    finally:
        await runner.cleanup()


async def test_what_it_booked_outlives_kill_9_and_is_paid_once_however_often_it_is_asked(simulator: Simulator) -> None:
    for _ in range(3):
        await simulator.start()
        status, answer = await simulator.ask("POST", "/payouts", PAY)
        assert (status, answer["status"], answer["provider_reference"]) == (200, "paid", "B-po_1")
        assert (await simulator.ask("GET", "/payouts/po_1"))[1]["status"] == "paid"
        assert await simulator.end() == -signal.SIGKILL
    (payment,) = Ledger(simulator.books).payments()
    assert (payment.submits, payment.times_paid, payment.amount_minor) == (3, 1, 1000)


async def test_other_terms_under_a_reference_pay_nothing(simulator: Simulator) -> None:
    await simulator.start()
    await simulator.ask("POST", "/payouts", PAY)
    for terms in ({"amount_minor": 1001}, {"currency": "USD"}, {"recipient": {"number": "01799999999"}}):
        assert (await simulator.ask("POST", "/payouts", PAY | terms))[0] == 409
    (payment,) = Ledger(simulator.books).payments()
    assert (payment.times_paid, payment.amount_minor, payment.currency) == (1, 1000, "BDT")


@pytest.mark.parametrize(("secret", "ago"), [("rk_another", 0), (SECRET, 3600)], ids=["badly signed", "old"])
async def test_who_does_not_sign_is_told_nothing_and_nothing_is_booked(
    simulator: Simulator, secret: str, ago: int
) -> None:
    await simulator.start()
    assert await simulator.ask("POST", "/payouts", PAY, secret=secret, ago=ago) == (401, {})
    assert await simulator.ask("GET", "/payouts/po_1", secret=secret, ago=ago) == (401, {})
    assert Ledger(simulator.books).payments() == []


async def test_nobody_knows_what_was_never_asked_for(simulator: Simulator) -> None:
    await simulator.start()
    assert await simulator.ask("GET", "/payouts/po_9") == (404, {"reference": "po_9", "status": "not_found"})
    assert await simulator.ask("GET", "/payins/pi_9") == (404, {"reference": "pi_9", "status": "not_found"})


async def test_an_event_is_told_until_it_is_heard_also_after_a_kill(simulator: Simulator) -> None:
    async with listener(503, 500) as (url, heard):
        simulator.options = ("--events-url", url, "--pace-seconds", "0.05")
        await simulator.start()
        await simulator.ask("POST", "/payouts", PAY)

        async def told(times: int) -> bool:
            return len(heard) >= times

        await eventually(lambda: told(1), "it is told once")
        await simulator.end()
        await simulator.start()
        await eventually(lambda: told(3), "it is told until it was heard")
        books = Ledger(simulator.books)

        async def nothing_left() -> bool:
            return books.count_untold() == 0

        await eventually(nothing_left, "nothing is left to tell")
        assert {(event["id"], event["status"], event["is_signed"]) for event in heard} == {("po_1-1", "paid", True)}


async def test_payers_pay_in_at_the_counter_once_and_may_get_it_back(simulator: Simulator) -> None:
    async with listener() as (url, heard), aiohttp.ClientSession() as payer:
        simulator.options = ("--events-url", url, "--pace-seconds", "0.05")
        await simulator.start()
        counter = f"{simulator.url}/counter/pi_1"
        paid = {"amount_minor": 700, "currency": "BDT"}
        assert [(await payer.post(counter, json=paid)).status for _ in range(2)] == [200, 409]
        status, answer = await simulator.ask("GET", "/payins/pi_1")
        assert (status, answer["status"], answer["amount_minor"]) == (200, "paid", 700)
        await simulator.end()
        await simulator.start()
        assert [(await payer.post(f"{counter}/return")).status for _ in range(2)] == [200, 409]
        assert (await simulator.ask("GET", "/payins/pi_1"))[1]["status"] == "returned"

        async def told() -> bool:
            return {event["status"] for event in heard} == {"paid", "returned"}

        await eventually(told, "both are told")
        assert {event["amount_minor"] for event in heard} == {700}


async def test_it_leaves_when_it_is_asked_to(simulator: Simulator) -> None:
    await simulator.start()
    assert await simulator.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("name", MOODS)
def test_a_mood_is_the_same_for_the_same_seed(name: str) -> None:
    moods = [SeededMood(name, seed) for seed in (1, 1, 2)]
    drawn = [[mood.submit(f"po_{n}", 1) for n in range(200)] for mood in moods]
    assert drawn[0] == drawn[1]
    assert (drawn[0] != drawn[2]) == (name != "calm")


def test_the_worst_mood_knows_every_evil_and_refuses_nobody_for_ever() -> None:
    mood = SeededMood("worst", 7)
    drawn = [mood.submit(f"po_{n}", 1) for n in range(5000)]
    assert {behaviour.manner for behaviour in drawn} == set(Manner)
    assert {behaviour.fate for behaviour in drawn} == set(Fate)
    assert {behaviour.telling for behaviour in drawn} == set(Telling)
    assert all(mood.submit(f"po_{n}", 4).fate is not Fate.NOT_ACCEPTED for n in range(5000))
