"""`accept_unopposed`: one statement that accepts what nothing speaks against, and leaves the rest as it is."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from common.db.accepting import accept_unopposed
from common.db.engine import each_alone, in_transaction
from common.errors import AccountBusy
from gateway.deciding import Order
from tests.factories import Merchant, engine, execute, fetch, order
from tests.faults.locks import Superuser, locked, until_waiting
from tests.flows import LOCK_WAIT_SECONDS, Desk, assert_sound

NOW = datetime.now(UTC)
LATER = NOW + timedelta(hours=1)
FUNDS_MINOR = 100_000_000


async def accept(
    floor: Desk, orders: Sequence[Order], *, wait_seconds: float = 0, until: datetime = LATER
) -> dict[int, datetime | None]:
    found = await in_transaction(
        each_alone(floor.gateway),
        lambda tx: accept_unopposed(tx, orders, wait_seconds=wait_seconds, until=until),
        attempts_max=1,
    )
    return found.accepted_at


async def stored_ids(floor: Desk) -> list[Any]:
    return [row.id for row in await fetch(floor.owner, "SELECT id FROM payouts ORDER BY account_id, hold_seq")]


async def test_many_of_several_shops_are_accepted_in_the_order_in_which_they_came(floor: Desk) -> None:
    one, other = await floor.merchant(), await floor.merchant()
    orders = [order(floor.settings, (one, other)[n % 2].shop, amount_minor=100 + n) for n in range(64)]
    accepted_at = await accept(floor, orders)
    assert accepted_at.keys() == {one.shop.account_id, other.shop.account_id}
    assert await stored_ids(floor) == [item.id for item in [*orders[::2], *orders[1::2]]]
    rows = await fetch(floor.owner, "SELECT account_id, created_at FROM payouts")
    assert {(row.account_id, row.created_at) for row in rows} == set(accepted_at.items())
    for merchant, amounts in (one, orders[::2]), (other, orders[1::2]):
        assert await floor.balance(merchant) == (FUNDS_MINOR, sum(item.amount_minor for item in amounts))
    assert await floor.count("payout_due") == 64
    await assert_sound(floor.owner)


async def test_everything_that_was_said_of_a_payout_is_stored_as_the_careful_way_stores_it(floor: Desk) -> None:
    merchant = await floor.merchant()
    first = order(
        floor.settings,
        merchant.shop,
        callback_url="https://example.com/told",
        details={"note": "quotes \" and ' and ü", "n": [1, None]},
        expires_at=NOW + timedelta(hours=1),
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )
    await accept(floor, [first])
    second = replace(first, id=order(floor.settings, merchant.shop).id, external_id="PAY-careful")
    await floor.accept(second)
    kept = (
        "shop_id, account_id, amount_minor, currency, recipient_sealed, recipient_masked, recipient_digest, callback_url,"
        " payment_data_digest, details, expires_at, traceparent, state, version"
    )
    one, other = await fetch(floor.owner, f"SELECT {kept} FROM payouts")
    assert one == other
    one, other = await fetch(floor.owner, "SELECT shop_id, rail, expires_at, lease_token FROM payout_due")
    assert one == other


async def _close_shop(floor: Desk, merchant: Merchant) -> list[Order]:
    await execute(floor.owner, "UPDATE shops SET status = 'inactive' WHERE id = :id", id=merchant.shop.id)
    return [order(floor.settings, merchant.shop)]


async def _suspend_merchant(floor: Desk, merchant: Merchant) -> list[Order]:
    await execute(floor.owner, "UPDATE merchants SET status = 'suspended' WHERE id = :id", id=merchant.shop.merchant_id)
    return [order(floor.settings, merchant.shop)]


async def _repeat(floor: Desk, merchant: Merchant) -> list[Order]:
    known = order(floor.settings, merchant.shop)
    await floor.accept(known)
    return [order(floor.settings, merchant.shop), replace(known, id=order(floor.settings, merchant.shop).id)]


async def _send_twins(floor: Desk, merchant: Merchant) -> list[Order]:
    one = order(floor.settings, merchant.shop)
    return [one, replace(one, id=order(floor.settings, merchant.shop).id)]


async def _spend_more(floor: Desk, merchant: Merchant) -> list[Order]:
    return [order(floor.settings, merchant.shop, amount_minor=FUNDS_MINOR // 2 + n) for n in range(2)]


async def _come_late(floor: Desk, merchant: Merchant) -> list[Order]:
    return [
        order(floor.settings, merchant.shop, expires_at=NOW + timedelta(hours=1)),
        order(floor.settings, merchant.shop, expires_at=NOW - timedelta(seconds=1)),
    ]


@pytest.mark.parametrize(
    "oppose",
    [_close_shop, _suspend_merchant, _repeat, _send_twins, _spend_more, _come_late],
    ids=lambda way: way.__name__,
)
async def test_what_something_speaks_against_is_left_as_it_is_and_neighbours_are_accepted(
    floor: Desk, oppose: Any
) -> None:
    merchant, neighbour = await floor.merchant(), await floor.merchant()
    opposed = await oppose(floor, merchant)
    before = await stored_ids(floor)
    beside = order(floor.settings, neighbour.shop)
    accepted_at = await accept(floor, [*opposed, beside])
    assert accepted_at[merchant.shop.account_id] is None
    assert accepted_at[neighbour.shop.account_id] is not None
    assert await stored_ids(floor) == [*before, beside.id]
    await assert_sound(floor.owner)


async def test_all_the_money_there_is_may_be_spent(floor: Desk) -> None:
    merchant = await floor.merchant()
    orders = [order(floor.settings, merchant.shop, amount_minor=FUNDS_MINOR // 2) for _ in range(2)]
    assert (await accept(floor, orders))[merchant.shop.account_id] is not None
    assert await floor.balance(merchant) == (FUNDS_MINOR, FUNDS_MINOR)


async def test_an_account_that_somebody_holds_is_left_out_or_awaited_for_a_while(floor: Desk) -> None:
    held, free = await floor.merchant(), await floor.merchant()
    orders = [order(floor.settings, merchant.shop) for merchant in (held, free)]
    async with locked(floor.owner, "SELECT FROM accounts WHERE id = $1 FOR UPDATE", held.shop.account_id):
        assert (await accept(floor, orders)).keys() == {free.shop.account_id}
        with pytest.raises(AccountBusy):
            await accept(floor, orders[:1], wait_seconds=0.01)
    assert await stored_ids(floor) == [orders[1].id]


async def accept_behind(floor: Desk, superuser: Superuser, before: Order, behind: Order) -> dict[int, datetime | None]:
    """Accept one while a transaction that has accepted another still holds their account, and then commits."""
    async with floor.gateway.connect() as holder:
        await accept_unopposed(holder, [before], wait_seconds=0, until=LATER)
        waiting = asyncio.create_task(accept(floor, [behind], wait_seconds=LOCK_WAIT_SECONDS))
        await until_waiting(superuser, "tests", "accept_unopposed")
        await holder.commit()
    return await waiting


async def test_what_the_holder_of_an_account_did_to_it_is_seen(floor: Desk, superuser: Superuser) -> None:
    merchant = await floor.merchant()
    before, behind = (order(floor.settings, merchant.shop) for _ in range(2))
    assert (await accept_behind(floor, superuser, before, behind))[merchant.shop.account_id] is not None
    assert await stored_ids(floor) == [before.id, behind.id]
    too_much = order(floor.settings, merchant.shop, amount_minor=FUNDS_MINOR - 3 * 1000 + 1)
    assert await accept_behind(floor, superuser, order(floor.settings, merchant.shop), too_much) == {
        merchant.shop.account_id: None
    }
    await assert_sound(floor.owner)


async def test_an_id_that_came_while_the_account_was_awaited_is_seen(floor: Desk, superuser: Superuser) -> None:
    merchant = await floor.merchant()
    come = order(floor.settings, merchant.shop)
    twin = replace(come, id=order(floor.settings, merchant.shop).id)
    assert await accept_behind(floor, superuser, come, twin) == {merchant.shop.account_id: None}
    assert await stored_ids(floor) == [come.id]
    await assert_sound(floor.owner)


async def test_what_comes_late_accepts_nothing(floor: Desk) -> None:
    merchant = await floor.merchant()
    late = order(floor.settings, merchant.shop)
    assert await accept(floor, [late], until=NOW - timedelta(seconds=1)) == {merchant.shop.account_id: None}
    assert await stored_ids(floor) == []


async def test_what_gets_its_account_late_accepts_nothing(floor: Desk, superuser: Superuser) -> None:
    """The server's clock is looked at under the lock: who had it before may have said that there is no such payout."""
    merchant = await floor.merchant()
    async with locked(floor.owner, "SELECT FROM accounts WHERE id = $1 FOR UPDATE", merchant.shop.account_id):
        until = datetime.now(UTC) + timedelta(seconds=1)
        waiting = asyncio.create_task(
            accept(floor, [order(floor.settings, merchant.shop)], wait_seconds=LOCK_WAIT_SECONDS, until=until)
        )
        await until_waiting(superuser, "tests", "accept_unopposed")
        await floor.one("SELECT pg_sleep_until(CAST(:until AS timestamptz))", until=until)
    assert await waiting == {merchant.shop.account_id: None}
    assert await stored_ids(floor) == []


async def test_each_alone_leaves_the_transactions_of_its_pool_alone(floor: Desk) -> None:
    merchant = await floor.merchant()
    pool = engine(floor.url, role="payouts_gateway")
    accepted, undone = (order(floor.settings, merchant.shop) for _ in range(2))
    for alone in (True, False) * 3:
        item = accepted if alone else undone
        async with (each_alone(pool) if alone else pool).connect() as tx:
            await accept_unopposed(tx, [item], wait_seconds=0, until=LATER)
    await pool.dispose()
    assert await stored_ids(floor) == [accepted.id]
