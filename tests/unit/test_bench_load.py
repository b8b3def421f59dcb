"""The load generator, and how its answers are laid beside what is stored."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.answers import Answers, Row, count_differing
from bench.load import UNANSWERED, Load, Plan, Sender, draw_times, render_request
from common.domain.signing import sign_v1
from gateway.schemas import parse_create_payout
from ops.ports import LOOPBACK

_SENDER = Sender("pk_one", "sk_one", "http://127.0.0.1:9/callbacks")
_PATH = "/api/v1/payouts"


def _plan(**changes: Any) -> Plan:
    usual: dict[str, Any] = {
        "port": 1,
        "path": _PATH,
        "prefix": "load-",
        "senders": [_SENDER],
        "connections": 4,
        "seconds": 0.2,
        "warm_seconds": 0.0,
    }
    return Plan(**{**usual, **changes})


def _answers(**changes: Any) -> Answers:
    usual: dict[str, Any] = {
        "plan": _plan(),
        "began": 100.0,
        "ended": 110.0,
        "cpu_share": 0.1,
        "rendered_late": 0,
        "connections_lost": 0,
        "senders": [0, 0],
        "amounts": [100, 200],
        "intended": [101.0, 102.0],
        "sent": [101.0, 102.0],
        "done": [101.5, 102.25],
        "statuses": [201, 201],
        "ids": ["po_a", "po_b"],
    }
    return Answers(**{**usual, **changes})


def test_a_request_is_one_that_the_gateway_takes_and_its_signature_holds() -> None:
    head, _, body = render_request(_plan(), 7, _SENDER, 1205, 1_790_000_000).partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    assert headers["X-Signature"] == sign_v1("sk_one", headers["X-Timestamp"], "POST", _PATH, "", body)
    assert int(headers["Content-Length"]) == len(body)
    create = parse_create_payout(body, private_callbacks=True)
    assert (create.external_id, create.amount, create.currency) == ("load-7", "12.05", "BDT")
    assert json.loads(body)["callback_url"] == _SENDER.callback_url


def test_times_of_an_open_loop_are_the_same_for_a_seed_and_as_many_as_the_rate_says() -> None:
    times = draw_times(1000.0, 20.0, seed=3)
    assert times == draw_times(1000.0, 20.0, seed=3) == sorted(times)
    assert 19_000 < len(times) < 21_000


async def _read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
    return await reader.readexactly(int(length.split(b":")[1]))


def _render(status: int, external_id: str) -> bytes:
    body = json.dumps({"id": f"po_{external_id}"}, separators=(",", ":")).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@asynccontextmanager
async def _server(answer: Callable[[str], bytes | None]) -> AsyncIterator[tuple[int, list[str]]]:
    """A server that answers what it is told to by `external_id`, in two pieces; with None it hangs up."""
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                external_id = json.loads(await _read_request(reader))["external_id"]
                seen.append(external_id)
                data = answer(external_id)
                if data is None:
                    break
                writer.write(data[:20])
                await writer.drain()
                writer.write(data[20:])
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, LOOPBACK, 0)
    async with server:
        yield server.sockets[0].getsockname()[1], seen


@pytest.mark.parametrize("rate", [None, 300.0])
async def test_everything_is_sent_once_and_every_answer_stands_under_its_number(rate: float | None) -> None:
    async with _server(lambda external_id: _render(201, external_id)) as (port, seen):
        plan = _plan(port=port, rate=rate)
        answers = Answers(plan, **await Load(plan).run())
    count = len(answers.statuses)
    assert count > 4
    assert sorted(seen) == sorted(f"load-{number}" for number in range(count))
    assert answers.ids == [f"po_load-{number}" for number in range(count)]
    assert answers.failed == 0
    assert all(a <= b <= c for a, b, c in zip(answers.intended, answers.sent, answers.done, strict=True))


async def test_what_a_connection_took_along_stays_unanswered_and_the_load_goes_on() -> None:
    async with _server(lambda x: None if x == "load-2" else _render(201, x)) as (port, seen):
        plan = _plan(port=port, rate=300.0)
        found = await Load(plan).run()
    assert found["connections_lost"] == 1
    assert found["statuses"][2] == UNANSWERED
    assert found["statuses"].count(201) == len(found["statuses"]) - 1
    assert seen.count("load-2") == 1


def test_latencies_count_from_the_time_that_was_meant_and_what_failed_took_until_the_end() -> None:
    answers = _answers(sent=[101.4, 102.0], statuses=[201, 503])
    assert answers.latencies_ms() == pytest.approx([500.0, 8000.0])
    assert answers.failed == 1


def test_the_rate_counts_what_was_created_between_the_warming_up_and_the_end() -> None:
    assert _answers(done=[99.0, 105.0]).rate == pytest.approx(0.1)
    assert _answers(statuses=[200, 201]).rate == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("statuses", "stored", "differing"),
    [
        ([201, 201], {"load-0": Row("po_a", 100), "load-1": Row("po_b", 200)}, 0),
        ([201, 201], {"load-0": Row("po_a", 100)}, 1),
        ([201, 201], {"load-0": Row("po_x", 100), "load-1": Row("po_b", 201)}, 2),
        ([201, 422], {"load-0": Row("po_a", 100), "load-1": Row("po_b", 200)}, 1),
        ([201, UNANSWERED], {"load-0": Row("po_a", 100), "load-1": Row("po_z", 200)}, 0),
        ([201, 503], {"load-0": Row("po_a", 100)}, 0),
        ([201, 503], {"load-0": Row("po_a", 100), "load-1": Row("po_z", 1)}, 1),
        ([201, 201], {"load-0": Row("po_a", 100), "load-1": Row("po_b", 200), "load-2": Row("po_c", 1)}, 1),
    ],
)
def test_answers_and_payouts_must_bear_each_other_out(
    statuses: list[int], stored: dict[str, Row], differing: int
) -> None:
    assert count_differing(_answers(statuses=statuses), stored) == differing


def test_a_plan_survives_its_file_and_shows_no_secret(tmp_path: Path) -> None:
    plan = _plan(rate=5.0, zipf=1.0)
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan
    assert "sk_one" not in repr(plan)
