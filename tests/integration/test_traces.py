"""Traces: one payout is followed from its request through PostgreSQL and RabbitMQ to its callback."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id

from common import tracing
from common.messaging.codec import WorkMessage
from common.messaging.topology import Work
from common.opentelemetry import OpenTelemetryTracer
from common.tracing import Kind
from tests.broker import Broker
from tests.collector import Collector, collector
from tests.endpoint import endpoint
from tests.factories import Merchant, add_funded_merchant, create_body, engine, fetch
from tests.flows import Desk
from tests.stack import ROOT, Process, Stack, client, eventually, stack

GATEWAY, SETTLE, CALLBACKS = "payouts-gateway", "payouts-worker-settle", "payouts-worker-callbacks"
CREATE: Final = "POST /api/v1/payouts"
STRANGER: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
async def collecting() -> AsyncIterator[Collector]:
    async with collector() as running:
        yield running


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What this process traces, as soon as it has ended."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", OpenTelemetryTracer(provider, exporter))
    return exporter


def lines_of(process: Process, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in process.output.splitlines()]
    return [line for line in lines if line["event"] == event]


async def a_merchant(running: Stack, url: str) -> Merchant:
    owner = engine(running.database_url)
    try:
        return await add_funded_merchant(owner, running.settings, webhook_url=url)
    finally:
        await owner.dispose()


async def traceparents(running: Stack) -> list[str | None]:
    owner = engine(running.database_url)
    try:
        return [row.traceparent for row in await fetch(owner, "SELECT traceparent FROM payouts ORDER BY created_at")]
    finally:
        await owner.dispose()


async def test_one_trace_goes_from_the_request_through_database_and_broker_to_the_callback(
    collecting: Collector, database_url: str, broker: Broker, amqp_prefix: str
) -> None:
    await follow_one(collecting, database_url, AMQP_URL=broker.url, PAYOUTS_AMQP_QUEUE_PREFIX=amqp_prefix)


async def test_one_trace_goes_from_the_request_through_the_database_alone_to_the_callback(
    collecting: Collector, database_url: str
) -> None:
    await follow_one(collecting, database_url)


async def follow_one(collecting: Collector, database_url: str, **variables: str) -> None:
    """A payout through processes of their own, and what they exported of it."""
    variables |= collecting.environment
    messages = 1 if "AMQP_URL" in variables else 0
    async with stack(database_url, **variables) as running, endpoint() as receiver:
        merchant = await a_merchant(running, receiver.url)
        gateway = await running.start("gateway")
        settle = await running.start("worker", "settle")
        callbacks = await running.start("worker", "callbacks")
        if messages:
            await until_connected(gateway, settle, callbacks)
        body = create_body()
        headers = merchant.headers("POST", "/api/v1/payouts", body) | {"traceparent": STRANGER}
        async with client(running.base_url, merchant) as sender:
            status, created = await sender.request("POST", "/api/v1/payouts", body=body, headers=headers)
        assert status == 201
        await collecting.until(lambda spans: {span.service for span in spans} == {GATEWAY, SETTLE, CALLBACKS})
        for process in (gateway, settle, callbacks):
            assert await process.stop() == 0

        (accepted,), (settled,), (called,) = (
            collecting.find(*wanted) for wanted in ((GATEWAY, CREATE), (SETTLE, "settle"), (CALLBACKS, "callback"))
        )
        (rail,), (recorded,) = collecting.find(SETTLE, "submit sandbox"), collecting.find(SETTLE, "record")
        assert {span.trace_id for span in collecting.spans} == {accepted.trace_id}
        assert [span.parent_id for span in (accepted, settled, called)] == ["", accepted.span_id, accepted.span_id]
        assert {rail.parent_id, recorded.parent_id} == {settled.span_id}
        assert [span.kind for span in (accepted, settled, rail, called)] == [2, 5, 3, 3], "server, consumer, clients"
        assert accepted.links == [tuple(STRANGER.split("-")[1:3])]
        assert [span.attributes["payouts.payout_id"] for span in (accepted, settled)] == [created["id"]] * 2
        assert accepted.attributes["http.response.status_code"] == 201
        assert not any(span.failed for span in collecting.spans)
        received = [*collecting.find(SETTLE, "receive payouts"), *collecting.find(CALLBACKS, "receive callbacks")]
        assert [span.parent_id for span in received] == [accepted.span_id] * 2 * messages
        assert settled.links + called.links == [(span.trace_id, span.span_id) for span in received]

        (told,) = receiver.received
        assert not [line for line in told.lines if "trace" in line.lower()], "merchants are not told of our traces"
        for process, event in (
            (gateway, "request.answered"),
            (settle, "payout.attempted"),
            (callbacks, "callback.attempted"),
        ):
            ours = [line for line in lines_of(process, event) if line["payout_id"] == created["id"]]
            assert [line["trace_id"] for line in ours] == [accepted.trace_id]


async def until_connected(*processes: Process) -> None:
    """Once all of their links to the broker stand."""

    async def connected() -> bool:
        states = [process.output.count('"broker.connected"') for process in processes]
        return states[0] >= 1 and all(count >= 2 for count in states[1:])

    await eventually(connected, "everybody is connected to the broker")


@pytest.mark.parametrize(
    ("variables", "sampled"),
    [
        ({}, True),
        ({"OTEL_TRACES_SAMPLER_ARG": "0"}, False),
        ({"OTEL_TRACES_SAMPLER_ARG": "1"}, True),
        ({"OTEL_TRACES_SAMPLER": "always_off", "OTEL_TRACES_SAMPLER_ARG": "1"}, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, False),
    ],
)
async def test_the_request_decides_what_is_sampled_and_a_stranger_does_not(
    collecting: Collector, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sampled: bool
) -> None:
    environ = variables | collecting.environment
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    def trace() -> bool:
        """Beside the collector: what is left is exported at the end."""
        with (
            tracing.traced(environ, "gateway"),
            tracing.begin("request", caller=STRANGER) as span,
            tracing.follow("settle", Kind.CONSUMER, span.traceparent) as followed,
            followed.child("submit"),
        ):
            return span.traceparent is not None

    assert await asyncio.to_thread(trace) is sampled
    assert len(collecting.spans) == (3 if sampled else 0)


def test_a_collector_that_is_away_keeps_no_process_from_ending_and_the_log_counts_what_is_lost() -> None:
    code = """
