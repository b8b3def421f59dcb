"""Fault tests: many at once. Twins, a balance that does not last, refused neighbours, held accounts, full queues.

Nothing is repeated here that the product does not repeat itself.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import pytest

from common.db.engine import Engine, create_engine
from common.errors import DatabaseUnavailable, ExternalIdReused, InsufficientBalance, Overloaded
from common.settings import Settings
from gateway import accept
from gateway.accept import Acceptor
from gateway.deciding import Accepted, Order
from tests.factories import add_funded_merchant, create_body, execute, fetch, order, settings
from tests.faults.locks import Superuser
from tests.faults.merchants import (
    Stored,
    account_locked,
    assert_invariants,
    count_lock_waiters,
    external_id_of,
    find_held,
    find_stored,
    sender,
)
from tests.faults.patience import UNHURRIED, UNHURRIED_SECONDS
from tests.faults.proxy import CommitFault, proxy, until_failed
from tests.stack import DEADLINE_SECONDS, Stack, eventually, stack

GATEWAY = "payouts-gateway"
# What a create may take that waits for nobody, on a machine that stands still now and then; and how long one waits for a lock.
PROMPT_SECONDS = 6.0
WAIT_SECONDS = 9.0
PATIENT = {
    "PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS": f"{WAIT_SECONDS}",
    "PAYOUTS_ACCEPT_WAIT_SECONDS_MAX": f"{WAIT_SECONDS}",
    "PAYOUTS_REQUEST_SECONDS_MAX": "90",
}


async def start_gateways(running: Stack, count: int) -> None:
    """Gateways that share the port."""
    await asyncio.gather(*(running.start("gateway") for _ in range(count)))


@asynccontextmanager
async def acceptor(
    config: Settings, *, queue_max: int = 1000, wait_seconds: float = UNHURRIED_SECONDS
) -> AsyncIterator[Acceptor]:
    """The gateway's own, in this process, so that a test knows what waits in it."""
    pool = create_engine(config, role="payouts_gateway", application=GATEWAY, pool_max=4)
    running = Acceptor(
        pool,
        committers=2,
        busy_committers=2,
        busy_seconds_max=UNHURRIED_SECONDS,
        batch_max=128,
        queue_max=queue_max,
        wait_seconds=wait_seconds,
    )
    yield running
    await running.close(10)
    await pool.dispose()


async def until_one_waits(superuser: Superuser) -> None:
    """Return once a gateway's transaction waits for a lock."""

    async def waits() -> bool:
        return await count_lock_waiters(superuser, GATEWAY) >= 1

    await eventually(waits, "a transaction waits for the account")


async def accept_as_one_batch(
    running: Acceptor, owner: Engine, superuser: Superuser, first: Order, orders: list[Order]
) -> list[Accepted | BaseException]:
    """Let `first` wait for its locked account and the orders queue up behind it: the next transaction takes them all."""
    async with account_locked(owner, first.shop.id):
        ahead = asyncio.create_task(running.accept(first))
        await until_one_waits(superuser)
        behind = [asyncio.create_task(running.accept(item)) for item in orders]
    assert not (await ahead).replayed
    return await asyncio.gather(*behind, return_exceptions=True)


