"""The whole product at work and in trouble, as talkative as it can be: no secret, no recipient and no part of one is in a log,
an exported trace or a page of metrics.
"""

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aio_pika
import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from sqlalchemy.engine import make_url
from yarl import URL

from common import tracing
from common.db.engine import Engine
from common.domain.signing import sign_v1
from common.log import LogEvent
from common.messaging.topology import Topology, Work
from ops.ports import choose_port
from ops.simulator.moods import Behaviour, Fate, Manner
from tests.bank import SECRET, add_rail, bank
from tests.broker import Broker
from tests.collector import collector
from tests.endpoint import Endpoint, endpoint
from tests.factories import Merchant, add_funded_merchant, create_body, execute, fetch
from tests.flows import desk
from tests.private import CARD, PIN, PRIVATE, WALLET, readable, unreadable
from tests.stack import ROOT, Process, Stack, eventually, stack
from tests.wire import BALANCE, PAYOUTS, Gateway, signed_headers, signed_request

# Every run of so many characters of a secret, or of a recipient, is looked for; fewer might stand there by chance.
SECRET_PART: Final = 12
RECIPIENT_PART: Final = 10

WRONG_PASSWORD: Final = "a-password-that-opens-nothing"
WALLETS: Final = tuple(f"0198765{end}" for end in ("0000", "0100", "0105", "0120", "0200", "0300", "0301", "0400"))
CARDS: Final = ("5500005555555559", "5105105105105100", "6011000990139424", "3530111333300000")
QUICK: Final = {
    "PAYOUTS_SUBMIT_DELAYS_SECONDS": "0.1,0.1",
    "PAYOUTS_LOOK_UP_DELAYS_SECONDS": "0.1",
    "PAYOUTS_PAYIN_LOOK_UP_DELAYS_SECONDS": "0.1",
}


@dataclass(slots=True)
class Secrets:
    """What must not be found, by what it is."""

    secrets: dict[str, str] = field(default_factory=dict)
    recipients: set[str] = field(default_factory=lambda: {CARD, WALLET, *WALLETS, *CARDS})

    def parts(self) -> Iterator[tuple[str, bytes]]:
        """Everything to look for, and what it is part of."""
        for name, text in self.secrets.items():
            yield from ((name, part) for part in _parts(text, SECRET_PART))
        for text in self.recipients:
            yield from ((text, part) for part in _parts(text, RECIPIENT_PART))
        for text in PRIVATE - {"411111"}:
            yield text, text.encode()

    def found_in(self, places: Mapping[str, bytes]) -> set[tuple[str, str]]:
        """What is found where."""
        return {(name, place) for name, part in self.parts() for place, content in places.items() if part in content}


def _parts(text: str, size: int) -> Iterator[bytes]:
    for begin in range(max(1, len(text) - size + 1)):
        yield text[begin : begin + size].encode()


