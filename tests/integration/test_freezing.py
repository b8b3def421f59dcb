"""A frozen shop: nothing more is accepted, nothing is sent that was not sent, and nothing that has begun is left alone."""

import asyncio
from typing import Final

from common.errors import ShopNotFound
from gateway.deciding import Accepted, decide_batch
from tests.factories import Merchant, execute, fetch, order
from tests.faults.locks import Superuser, locked, until_waiting
from tests.flows import LOCK_WAIT_SECONDS, Desk, assert_sound
from tests.integration.test_stuck_cli import look
from tests.terminal import Terminal

BECAUSE: Final = ("--reason", "their key is on the internet", "--actor", "alice")


def shop_of(merchant: Merchant) -> str:
    return f"{merchant.code}/{merchant.shop.code}"


async def test_nothing_more_is_accepted_and_what_waits_is_sent_when_it_goes_on(terminal: Terminal, floor: Desk) -> None:
    merchant, other = await floor.merchant(), await floor.merchant()
    waiting, theirs = await floor.create(merchant), await floor.create(other)

    (await terminal.run("shop", "freeze", shop_of(merchant), *BECAUSE)).assert_shown("inactive", BECAUSE[1])
    (refused,) = await floor.accept(order(floor.settings, merchant.shop))
    await floor.settle()

    assert isinstance(refused, ShopNotFound)
    assert (await floor.state(waiting), await floor.state(theirs)) == ("queued", "success")
    assert await floor.attempts(waiting) == []
    assert (await floor.balance(merchant))[1] == 1000, "its money stays held"
    await floor.make_due(waiting)
    assert await floor.claim() == [], "asked again, it still waits"
    due = await floor.one("SELECT lease_token, due_at > now() + interval '30 s' AS later FROM payout_due")
    assert tuple(due) == (None, True)
    found = await look(terminal)
    assert {key: (row["shop"], row["note"]) for key, row in found.items()} == {
        ("shop_frozen", "sandbox"): (shop_of(merchant), "1 of them")
    }
    assert found["shop_frozen", "sandbox"]["do"].startswith(f"payouts shop unfreeze {shop_of(merchant)} ")

    (await terminal.run("shop", "unfreeze", shop_of(merchant), *BECAUSE)).assert_shown("active")
    (accepted,) = await floor.accept(order(floor.settings, merchant.shop))
    await floor.make_due()
    await floor.settle()

    assert isinstance(accepted, Accepted)
    assert await floor.state(waiting) == "success"
    audited = await fetch(floor.owner, "SELECT actor, action, subject, reason FROM audit ORDER BY id DESC LIMIT 2")
    assert [tuple(row) for row in audited] == [
        ("alice", "shop.unfreeze", shop_of(merchant), BECAUSE[1]),
        ("alice", "shop.freeze", shop_of(merchant), BECAUSE[1]),
    ]
    await assert_sound(floor.owner)


async def test_what_a_rail_has_taken_ends_as_it_ends(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant()
    in_doubt = await floor.create(merchant, recipient="017000000201")
    hasty, settler = floor.settler(rail_timeout_seconds=1.0), floor.settler()
    await hasty.run_round()
    await hasty.drain(20.0)
    await execute(floor.owner, "UPDATE payout_due SET due_at = now() + interval '1 hour'")
    taken = await floor.create(merchant, recipient="017000000001")
    refused = await floor.create(merchant, recipient="017000000120")
    await settler.run_round()
    await settler.drain(20.0)
    states = [await floor.state(payout_id) for payout_id in (taken, in_doubt, refused)]
    assert states == ["submitted", "verifying", "queued"]

    (await terminal.run("shop", "freeze", shop_of(merchant), *BECAUSE)).assert_shown()
    await floor.make_due()
    await floor.settle(settler)

    states = [await floor.state(payout_id) for payout_id in (taken, in_doubt, refused)]
    assert states == ["success", "success", "queued"]
    assert await floor.attempts(refused) == [("submit", "not_accepted")]
    await assert_sound(floor.owner)


async def test_once_it_is_frozen_no_create_that_was_under_way_comes_after(
    terminal: Terminal, floor: Desk, superuser: Superuser
) -> None:
    merchant = await floor.merchant()
    async with floor.gateway.begin() as tx:
        (verdict,) = await decide_batch(tx, [order(floor.settings, merchant.shop)], wait_seconds=LOCK_WAIT_SECONDS)
        freezing = asyncio.create_task(terminal.run("shop", "freeze", shop_of(merchant), *BECAUSE))
        await until_waiting(superuser, "cli", "lock_accounts")
        assert not freezing.done()
    (await freezing).assert_shown()
    (late,) = await floor.accept(order(floor.settings, merchant.shop))

    assert isinstance(verdict, Accepted)
    assert isinstance(late, ShopNotFound)


async def test_an_account_that_somebody_holds_is_not_frozen_half(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant()
    async with locked(floor.owner, "SELECT 1 FROM accounts WHERE id = $1 FOR UPDATE", merchant.shop.account_id):
        (await terminal.run("shop", "freeze", shop_of(merchant), *BECAUSE)).assert_refused("locked", "repeat")

    assert await floor.count("shops", "status <> 'active'") == await floor.count("audit", "action = 'shop.freeze'") == 0


async def test_freezing_what_is_frozen_or_nowhere_is_refused_and_not_written_down(
    terminal: Terminal, floor: Desk
) -> None:
    merchant = await floor.merchant()

    (await terminal.run("shop", "unfreeze", shop_of(merchant), *BECAUSE)).assert_refused("is not frozen")
    (await terminal.run("shop", "freeze", shop_of(merchant), *BECAUSE)).assert_shown()
    (await terminal.run("shop", "freeze", shop_of(merchant), *BECAUSE)).assert_refused("frozen already")
    (await terminal.run("shop", "freeze", "nobody/shop-001", *BECAUSE)).assert_refused("no shop")
    (await terminal.run("shop", "freeze", shop_of(merchant))).assert_refused("--reason")

    assert await floor.count("audit", "action LIKE 'shop.%freeze'") == 1


async def test_a_frozen_shop_with_nothing_unfinished_is_no_reason_to_worry(terminal: Terminal, floor: Desk) -> None:
    await floor.merchant()
    await execute(floor.owner, "UPDATE shops SET status = 'inactive'")

    assert await look(terminal) == {}
