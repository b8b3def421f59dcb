"""What the admin ports tell: everything that operators must see, and no label that anybody from outside could make grow."""

import asyncio
from typing import Final

import aiohttp
import asyncpg
import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from common.errors import Transient
from migrations.run import newest_revision
from ops.onboarding import add_http_rail
from tests.broker import Broker
from tests.endpoint import endpoint
from tests.factories import ACTOR, add_funded_merchant, engine
from tests.stack import Process, Stack, client, eventually, stack
from worker.sweep import OLDEST_TRANSACTION, Sweeper

LABELS: Final = {
    *("method", "route", "status"),
    *("rail", "action", "outcome"),
    *("work", "link", "rule", "table", "version", "schema", "le"),
}
# By process: name and labels of a sample, and the least that it must be after one payout.
TOLD: Final = {
    "gateway": [
        ("payouts_request_seconds_count", {"method": "POST", "route": "/api/v1/payouts", "status": "201"}, 1),
        ("payouts_messages_published_total", {"work": "settle", "outcome": "confirmed"}, 1),
        ("payouts_messages_unconfirmed", {}, 0),
        ("payouts_broker_connected", {"link": "publish"}, 1),
        ("payouts_build_info", {"version": "0.1.0", "schema": newest_revision()}, 1),
    ],
    "worker all": [
        ("payouts_rail_call_seconds_count", {"rail": "sandbox", "action": "submit", "outcome": "paid"}, 1),
        ("payouts_settled_seconds_count", {"outcome": "success"}, 1),
        ("payouts_callback_attempt_seconds_count", {"outcome": "delivered"}, 1),
        ("payouts_callback_delivered_seconds_count", {}, 1),
        ("payouts_oldest_due_payout_age_seconds", {}, 0),
        ("payouts_oldest_verifying_age_seconds", {}, 0),
        ("payouts_oldest_due_callback_age_seconds", {}, 0),
        ("payouts_verifying", {}, 0),
        ("payouts_open_discrepancies", {}, 0),
        ("payouts_open_resolutions", {}, 0),
        ("payouts_messages_unconfirmed", {}, 0),
        ("payouts_messages_parked", {}, 0),
        ("payouts_callback_lanes_held", {}, 0),
        ("payouts_callback_lanes_failing", {}, 0),
        ("payouts_rail_breaker_open", {"rail": "bank"}, 0),
        ("payouts_invariant_offenders", {"rule": "entries_chain"}, 0),
        ("payouts_invariant_checked_pass_age_seconds", {"table": "payouts"}, 0),
        ("payouts_database_connections", {}, 1),
        ("payouts_database_connections_max", {}, 1),
        ("payouts_database_oldest_transaction_age_seconds", {}, 0),
        ("payouts_build_info", {"version": "0.1.0", "schema": newest_revision()}, 1),
    ],
}

# What one role has seen of the whole, and alarms and scaling look at.
SWEPT: Final = (
    *("payouts_oldest_due_payout_age_seconds", "payouts_oldest_due_callback_age_seconds"),
    *("payouts_verifying", "payouts_oldest_verifying_age_seconds"),
    *("payouts_open_discrepancies", "payouts_open_resolutions"),
    *("payouts_database_connections", "payouts_database_connections_max"),
    "payouts_database_oldest_transaction_age_seconds",
)

Sample = tuple[str, frozenset[tuple[str, str]]]


async def told_by(process: Process) -> dict[Sample, float]:
    """The samples of ours at an admin port."""
    url = f"http://127.0.0.1:{process.admin_port}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        families = text_string_to_metric_families(await response.text())
        samples = [sample for family in families for sample in family.samples]
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for sample in samples
        if sample.name.startswith("payouts_")
    }


