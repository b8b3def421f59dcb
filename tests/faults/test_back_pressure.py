"""Fault tests: somebody else's transaction holds what we need; what waits for it is bounded, and keeps nobody else waiting."""

import asyncio
from collections import Counter

from common.db.engine import Engine
from common.settings import Settings
from tests.factories import add_funded_merchant, create_body, fetch
from tests.faults.locks import locked
from tests.faults.merchants import assert_invariants, sender
from tests.faults.patience import UNHURRIED, UNHURRIED_LOCKS
from tests.faults.receiver import receiver
from tests.stack import eventually, stack

# Sooner than anything that waits is given up.
PROMPT_SECONDS = 8.0
REQUEST_SECONDS_MAX = 9.0
# Only the feed reads them; nothing that is accepted writes any.
HOLD_EVENTS = "LOCK TABLE events IN ACCESS EXCLUSIVE MODE"
# Nothing but the bound of a request ends a wait.
PATIENT = {"PAYOUTS_DATABASE_CONNECT_TIMEOUT_SECONDS": "40", **UNHURRIED_LOCKS}


async def test_beyond_the_requests_at_work_one_is_refused_at_once_and_the_rest_in_time(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchant = await add_funded_merchant(owner, config)
    bounds = {"PAYOUTS_REQUESTS_MAX": "20", "PAYOUTS_REQUEST_SECONDS_MAX": str(REQUEST_SECONDS_MAX)}
    async with stack(database_url, **bounds, **PATIENT) as running:
        await running.start("gateway")
        async with sender(running.base_url, merchant) as send:
            assert (await send.request("GET", "/api/v1/events")).status == 200
            async with locked(owner, HOLD_EVENTS):
                answers = await asyncio.gather(*(send.request("GET", "/api/v1/events") for _ in range(200)))
            for answer in answers:
                answer.assert_unavailable()
            refused = [answer for answer in answers if answer.body["error"]["reason"] == "overloaded"]
            assert len(refused) >= 150
            assert max(answer.seconds for answer in refused) < PROMPT_SECONDS
            assert max(answer.seconds for answer in answers) < REQUEST_SECONDS_MAX + PROMPT_SECONDS

            async def free() -> bool:
                return (await send.request("GET", "/api/v1/events")).status == 200

            await eventually(free, "who reads is answered again")


async def test_reads_that_hang_keep_no_create_waiting_though_no_key_is_remembered(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with stack(database_url, PAYOUTS_KEY_CACHE_SECONDS="0", **PATIENT) as running:
        await running.start("gateway")
        async with sender(running.base_url, merchant) as send:
            async with locked(owner, HOLD_EVENTS):
                hanging = [asyncio.create_task(send.request("GET", "/api/v1/events")) for _ in range(40)]
                created = [await send.create(create_body()) for _ in range(20)]
            assert {answer.status for answer in created} == {201}
            assert max(answer.seconds for answer in created) < PROMPT_SECONDS
            assert Counter(answer.status for answer in await asyncio.gather(*hanging)).keys() <= {200, 503}
    await assert_invariants(owner)


async def test_a_foreign_transaction_that_stays_open_holds_up_nothing_but_the_feed(
    database_url: str, owner: Engine, config: Settings
) -> None:
    async with receiver() as endpoint, stack(database_url, **UNHURRIED) as running:
        merchant = await add_funded_merchant(owner, config, webhook_url=endpoint.url)
        await asyncio.gather(running.start("gateway"), running.start("worker", "all"))
        async with sender(running.base_url, merchant) as send:
            # It keeps vacuum from every row that dies meanwhile, and the order of events from being for good.
            async with locked(owner, "SELECT pg_current_xact_id()"):
                answers = await asyncio.gather(*(send.create(create_body()) for _ in range(100)))
                assert {answer.status for answer in answers} == {201}

                async def told() -> bool:
                    (row,) = await fetch(owner, "SELECT count(*) AS n FROM callbacks WHERE state = 'delivered'")
                    return bool(row.n == 100)

                await eventually(told, "everything is settled and told")
                assert (await send.request("GET", "/api/v1/events")).body["data"] == []

            async def fed() -> bool:
                page = await send.request("GET", "/api/v1/events")
                return len(page.body["data"]) > 0

            # Any transaction on the server that is older holds it up, be it of another database.
            await eventually(fed, "the feed goes on")
    await assert_invariants(owner)
