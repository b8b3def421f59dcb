"""What a gateway writes about requests of every kind: a line each, of a closed list of events, and nothing to hide in it."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy.engine import make_url

from common.log import LogEvent
from tests.factories import KEY, Merchant, create_body, execute
from tests.stack import DEADLINE_SECONDS, eventually, free_port
from tests.wire import BALANCE, PAYOUTS, Gateway, plain_request, signed_headers, signed_request

pytestmark = pytest.mark.asyncio(loop_scope="module")

CARD = "4111111111111111"
WALLET = "01798761234"
# What the requests below carry, and nobody may find again.
FIELDS: dict[str, Any] = {
    "description": "wages-of-fear",
    "metadata": {"note": "metadata-of-mine"},
    "merchant_user_id": "user-of-mine",
    "merchant_user_ip": "203.0.113.77",
    "callback_url": "https://merchant.example.com/?token=token-in-a-url",
    "unknown": "field-nobody-knows",
}
PIN = {"pin": "pin-998877"}
PRIVATE = {
    *(CARD, "4111 1111 1111 1111", "411111", WALLET, "pin-998877", "broken-body-of-mine", KEY),
    *("wages-of-fear", "metadata-of-mine", "user-of-mine", "203.0.113.77", "token-in-a-url", "field-nobody-knows"),
}


@dataclass(frozen=True, slots=True)
class Heard:
    """What a gateway wrote, the secrets it had to do with, and how many requests it answered."""

    output: str
    secrets: set[str]
    answers: int

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The output, read as JSON lines."""
        return [json.loads(line) for line in self.output.splitlines()]


def readable(merchant: Merchant) -> list[bytes]:
    """Requests of every kind that HTTP allows, successes and failures."""
    ok = create_body(external_id="PAY-1", card_number=CARD, paymentData=PIN, **FIELDS)
    wallet = create_body(external_id="PAY-2", card_number=WALLET, **FIELDS)
    spaced = create_body(external_id="PAY-1", card_number="4111 1111 1111 1111", paymentData=PIN)
    broken = b'{"card_number": "%s", "x": "broken-body-of-mine", ' % CARD.encode()
    wrong = {"X-Signature": "v1=" + "5ec7e7" * 10 + "0000"}
    return [
        *(
            signed_request(merchant, "POST", PAYOUTS, body, formula=formula)
            for body in (ok, wallet, spaced)
            for formula in ("v1", "body")
        ),
        *(
            signed_request(merchant, "GET", f"{PAYOUTS}/{name}")
            for name in ("PAY-1", "PAY-2", CARD, f"{CARD}%00", f"%20{WALLET}")
        ),
        *(signed_request(merchant, "GET", f"{BALANCE}?shop_code={code}") for code in ("shop-001", CARD, f"{CARD}%ff")),
        signed_request(merchant, "POST", PAYOUTS, broken),
        signed_request(merchant, "POST", PAYOUTS, broken + b"\xff"),
        signed_request(merchant, "POST", PAYOUTS, broken.ljust(70_000)),
        signed_request(merchant, "POST", PAYOUTS, ok, content_type=f"text/{CARD}"),
        signed_request(merchant, "POST", PAYOUTS, ok, headers=wrong),
        signed_request(merchant, "POST", PAYOUTS, ok, headers={"X-API-Key": f"pk_{CARD}"}),
        signed_request(merchant, "POST", PAYOUTS, ok, headers={"X-Timestamp": CARD}),
        signed_request(merchant, "POST", PAYOUTS, ok, timestamp="1764928800"),
        signed_request(merchant, "POST", PAYOUTS, ok, headers={"X-Request-Id": f"not safe {CARD}"}),
        signed_request(
            merchant,
            "POST",
            PAYOUTS,
            create_body(amount=f"x{CARD}", card_number=CARD, callback_url=WALLET, currency=""),
        ),
        signed_request(merchant, "POST", PAYOUTS, create_body(card_number=f"{CARD}/{WALLET}", external_id=f"{CARD} ")),
        signed_request(merchant, "POST", PAYOUTS, create_body(currency=CARD, card_number=CARD)),
        signed_request(merchant, "POST", PAYOUTS, create_body(shop_code=CARD, card_number=CARD)),
        signed_request(merchant, "POST", PAYOUTS, create_body(external_id="PAY-1", amount="11.00", card_number=WALLET)),
        signed_request(merchant, "POST", PAYOUTS, create_body(amount="9999999999.00", card_number=CARD, **FIELDS)),
        plain_request("GET", f"/{CARD}".encode()),
        plain_request("PUT", f"{PAYOUTS}?card={CARD}".encode(), ok),
    ]


