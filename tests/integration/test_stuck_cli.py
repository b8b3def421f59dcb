"""What does not go on by itself is shown with what to do about it, and nothing that goes on is."""

import json
import re
from inspect import getsource
from typing import Any, Final
from uuid import UUID, uuid4

import click
import pytest

from common.db import stuck
from common.db.engine import in_transaction
from common.db.rail_events import NewDiscrepancy, NewRailEvent, append_rail_events, open_discrepancies
from common.domain.ids import EVENT, PAYIN, PAYOUT, new_id, render_id
from ops.cli import cli
from ops.cli.stuck import ADVICE
from tests.broker import Broker
from tests.conftest import Server
from tests.factories import environment, execute
from tests.flows import Desk
from tests.integration.test_parked import open_lot
from tests.terminal import Terminal
from tests.waiting import add_waiting, lane_of

URL: Final = "http://127.0.0.1:9/hook"
AT_ONCE: Final = ("--overdue", "0", "--doubt", "0")


async def look(terminal: Terminal, *options: object) -> dict[tuple[str, str | None], Any]:
    """What is stuck, by reason and id; the exit code says whether anything is."""
    ended = await terminal.run("stuck", *options, "--json")
    document = json.loads(ended.out)
    assert ended.code == (1 if document["stuck"] else 0), ended
    return {(row["reason"], row["id"]): row for row in document["stuck"]}


async def told(floor: Desk, **fields: Any) -> tuple[UUID, UUID]:
    """A payout that has ended, and the event that waits to be told."""
    merchant = await floor.merchant()
    payout_id = await floor.create(merchant, callback_url=URL, **fields)
    await floor.settle()
    event = await floor.one("SELECT id FROM events WHERE payout_id = :id", id=payout_id)
    return payout_id, event.id


# What it says of itself.


def test_every_reason_has_its_advice_and_every_advice_a_reason() -> None:
    given = set(re.findall(r"(?:SELECT|THEN|ELSE) '([a-z_]+)'", getsource(stuck)))
    assert given == set(ADVICE) - {"parked", "broker"}


def test_the_commands_that_are_advised_exist() -> None:
    commands = [words for advice in ADVICE.values() for words in re.findall(r"payouts ([a-z][a-z| ]*)", advice.do)]
    assert len(commands) > 10
    for words in commands:
        group: click.Command = cli
        for word in words.split():
            if not isinstance(group, click.Group):
                break
            names = word.split("|")
            assert set(names) <= set(group.commands), words
            group = group.commands[names[0]]
        else:
            assert not isinstance(group, click.Group), words


async def test_nothing_is_stuck_is_exit_code_0(terminal: Terminal, floor: Desk) -> None:
    await told(floor)
    merchant = await floor.merchant()
    await floor.create(merchant)
    await floor.create_payin(merchant)

    (await terminal.run("stuck")).assert_shown("none")
    assert (await terminal.run("stuck", "--json")).document == {"stuck": [], "more": []}