class Life:
    """The short and eventful life of a stack, and what was secret in it."""

    def __init__(self, running: Stack, owner: Engine, broker: Broker, well: Endpoint, ill: Endpoint) -> None:
        self.running = running
        self.owner = owner
        self.broker = broker
        self.well = well
        self.ill = ill
        self.hidden = Secrets({"password of nobody": WRONG_PASSWORD, "rail's secret": SECRET})
        self.gateway = Gateway(running, running.port, owner)
        self.processes: list[Process] = []

    async def begin(self) -> None:
        """Merchants and processes."""
        self.payer = await self._add_merchant(webhook_url=self.well.url)
        self.banker = await self._add_merchant(webhook_url=self.ill.url, rail="bank")
        roles = (["gateway"], ["worker", "settle"], ["worker", "callbacks"], ["worker", "sweep"])
        self.processes += await asyncio.gather(*(self.running.start(*role) for role in roles))
        for process, links in zip(self.processes, (1, 2, 2), strict=False):
            await self._until_said(process, LogEvent.BROKER_CONNECTED, links - 1)

    async def _add_merchant(self, **options: Any) -> Merchant:
        merchant = await add_funded_merchant(self.owner, self.running.settings, **options)
        self.hidden.secrets |= {
            f"API key of {merchant.code}": merchant.api_key,
            f"API secret of {merchant.code}": merchant.api_secret,
            f"webhook secret of {merchant.code}": merchant.webhook_secret.removeprefix("whsec_"),
        }
        return merchant

    async def send(self, request: bytes) -> int:
        """One request, whose signature is secret from now on; the status of its answer."""
        for line in request.split(b"\r\n"):
            if line.startswith(b"X-Signature: "):
                self.hidden.secrets[f"signature {len(self.hidden.secrets)}"] = line[13:].decode().removeprefix("v1=")
        return (await self.gateway.send(request)).status

    async def ask(self, merchant: Merchant, method: str, path: str, body: bytes = b"", **options: Any) -> int:
        return await self.send(signed_request(merchant, method, path, body, **options))

    async def work(self) -> None:
        """Payouts of every fate, payins, a bank that misbehaves and speaks by itself, callbacks that nobody takes."""
        for number, wallet in enumerate(WALLETS):
            body = create_body(external_id=f"WORK-{number}", card_number=wallet, paymentData=PIN)
            assert await self.ask(self.payer, "POST", PAYOUTS, body) == 201
        for number, card in enumerate(CARDS):
            body = create_body(external_id=f"BANK-{number}", card_number=card)
            assert await self.ask(self.banker, "POST", PAYOUTS, body) == 201
        for amount in ("10.00", "10.03", "10.04"):
            body = create_body(external_id=f"IN-{amount}", amount=amount, card_number=None, paymentData=PIN)
            assert await self.ask(self.payer, "POST", "/api/v1/payins", body) == 201
        for path in ("", "/events", "/callbacks"):
            assert await self.ask(self.payer, "GET", f"{PAYOUTS}/WORK-0{path}") == 200
        for action in ("cancel", "callbacks/resend"):
            assert await self.ask(self.payer, "POST", f"{PAYOUTS}/WORK-2/{action}") in (200, 422)
        await self._until(
            "SELECT count(*) >= 9 AS done FROM payouts WHERE finalized_at IS NOT NULL OR state = 'verifying'"
        )
        assert await self.say("paid", SECRET) == 200
        assert await self.say("declined", "rk_of_somebody_else") == 401
        await self._until("SELECT bool_and(applied_at IS NOT NULL) AS done FROM rail_events WHERE rail = 'bank'")
        await self._until("SELECT count(*) >= 2 AS done FROM payins WHERE state IN ('success', 'refunded')")
        await self._until("SELECT count(*) > 0 AS done FROM callback_attempts WHERE error = 'http_5xx'")
        await self._until("SELECT count(*) > 0 AS done FROM callbacks WHERE state = 'delivered'")

    async def say(self, word: str, secret: str) -> int:
        """The bank says a word about a payout of its own."""
        (row,) = await fetch(self.owner, "SELECT reference FROM payout_attempts WHERE rail = 'bank' LIMIT 1")
        event = {"id": f"E-{word}", "reference": row.reference, "status": word, "amount_minor": 1000, "currency": "BDT"}
        path, timestamp, body = "/api/v1/rails/bank/events", str(int(time.time())), json.dumps(event).encode()
        signature = self.hidden.secrets[f"rail's {word}"] = sign_v1(secret, timestamp, "POST", path, "", body)
        headers = {"X-Timestamp": timestamp, "X-Signature": signature, "Content-Type": "application/json"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.running.base_url}{path}", data=body, headers=headers) as response,
        ):
            return response.status

    async def suffer(self) -> None:
        """Requests that are refused, faults of ours, a message that nobody can read, passwords that open nothing."""
        for request in readable(self.payer):
            await self.send(request)
        headers = signed_headers(self.payer, "GET", BALANCE)
        self.hidden.secrets["signature that nobody parsed"] = headers["X-Signature"].removeprefix("v1=")
        for data in unreadable(headers):
            await self.gateway.send(data)
        await execute(self.owner, "REVOKE SELECT ON shops FROM payouts_gateway")
        assert await self.ask(self.payer, "GET", f"{BALANCE}?shop_code=a-{CARD}") == 500
        await execute(self.owner, "GRANT SELECT ON shops TO payouts_gateway")
        settle, callbacks = self.processes[1:3]
        for right, role, fails in (
            ("INSERT ON payout_due", "gateway", None),
            ("INSERT ON payout_attempts", "worker", settle),
            ("INSERT ON callback_attempts", "worker", callbacks),
        ):
            failed_before = 0 if fails is None else fails.output.count(LogEvent.ROUND_FAILED)
            await execute(self.owner, f"REVOKE {right} FROM payouts_{role}")
            status = await self.ask(self.payer, "POST", PAYOUTS, create_body(card_number=CARD, paymentData=PIN))
            assert status == (500 if fails is None else 201)
            if fails is not None:
                await self._until_said(fails, LogEvent.ROUND_FAILED, failed_before)
            await execute(self.owner, f"GRANT {right} TO payouts_{role}")
        await self._publish(json.dumps({"v": 9, "card": CARD, "key": self.payer.api_secret}).encode())
        await self._until_said(settle, LogEvent.MESSAGE_PARKED)
        database = make_url(self.running.database_url).set(password=WRONG_PASSWORD)
        broker = URL(self.broker.url).with_password(WRONG_PASSWORD)
        for role, variables, event in (
            ("worker sweep", {"DATABASE_URL": database.render_as_string(hide_password=False)}, LogEvent.ROUND_FAILED),
            ("gateway", {"AMQP_URL": str(broker), "PORT": str(choose_port())}, LogEvent.BROKER_UNREACHABLE),
        ):
            locked_out = await self.running.launch(*role.split(), **variables)
            self.processes.append(locked_out)
            await self._until_said(locked_out, event)

    async def end(self) -> dict[str, bytes]:
        """Everything that the processes told, by log and by metrics."""
        told = {}
        async with aiohttp.ClientSession() as session:
            for process in self.processes[:4]:
                async with session.get(f"http://127.0.0.1:{process.admin_port}/metrics") as response:
                    told[f"metrics of {process.name}"] = await response.read()
        for number, process in enumerate(self.processes):
            assert await process.stop() == 0, process.output
            told[f"log {number} of {process.name}"] = process.output.encode()
        for place in (self.well, self.ill):
            for request in place.received:
                for name in ("webhook-signature", "X-Signature"):
                    signature = request.headers[name].removeprefix("v1,")
                    self.hidden.secrets[f"callback's signature {len(self.hidden.secrets)}"] = signature
        return told

    async def _publish(self, body: bytes) -> None:
        """A message by hand to whoever settles."""
        settings = self.running.settings
        queue = Topology(settings.amqp_queue_prefix, settings.amqp_shards).queue(Work.SETTLE, 0)
        async with await aio_pika.connect(self.broker.url) as connection:
            channel = await connection.channel()
            await channel.default_exchange.publish(aio_pika.Message(body, type=Work.SETTLE), queue)

    async def _until(self, query: str) -> None:
        async def done() -> bool:
            (row,) = await fetch(self.owner, query)
            return bool(row.done)

        await eventually(done, query)

    async def _until_said(self, process: Process, event: LogEvent, before: int = 0) -> None:
        async def said() -> bool:
            return process.output.count(event) > before

        await eventually(said, f"{process.name} says {event}")


