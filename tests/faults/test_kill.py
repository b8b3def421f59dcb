"""Fault tests: processes are killed under load and started again, as a supervisor would; gateways are asked to leave.

Nothing a client was told may be untrue afterwards, no money may be lost or paid twice.
"""

import asyncio
import signal
from contextlib import AsyncExitStack

import pytest

from common.db.engine import Engine
from common.settings import Settings
from tests.conftest import MakeCluster
from tests.factories import add_funded_merchant, create_body, engine, fetch, settings
from tests.faults.endings import exit_code, leave
from tests.faults.load import Load, assert_told_truly
from tests.faults.locks import Superuser
from tests.faults.merchants import (
    account_locked,
    assert_invariants,
    count_lock_waiters,
    find_held,
    raw_request,
    sender,
)
from tests.faults.outcome import FUNDS, assert_rail_agrees, assert_stored_once, assert_whole
from tests.faults.patience import UNHURRIED
from tests.faults.receiver import receiver
from tests.stack import Process, Stack, eventually, stack

SHORT = {
    "PAYOUTS_RAIL_TIMEOUT_SECONDS": "0.5",
    "PAYOUTS_SETTLE_LEASE_SECONDS": "5.5",
    "PAYOUTS_CALLBACK_TIMEOUT_SECONDS": "1",
    "PAYOUTS_CALLBACK_LEASE_SECONDS": "6",
    "PAYOUTS_SANDBOX_SETTLE_SECONDS": "1",
    "PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS": "5",
}
KILLS_MIN, KILLS_MAX = 3, 10
ROLES = (("gateway",), ("gateway",), ("worker", "settle"), ("worker", "callbacks"), ("worker", "sweep"))


async def start_all(running: Stack) -> dict[str, Process]:
    """Two gateways and a worker of each role, by name."""
    processes = await asyncio.gather(*(running.start(*role) for role in ROLES))
    return dict(zip(("gateway 1", "gateway 2", "settle", "callbacks", "sweep"), processes, strict=True))


async def kill_and_restart(running: Stack, process: Process) -> None:
    """Kill -9, and what a supervisor does next."""
    await process.kill()
    await running.start(*process.name.split())


