"""The number of shards changes under load, process by process; nothing is lost, and no queue is left behind."""

from collections.abc import Sequence
from typing import Final

import pytest

from common.messaging.topology import Topology, Work
from tests.broker import Broker
from tests.factories import add_funded_merchant, environment
from tests.faults.scene import SHORT_LEASES, Scene, scene
from tests.stack import Process, eventually
from tests.terminal import Terminal

GATEWAY: Final = ("gateway",)
WORKER: Final = ("worker", "all")


async def replace(stage: Scene, running: Sequence[Process], shards: int) -> list[Process]:
    """Start another of each with that many shards, and let the old one leave, one by one; then as many payouts again."""
    replaced = []
    for old in running:
        replaced.append(await stage.start(*old.name.split(), PAYOUTS_AMQP_SHARDS=str(shards)))
        assert await old.stop() == 0
        await stage.answered(10)
    await stage.wait_connected(*replaced)
    return replaced


@pytest.mark.timeout(300)
async def test_shards_go_from_one_to_four_to_two_under_load(
    database_url: str, broker: Broker, amqp_prefix: str
) -> None:
    async with scene(database_url, broker, amqp_prefix, **SHORT_LEASES, PAYOUTS_AMQP_SHARDS="1") as stage:
        four, two = Topology(amqp_prefix, 4), Topology(amqp_prefix, 2)
        while len({four.shard_of(merchant.shop.id) for merchant in stage.merchants}) < 3:
            stage.merchants.append(await add_funded_merchant(stage.owner, stage.stack.settings))
        gateway, *workers = [await stage.start(*role) for role in (GATEWAY, WORKER, WORKER)]
        await stage.wait_connected(gateway, *workers)
        async with stage.load(per_second=40, repeats_503=True):
            await stage.answered(40)
            # More: those who take first.
            gateway, *workers = reversed(await replace(stage, [*workers, gateway], 4))
            assert set(four.all_queues()) == set(await stage.depths())

            async def all_are_used() -> bool:
                consumers = {name: n for name, (_, n) in (await stage.depths()).items()}
                return all(consumers[name] == len(workers) for work in Work for name in four.queues(work))

            await eventually(all_are_used, "every worker takes from every shard")
            await stage.answered(80)
            # Fewer: those who publish first.
            gateway, *workers = await replace(stage, [gateway, *workers], 2)
            await stage.answered(40)
        variables = stage.broker_variables | {"PAYOUTS_AMQP_SHARDS": "2"}
        retired = await Terminal(environment(database_url, **variables)).run(
            "queues", "retire", "--reason", "one is enough", "--actor", "alice", "--json"
        )

        assert {row["queue"] for row in retired.document["retired"]} == set(four.all_queues()) - set(two.all_queues())
        stage.topology = two
        await stage.assert_work_flows(gateway, *workers)
        # Also that these are all the queues there are, and that they are empty.
        await stage.assert_all_well()
