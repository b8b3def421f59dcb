"""How payouts end that no rail tells of: by the word of two operators, and by nothing less."""

import asyncio
from uuid import UUID

import pytest
from prometheus_client import REGISTRY

from common.domain.ids import PAYOUT, render_id
from tests.conftest import Server
from tests.factories import execute
from tests.flows import Desk, assert_sound, forge
from tests.terminal import Terminal
from worker.hearing import hear
from worker.sweep import Sweeper

SILENT = "01712300200"
LATE = "01712300001"
URL = "http://127.0.0.1:9/told"
ALICE = ("--actor", "alice", "--evidence", "the bank's letter of Monday")
BOB = ("--actor", "bob", "--evidence", "the bank's statement, line 7")


@pytest.fixture
async def doubtful(floor: Desk) -> UUID:
    """A payout whose rail never answers."""
    payout_id = await floor.create(await floor.merchant(), recipient=SILENT, callback_url=URL, external_id="PAY-1")
    await floor.settle(floor.settler(rail_timeout_seconds=1.0))
    assert await floor.state(payout_id) == "verifying"
    return payout_id


async def held_minor(floor: Desk) -> int:
    return int((await floor.one("SELECT held_minor FROM accounts")).held_minor)


@pytest.mark.parametrize(("says", "status", "posted_change"), [("--success", "success", -1), ("--failed", "failed", 0)])
async def test_what_two_operators_say_ends_the_payout_like_a_rails_word(
    terminal: Terminal, floor: Desk, doubtful: UUID, says: str, status: str, posted_change: int
) -> None:
    before = await floor.one("SELECT posted_minor, held_minor FROM accounts")

    first = await terminal.run("payout", "resolve", "PAY-1", says, *ALICE)
    first.assert_shown("waits for another operator", "alice")
    assert (await hear(floor.worker)).count == 0
    assert await floor.state(doubtful) == "verifying"
    assert await held_minor(floor) == before.held_minor

    (await terminal.run("payout", "resolve", render_id(PAYOUT, doubtful), says, *BOB)).assert_shown("confirmed", "bob")
    assert (await hear(floor.worker)).count == 1

    assert await floor.state(doubtful) == status
    after = await floor.one("SELECT posted_minor, held_minor FROM accounts")
    assert after.held_minor == 0
    assert after.posted_minor == before.posted_minor + posted_change * before.held_minor
    assert await floor.count("callbacks") == 1
    await assert_sound(floor.owner)
    story = await terminal.run("payout", "show", "PAY-1")
    story.assert_shown("alice", "bob", "the bank's letter of Monday", "the bank's statement, line 7")


async def test_what_a_rail_has_taken_and_is_silent_about_comes_to_the_operators_too(
    terminal: Terminal, floor: Desk, server: Server
) -> None:
    payout_id = await floor.create(await floor.merchant(), recipient=LATE, external_id="PAY-1")
    await floor.settle()
    assert await floor.state(payout_id) == "submitted"
    await execute(floor.owner, "UPDATE sandbox.payments SET state = 'absent', authoritative = false")
    await floor.make_due()
    await floor.settle()
    assert await floor.state(payout_id) == "submitted", "it may be silent for a while"
    (await terminal.run("payout", "resolve", "PAY-1", "--success", *ALICE)).assert_refused("submitted")

    await forge(server, floor.url, "UPDATE payout_attempts SET finished_at = finished_at - interval '25 hours'")
    await floor.make_due()
    await floor.settle()
    assert await floor.state(payout_id) == "verifying"
    (await terminal.run("payout", "waiting")).assert_shown("PAY-1")

    (await terminal.run("payout", "resolve", "PAY-1", "--success", *ALICE)).assert_shown("waits")
    (await terminal.run("payout", "resolve", "PAY-1", "--success", *BOB)).assert_shown("confirmed")
    await hear(floor.worker)
    assert await floor.state(payout_id) == "success"
    await assert_sound(floor.owner)


async def test_contradictory_words_are_none(terminal: Terminal, floor: Desk, doubtful: UUID) -> None:
    for words in (("--success", "--failed"), ("--failed", "--withdraw"), ()):
        (await terminal.run("payout", "resolve", "PAY-1", *words, *ALICE)).assert_refused("one alone")
    assert await floor.count("resolutions") == 0


async def test_one_operator_is_not_two(terminal: Terminal, floor: Desk, doubtful: UUID) -> None:
    (await terminal.run("payout", "resolve", "PAY-1", "--success", *ALICE)).assert_shown("waits")
    for name in ("alice", "ALICE"):
        again = await terminal.run("payout", "resolve", "PAY-1", "--success", "--actor", name, "--evidence", "again")
        again.assert_refused("alice has said so already")
    (await terminal.run("payout", "resolve", "PAY-1", "--failed", *BOB)).assert_refused("alice said paid")
    assert await floor.count("rail_events") == 0
    assert await floor.state(doubtful) == "verifying"