async def test_of_64_concurrent_twins_one_is_created_and_63_are_told_so(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchant = await add_funded_merchant(owner, config, funds="1000.00")
    async with stack(database_url, **UNHURRIED) as running:
        await start_gateways(running, 2)
        async with sender(running.base_url, merchant, keep_alive=False) as send:
            for _ in range(5):
                body = create_body(amount="10.00")
                answers = await asyncio.gather(*(send.create(body) for _ in range(64)))
                assert Counter(answer.status for answer in answers) == {201: 1, 200: 63}
                assert len({answer.body["id"] for answer in answers}) == 1
                assert {a.headers.get("Idempotent-Replayed") for a in answers if a.status == 200} == {"true"}
                assert await find_stored(owner, merchant.shop.id, external_id_of(body)) == Stored(1, 1, 1000)
        await assert_both_served(running)
    assert await find_held(owner, merchant.shop.id) == 5000
    await assert_invariants(owner)


async def assert_both_served(running: Stack) -> None:
    """Every gateway of the stack has answered creates; otherwise the test has not tested much."""
    for process in running._processes:
        assert '"route":"/api/v1/payouts"' in process.output


async def test_of_64_concurrent_twins_with_different_contents_one_is_created_and_the_rest_are_refused_or_told(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchant = await add_funded_merchant(owner, config, funds="1000.00")
    async with stack(database_url, **UNHURRIED) as running:
        await start_gateways(running, 2)
        async with sender(running.base_url, merchant, keep_alive=False) as send:
            bodies = [create_body(external_id="PAY-twin", amount=amount) for amount in ("1.00", "2.00")] * 32
            answers = await asyncio.gather(*(send.create(body) for body in bodies))
    assert Counter(answer.status for answer in answers) == {201: 1, 200: 31, 422: 32}
    assert {answer.body["code"] for answer in answers if answer.status == 422} == {"external_id_reused"}
    (won,) = {answer.body["amount"] for answer in answers if answer.status in (200, 201)}
    assert await find_stored(owner, merchant.shop.id, "PAY-twin") == Stored(1, 1, int(won[0]) * 100)
    await assert_invariants(owner)


@pytest.mark.parametrize("gateways", [1, 2])
async def test_of_200_concurrent_creates_exactly_the_50_that_the_balance_covers_are_accepted(
    database_url: str, owner: Engine, config: Settings, gateways: int
) -> None:
    merchant = await add_funded_merchant(owner, config, funds="50.00")
    async with stack(database_url, **UNHURRIED) as running:
        await start_gateways(running, gateways)
        async with sender(running.base_url, merchant, keep_alive=False) as send:
            answers = await asyncio.gather(*(send.create(create_body(amount="1.00")) for _ in range(200)))
            balance = (await send.request("GET", "/api/v1/balance")).body
    assert Counter(answer.status for answer in answers) == {201: 50, 422: 150}
    assert {answer.body["message"] for answer in answers if answer.status == 422} == {
        "Insufficient balance. Required 1.00, available 0.00."
    }
    assert (balance["available"], balance["pending"]) == ("0.00", "50.00")
    (row,) = await fetch(owner, "SELECT count(*) AS n, sum(amount_minor) AS total FROM payouts")
    assert (row.n, row.total) == (50, 5000)
    await assert_invariants(owner)


async def test_refused_neighbours_in_a_batch_harm_nobody(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    shop = (await add_funded_merchant(owner, config, funds="100.00")).shop
    async with acceptor(config) as running:
        stored = order(config, shop, amount_minor=1000)
        assert not (await running.accept(stored)).replayed
        first, one, three = (order(config, shop, amount_minor=1000) for _ in range(3))
        batch = [
            one,
            order(config, shop, external_id=stored.external_id, amount_minor=1000),  # a twin of what is stored
            order(config, shop, external_id=one.external_id, amount_minor=1000),  # a twin within the batch
            order(config, shop, external_id=stored.external_id, amount_minor=999),  # an id reused
            order(config, shop, external_id=one.external_id, recipient="0987654321"),  # an id reused within the batch
            order(config, shop, external_id="PAY-too-much", amount_minor=7001),  # more than is left
            three,
            order(config, shop, external_id="PAY-too-much", amount_minor=6000),  # the refused id is free; all there is
            order(config, shop, amount_minor=1),  # nothing is left
        ]
        results = await accept_as_one_batch(running, owner, superuser, first, batch)
    accepted = {i: result for i, result in enumerate(results) if isinstance(result, Accepted)}
    assert {i: result.replayed for i, result in accepted.items()} == {0: False, 1: True, 2: True, 6: False, 7: False}
    assert [accepted[i].payout.id for i in (0, 1, 2)] == [one.id, stored.id, one.id]
    reused = {i: result.fields for i, result in enumerate(results) if isinstance(result, ExternalIdReused)}
    assert reused == {3: ["amount"], 4: ["card_number"]}
    short = {i: str(result) for i, result in enumerate(results) if isinstance(result, InsufficientBalance)}
    assert short == {
        5: "Insufficient balance. Required 70.01, available 70.00.",
        8: "Insufficient balance. Required 0.01, available 0.00.",
    }
    # One transaction, so one time: they did share a batch.
    assert len({accepted[i].payout.created_at for i in (0, 6, 7)}) == 1
    assert await find_held(owner, shop.id) == 10_000
    await assert_invariants(owner)


async def test_a_neighbour_that_the_database_refuses_takes_nobody_along(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    shop = (await add_funded_merchant(owner, config, funds="1000.00")).shop
    async with acceptor(config) as running:
        batch = [order(config, shop) for _ in range(40)]
        # Nothing of the gateway's lets such an order through; the schema is the second guard.
        batch[17] = order(config, shop, callback_url="https://example.com/" + "x" * 2048)
        results = await accept_as_one_batch(running, owner, superuser, order(config, shop), batch)
    assert [i for i, result in enumerate(results) if not isinstance(result, Accepted)] == [17]
    assert await find_held(owner, shop.id) == 40 * 1000
    assert await find_stored(owner, shop.id, batch[17].external_id) == Stored(0, 0, 0)
    await assert_invariants(owner)


async def test_an_order_that_comes_while_its_shop_is_behind_is_decided_after_those_before_it(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    shop = (await add_funded_merchant(owner, config, funds="30.00")).shop
    async with acceptor(config) as running:
        results = await accept_as_one_batch(
            running, owner, superuser, order(config, shop), [order(config, shop) for _ in range(20)]
        )
    assert [isinstance(result, Accepted) for result in results] == [True, True] + [False] * 18
    await assert_invariants(owner)


@pytest.mark.parametrize("gateways", [1, 2])
async def test_an_account_that_somebody_holds_delays_only_its_own_shop(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser, gateways: int
) -> None:
    held, *others = [await add_funded_merchant(owner, config) for _ in range(9)]
    async with stack(database_url, **PATIENT) as running:
        await start_gateways(running, gateways)
        async with account_locked(owner, held.shop.id), sender(running.base_url, held, keep_alive=False) as blocked:
            started = monotonic()
            bodies = [create_body() for _ in range(40)]
            waiting = [asyncio.create_task(blocked.create(body)) for body in bodies]
            await until_one_waits(superuser)
            for other in others:
                async with sender(running.base_url, other, keep_alive=False) as send:
                    answers = await asyncio.gather(*(send.create(create_body()) for _ in range(20)))
                    assert {answer.status for answer in answers} == {201}
                    assert max(answer.seconds for answer in answers) < PROMPT_SECONDS
                    assert (await send.request("GET", "/api/v1/balance")).seconds < PROMPT_SECONDS
            # Balances are read without waiting, also that of the shop itself.
            assert (await blocked.request("GET", "/api/v1/balance")).seconds < PROMPT_SECONDS
            for answer in await asyncio.gather(*waiting):
                answer.assert_unavailable()
            # The lock's time-out, or the queue's.
            assert monotonic() - started < WAIT_SECONDS + PROMPT_SECONDS
        async with sender(running.base_url, held) as freed:
            # 503 is "unknown": those in flight at the end may be there, and repeating is safe.
            repeated = await asyncio.gather(*(freed.create(body) for body in bodies))
            assert {answer.status for answer in repeated} <= {200, 201}
    assert await find_held(owner, held.shop.id) == 40 * 1000
    await assert_invariants(owner)


async def test_held_accounts_delay_only_their_own_shops_though_two_gateways_compete_for_the_rest(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    one, two, *others = [await add_funded_merchant(owner, config) for _ in range(6)]
    async with stack(database_url, **PATIENT) as running:
        await start_gateways(running, 2)
        async with (
            account_locked(owner, one.shop.id),
            account_locked(owner, two.shop.id),
            sender(running.base_url, one, keep_alive=False) as blocked_1,
            sender(running.base_url, two, keep_alive=False) as blocked_2,
        ):
            waiting = [asyncio.create_task(who.create(create_body())) for who in (blocked_1, blocked_2) * 10]

            async def wait() -> bool:
                return await count_lock_waiters(superuser, GATEWAY) >= 2

            await eventually(wait, "each held account is waited for")
            for other in others:
                async with sender(running.base_url, other, keep_alive=False) as send:
                    answers = await asyncio.gather(*(send.create(create_body()) for _ in range(40)))
                    assert {answer.status for answer in answers} == {201}
                    assert max(answer.seconds for answer in answers) < PROMPT_SECONDS
            for answer in await asyncio.gather(*waiting):
                answer.assert_unavailable()
    await assert_invariants(owner)


async def test_an_account_that_somebody_holds_delays_only_its_own_shop_in_settlement_too(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    # The other's account has the lower id: it would be locked first, and kept while the held one is waited for.
    other, held = [await add_funded_merchant(owner, config) for _ in range(2)]
    async with stack(database_url, **PATIENT) as running:
        await start_gateways(running, 1)
        async with sender(running.base_url, other) as send, sender(running.base_url, held) as blocked:
            for _ in range(20):
                assert (await send.create(create_body())).status == 201
                assert (await blocked.create(create_body())).status == 201
            async with account_locked(owner, held.shop.id):
                await running.start("worker", "settle")

                async def wait() -> bool:
                    return await count_lock_waiters(superuser, "payouts-settle") >= 1

                await eventually(wait, "an outcome waits for the held account")
                answers = await asyncio.gather(*(send.create(create_body()) for _ in range(20)))
                assert {answer.status for answer in answers} == {201}
                assert max(answer.seconds for answer in answers) < PROMPT_SECONDS

                async def others_settled() -> bool:
                    (row,) = await fetch(
                        owner,
                        "SELECT count(*) AS n FROM payouts WHERE shop_id = :id AND state = 'success'",
                        id=other.shop.id,
                    )
                    return bool(row.n == 40)

                await eventually(others_settled, "the other shop's payouts are settled")
    await assert_invariants(owner)


async def test_a_held_account_that_is_let_go_in_time_costs_only_time(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    merchant = await add_funded_merchant(owner, config, funds="300.00")
    async with stack(database_url, **UNHURRIED) as running:
        await start_gateways(running, 2)
        async with sender(running.base_url, merchant, keep_alive=False) as send:
            async with account_locked(owner, merchant.shop.id):
                waiting = [asyncio.create_task(send.create(create_body())) for _ in range(30)]
                await until_one_waits(superuser)
            answers = await asyncio.gather(*waiting)
    assert {answer.status for answer in answers} == {201}
    assert await find_held(owner, merchant.shop.id) == 30_000
    await assert_invariants(owner)


async def test_a_shop_that_is_closed_while_its_orders_wait_accepts_none_of_them(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    merchant = await add_funded_merchant(owner, config)
    async with stack(database_url, **UNHURRIED) as running:
        await start_gateways(running, 1)
        async with sender(running.base_url, merchant) as send:
            # Key and shop are remembered from here on.
            assert (await send.request("GET", "/api/v1/balance")).status == 200
            async with account_locked(owner, merchant.shop.id):
                waiting = [asyncio.create_task(send.create(create_body())) for _ in range(5)]
                await until_one_waits(superuser)
                await execute(owner, "UPDATE shops SET status = 'inactive' WHERE id = :id", id=merchant.shop.id)
            for answer in await asyncio.gather(*waiting):
                assert (answer.status, answer.body["code"]) == (422, "shop_not_found")
    assert await find_held(owner, merchant.shop.id) == 0


async def test_beyond_the_queue_a_create_is_a_503_at_once(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    held, other = [await add_funded_merchant(owner, config) for _ in range(2)]
    async with stack(database_url, PAYOUTS_ACCEPT_QUEUE_MAX="4", **UNHURRIED) as running:
        await running.start("gateway")
        async with sender(running.base_url, held) as send, sender(running.base_url, other) as elsewhere:
            async with account_locked(owner, held.shop.id):
                waiting = [asyncio.create_task(send.create(create_body())) for _ in range(30)]
                await until_one_waits(superuser)

                async def refused() -> bool:
                    return sum(task.done() for task in waiting) == 26

                # At once: nothing that waits is answered before the account is free, or in many times this time.
                await eventually(refused, "all that do not fit are answered", PROMPT_SECONDS)
                for task in waiting:
                    if task.done():
                        task.result().assert_unavailable()
                # The bound is the process's: while it is full, nobody is taken.
                full = await elsewhere.create(create_body())
                full.assert_unavailable()
                assert full.seconds < PROMPT_SECONDS
            answers = await asyncio.gather(*waiting)
            assert Counter(answer.status for answer in answers) == {201: 4, 503: 26}
            assert (await elsewhere.create(create_body())).status == 201
    assert await find_held(owner, held.shop.id) == 4 * 1000
    await assert_invariants(owner)


async def test_an_order_that_waited_too_long_is_a_503_and_is_not_accepted_later(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    shop, other = [(await add_funded_merchant(owner, config)).shop for _ in range(2)]
    async with acceptor(config, wait_seconds=WAIT_SECONDS) as running:
        # It is connected from here on: an order waits for its account, not for a connection.
        connecting = order(config, other)
        await running.accept(connecting)
        async with account_locked(owner, shop.id):
            in_flight = order(config, shop)
            first = asyncio.create_task(running.accept(in_flight))
            await until_one_waits(superuser)
            behind = [order(config, shop) for _ in range(20)]
            tasks = [asyncio.create_task(running.accept(item)) for item in behind]
            # While the account is held nothing else answers them, but for `AccountBusy` much later.
            async with asyncio.timeout(WAIT_SECONDS + PROMPT_SECONDS):
                results = await asyncio.gather(first, *tasks, return_exceptions=True)
            assert all(isinstance(result, Overloaded) for result in results)
        after = order(config, shop)
        await running.accept(after)
        # What had been given up never reached the database.
        rows = await fetch(owner, "SELECT external_id FROM payouts ORDER BY id")
        assert {row.external_id for row in rows} == {connecting.external_id, after.external_id}
    await assert_invariants(owner)


async def test_nobody_is_refused_while_a_statement_that_was_lost_might_still_come(
    database_url: str, owner: Engine, config: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Until it certainly comes no more, there is time enough for all that the test does meanwhile.
    monkeypatch.setattr(accept, "_CERTAIN_SECONDS", 20.0)
    shop = (await add_funded_merchant(owner, config, funds="10.00")).shop
    async with (
        proxy(database_url) as network,
        acceptor(settings(network.url)) as running,
        acceptor(config) as elsewhere,
    ):
        # Both are connected and know the server's clock from now on.
        for each in (running, elsewhere):
            await each.accept(order(config, shop, amount_minor=100))
        network.fail_commits(CommitFault.HOLD_COMMIT)
        lost = asyncio.create_task(running.accept(order(config, shop, amount_minor=600)))
        await until_failed(network)
        await elsewhere.accept(order(config, shop, amount_minor=600))
        network.cut()
        with pytest.raises(DatabaseUnavailable):
            await lost
    assert await find_held(owner, shop.id) == 800
    await assert_invariants(owner)


async def test_while_the_database_stands_still_who_finds_no_place_is_refused_at_once(
    database_url: str, owner: Engine, config: Settings
) -> None:
    shop = (await add_funded_merchant(owner, config)).shop
    async with (
        proxy(database_url) as network,
        acceptor(settings(network.url), queue_max=10, wait_seconds=0.3) as running,
    ):

        async def accepts() -> bool:
            try:
                await running.accept(order(config, shop))
            except Overloaded:
                return False
            return True

        await eventually(accepts, "it is connected")
        network.black_hole()
        waiting = [running.accept(order(config, shop)) for _ in range(10)]
        assert {type(result) for result in await asyncio.gather(*waiting, return_exceptions=True)} == {Overloaded}
        for _ in range(100):
            # By its first step: none of them waits for anything.
            with pytest.raises(Overloaded):
                running.accept(order(config, shop)).send(None)
        network.flow()
        await eventually(accepts, "there is room again")
    await assert_invariants(owner)


async def test_a_caller_that_goes_away_frees_its_place_only_when_its_order_is_decided(
    database_url: str, owner: Engine, config: Settings, superuser: Superuser
) -> None:
    shop = (await add_funded_merchant(owner, config)).shop
    async with acceptor(config, queue_max=3) as running:
        async with account_locked(owner, shop.id):
            tasks = [asyncio.create_task(running.accept(order(config, shop))) for _ in range(3)]
            await until_one_waits(superuser)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            with pytest.raises(Overloaded):
                await running.accept(order(config, shop))

        async def accepts() -> bool:
            try:
                await running.accept(order(config, shop))
            except Overloaded:
                return False
            return True

        await eventually(accepts, "there is room again")
        (row,) = await fetch(owner, "SELECT count(*) AS n FROM payouts")
        assert row.n == 4
    await assert_invariants(owner)


async def test_a_merchant_who_spends_on_two_gateways_while_money_comes_back_never_overdraws(
    database_url: str, owner: Engine, config: Settings
) -> None:
    merchant = await add_funded_merchant(owner, config, funds="20.00")
    async with stack(database_url, **UNHURRIED) as running:
        await start_gateways(running, 2)
        await running.start("worker", "settle")
        async with sender(running.base_url, merchant, keep_alive=False) as send:
            statuses: Counter[int] = Counter()
            # Declined payouts give their money back: the same 20.00 are held again and again.
            rounds, ends_at = 0, monotonic() + DEADLINE_SECONDS
            while rounds < 15 or (statuses[201] < 40 and monotonic() < ends_at):
                rounds += 1
                bodies = [create_body(amount="1.00", card_number="017000100") for _ in range(20)]
                statuses.update(answer.status for answer in await asyncio.gather(*map(send.create, bodies)))

            async def all_back() -> bool:
                return await find_held(owner, merchant.shop.id) == 0

            await eventually(all_back, "everything is given back")
            balance = (await send.request("GET", "/api/v1/balance")).body
    assert set(statuses) <= {201, 422}
    assert statuses[201] >= 40
    assert (balance["available"], balance["total"]) == ("20.00", "20.00")
    (row,) = await fetch(owner, "SELECT max(held_after_minor) AS most FROM entries")
    assert row.most <= 2000
    await assert_invariants(owner)