def unreadable(headers: dict[str, str]) -> list[bytes]:
    """What no HTTP parser accepts, with a signature and a card number where it breaks."""
    signature = headers["X-Signature"].encode()
    head = f"GET {BALANCE} HTTP/1.1\r\nHost: localhost\r\n".encode()
    return [
        head + b"X-Signature: %s\x00\r\n\r\n" % signature,
        head + b"X-Signature\x00: %s\r\n\r\n" % signature,
        head + b"X-Card: 1\r\n %s\r\n\r\n" % CARD.encode(),
        head + b"X-Card: %s\r\n\r\n" % (CARD.encode() * 600),
        head.replace(b"balance", f"balance?card={CARD}".encode() + b"\xff") + b"\r\n",
        f"POST {PAYOUTS} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{CARD}zz\r\n\r\n".encode(),
        create_body(card_number=CARD, paymentData=PIN) + b"\r\n\r\n",
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def heard(gateway: Gateway) -> AsyncIterator[Heard]:
    """A gateway that was asked everything, and then had a fault."""
    merchant, port = await gateway.merchant(), free_port()
    process = await gateway.stack.start("gateway", PORT=str(port))
    asked = Gateway(gateway.stack, port, gateway.owner)
    requests = readable(merchant)
    answers = [await asked.send(request) for request in requests]
    body = create_body(card_number=CARD, paymentData=PIN, **FIELDS)
    faults = [
        ("INSERT ON payout_due", signed_request(merchant, "POST", PAYOUTS, body)),
        ("SELECT ON shops", signed_request(merchant, "POST", PAYOUTS, create_body(card_number=CARD, shop_code=WALLET))),
        ("SELECT ON shops", signed_request(merchant, "GET", f"{BALANCE}?shop_code=a-{CARD}")),
        (
            "SELECT ON api_keys",
            signed_request(merchant, "GET", BALANCE, headers={"X-API-Key": f"sk_by_mistake_{CARD}"}),
        ),
    ]
    for right, request in faults:
        await execute(gateway.owner, f"REVOKE {right} FROM payouts_gateway")
        answers.append(await asked.send(request))
        await execute(gateway.owner, f"GRANT {right} TO payouts_gateway")
    assert [answer.status for answer in answers[-len(faults) :]] == [500] * len(faults)
    assert {answer.status for answer in answers} >= {200, 201, 401, 404, 405, 413, 415, 422, 500}
    sent = b"\r\n".join([*requests, *(request for _, request in faults)]).split(b"\r\n")
    signatures = {line[13:].decode() for line in sent if line.startswith(b"X-Signature: ")}
    headers = signed_headers(merchant, "GET", BALANCE)
    for data in unreadable(headers):
        await asked.send(data)
    async with asked.connect() as wire:
        await wire.send(signed_request(merchant, "POST", PAYOUTS, create_body(card_number=CARD, **FIELDS))[:-5])
        wire.abort()

    async def all_written() -> bool:
        written = process.output.count(f'"{LogEvent.REQUEST_ANSWERED}"')
        return written >= len(answers) + 1

    await eventually(all_written, "a line for every request", seconds=DEADLINE_SECONDS)
    await process.stop()
    password = make_url(gateway.stack.database_url).password
    secrets = {
        *signatures,
        *(text.removeprefix("v1=") for text in signatures),
        headers["X-Signature"],
        merchant.api_secret,
    }
    secrets |= {merchant.webhook_secret.removeprefix("whsec_"), *([str(password)] if password else [])}
    yield Heard(process.output, secrets, len(answers))


async def test_nothing_that_is_private_or_secret_is_ever_written(heard: Heard) -> None:
    assert heard.answers > 30
    assert [text for text in sorted(PRIVATE | heard.secrets) if text in heard.output] == []


async def test_every_line_is_json_about_an_event_of_the_closed_list(heard: Heard) -> None:
    assert {line["event"] for line in heard.lines} - set(LogEvent) == set()


async def test_every_request_that_was_answered_has_one_line_with_its_id_route_status_and_duration(heard: Heard) -> None:
    lines = [line for line in heard.lines if line["event"] == LogEvent.REQUEST_ANSWERED]
    assert len({line["request_id"] for line in lines}) == len(lines) >= heard.answers
    assert all({"method", "route", "status", "reason", "duration_ms"} <= line.keys() for line in lines)
    assert {line["route"] for line in lines} <= {"-", PAYOUTS, f"{PAYOUTS}/{{external_id}}", BALANCE}


async def test_a_client_that_hangs_up_is_no_crash_of_ours(heard: Heard) -> None:
    crashed = [line for line in heard.lines if line["event"] == LogEvent.REQUEST_CRASHED]
    assert {line["exception"][0]["exc_type"] for line in crashed} == {"ProgrammingError"}


async def test_a_fault_of_ours_is_written_with_what_broke(heard: Heard) -> None:
    faults = [line for line in heard.lines if line["event"] == LogEvent.ACCEPT_BATCH_FAILED]
    assert len(faults) == 1
    assert faults[0]["error"] == "ProgrammingError"
