"""Rails as operators set them up: payouts of a rail that is off wait, and one rail never holds up another."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.db.engine import in_transaction
from common.db.rails import save_rail_status
from common.messaging.codec import WorkMessage
from common.messaging.topology import Work
from ops.simulator.moods import Behaviour, Manner
from tests.bank import RunningBank, add_rail, bank
from tests.factories import environment, execute, fetch
from tests.flows import Desk, assert_sound, desk
from tests.stack import eventually, stack
from tests.terminal import Terminal
from worker.rails.http import open_rail_session
from worker.rails.registry import Registry
from worker.settlement import Settler


@pytest.fixture
async def working(database_url: str) -> AsyncIterator[Desk]:
    async with desk(database_url) as opened:
        yield opened
        await assert_sound(opened.owner)


@asynccontextmanager
async def settler_of_the_table(working: Desk) -> AsyncIterator[Settler]:
    """A settler that knows its rails as workers do."""
    async with open_rail_session(connect_timeout_seconds=1.0, timeout_seconds=1.0) as session:
        settings = working.settings
        registry = Registry(working.worker, settings.keyring, settings, session)
        yield Settler(working.worker, settings.keyring, registry, settings, refresh_rails=registry.refresh)


async def switch(working: Desk, name: str, status: str) -> None:
    assert await in_transaction(working.owner, lambda tx: save_rail_status(tx, name, status))


async def test_payouts_of_a_rail_that_is_off_wait_and_go_on_when_it_is_on(working: Desk, tmp_path: Path) -> None:
    async with bank(tmp_path) as there:
        await add_rail(working, "bank", there.base_url)
        off, on = await working.merchant(rail="bank"), await working.merchant()
        waiting, other = await working.create(off), await working.create(on)
        await switch(working, "bank", "off")
        async with settler_of_the_table(working) as settler:
            await working.settle(settler)
            assert (await working.state(waiting), await working.state(other)) == ("queued", "success")
            assert there.ledger.payments() == []
            await switch(working, "bank", "on")

            async def paid() -> bool:
                await working.settle(settler)
                return await working.state(waiting) == "success"

            await eventually(paid, "the worker has heard that the rail is on")
        assert len(there.ledger.payments()) == 1


async def test_a_rail_that_a_worker_has_not_heard_of_fails_nothing(working: Desk) -> None:
    """In a rolling deploy old workers know fewer rails than the table."""
    await add_rail(working, "new-bank", "http://127.0.0.1:9")
    payout_id = await working.create(await working.merchant(rail="new-bank"))
    await working.settle(working.settler({}))
    assert await working.state(payout_id) == "queued"


async def test_a_rail_without_an_address_to_call_keeps_its_payouts_waiting(working: Desk) -> None:
    """A secret that does not open, say of a master key that is gone: nothing is sent, nothing is lost."""
    await add_rail(working, "bank", "http://127.0.0.1:9")
    await execute(working.owner, "UPDATE rails SET secret_sealed = 'x' WHERE name = 'bank'")
    payout_id = await working.create(await working.merchant(rail="bank"))
    async with settler_of_the_table(working) as settler:
        await working.settle(settler)
    assert await working.state(payout_id) == "queued"


async def test_a_rail_that_is_full_keeps_no_message_of_another_waiting(working: Desk, tmp_path: Path) -> None:
    async with bank(tmp_path) as there:
        await add_rail(working, "a-bank", there.base_url, concurrency=1)
        slow, quick = await working.merchant(rail="a-bank"), await working.merchant()
        there.script.submits += [Behaviour(Manner.SLOW)] * 10
        slow_ids, quick_ids = await working.create_many(slow, 10), await working.create_many(quick, 10)
        async with settler_of_the_table(working) as settler:
            assert await asyncio.wait_for(
                settler.claim_messages([WorkMessage(Work.SETTLE, tuple(slow_ids + quick_ids))]), 5
            )

            async def paid() -> bool:
                return {await working.state(payout_id) for payout_id in quick_ids} == {"success"}

            await eventually(paid, "the other rail's payouts are paid")
            assert len(there.ledger.payments()) <= 2
            settler.leave()
            await settler.drain(5)


async def test_a_bank_that_is_not_there_is_asked_again_later_under_the_same_reference(
    working: Desk, tmp_path: Path
) -> None:
    async with AsyncExitStack() as resources:
        there: RunningBank = await resources.enter_async_context(bank(tmp_path))
        await add_rail(working, "bank", there.base_url)
        payout_id = await working.create(await working.merchant(rail="bank"))
        async with settler_of_the_table(working) as settler:
            await resources.aclose()
            await working.settle(settler)
            assert await working.attempts(payout_id) == [("submit", "not_accepted")]
            assert await working.state(payout_id) == "queued"


# For operators


@pytest.fixture
def terminal(database_url: str) -> Terminal:
    return Terminal(environment(database_url))


async def test_an_operator_brings_a_bank_in_and_money_goes_through_it(
    terminal: Terminal, working: Desk, database_url: str, tmp_path: Path
) -> None:
    async with bank(tmp_path) as there, stack(database_url) as running:
        added = (await terminal.run("rail", "add", "acme", "--base-url", there.base_url + "/", "--json")).document
        assert (added["name"], added["base_url"], added["authoritative"]) == ("acme", there.base_url, False)
        there.bank.secret = added["secret"]
        merchant = await working.merchant()
        shop = f"{merchant.code}/shop-001"
        moved = await terminal.run("shop", "rail", shop, "acme", "--reason", "cheaper", "--actor", "ann", "--json")
        assert moved.document["rail"] == "acme"
        (written,) = await fetch(
            working.owner, "SELECT actor, subject, reason, detail FROM audit WHERE action = 'shop.rail'"
        )
        assert tuple(written) == ("ann", shop, "cheaper", {"rail": "acme"})
        payout_id = await working.create(replace(merchant, shop=replace(merchant.shop, rail="acme")))
        await running.start("worker", "settle")

        async def paid() -> bool:
            return await working.state(payout_id) == "success"

        await eventually(paid, "the bank has paid")
        (listed,) = [
            rail for rail in (await terminal.run("rail", "list", "--json")).document["rails"] if rail["name"] == "acme"
        ]
        assert (listed["status"], listed["unfinished"], "secret" in str(listed)) == ("on", 0, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rail", "add", "Bank", "--base-url", "http://b.example"], ["a-z 0-9"]),
        (["rail", "add", "sandbox", "--base-url", "http://b.example"], ["already"]),
        (["rail", "add", "bank", "--base-url", "ftp://b.example"], ["http(s)"]),
        (["rail", "add", "bank", "--base-url", "http://b.example/?x=1"], ["query"]),
        (["rail", "off", "nobody", "--reason", "x"], ["no rail nobody"]),
        (["rail", "remove", "nobody", "--reason", "x"], ["no rail nobody"]),
        (["rail", "remove", "sandbox", "--reason", "x"], ["still name it"]),
        (["shop", "rail", "dhaka/shop-001", "nobody", "--reason", "x"], ["no rail nobody"]),
    ],
    ids=" ".join,
)
async def test_what_cannot_be_is_refused_in_words(
    terminal: Terminal, working: Desk, arguments: list[str], words: list[str]
) -> None:
    await working.merchant()
    (await terminal.run(*arguments)).assert_refused(*words)


async def test_switching_is_written_down_with_its_reason(terminal: Terminal, working: Desk) -> None:
    await terminal.run("rail", "off", "sandbox", "--reason", "maintenance", "--actor", "ann")
    rows = await fetch(working.owner, "SELECT actor, action, subject, reason FROM audit WHERE action LIKE 'rail%'")
    assert [tuple(row) for row in rows] == [("ann", "rail.off", "sandbox", "maintenance")]
    assert (await working.one("SELECT status FROM rails WHERE name = 'sandbox'")).status == "off"
    await terminal.run("rail", "on", "sandbox", "--reason", "over", "--actor", "ann")
    assert (await working.one("SELECT status FROM rails WHERE name = 'sandbox'")).status == "on"


async def test_a_rail_that_nobody_names_can_be_removed(terminal: Terminal, working: Desk) -> None:
    await add_rail(working, "bank", "http://127.0.0.1:9")
    removed: dict[str, Any] = (await terminal.run("rail", "remove", "bank", "--reason", "closed", "--json")).document
    assert removed == {"name": "bank", "removed": True}
    assert await working.count("rails", "name = 'bank'") == 0