import os
from time import monotonic
from common.log import configure_logging
from common.tracing import begin, traced
configure_logging("json", process="gateway")
with traced(os.environ, "gateway"):
    with begin("request", caller=None):
        pass
    began = monotonic()
assert monotonic() - began < 5
"""
    (line,) = run_python(code, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9").splitlines()
    said = json.loads(line)
    assert (said["event"], said["count"], said["process"]) == ("spans.lost", 1, "gateway")


async def test_each_of_a_batch_keeps_its_own_trace_and_points_at_what_brought_it(
    floor: Desk, spans: InMemorySpanExporter
) -> None:
    merchant = await floor.merchant()
    contexts = []
    for number in range(3):
        with tracing.begin(f"request {number}", caller=None) as span:
            contexts.append(span.traceparent)
    ids = [await floor.create(merchant, traceparent=context) for context in [*contexts, None]]
    spans.clear()
    settler = floor.settler()

    known = tuple(context for context in contexts if context is not None)
    await settler.claim_messages([WorkMessage(Work.SETTLE, tuple(ids), known)])
    await settler.drain(10)

    ended = spans.get_finished_spans()
    (received,) = [span for span in ended if span.name == "receive payouts"]
    settled = [span for span in ended if span.name == "settle"]
    assert received.context is not None
    assert received.parent is not None
    assert len(settled) == 3, "the fourth is not traced"
    assert {written(span.parent) for span in settled} == set(known)
    assert [[written(link.context) for link in span.links] for span in settled] == [[written(received.context)]] * 3
    assert [written(received.parent), *(written(link.context) for link in received.links)] == list(known)


def written(context: Any) -> str:
    return f"00-{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}-{context.trace_flags:02x}"


async def test_an_error_is_named_by_its_kind_and_never_quoted(spans: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match="4111"), tracing.begin("request", caller=None):
        raise ValueError("4111111111111111")

    (span,) = spans.get_finished_spans()
    assert span.attributes == {"error.type": "ValueError"}
    assert (span.status.is_ok, span.status.description, span.events) == (False, None, ())


@pytest.mark.parametrize("nonsense", ["", "00-1-2-3", "x" * 55, "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_a_context_that_is_nonsense_leads_nowhere(spans: InMemorySpanExporter, nonsense: str) -> None:
    with tracing.follow("settle", Kind.CONSUMER, nonsense), tracing.receive("payouts", [nonsense]):
        pass
    with tracing.begin("request", caller=nonsense):
        pass
    (span,) = spans.get_finished_spans()
    assert (span.name, list(span.links)) == ("request", [])


def run_python(code: str, **variables: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_that_is_not_asked_to_trace_never_loads_the_library() -> None:
    code = """
import sys
import gateway.__main__, worker.__main__
from common.tracing import NO_SPAN, begin, traced
endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
for environ in ({}, endpoint | {"OTEL_SDK_DISABLED": "true"}, endpoint | {"OTEL_TRACES_EXPORTER": "none"}):
    with traced(environ, "gateway"):
        assert begin("request", caller=None) is NO_SPAN
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    assert run_python(code) == "[]\n"


def test_without_the_extra_the_log_says_so_and_everything_works(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
from common.log import configure_logging
from common.tracing import NO_SPAN, begin, traced
configure_logging("json", process="gateway")
with traced(os.environ, "gateway"):
    assert begin("request", caller=None) is NO_SPAN
"""
    (tmp_path / "opentelemetry.py").write_text("raise ImportError('it is not installed')")
    (line,) = run_python(code, OTEL_TRACES_EXPORTER="otlp").splitlines()
    assert json.loads(line)["event"] == "tracing.missing"
