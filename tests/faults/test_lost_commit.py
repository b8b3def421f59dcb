"""Fault tests: COMMIT's answer is lost, the database is out of reach, the caller hangs up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from common.db.engine import Engine
from common.settings import Settings
from tests.factories import Merchant, add_funded_merchant, create_body, fetch
from tests.faults.locks import Superuser
from tests.faults.merchants import (
    Answer,
    Sender,
    Stored,
    account_locked,
    assert_invariants,
    count_lock_waiters,
    external_id_of,
    find_held,
    find_stored,
    raw_request,
    sender,
)
from tests.faults.patience import UNHURRIED
from tests.faults.proxy import CommitFault, Proxy, proxy
from tests.stack import Process, eventually, stack

GATEWAY = "payouts-gateway"
# Whatever is answered sooner has not waited.
PATIENT = {"PAYOUTS_DATABASE_CONNECT_TIMEOUT_SECONDS": "40", **UNHURRIED}


@asynccontextmanager
async def gateway_behind_proxy(
    database_url: str, merchant: Merchant, **overrides: str
) -> AsyncIterator[tuple[Proxy, Sender, Process]]:
    """A gateway whose only way to the database is the proxy, and a merchant who has been served once."""
    async with proxy(database_url) as network, stack(network.url, **overrides) as running:
        process = await running.start("gateway")
        async with sender(running.base_url, merchant) as send:

            async def served() -> bool:
                answer = await send.request("GET", "/api/v1/balance")
                if answer.status != 200:
                    answer.assert_unavailable()
                return answer.status == 200

            # Its first statements take long, on connections that are new, and may be given up.
            await eventually(served, "the merchant is served")
            yield network, send, process


async def create_until_answered(send: Sender, body: bytes, *before: Answer) -> list[Answer]:
    """Send a create, and repeat it while the answer is 503; all the answers, with those that came before."""
    answers = list(before)

    async def answered() -> bool:
        answers.append(await send.create(body))
        if answers[-1].status == 503:
            answers[-1].assert_unavailable()
        return answers[-1].status != 503

    await eventually(answered, "an answer other than 503")
    assert answers[-1].status == 201 or (len(answers) > 1 and answers[-1].status == 200), answers
    return answers


async def create_until_failed(send: Sender, network: Proxy, **fields: str) -> tuple[bytes, Answer]:
    """The create whose COMMIT the network was told to fail, and its answer; one that never came so far is left behind."""
    while True:
        body = create_body(**fields)
        answer = await send.create(body)
        answer.assert_unavailable()
        if network.faults_done:
            return body, answer


@pytest.mark.parametrize("fault", [CommitFault.LOSE_ANSWER, CommitFault.LOSE_COMMIT])
@pytest.mark.parametrize("times", [1, 5])
async def test_a_create_counts_once_though_the_connection_breaks_at_commit(
    database_url: str, owner: Engine, config: Settings, fault: CommitFault, times: int
) -> None:
    merchant = await add_funded_merchant(owner, config, funds="100.00")
    async with gateway_behind_proxy(database_url, merchant) as (network, send, _):
        network.fail_commits(fault, count=times)
        body = create_body(amount="30.00")
        answers = await create_until_answered(send, body)
        network.stop_failing()
        again = await send.create(body)
        assert (again.status, again.headers.get("Idempotent-Replayed")) == (200, "true")
        assert again.body["id"] == answers[-1].body["id"]
        balance = (await send.request("GET", "/api/v1/balance")).body
        assert network.faults_done >= 1
        if fault is CommitFault.LOSE_ANSWER:
            # The first look under the lock tells that it happened.
            assert [answer.status for answer in answers] == [201]
    assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 3000)
    assert (balance["available"], balance["pending"]) == ("70.00", "30.00")
    await assert_invariants(owner)


@pytest.mark.parametrize("fault", [CommitFault.LOSE_ANSWER, CommitFault.LOSE_COMMIT])
async def test_a_whole_batch_counts_once_though_the_connection_breaks_at_commit(
    database_url: str, owner: Engine, config: Settings, fault: CommitFault
) -> None:
    merchant = await add_funded_merchant(owner, config, funds="100.00")
    async with gateway_behind_proxy(database_url, merchant) as (network, send, _):
        network.fail_commits(fault, count=3)
        bodies = [create_body(amount="1.00") for _ in range(60)]
        last = [answers[-1] for answers in await asyncio.gather(*(create_until_answered(send, b) for b in bodies))]
        assert network.faults_done >= 1
        repeated = await asyncio.gather(*(send.create(body) for body in bodies))
        assert {answer.status for answer in repeated} == {200}
        assert [answer.body["id"] for answer in repeated] == [answer.body["id"] for answer in last]
    for body in bodies:
        assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 100)
    assert await find_held(owner, merchant.shop.id) == 6000
    await assert_invariants(owner)


async def test_a_commit_that_never_answers_is_a_503_in_time_and_counts_once(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with gateway_behind_proxy(
        database_url,
        merchant,
        PAYOUTS_ACCEPT_WAIT_SECONDS_MAX="1",
        # The driver gives up 5 s later.
        PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS="5",
    ) as (network, send, _):
        await create_until_answered(send, create_body())
        network.fail_commits(CommitFault.HOLD_ANSWER)
        body, first = await create_until_failed(send, network, amount="30.00")
        assert first.seconds < 8
        answers = await create_until_answered(send, body)
        assert answers[-1].status == 200
    assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 3000)
    await assert_invariants(owner)


async def test_a_gateway_that_drops_off_the_network_within_its_transaction_holds_its_shop_for_a_bounded_time(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchant = await add_funded_merchant(owner, config)
    # The server ends transactions that are idle for as long as a statement may take.
    patience = {"PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS": "1.5", "PAYOUTS_ACCEPT_WAIT_SECONDS_MAX": "1"}
    async with (
        gateway_behind_proxy(database_url, merchant, **patience) as (network, send, _),
        stack(database_url, **patience) as elsewhere,
    ):
        await elsewhere.start("gateway")
        network.fail_commits(CommitFault.HOLD_COMMIT)
        body, _ = await create_until_failed(send, network)
        other = create_body()
        async with sender(elsewhere.base_url, merchant) as send_elsewhere:
            answers = [*await create_until_answered(send_elsewhere, other)]
            assert answers[-1].status == 201 or len(answers) > 1
            assert sum(answer.seconds for answer in answers) < 12
            # The same request on the other gateway, and then the first one comes back with its COMMIT.
            assert (await send_elsewhere.create(body)).status in (200, 201, 503)
            network.release()
            answers = await create_until_answered(send_elsewhere, body, *answers)
    assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 1000)
    assert await find_stored(owner, merchant.shop.id, external_id_of(other)) == Stored(1, 1, 1000)
    await assert_invariants(owner)


async def test_a_late_answer_to_commit_is_still_an_answer(database_url: str, owner: Engine, config: Settings) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with gateway_behind_proxy(database_url, merchant, **UNHURRIED) as (network, send, _):
        network.fail_commits(CommitFault.HOLD_ANSWER)
        body = create_body()
        waiting = asyncio.create_task(send.create(body))

        async def held() -> bool:
            return network.faults_done == 1

        await eventually(held, "COMMIT's answer is held")
        assert not waiting.done()
        network.release()
        assert (await waiting).status == 201
    assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 1000)


async def test_a_database_that_refuses_is_a_503_at_once_and_heals_by_itself(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with gateway_behind_proxy(database_url, merchant, **PATIENT) as (network, send, process):
        network.refuse()
        body = create_body()
        answers = await asyncio.gather(
            *(send.create(body) for _ in range(20)),
            send.request("GET", "/api/v1/balance"),
            send.request("GET", "/api/v1/payouts/none"),
        )
        for answer in answers:
            answer.assert_unavailable()
            assert answer.seconds < 8
        await network.listen()
        await create_until_answered(send, body)
        assert (await send.request("GET", f"/api/v1/payouts/{external_id_of(body)}")).status == 200
        assert "request.crashed" not in process.output
    assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 1000)
    await assert_invariants(owner)


@pytest.mark.parametrize("key", ["cached", "not cached"])
async def test_a_database_that_keeps_silent_is_a_503_in_time_and_heals_by_itself(
    database_url: str, owner: Engine, config: Settings, key: str
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with gateway_behind_proxy(
        database_url,
        merchant,
        PAYOUTS_KEY_CACHE_SECONDS="5" if key == "cached" else "0",
        PAYOUTS_ACCEPT_WAIT_SECONDS_MAX="1",
        PAYOUTS_DATABASE_CONNECT_TIMEOUT_SECONDS="1",
        PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS="0.5",
    ) as (network, send, process):
        await create_until_answered(send, create_body())
        network.black_hole()
        body = create_body()
        answers = await asyncio.gather(*(send.create(body) for _ in range(20)))
        for answer in answers:
            answer.assert_unavailable()
            assert answer.seconds < 10
        network.flow()
        await create_until_answered(send, body, *answers)
        assert "request.crashed" not in process.output
    assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 1000)
    await assert_invariants(owner)


async def test_a_slow_network_only_costs_time(database_url: str, owner: Engine, config: Settings) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with gateway_behind_proxy(database_url, merchant, **UNHURRIED) as (network, send, _):
        network.delay(0.05)
        bodies = [create_body() for _ in range(30)]
        answers = await asyncio.gather(*(send.create(body) for body in bodies))
        assert {answer.status for answer in answers} == {201}
        assert await find_held(owner, merchant.shop.id) == 30_000


async def test_a_server_that_takes_no_more_connections_is_a_503_and_heals_by_itself(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    merchant = await add_funded_merchant(owner, config)
    name = await superuser.fetchval("SELECT current_database()")
    async with gateway_behind_proxy(database_url, merchant, **PATIENT) as (network, send, process):
        await superuser.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
        network.cut()
        body = create_body()
        answer = await send.create(body)
        answer.assert_unavailable()
        assert answer.seconds < 8
        await superuser.execute(f"ALTER DATABASE {name} CONNECTION LIMIT -1")
        await create_until_answered(send, body)
        assert "request.crashed" not in process.output


async def test_sessions_that_the_server_ends_under_load_cost_no_payout_and_make_none_twice(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with stack(database_url) as running:
        await running.start("gateway")
        async with sender(running.base_url, merchant) as send:
            bodies = [create_body(amount="1.00") for _ in range(600)]
            limit = asyncio.Semaphore(24)

            async def create(body: bytes) -> list[Answer]:
                async with limit:
                    return await create_until_answered(send, body)

            creates = [asyncio.create_task(create(body)) for body in bodies]
            for goal in range(60, 600, 90):

                async def sessions_ended(goal: int = goal) -> bool:
                    if sum(task.done() for task in creates) < goal:
                        return False
                    ended = await superuser.fetchval(
                        "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity"
                        " WHERE datname = current_database() AND application_name LIKE $1 || '%'",
                        GATEWAY,
                    )
                    return bool(ended)

                await eventually(sessions_ended, f"after {goal} answered creates the gateway lost its sessions")
            answers = await asyncio.gather(*creates)
    assert {chain[-1].status for chain in answers} <= {200, 201}
    (row,) = await fetch(owner, "SELECT count(*) AS n, count(DISTINCT external_id) AS ids FROM payouts")
    assert (row.n, row.ids) == (600, 600)
    assert await find_held(owner, merchant.shop.id) == 60_000
    await assert_invariants(owner)


async def test_hanging_up_in_the_middle_of_the_body_leaves_nothing(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with stack(database_url) as running:
        process = await running.start("gateway")
        body = create_body(metadata={f"note {n}": "x" * 100 for n in range(15)})
        for send_bytes in (0, 1, len(body) // 2, len(body) - 1):
            async with raw_request(running.base_url, merchant, body, send_bytes=send_bytes):
                pass

        async def noticed() -> bool:
            return process.output.count('"route":"/api/v1/payouts"') == 4

        await eventually(noticed, "the gateway noticed that the callers had gone")
        assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(0, 0, 0)
        assert "request.crashed" not in process.output
        async with sender(running.base_url, merchant) as send:
            assert (await send.create(body)).status == 201
    assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 1000)


async def test_hanging_up_before_the_answer_leaves_a_whole_payout(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with stack(database_url, **UNHURRIED) as running:
        process = await running.start("gateway")
        body = create_body()
        async with account_locked(owner, merchant.shop.id):
            async with raw_request(running.base_url, merchant, body, send_bytes=len(body)):

                async def waits() -> bool:
                    return await count_lock_waiters(superuser, GATEWAY) == 1

                await eventually(waits, "the create waits for the account")
            assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(0, 0, 0)

        async def stored() -> bool:
            return await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 1000)

        await eventually(stored, "the payout is there though nobody waits for the answer")
        async with sender(running.base_url, merchant) as send:
            again = await send.create(body)
            assert (again.status, again.body["external_id"]) == (200, external_id_of(body))
        assert "request.crashed" not in process.output
    assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 1000)
    await assert_invariants(owner)


async def test_hundreds_of_callers_who_hang_up_leave_whole_payouts_or_nothing(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with stack(database_url) as running:
        process = await running.start("gateway")
        bodies = [create_body(amount="1.00") for _ in range(200)]

        async def hang_up(body: bytes) -> None:
            async with raw_request(running.base_url, merchant, body, send_bytes=len(body)):
                pass

        await asyncio.gather(*(hang_up(body) for body in bodies))
        async with sender(running.base_url, merchant) as send:
            answers = await asyncio.gather(*(send.create(body) for body in bodies))
            assert {answer.status for answer in answers} <= {200, 201}
        assert "request.crashed" not in process.output
    for body in bodies:
        assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 100)
    assert await find_held(owner, merchant.shop.id) == 20_000
    await assert_invariants(owner)
