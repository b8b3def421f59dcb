"""What a gateway writes about requests of every kind: a line each, of a closed list of events, and nothing to hide in it."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy.engine import make_url

from common.log import LogEvent
from ops.ports import choose_port
from tests.factories import create_body, execute
from tests.private import CARD, FIELDS, PIN, PRIVATE, WALLET, readable, unreadable
from tests.stack import DEADLINE_SECONDS, eventually
from tests.wire import BALANCE, PAYOUTS, Gateway, signed_headers, signed_request

pytestmark = pytest.mark.asyncio(loop_scope="module")

FIELDS_OF_A_LINE = frozenset(
    {
        *("event", "level", "timestamp", "process", "method", "route", "status", "code", "reason", "duration_ms"),
        *("request_id", "merchant_id", "shop_id", "payout_id", "payin_id", "rail", "trace_id"),
    }
)


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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def heard(gateway: Gateway) -> AsyncIterator[Heard]:
    """A gateway that was asked everything, and then had a fault."""
    merchant, port = await gateway.merchant(), choose_port()
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
    assert {frozenset(line) for line in lines} == {FIELDS_OF_A_LINE}, "known or not, every field is on every line"
    assert all((line["code"] is None) is (line["status"] < 400) for line in lines)
    created = [line for line in lines if line["status"] == 201]
    assert created
    assert all(line["payout_id"].startswith("po_") and line["shop_id"] and line["merchant_id"] for line in created)
    assert {line["merchant_id"] for line in lines if line["code"] == "unauthorized"} == {None}
    assert {line["route"] for line in lines} <= {"-", PAYOUTS, f"{PAYOUTS}/{{external_id}}", BALANCE}


async def test_a_client_that_hangs_up_is_no_crash_of_ours(heard: Heard) -> None:
    crashed = [line for line in heard.lines if line["event"] == LogEvent.REQUEST_CRASHED]
    assert {line["exception"][0]["exc_type"] for line in crashed} == {"ProgrammingError"}


async def test_a_fault_of_ours_is_written_with_what_broke(heard: Heard) -> None:
    faults = [line for line in heard.lines if line["event"] == LogEvent.ACCEPT_BATCH_FAILED]
    assert len(faults) == 1
    assert faults[0]["error"] == "ProgrammingError"