@pytest.mark.timeout(150)
async def test_whatever_is_killed_every_answered_payout_is_there_once_and_ends_as_the_rail_says(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(durable=True)
    url = cluster.url("payouts")
    async with AsyncExitStack() as resources:
        owner = engine(url)
        resources.push_async_callback(owner.dispose)
        merchants = [await add_funded_merchant(owner, settings(url), funds=FUNDS) for _ in range(3)]
        endpoint = await resources.enter_async_context(receiver())
        running = await resources.enter_async_context(stack(url, **SHORT))
        processes = await start_all(running)
        load = Load(running.base_url, merchants, callback_url=endpoint.url, clients=8)
        load.start()
        await load.progress(100)
        for name in ("gateway 1", "settle", "callbacks", "sweep"):
            await kill_and_restart(running, processes[name])
            await load.progress(50)
        await asyncio.to_thread(cluster.kill)
        await asyncio.to_thread(cluster.start)
        await load.progress(100)
        await load.stop()
        statuses = load.statuses()
        # A gateway may be killed between two answers; that the database was away is felt by somebody.
        assert statuses[None] + statuses[503] >= 1, statuses
        # The test's own connections went with the server.
        await owner.dispose()

        await assert_whole(owner, merchants, load.sent, endpoint)


async def test_two_workers_of_each_role_settle_and_tell_everything_once(
    database_url: str, owner: Engine, config: Settings
) -> None:
    async with receiver() as endpoint, stack(database_url, **UNHURRIED) as running:
        merchant = await add_funded_merchant(owner, config, webhook_url=endpoint.url)
        await running.start("gateway")
        async with sender(running.base_url, merchant) as send:
            answers = await asyncio.gather(*(send.create(create_body(amount="1.00")) for _ in range(400)))
        assert {answer.status for answer in answers} == {201}
        await asyncio.gather(*(running.start("worker", role) for role in ("settle", "callbacks") * 2))

        async def done() -> bool:
            (row,) = await fetch(owner, "SELECT count(*) AS n FROM callbacks WHERE state = 'delivered'")
            return bool(row.n == 400)

        await eventually(done, "everything is settled and told")
        # Told once each: nobody was killed, so nothing is repeated.
        assert len(endpoint.deliveries) == len({delivery.webhook_id for delivery in endpoint.deliveries}) == 400
    (row,) = await fetch(owner, "SELECT count(*) AS n, max(submits) AS most FROM sandbox.payments WHERE state = 'paid'")
    assert (row.n, row.most) == (400, 1)
    (row,) = await fetch(owner, "SELECT count(*) AS n FROM payout_attempts")
    assert row.n == 400
    await assert_rail_agrees(owner)
    await assert_invariants(owner)


async def test_gateways_that_are_killed_again_and_again_leave_whole_payouts(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchants = [await add_funded_merchant(owner, config) for _ in range(2)]
    async with stack(database_url) as running:
        gateways = list(await asyncio.gather(running.start("gateway"), running.start("gateway")))
        load = Load(running.base_url, merchants, callback_url="http://127.0.0.1:9/", clients=8)
        load.start()
        kills = 0
        # A gateway may be killed between two answers; then another is, until somebody has felt it.
        while kills < KILLS_MIN or (kills < KILLS_MAX and not load.statuses()[None]):
            await load.progress(60)
            await gateways.pop(0).kill()
            gateways.append(await running.start("gateway"))
            kills += 1
        await load.stop()
        assert load.statuses()[None] >= 1
    for sent in load.sent:
        assert_told_truly(sent)
    rows = await fetch(owner, "SELECT * FROM payouts")
    await assert_stored_once(owner, load.sent, {(row.shop_id, row.external_id): row for row in rows})
    for merchant in merchants:
        mine = sum(row.amount_minor for row in rows if row.shop_id == merchant.shop.id)
        assert await find_held(owner, merchant.shop.id) == mine
    await assert_invariants(owner)


# Gateways that are asked to leave.


async def test_one_sigterm_lets_a_gateway_answer_everything_it_had_begun(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with stack(database_url, **UNHURRIED) as running, sender(running.base_url, merchant) as send:
        gateway = await running.start("gateway")
        async with account_locked(owner, merchant.shop.id):
            waiting = [asyncio.create_task(send.create(create_body())) for _ in range(50)]

            async def waits() -> bool:
                return await count_lock_waiters(superuser, "payouts-gateway") >= 1

            await eventually(waits, "creates wait for the account")
            await leave(gateway)
        assert {answer.status for answer in await asyncio.gather(*waiting)} == {201}
        assert await exit_code(gateway) == 0
    assert await find_held(owner, merchant.shop.id) == 50 * 1000
    await assert_invariants(owner)


async def test_a_request_that_is_half_received_at_sigterm_is_never_refused_for_that(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with stack(database_url, PAYOUTS_BODY_TIMEOUT_SECONDS="8") as running:
        gateway = await running.start("gateway")
        body = create_body()
        half = len(body) // 2
        async with raw_request(running.base_url, merchant, body, send_bytes=half) as (reader, writer):
            await leave(gateway)
            writer.write(body[half:])
            answered = await reader.readline()
            # Either it is still taken, or the merchant is told to repeat it; a 4xx would tell them to give up.
            assert answered.split()[1:2] in ([b"201"], [b"503"], []), answered
        assert await exit_code(gateway) == 0


async def test_a_gateway_that_leaves_under_load_accepts_nothing_that_it_does_not_answer(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchants = [await add_funded_merchant(owner, config) for _ in range(2)]
    async with stack(database_url, **UNHURRIED) as running:
        gateways = list(await asyncio.gather(running.start("gateway"), running.start("gateway")))
        load = Load(running.base_url, merchants, callback_url="http://127.0.0.1:9/", clients=12)
        load.start()
        for _ in range(2):
            await load.progress(80)
            leaving = gateways.pop(0)
            assert await leaving.stop() == 0
            gateways.append(await running.start("gateway"))
        await load.progress(50)
        await load.stop()
    # A repeat that finds its payout would mean that somebody had accepted it and gone without an answer.
    assert [sent for sent in load.sent if sent.last.status != 201] == []
    assert load.statuses()[503] == 0
    rows = await fetch(owner, "SELECT * FROM payouts")
    await assert_stored_once(owner, load.sent, {(row.shop_id, row.external_id): row for row in rows})
    await assert_invariants(owner)


async def test_a_second_sigterm_ends_a_gateway_at_once(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with stack(database_url, **UNHURRIED) as running:
        gateway = await running.start("gateway")
        body = create_body()
        async with (
            account_locked(owner, merchant.shop.id),
            raw_request(running.base_url, merchant, body, send_bytes=len(body)) as (reader, _),
        ):

            async def waits() -> bool:
                return await count_lock_waiters(superuser, "payouts-gateway") == 1

            await eventually(waits, "the create waits for the account")
            await leave(gateway)
            gateway.send(signal.SIGTERM)
            assert await exit_code(gateway) == -signal.SIGTERM
            assert await reader.read() == b""
        await running.start("gateway")
        async with sender(running.base_url, merchant) as send:
            assert (await send.create(body)).status in (200, 201)
    assert await find_held(owner, merchant.shop.id) == 1000
    await assert_invariants(owner)