async def test_what_was_said_can_be_taken_back_until_it_is_confirmed(
    terminal: Terminal, floor: Desk, doubtful: UUID
) -> None:
    (await terminal.run("payout", "resolve", "PAY-1", "--withdraw", *BOB)).assert_refused("no resolution")
    (await terminal.run("payout", "resolve", "PAY-1", "--success", *ALICE)).assert_shown("waits")
    (await terminal.run("payout", "resolve", "PAY-1", "--withdraw", *ALICE)).assert_shown("withdrawn")
    (await terminal.run("payout", "resolve", "PAY-1", "--failed", *ALICE)).assert_shown("waits")
    (await terminal.run("payout", "resolve", "PAY-1", "--failed", *BOB)).assert_shown("confirmed")
    (await terminal.run("payout", "resolve", "PAY-1", "--withdraw", *BOB)).assert_refused("no resolution")
    await hear(floor.worker)
    assert await floor.state(doubtful) == "failed"


async def test_only_what_is_verifying_is_resolved_by_people(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant()
    paid = await floor.create(merchant)
    await floor.settle()
    queued = await floor.create(merchant)
    for payout_id, stage in ((paid, "success"), (queued, "queued")):
        asked = await terminal.run("payout", "resolve", render_id(PAYOUT, payout_id), "--failed", *ALICE)
        asked.assert_refused(f"the payout is {stage}")
    asked = await terminal.run("payout", "resolve", "PAY-9", "--failed", *ALICE)
    asked.assert_refused("no payout PAY-9")
    assert (await terminal.run("payout", "resolve", "PAY-9", *ALICE)).code == 2
    assert await floor.count("resolutions") == 0


async def test_when_the_rail_was_quicker_their_word_moves_no_money(
    terminal: Terminal, floor: Desk, doubtful: UUID
) -> None:
    for operator in (ALICE, BOB):
        await terminal.run("payout", "resolve", "PAY-1", "--failed", *operator)
    await execute(
        floor.worker,
        "INSERT INTO rail_events (rail, event_id, reference, outcome, due_at)"
        " SELECT 'sandbox', 'e-1', reference, 'paid', now() - interval '1 minute' FROM payout_attempts LIMIT 1",
    )
    while (await hear(floor.worker)).count:
        pass

    assert await floor.state(doubtful) == "success"
    discrepancy = await floor.one("SELECT rail, kind, word, state FROM discrepancies")
    assert tuple(discrepancy) == ("operators", "status", "declined", "success")
    await assert_sound(floor.owner)


async def test_a_late_word_of_the_rail_against_theirs_is_a_discrepancy(
    terminal: Terminal, floor: Desk, doubtful: UUID
) -> None:
    for operator in (ALICE, BOB):
        await terminal.run("payout", "resolve", "PAY-1", "--failed", *operator)
    await hear(floor.worker)
    await execute(
        floor.worker,
        "INSERT INTO rail_events (rail, event_id, reference, outcome)"
        " SELECT 'sandbox', 'e-1', reference, 'paid' FROM payout_attempts WHERE attempt_no = 1",
    )
    await hear(floor.worker)

    assert await floor.state(doubtful) == "failed"
    assert tuple(await floor.one("SELECT kind, word, state FROM discrepancies")) == ("status", "paid", "failed")
    await assert_sound(floor.owner)


async def test_two_that_begin_at_the_same_time_are_not_a_first_and_a_second(
    terminal: Terminal, floor: Desk, doubtful: UUID
) -> None:
    ended = await asyncio.gather(
        *(terminal.run("payout", "resolve", "PAY-1", "--success", *operator) for operator in (ALICE, BOB))
    )
    row = await floor.one("SELECT count(*) AS n, bool_or(is_confirmed) AS confirmed FROM resolutions")
    assert row.n == 1
    # One came after the other, or one was refused.
    assert (row.confirmed is True) == all(command.code == 0 for command in ended)


async def test_what_waits_for_people_is_listed_and_counted(terminal: Terminal, floor: Desk, doubtful: UUID) -> None:
    await floor.create(await floor.merchant())
    (await terminal.run("payout", "resolve", "PAY-1", "--success", *ALICE)).assert_shown("waits")

    (shown,) = (await terminal.run("payout", "waiting", "--json")).document["payouts"]
    assert (shown["payout"], shown["external_id"], shown["rail"]) == (render_id(PAYOUT, doubtful), "PAY-1", "sandbox")
    assert shown["proposed"] == "paid by alice"
    since = shown["verifying_since"]

    await Sweeper(floor.worker).run_round()
    values = {
        name: REGISTRY.get_sample_value(name)
        for name in ("payouts_verifying", "payouts_open_resolutions", "payouts_open_discrepancies")
    }
    assert values == {"payouts_verifying": 1, "payouts_open_resolutions": 1, "payouts_open_discrepancies": 0}
    assert (REGISTRY.get_sample_value("payouts_oldest_verifying_age_seconds") or 0) > 0

    # A look-up that learns nothing does not make the doubt younger; one that learns ends it.
    await floor.make_due()
    await floor.settle(floor.settler(rail_timeout_seconds=1.0))
    (still,) = (await terminal.run("payout", "waiting", "--json")).document["payouts"]
    assert (still["verifying_since"], still["look_ups"]) == (since, shown["look_ups"] + 1)
    await terminal.run("payout", "resolve", "PAY-1", "--success", *BOB)
    await hear(floor.worker)
    (await terminal.run("payout", "waiting")).assert_shown("none")