async def wait_until_told(process: Process) -> dict[Sample, float]:
    """All that it tells, once everything that it must tell is among it; NaN is nothing."""
    told: dict[Sample, float] = {}

    async def all_told() -> bool:
        told.update(await told_by(process))
        wanted = [(name, frozenset(labels.items()), least) for name, labels, least in TOLD[process.name]]
        missing[:] = [name for name, labels, least in wanted if not told.get((name, labels), -1) >= least]
        return not missing

    missing: list[str] = []
    try:
        await eventually(all_told, "everything is told")
    except AssertionError:
        pytest.fail(f"{process.name} does not tell: {missing}")
    return told


async def run_one_payout(running: Stack) -> None:
    """From its create to its callback; and requests of a stranger, who makes names up."""
    owner = engine(running.database_url)
    merchant = await add_funded_merchant(owner, running.settings)
    await owner.dispose()
    async with endpoint() as receiving, client(running.base_url, merchant) as http:
        status, _ = await http.create(callback_url=f"http://127.0.0.1:{receiving.port}/told")
        assert status == 201
        for method, path in (("BREW", "/api/v1/payouts"), ("GET", "/made-up-1"), ("GET", "/api/v1/payouts/made-up-2")):
            await http.request(method, path)

        async def received() -> bool:
            return bool(receiving.received)

        await eventually(received, "the callback comes")


async def test_the_admin_ports_tell_all_that_operators_must_see(
    database_url: str, broker: Broker, amqp_prefix: str
) -> None:
    amqp = {"AMQP_URL": broker.url, "PAYOUTS_AMQP_QUEUE_PREFIX": amqp_prefix}
    async with stack(database_url, **amqp, PAYOUTS_CALLBACK_PORTS="") as running:
        owner = engine(database_url)
        await add_http_rail(
            owner,
            running.settings.keyring,
            name="bank",
            base_url="http://127.0.0.1:9",
            authoritative=True,
            actor=ACTOR,
        )
        await owner.dispose()
        processes = await asyncio.gather(running.start("gateway"), running.start("worker", "all"))

        async def connected() -> bool:
            told = await told_by(processes[0])
            return told["payouts_broker_connected", frozenset({("link", "publish")})] == 1

        await eventually(connected, "the gateway can publish")
        await run_one_payout(running)
        told = [await wait_until_told(process) for process in processes]

    labels = {label for samples in told for _, labels in samples for label in labels}
    assert {name for name, _ in labels} <= LABELS
    assert not [label for label in labels if "made-up" in label[1] or label[1] == "BREW"]


async def test_a_transaction_that_stays_open_is_seen_and_one_that_only_reads_is_not(database_url: str) -> None:
    worker = engine(database_url, role="payouts_worker")
    sweeper = Sweeper(worker)

    async def seen() -> bool:
        await sweeper.run_round()
        return bool(OLDEST_TRANSACTION._value.get() > 0)

    async def not_seen() -> bool:
        return not await seen()

    connection = await asyncpg.connect(database_url)
    async with connection.transaction():
        await connection.fetch("SELECT count(*) FROM payouts")
        await eventually(not_seen, "nothing writes")
        await connection.execute("SELECT pg_current_xact_id()")
        await eventually(seen, "the one that writes is seen")
    await eventually(not_seen, "it is over")
    await connection.close()
    await worker.dispose()


async def test_what_a_sweep_could_not_look_at_is_not_known_any_more(database_url: str) -> None:
    """A value that stays as it was would tell alarms that all is well."""
    worker = engine(database_url, role="payouts_worker")
    impatient = engine(database_url, role="payouts_worker", PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS="0.5")
    sweeper = Sweeper(worker)

    def known() -> set[str]:
        return {name for name in SWEPT if (REGISTRY.get_sample_value(name) or 0.0) >= 0}

    await sweeper.run_round()
    assert known() == set(SWEPT)

    connection = await asyncpg.connect(database_url)
    async with connection.transaction():
        await connection.execute("LOCK TABLE callback_lanes IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(Transient):
            await Sweeper(impatient).run_round()
        assert known() == set()
    await impatient.dispose()
    await connection.close()

    await sweeper.run_round()
    assert known() == set(SWEPT)
    await worker.dispose()
