"""Fault tests: PostgreSQL stops, stands still, moves to another server or has no more room, while everybody is at work.

While it lasts, every answer comes in time and says that the same request may be repeated; when it is over, everything goes on
by itself, and what was accepted is there and ends once.
"""

import asyncio
from contextlib import AsyncExitStack, suppress

import asyncpg
import pytest

from migrations.run import upgrade
from ops.postgres import DATABASE, Cluster
from tests.conftest import MakeCluster
from tests.faults.disk import ballast, small_disk
from tests.faults.outage import outage, paused
from tests.faults.standby import follow, promote


@pytest.mark.timeout(150)
async def test_a_server_that_is_restarted_stands_still_or_has_no_connection_left_is_a_503_in_time(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(durable=False)
    async with outage(cluster) as during:
        await asyncio.to_thread(cluster.stop)
        await during.until_refused()
        await during.until_ready(503)
        await asyncio.to_thread(cluster.start)
        await during.until_well()

        with paused(cluster):
            await during.until_refused(20)
            await during.until_ready(503)
        await during.until_well()

        async with AsyncExitStack() as others:
            during.network.refuse()
            await occupy(cluster, others)
            await during.network.listen()
            await during.until_refused()
            await during.until_ready(503)
        await during.until_well()

        await during.assert_survived()


@pytest.mark.timeout(150)
async def test_a_standby_that_takes_over_knows_everything_that_was_answered(make_cluster: MakeCluster) -> None:
    primary = await make_cluster(durable=False)
    standby = await make_cluster(durable=False, started=False)
    await follow(primary, standby)
    async with outage(primary) as during:
        with paused(standby):
            # What only one server knows is promised to nobody.
            await during.until_creates_refused()
        await during.until_well()
        await asyncio.to_thread(primary.kill)
        # The address leads to a server that only reads, for a while.
        during.network.lead_to(standby.url(DATABASE))
        await during.until_refused()
        await during.until_ready(503)
        await promote(standby)
        await during.until_well()
        await during.assert_survived()


async def test_a_disk_that_is_full_is_a_503_until_it_is_not(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(durable=False, started=False)
    with small_disk(cluster.home):
        await upgrade(await asyncio.to_thread(cluster.start))
        async with outage(cluster) as during:
            with ballast(cluster.home):
                await during.until_creates_refused()
            if cluster.process_id is None:
                await asyncio.to_thread(cluster.start)
            await during.until_well()
            await during.assert_survived()
        await asyncio.to_thread(cluster.stop)


async def occupy(cluster: Cluster, others: AsyncExitStack) -> None:
    """Take every connection that the server has for such as us."""
    with suppress(asyncpg.TooManyConnectionsError):
        while True:
            other = await asyncpg.connect(cluster.url(DATABASE))
            others.push_async_callback(other.close)
