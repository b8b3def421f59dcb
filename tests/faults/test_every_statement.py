"""Fault tests: the connection breaks at each statement in turn, before the server has heard of it and after it has done it."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from itertools import count

import pytest

from common.domain.ids import EVENT, render_id
from gateway.accept import Acceptor
from gateway.deciding import Accepted
from tests.factories import fetch, order
from tests.faults.outcome import assert_rail_agrees
from tests.faults.proxy import CommitFault, Proxy, proxy
from tests.faults.receiver import receiver
from tests.flows import DRAIN_SECONDS, Desk, assert_sound, desk, pass_callback_time
from worker.callbacks.deliver import Deliverer
from worker.callbacks.send import open_session

# What can be said of a commit can be said of any statement.
FAULTS = [CommitFault.LOSE_ANSWER, CommitFault.LOSE_COMMIT]
Arm = Callable[[], None]


@pytest.fixture
async def network(database_url: str) -> AsyncIterator[Proxy]:
    """The only way to the test's database."""
    async with proxy(database_url) as between:
        yield between


@pytest.fixture
async def working(network: Proxy) -> AsyncIterator[Desk]:
    """A desk behind that network."""
    async with desk(network.url) as there:
        yield there


async def break_everywhere(network: Proxy, fault: CommitFault, step: Callable[[Arm], Awaitable[None]]) -> int:
    """Take a step again and again, and let the connection break one statement later each time, until there is none left.

    The statements count from where the step says so. Returns: how many there are.
    """
    for number in count(1):
        await step(partial(network.fail_statement, number, fault))
        network.stop_failing()
        if not network.faults_done:
            return number - 1
    raise AssertionError("unreachable: a step has an end")


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_create_counts_once_wherever_its_connection_breaks(
    network: Proxy, working: Desk, fault: CommitFault
) -> None:
    merchant = await working.merchant()
    await working.create(merchant)
    accepted = 1

    async def create(arm: Arm) -> None:
        nonlocal accepted
        arm()
        (verdict,) = await working.accept(order(working.settings, merchant.shop))
        # Its own payout is nobody else's, though it was there already when the batch was repeated.
        assert isinstance(verdict, Accepted)
        assert not verdict.replayed
        accepted += 1

    assert await break_everywhere(network, fault, create) >= 5
    assert await working.count("payouts") == await working.count("entries", "kind = 'hold'") == accepted
    assert await working.balance(merchant) == (100_000_000, accepted * 1000)
    await assert_sound(working.owner)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_create_that_goes_through_the_gateway_s_line_counts_once_wherever_its_connection_breaks(
    network: Proxy, working: Desk, fault: CommitFault
) -> None:
    merchant = await working.merchant()
    running = Acceptor(
        working.gateway, committers=1, busy_committers=1, busy_seconds_max=1, batch_max=1, queue_max=1, wait_seconds=10
    )
    await running.accept(order(working.settings, merchant.shop))
    accepted = 1

    async def create(arm: Arm) -> None:
        nonlocal accepted
        arm()
        assert not (await running.accept(order(working.settings, merchant.shop))).replayed
        accepted += 1

    assert await break_everywhere(network, fault, create) >= 1
    assert await working.count("payouts") == await working.count("entries", "kind = 'hold'") == accepted
    assert await working.balance(merchant) == (100_000_000, accepted * 1000)
    await assert_sound(working.owner)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_payout_is_settled_once_wherever_the_worker_s_connection_breaks(
    network: Proxy, working: Desk, fault: CommitFault
) -> None:
    merchant = await working.merchant()
    await working.create(merchant)
    settler = working.settler()
    await working.settle(settler)

    async def settle(arm: Arm) -> None:
        payout_id = await working.create(merchant)
        arm()
        await working.settle(settler)
        network.stop_failing()
        while await working.state(payout_id) != "success":
            # Nobody heard of its claim: the lease has to pass.
            await working.make_due(payout_id)
            await working.settle(settler)

    assert await break_everywhere(network, fault, settle) >= 10
    settled = await working.count("payouts")
    assert await working.count("payouts", "state = 'success'") == settled
    assert await working.count("entries", "kind = 'capture'") == settled
    # One payment for each; the rail may have been asked twice under its one reference, where its own COMMIT was lost.
    assert await working.count("sandbox.payments", "state = 'paid'") == settled
    assert await working.balance(merchant) == (100_000_000 - settled * 1000, 0)
    await assert_rail_agrees(working.owner)
    await assert_sound(working.owner)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_callback_is_sent_once_wherever_the_worker_s_connection_breaks(
    network: Proxy, working: Desk, fault: CommitFault
) -> None:
    merchant = await working.merchant()
    async with receiver() as endpoint, open_session(private_allowed=True, ports=frozenset()) as session:
        deliverer = Deliverer(working.worker, working.settings.keyring, session, working.settings)

        async def deliver() -> None:
            await deliverer.run_round()
            await deliverer.drain(DRAIN_SECONDS)

        async def tell(arm: Arm) -> None:
            await working.create(merchant, callback_url=endpoint.url)
            await working.settle()
            arm()
            await deliver()
            network.stop_failing()
            while await working.count("callbacks", "state <> 'delivered'"):
                await pass_callback_time(working.owner)
                await deliver()

        assert await break_everywhere(network, fault, tell) >= 10
        events = [render_id(EVENT, row.id) for row in await fetch(working.owner, "SELECT id FROM events")]
        assert Counter(delivery.webhook_id for delivery in endpoint.deliveries) == Counter(events)
    assert await working.count("callback_attempts") == len(events)
    await assert_sound(working.owner)