@pytest.mark.timeout(400)
async def test_no_secret_and_no_recipient_is_in_any_log_any_trace_or_any_metric(
    database_url: str, broker: Broker, amqp_prefix: str, tmp_path: Path
) -> None:
    keys = {name: base64.b64encode(os.urandom(32)).decode() for name in ("master", "content")}
    variables = {"PAYOUTS_MASTER_KEYS": f"1:{keys['master']}", "PAYOUTS_CONTENT_KEY": keys["content"]}
    talkative = {**variables, **QUICK, "PAYOUTS_LOG_LEVEL": "debug", "AMQP_URL": broker.url}
    async with (
        collector() as traces,
        endpoint() as well,
        endpoint() as ill,
        stack(database_url, PAYOUTS_AMQP_QUEUE_PREFIX=amqp_prefix, **talkative, **traces.environment) as running,
        desk(database_url, **variables) as working,
        bank(tmp_path) as provider,
    ):
        ill.answer, ill.content = "500 Internal Server Error", CARD.encode()
        provider.script.submits = [Behaviour(each) for each in (Manner.GARBAGE, Manner.BADLY_SIGNED, Manner.DROP_AFTER)]
        provider.script.submits.append(Behaviour(fate=Fate.SUBMITTED_PAID))
        await add_rail(working, "bank", provider.base_url)
        life = Life(running, working.owner, broker, well, ill)
        await life.begin()
        await life.work()
        await life.suffer()
        places = await life.end()
        places |= {f"traces, export {number}": body for number, body in enumerate(traces.bodies)}
        life.hidden.secrets |= {f"{name} key": key for name, key in keys.items()}
        life.hidden.secrets |= {f"{name} key in hex": base64.b64decode(key).hex() for name, key in keys.items()}
        life.hidden.secrets |= {"database password": passwords(database_url), "broker password": passwords(broker.url)}

        assert life.hidden.found_in(places) == set()

        logs = b"".join(content for place, content in places.items() if place.startswith("log"))
        events = {json.loads(line)["event"] for line in logs.decode().splitlines() if line.startswith("{")}
        assert events >= {
            *(LogEvent.REQUEST_ANSWERED, LogEvent.REQUEST_CRASHED, LogEvent.ACCEPT_BATCH_FAILED, LogEvent.ROUND_FAILED),
            *(LogEvent.PAYOUT_ATTEMPTED, LogEvent.PAYIN_ASKED, LogEvent.CALLBACK_ATTEMPTED, LogEvent.MESSAGE_CLAIMED),
            *(LogEvent.MESSAGE_PARKED, LogEvent.BROKER_UNREACHABLE, LogEvent.RAIL_EVENT_APPLIED),
        }
        assert b'"level":"debug"' in logs.replace(b'": "', b'":"'), "libraries talk too"
        assert {span.name for span in traces.spans} >= {"POST /api/v1/payouts", "settle", "submit bank", "callback"}
        assert len([place for place in places if place.startswith("metrics") and b"payouts_" in places[place]]) == 4
        a_part_of_each = dict(life.hidden.parts())
        planted = {"a place": logs + b" ".join(a_part_of_each.values())}
        assert life.hidden.found_in(planted) >= {(name, "a place") for name in a_part_of_each}, "all are looked for"