async def test_something_is_stuck_is_exit_code_1_and_people_read_what_to_do(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant()
    payout_id = await floor.create(merchant, recipient="017000000200")
    await floor.settle(floor.settler(rail_timeout_seconds=1.0))

    assert await look(terminal) == {}, "an hour has not passed"
    ended = await terminal.run("stuck", *AT_ONCE)

    assert ended.code == 1
    assert f"payouts payout resolve {render_id(PAYOUT, payout_id)}" in ended.out
    assert f"{merchant.code}/shop-001" in ended.out
    assert ended.err == "payouts: 1 stuck\n"
    assert "01700" not in ended.out


@pytest.mark.parametrize(
    "options", [("--overdue", "soon"), ("--doubt", "1"), ("--overdue", "31d"), ("--limit", "0"), ("--limit", "1001")]
)
async def test_an_age_that_is_none_is_refused(terminal: Terminal, options: tuple[str, str]) -> None:
    (await terminal.run("stuck", *options)).assert_refused(options[0])


# Payouts.


async def test_payouts_that_nobody_takes_are_counted_for_each_rail_and_shop(terminal: Terminal, floor: Desk) -> None:
    some, few = await floor.merchant(), await floor.merchant(rail="a-bank")
    await floor.create_many(some, 3)
    await floor.create_many(few, 2)
    rail = "INSERT INTO rails (id, name, kind, status) VALUES (gen_random_uuid(), 'a-bank', 'sandbox', 'off')"
    await execute(floor.owner, rail)
    await execute(floor.owner, "UPDATE payout_due SET due_at = now() - interval '10 minutes'")

    found = await look(terminal)

    assert set(found) == {("payouts_not_taken", "sandbox"), ("rail_off", "a-bank")}
    taken, off = found["payouts_not_taken", "sandbox"], found["rail_off", "a-bank"]
    assert (taken["shop"], taken["note"]) == (f"{some.code}/shop-001", "3 of them")
    assert (off["shop"], off["note"]) == (f"{few.code}/shop-001", "2 of them")
    assert off["do"].startswith("payouts rail on a-bank ")
    assert await look(terminal, "--overdue", "11m") == {}

    await floor.claim()
    await execute(floor.owner, "UPDATE payout_due SET due_at = now() - interval '10 minutes'")
    assert set(await look(terminal)) == {("payout_lease_lapsed", "sandbox"), ("rail_off", "a-bank")}


async def test_payouts_of_a_rail_that_is_gone(terminal: Terminal, floor: Desk) -> None:
    await floor.create(await floor.merchant(rail="no-bank"))
    await execute(floor.owner, "UPDATE payout_due SET due_at = now() - interval '10 minutes'")

    assert set(await look(terminal)) == {("rail_gone", "no-bank")}


async def test_a_payout_whose_rail_took_it_and_says_no_more(terminal: Terminal, floor: Desk) -> None:
    payout_id = await floor.create(await floor.merchant(), recipient="017000000001")
    settler = floor.settler({"sandbox": floor.sandbox(settle_seconds=3_600)})
    await settler.run_round()
    await settler.drain(20.0)
    assert await floor.state(payout_id) == "submitted"

    assert await look(terminal) == {}
    assert set(await look(terminal, "--doubt", "0")) == {("payout_without_word", render_id(PAYOUT, payout_id))}


async def test_what_people_have_to_say_is_there_too(terminal: Terminal, floor: Desk) -> None:
    payout_id = await floor.create(await floor.merchant(), recipient="017000000200")
    await floor.settle(floor.settler(rail_timeout_seconds=1.0))
    rendered = render_id(PAYOUT, payout_id)
    evidence = ("--evidence", "a letter of the bank", "--actor", "alice")
    (await terminal.run("payout", "resolve", rendered, "--success", *evidence)).assert_shown("waits")
    doubt = NewDiscrepancy(new_id(), "sandbox", "x-1", None, None, None, "paid", "reference")
    await in_transaction(floor.worker, lambda tx: open_discrepancies(tx, [doubt]))

    found = await look(terminal)

    assert set(found) == {("resolution_open", rendered), ("discrepancy_open", str(doubt.id))}
    assert found["resolution_open", rendered]["note"] == "alice says paid"
    assert found["discrepancy_open", str(doubt.id)]["note"] == "sandbox says paid of x-1"


async def test_a_word_of_a_rail_that_nobody_applied(terminal: Terminal, floor: Desk) -> None:
    word = NewRailEvent(rail="sandbox", event_id="e-1", reference="po_none", outcome="paid")
    later = NewRailEvent(rail="sandbox", event_id="e-2", reference="po_none", outcome="paid", due_in_seconds=86_400)
    await in_transaction(floor.owner, lambda tx: append_rail_events(tx, [word, later]))

    assert await look(terminal) == {}
    found = await look(terminal, "--overdue", "0")
    assert set(found) == {("rail_event_not_applied", "e-1")}
    assert found["rail_event_not_applied", "e-1"]["note"] == "sandbox: paid po_none"


# Payins.


async def test_payins_that_nobody_asks_about_and_those_past_their_end(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant()
    payin_id = await floor.create_payin(merchant, look_up_in_seconds=3_600.0)
    assert await look(terminal, *AT_ONCE) == {}

    await execute(floor.owner, "ALTER TABLE payins DISABLE TRIGGER USER")
    await execute(floor.owner, "UPDATE payins SET expires_at = now() - interval '1 minute'")
    assert set(await look(terminal, "--doubt", "0")) == {("payin_undecided", render_id(PAYIN, payin_id))}
    await execute(floor.owner, "UPDATE payin_due SET due_at = now() - interval '10 minutes'")
    assert set(await look(terminal)) == {("payins_not_asked", "sandbox")}
    await execute(floor.owner, "UPDATE rails SET status = 'off'")
    assert set(await look(terminal)) == {("rail_off_for_payins", "sandbox")}


# Callbacks.


async def test_callbacks_that_were_put_aside_are_found_and_listed(terminal: Terminal, floor: Desk) -> None:
    payout_id, event_id = await told(floor)
    await told(floor)
    await execute(
        floor.owner,
        "UPDATE callback_due SET due_at = 'infinity', in_lane = true, lost_leases = 5 WHERE event_id = :id",
        id=event_id,
    )

    found = await look(terminal)
    listed = (await terminal.run("callbacks", "list", "--state", "put-aside", "--json")).document["callbacks"]
    of_payout = await terminal.run("callbacks", "list", "--state", "put-aside", "--payout", payout_id, "--json")
    others = await terminal.run("callbacks", "list", "--state", "pending", "--json")

    assert set(found) == {("callback_put_aside", render_id(EVENT, event_id))}
    assert found["callback_put_aside", render_id(EVENT, event_id)]["note"] == "5 workers fell silent over it"
    assert [(row["event"], row["state"], row["due_at"]) for row in listed] == [
        (render_id(EVENT, event_id), "pending", None)
    ]
    assert of_payout.document["callbacks"] == listed
    assert len(others.document["callbacks"]) == 2
    again = await terminal.run("callbacks", "resend", render_id(EVENT, event_id), "--reason", "x", "--actor", "a")
    again.assert_shown()
    assert await look(terminal) == {}


async def test_leases_of_dead_workers_lanes_that_nobody_serves_and_lanes_that_are_held(
    terminal: Terminal, floor: Desk, server: Server, database_url: str
) -> None:
    _, event_id = await told(floor)
    await execute(
        floor.owner,
        "UPDATE callback_due SET lease_token = :token, due_at = now() - interval '10 minutes'",
        token=uuid4(),
    )
    merchant = await floor.merchant()
    await add_waiting(server, database_url, merchant, ["http://ready"], overdue_seconds=600)
    await add_waiting(server, database_url, merchant, ["http://fresh"], in_lane=False, overdue_seconds=600)
    await add_waiting(server, database_url, merchant, ["http://held"], overdue_seconds=600)
    await execute(
        floor.owner,
        "UPDATE callback_lanes SET held_at = now(), held_reason = 'a call', ready_at = 'infinity' WHERE origin = 'http://held'",
    )
    lanes = {name: str((await lane_of(floor, merchant, f"http://{name}")).id) for name in ("ready", "fresh", "held")}

    found = await look(terminal)

    assert set(found) == {
        ("callback_lease_lapsed", render_id(EVENT, event_id)),
        ("callbacks_not_taken", lanes["ready"]),
        ("callbacks_not_taken", lanes["fresh"]),
        ("lane_held", lanes["held"]),
    }
    assert found["lane_held", lanes["held"]]["note"] == "http://held: a call"
    assert found["lane_held", lanes["held"]]["do"].startswith(f"payouts lane release {lanes['held']} ")


# As much as fits.


async def test_of_each_kind_so_many_are_shown_and_it_is_said_that_there_are_more(
    terminal: Terminal, floor: Desk, server: Server, database_url: str
) -> None:
    origins = [f"http://shop-{number}" for number in range(4)]
    await add_waiting(server, database_url, await floor.merchant(), origins, overdue_seconds=600)
    await floor.create(await floor.merchant())
    await execute(floor.owner, "UPDATE payout_due SET due_at = now() - interval '10 minutes'")

    ended = await terminal.run("stuck", "--limit", 3, "--json")

    document = json.loads(ended.out)
    assert [row["reason"] for row in document["stuck"]] == ["payouts_not_taken", *["callbacks_not_taken"] * 3]
    assert document["more"] == ["callbacks_not_taken"]
    assert ended.err == "payouts: 4 stuck; there are more of: callbacks_not_taken (--limit)\n"


# Messages.


async def test_parked_messages_are_counted(database_url: str, broker: Broker, amqp_prefix: str) -> None:
    async with open_lot(database_url, broker, amqp_prefix) as lot:
        variables = {"AMQP_URL": broker.url, "PAYOUTS_AMQP_QUEUE_PREFIX": amqp_prefix}
        terminal = Terminal(environment(database_url, **variables))
        assert await look(terminal) == {}
        for _ in range(2):
            await lot.park(b"poison")
        found = await look(terminal)
    assert [(key[0], row["note"]) for key, row in found.items()] == [("parked", "2 of them")]


async def test_a_broker_out_of_reach_is_told_and_keeps_nothing_else_from_being_told(
    database_url: str, floor: Desk
) -> None:
    await floor.create(await floor.merchant())
    await execute(floor.owner, "UPDATE payout_due SET due_at = now() - interval '10 minutes'")
    terminal = Terminal(environment(database_url, AMQP_URL="amqp://guest:hunter2@127.0.0.1:1/"))

    found = await look(terminal)

    assert [reason for reason, _ in found] == ["payouts_not_taken", "broker"]
    assert "hunter2" not in json.dumps(list(found.values()))


async def test_whoever_may_only_read_may_look(database_url: str, floor: Desk) -> None:
    await floor.merchant()
    (await Terminal({"DATABASE_URL": database_url}).run("stuck")).assert_shown("none")