def passwords(url: str) -> str:
    """The password of a URL, as it stands there."""
    password = URL(url).raw_password
    assert password
    return password


async def test_what_is_planted_in_a_log_a_trace_and_a_metric_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: the search of the test above sees what went through the very channels that it searches."""
    hidden = Secrets({"a secret": "sk_1234567890abcdef"})
    part, digits = "4567890abcdef", f"x{CARD[:RECIPIENT_PART]}x"
    written = f"from common.log import *; configure_logging('json'); get_logger().info('x', a={part!r}, b={digits!r})"
    log = await asyncio.to_thread(subprocess.check_output, [sys.executable, "-c", written], cwd=ROOT)
    registry = CollectorRegistry()
    Gauge("planted", "A fault", ["one", "other"], registry=registry).labels(part, digits).set(1)
    async with collector() as traces:
        for name, value in traces.environment.items():
            monkeypatch.setenv(name, value)

        def trace() -> None:
            with tracing.traced(traces.environment, "x"), tracing.begin(part, caller=None, attributes={"b": digits}):
                pass

        await asyncio.to_thread(trace)
        places = {"log": log, "metrics": generate_latest(registry), "traces": b"".join(traces.bodies)}

    assert hidden.found_in(places) == {(name, place) for name in ("a secret", CARD) for place in places}
    assert hidden.found_in({"log": log.replace(part.encode(), b"").replace(digits.encode(), b"")}) == set()
