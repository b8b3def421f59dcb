"""What operators do to lanes, and how they have many callbacks sent again."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Final
from uuid import UUID, uuid4

import pytest

from common.db.engine import Engine, Tx, in_transaction
from common.db.lanes import Lease, claim_in_turn
from common.db.replays import Chosen, Replay, begin_replay, find_page, replay_page
from common.domain.ids import EVENT, render_id
from tests.conftest import Server
from tests.factories import Merchant, engine, environment, execute, fetch
from tests.faults.proxy import CommitFault, proxy
from tests.flows import Desk, assert_sound, pass_callback_time, take_callbacks
from tests.stack import eventually
from tests.terminal import Terminal
from tests.waiting import add_waiting, assert_lanes_sound, lane_of, room
from worker.callbacks.recording import Ended, record_attempts
from worker.callbacks.send import Attempt

BECAUSE: Final = ("--reason", "their server is back", "--actor", "alice")
URL: Final = "http://127.0.0.1:9/hook"
# The console script, which whoever runs the tests in the background would leave deaf to SIGINT.
_INTERRUPTIBLE: Final = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ops.cli import main; main()"
)


@pytest.fixture
async def ops(database_url: str) -> AsyncIterator[Engine]:
    """Somebody who acts as operators do."""
    pool = engine(database_url, role="payouts_ops")
    yield pool
    await pool.dispose()


async def tell(floor: Desk, merchant: Merchant, count: int, url: str = URL) -> list[UUID]:
    """Payouts that came to an end; the ids of their events, in order."""
    before = [row.id for row in await fetch(floor.owner, "SELECT id FROM events")]
    await floor.create_many(merchant, count, callback_url=url)
    await floor.settle()
    rows = await fetch(floor.owner, "SELECT id FROM events WHERE NOT id = ANY (:known) ORDER BY id", known=before)
    return [row.id for row in rows]


async def deliver(floor: Desk, status: int) -> list[UUID]:
    """One attempt at everything that waits, at the last step of the schedule; the events."""
    await execute(floor.owner, "UPDATE callback_due SET step = 14 WHERE lease_token IS NULL")
    attempt = Attempt(status, None if status < 300 else "http_5xx", b"", "127.0.0.1", 5, 0.0)

    async def attempt_some(tx: Tx) -> list[UUID]:
        token = uuid4()
        claimed = await take_callbacks(tx, token, 100)
        if claimed:
            await record_attempts(tx, [Ended(callback, token, attempt, 0.0, 0.0) for callback in claimed], now=0.0)
        return [callback.event_id for callback in claimed]

    told: list[UUID] = []
    while True:
        await pass_callback_time(floor.owner)
        some = await in_transaction(floor.worker, attempt_some)
        if not some:
            return told
        told += some


async def pending(floor: Desk) -> list[UUID]:
    rows = await fetch(floor.owner, "SELECT event_id FROM callbacks WHERE state = 'pending' ORDER BY event_id")
    return [row.event_id for row in rows]


# Lanes.


async def test_lanes_are_listed_with_what_they_are_and_why(
    terminal: Terminal, floor: Desk, server: Server, database_url: str
) -> None:
    merchant, other = [await floor.merchant() for _ in range(2)]
    for origin in ("http://failing", "http://held", "http://open", "http://resting"):
        await add_waiting(server, database_url, merchant, [origin], 3)
    await add_waiting(server, database_url, other, ["http://other"], 1)
    for change, origin in (
        ("failing_since = now(), opened = 1", "http://failing"),
        ("held_at = now(), held_reason = 'a call', ready_at = 'infinity'", "http://held"),
        ("blocked_until = now() + interval '1 hour', failing_since = now(), opened = 2", "http://resting"),
    ):
        await execute(floor.owner, f"UPDATE callback_lanes SET {change} WHERE origin = :origin", origin=origin)

    listed = (await terminal.run("lane", "list", "--merchant", merchant.code, "--json")).document["lanes"]
    troubled = (await terminal.run("lane", "list", "--troubled", "--json")).document["lanes"]

    assert [(lane["origin"], lane["state"], lane["why"], lane["waiting"]) for lane in listed] == [
        ("http://failing", "failing", None, 3),
        ("http://held", "held", "a call", 3),
        ("http://open", "open", None, 3),
        ("http://resting", "left in peace", None, 3),
    ]
    assert [lane["until"] is None for lane in listed] == [True, True, True, False]
    assert [lane["origin"] for lane in troubled] == ["http://failing", "http://held", "http://resting"]
    assert len((await terminal.run("lane", "list", "--json")).document["lanes"]) == 5
    assert len((await terminal.run("lane", "list", "--limit", 2, "--json")).document["lanes"]) == 2
    (await terminal.run("lane", "list")).assert_shown("http://held", "a call", merchant.code)


async def test_a_lane_is_held_and_released_by_somebody_who_says_why(
    terminal: Terminal, floor: Desk, server: Server, database_url: str
) -> None:
    merchant = await floor.merchant()
    await add_waiting(server, database_url, merchant, ["http://a"], 3)
    await execute(floor.owner, "UPDATE callback_lanes SET opened = 4, cap = 1, failing_since = now(), trouble = 0.9")
    lane = await lane_of(floor, merchant)

    async def claimed() -> int:
        lease = Lease(uuid4(), 60.0)
        return len(await in_transaction(floor.worker, lambda tx: claim_in_turn(tx, lease, room(2))))

    long = "x" * 1_000
    held = await terminal.run("lane", "hold", lane.id, "--reason", long, "--actor", "alice", "--json")
    assert held.document == {"lane": str(lane.id), "state": "held"}
    assert (await lane_of(floor, merchant)).held_reason == long
    assert await claimed() == 0
    (await terminal.run("lane", "hold", lane.id, *BECAUSE)).assert_refused("held already")

    released = await terminal.run("lane", "release", lane.id, *BECAUSE, "--json")
    assert released.document == {"lane": str(lane.id), "state": "open"}
    after = await lane_of(floor, merchant)
    assert (after.held_at, after.held_reason, after.cap, after.opened, after.failing_since) == (None, None, 8, 0, None)
    assert await claimed() == 2
    audited = await fetch(floor.owner, "SELECT actor, action, subject, reason FROM audit ORDER BY id DESC LIMIT 2")
    assert [tuple(row) for row in audited] == [
        ("alice", "lane.release", str(lane.id), "their server is back"),
        ("alice", "lane.hold", str(lane.id), long),
    ]
    await assert_lanes_sound(floor)


@pytest.mark.parametrize("command", ["hold", "release"])
async def test_a_lane_that_is_not_there_is_refused_and_nothing_is_written_down(
    terminal: Terminal, floor: Desk, command: str
) -> None:
    (await terminal.run("lane", command, uuid4(), *BECAUSE)).assert_refused("no such lane")
    (await terminal.run("lane", command, "http://a", *BECAUSE)).assert_refused("not the id of a lane")
    (await terminal.run("lane", command, uuid4())).assert_refused("--reason")
    assert await floor.count("audit", "action LIKE 'lane.%'") == 0


async def test_a_callback_that_was_put_aside_is_shown_as_one_that_waits_for_nothing(
    terminal: Terminal, floor: Desk
) -> None:
    (event_id,) = await tell(floor, await floor.merchant(), 1)
    await execute(floor.owner, "UPDATE callback_due SET due_at = 'infinity', in_lane = true, lost_leases = 5")

    (listed,) = (await terminal.run("callbacks", "list", "--json")).document["callbacks"]

    assert (listed["state"], listed["due_at"]) == ("pending", None)
    payout = await floor.one("SELECT payout_id FROM callbacks")
    assert "9999-12" not in (await terminal.run("payout", "show", payout.payout_id)).out
    again = await terminal.run("callbacks", "resend", render_id(EVENT, event_id), *BECAUSE, "--json")
    assert again.document["state"] == "pending"
    assert await deliver(floor, 200) == [event_id]
    await assert_sound(floor.owner)


# Sending many again.


async def test_a_replay_sends_again_what_was_asked_for_and_nothing_else(terminal: Terminal, floor: Desk) -> None:
    first, second = [await floor.merchant() for _ in range(2)]
    of_first = await tell(floor, first, 3)
    elsewhere = await tell(floor, first, 2, "http://127.0.0.1:8/hook")
    of_second = await tell(floor, second, 2)
    await deliver(floor, 503)
    delivered = await tell(floor, first, 2)
    await deliver(floor, 200)
    assert await pending(floor) == []

    async def would(*options: object) -> int:
        told = await terminal.run("callbacks", "replay", *options, "--dry-run", *BECAUSE, "--json")
        return int(told.document["would_be_sent"])

    tomorrow, yesterday = "2999-01-01", "2001-01-01T00:00:00+02:00"
    counts = {
        (): 7,
        ("--merchant", first.code): 5,
        ("--merchant", second.code): 2,
        ("--shop", f"{second.code}/shop-001"): 2,
        ("--origin", "http://127.0.0.1:8/anything"): 2,
        ("--origin", "HTTP://127.0.0.1:9"): 5,
        ("--origin", "http://127.0.0.1"): 0,
        ("--merchant", first.code, "--origin", URL): 3,
        ("--state", "delivered"): 2,
        ("--state", "rejected"): 0,
        ("--since", yesterday, "--until", tomorrow): 7,
        ("--since", tomorrow): 0,
        ("--until", yesterday): 0,
    }
    assert {options: await would(*options) for options in counts} == counts
    assert await pending(floor) == []
    assert await floor.count("callback_replays") == await floor.count("audit", "action = 'callback.replay'") == 0

    ended = await terminal.run(
        "callbacks", "replay", "--merchant", first.code, "--origin", URL, "--per-second", 1_000, *BECAUSE, "--json"
    )

    document = json.loads(ended.out)
    assert (ended.code, document["sent"], document["passed_over"]) == (0, 3, 0)
    assert await pending(floor) == of_first
    audit = await floor.one("SELECT actor, subject, reason FROM audit WHERE action = 'callback.replay'")
    assert tuple(audit) == ("alice", document["replay"], "their server is back")
    assert sorted(await deliver(floor, 200)) == of_first
    assert {row.attempt_no for row in await fetch(floor.owner, "SELECT attempt_no FROM callback_attempts")} == {1, 2}
    assert sorted([*elsewhere, *of_second]) == [
        row.event_id
        for row in await fetch(
            floor.owner, "SELECT event_id FROM callbacks WHERE state = 'exhausted' ORDER BY event_id"
        )
    ]
    assert delivered
    await assert_sound(floor.owner)


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("https://Shop.Example:443/told?a=b", "https://shop.example"),
        ("HTTPS://shop.example/told", "https://SHOP.example:443/x"),
        ("http://shop.example:80", "http://shop.example"),
        ("http://shop.example:?x", "http://shop.example"),
        ("http://shop.example#x", "http://shop.example"),
        ("http://b\u00fccher.example/told", "http://xn--bcher-kva.example"),
        ("http://[2001:DB8::1]:8080/told", "http://[2001:db8::1]:8080"),
    ],
)
async def test_an_origin_is_the_same_however_it_was_spelled(
    terminal: Terminal, floor: Desk, stored: str, asked: str
) -> None:
    merchant = await floor.merchant()
    await tell(floor, merchant, 1, stored)
    await tell(floor, merchant, 1, "https://shop.example.org/told")
    await deliver(floor, 503)
    told = await terminal.run("callbacks", "replay", "--origin", asked, "--dry-run", *BECAUSE, "--json")
    assert told.document == {"would_be_sent": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--origin", "shop.example"), ["--origin", "URL"]),
        (("--since", "soon"), ["--since", "ISO 8601"]),
        (("--shop", "dhaka"), ["MERCHANT/SHOP"]),
        (("--state", "pending"), ["pending"]),
        (("--per-second", "0"), ["--per-second"]),
        (("--merchant", "one", "--shop", "another/shop-001"), ["another", "one"]),
        (("--since", "2026-01-02", "--until", "2026-01-02"), ["--since must be before"]),
        (("--merchant", "nobody"), ["no merchant nobody"]),
        (("--shop", "nobody/shop-001"), ["no merchant nobody"]),
    ],
)
async def test_a_replay_that_makes_no_sense_is_refused(
    terminal: Terminal, floor: Desk, options: tuple[str, ...], words: list[str]
) -> None:
    (await terminal.run("callbacks", "replay", *options, *BECAUSE)).assert_refused(*words)
    assert await floor.count("callback_replays") == 0


async def test_a_replay_that_was_killed_goes_on_where_it_ended_and_sends_nothing_twice(
    terminal: Terminal, floor: Desk, ops: Engine
) -> None:
    merchant = await floor.merchant()
    events = await tell(floor, merchant, 60)
    await deliver(floor, 503)
    replay_id = uuid4()
    await in_transaction(
        ops,
        lambda tx: begin_replay(tx, replay_id, Chosen(state="exhausted"), per_second=1_000, actor="a", reason="r"),
    )
    pages = [await in_transaction(ops, lambda tx: replay_page(tx, replay_id, rows_max=7)) for _ in range(3)]
    assert [page and (page.sent, page.finished) for page in pages] == [(7, False), (14, False), (21, False)]
    async with ops.connect() as tx:
        await replay_page(tx, replay_id, rows_max=7)
    assert await pending(floor) == events[:21], "what was not committed was not sent"
    assert sorted(await deliver(floor, 503)) == events[:21]
    assert await pending(floor) == [], "all of them are exhausted again"

    resumed = await terminal.run("callbacks", "resume", replay_id, *BECAUSE, "--json")

    assert json.loads(resumed.out) == {"replay": str(replay_id), "sent": 60, "passed_over": 0}
    assert await pending(floor) == events[21:]
    again = await terminal.run("callbacks", "resume", replay_id, *BECAUSE, "--json")
    assert json.loads(again.out)["sent"] == 60, "it is over"
    assert await floor.count("audit", f"action = 'callback.replay_resumed' AND subject = '{replay_id}'") == 2
    assert await pending(floor) == events[21:]
    (await terminal.run("callbacks", "resume", uuid4(), *BECAUSE)).assert_refused("no replay")
    (await terminal.run("callbacks", "resume", "evt_1", *BECAUSE)).assert_refused("not the id of a replay")
    await assert_sound(floor.owner)


async def test_a_replay_of_few_among_many_looks_at_each_once_and_goes_on_from_there(floor: Desk, ops: Engine) -> None:
    many, few = await floor.merchant(), await floor.merchant()
    await tell(floor, many, 25)
    wanted = await tell(floor, few, 3)
    await tell(floor, many, 25)
    await deliver(floor, 503)
    replay_id, chosen = uuid4(), Chosen(state="exhausted", merchant=few.code)
    await in_transaction(ops, lambda tx: begin_replay(tx, replay_id, chosen, per_second=1_000, actor="a", reason="r"))
    pages, finished = [], False
    while not finished:
        page = await in_transaction(ops, lambda tx: replay_page(tx, replay_id, rows_max=5, looks_max=10))
        assert page is not None
        finished = page.finished
        pages.append(page.sent)
    assert pages == [0, 0, 3, 3, 3, 3], "ten of 53 in each"
    assert await pending(floor) == wanted
    found = await in_transaction(ops, lambda tx: find_page(tx, Chosen(state="exhausted"), behind=None, looks_max=10))
    assert (len(found.event_ids), found.behind) == (10, found.event_ids[-1])


async def test_two_who_go_on_with_one_replay_send_everything_once(floor: Desk, ops: Engine) -> None:
    events = await tell(floor, await floor.merchant(), 40)
    await deliver(floor, 503)
    replay_id = uuid4()
    await in_transaction(
        ops,
        lambda tx: begin_replay(tx, replay_id, Chosen(state="exhausted"), per_second=1_000, actor="a", reason="r"),
    )

    async def go_on() -> None:
        while (
            page := await in_transaction(ops, lambda tx: replay_page(tx, replay_id, rows_max=3))
        ) and not page.finished:
            pass

    await asyncio.gather(*[go_on() for _ in range(3)])
    replay = await floor.one("SELECT sent, passed_over FROM callback_replays")
    assert tuple(replay) == (40, 0)
    assert await pending(floor) == events


@pytest.mark.parametrize("fault", [CommitFault.LOSE_ANSWER, CommitFault.LOSE_COMMIT])
async def test_a_replay_whose_connection_breaks_at_commit_misses_nothing(
    floor: Desk, database_url: str, fault: CommitFault
) -> None:
    events = await tell(floor, await floor.merchant(), 12)
    await deliver(floor, 503)
    async with proxy(database_url) as network:
        network.fail_commits(fault, after=2)
        behind = Terminal(environment(network.url))
        ended = await behind.run("callbacks", "replay", "--per-second", 40, *BECAUSE, "--json")
    assert (ended.code, json.loads(ended.out)["sent"]) == (0, 12), ended
    assert await pending(floor) == events
    assert await floor.count("callback_replays") == 1


@pytest.mark.parametrize("command", ["lane hold", "lane release", "callbacks resend", "callbacks replay"])
async def test_what_was_done_though_nobody_heard_so_is_neither_denied_nor_done_again(
    floor: Desk, database_url: str, command: str
) -> None:
    merchant = await floor.merchant()
    (event,) = await tell(floor, merchant, 1)
    await deliver(floor, 503)
    subject = {
        "lane hold": [(await lane_of(floor, merchant)).id],
        "lane release": [(await lane_of(floor, merchant)).id],
        "callbacks resend": [render_id(EVENT, event)],
        "callbacks replay": ["--per-second", 40],
    }
    before = await floor.count("audit")
    async with proxy(database_url) as network:
        network.fail_commits(CommitFault.LOSE_ANSWER)
        behind = Terminal(environment(network.url))
        ended = await behind.run(*command.split(), *subject[command], *BECAUSE)
    assert (ended.code, ended.out) == (3, ""), ended
    assert "look before you repeat it" in ended.err
    assert await floor.count("audit") == before + 1
    if command == "callbacks replay":
        # Which one it was has been said, so that somebody can go on with it.
        replay_id = ended.err.split()[1]
        resumed = await Terminal(environment(database_url)).run("callbacks", "resume", replay_id, *BECAUSE, "--json")
        assert json.loads(resumed.out)["sent"] == 1


async def test_a_replay_that_is_interrupted_says_so(floor: Desk, database_url: str) -> None:
    await tell(floor, await floor.merchant(), 20)
    await deliver(floor, 503)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _INTERRUPTIBLE),
        *("callbacks", "replay", "--per-second", "1", *BECAUSE),
        env=os.environ | environment(database_url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )

    async def has_begun() -> bool:
        return await floor.count("callback_replays", "sent > 0") == 1

    await eventually(has_begun, "it sends")
    process.send_signal(signal.SIGINT)
    _, complaint = await process.communicate()
    assert process.returncode == 130
    assert b"payouts: interrupted" in complaint


async def test_a_replay_keeps_its_rate(terminal: Terminal, floor: Desk) -> None:
    """At least as long as the rate asks for; how much longer is the machine's business."""
    await tell(floor, await floor.merchant(), 20)
    await deliver(floor, 503)
    began = await floor.one("SELECT clock_timestamp() AS now")
    await terminal.run("callbacks", "replay", "--per-second", 10, *BECAUSE, "--json")
    ended = await floor.one("SELECT clock_timestamp() AS now")
    assert (ended.now - began.now).total_seconds() > 1.5


async def test_a_replay_of_what_was_delivered_ends_though_new_ones_are_delivered_all_the_time(
    floor: Desk, ops: Engine
) -> None:
    merchant = await floor.merchant()
    events = await tell(floor, merchant, 5)
    await deliver(floor, 200)
    replay_id = uuid4()
    await in_transaction(
        ops,
        lambda tx: begin_replay(tx, replay_id, Chosen(state="delivered"), per_second=1_000, actor="a", reason="r"),
    )
    sent: list[UUID] = []
    pages: list[Replay | None] = []
    while len(pages) < 20 and not (pages and pages[-1] and pages[-1].finished):
        pages.append(await in_transaction(ops, lambda tx: replay_page(tx, replay_id, rows_max=2)))
        await tell(floor, merchant, 2)
        sent += await deliver(floor, 200)
    assert [page and (page.sent, page.finished) for page in pages] == [(2, False), (4, False), (5, True)]
    sent += await deliver(floor, 200)
    assert [sent.count(event_id) for event_id in events] == [1] * 5, "each once"
    await assert_sound(floor.owner)


async def test_what_is_being_sent_just_then_is_passed_over_and_counted(floor: Desk, ops: Engine) -> None:
    """It has been sent again by somebody else meanwhile."""
    events = await tell(floor, await floor.merchant(), 3)
    await deliver(floor, 503)
    replay_id = uuid4()
    await in_transaction(
        ops,
        lambda tx: begin_replay(tx, replay_id, Chosen(state="exhausted"), per_second=1_000, actor="a", reason="r"),
    )
    await execute(
        floor.owner, "UPDATE callbacks SET state = 'pending', finished_at = NULL WHERE event_id = :id", id=events[1]
    )
    await execute(
        floor.owner,
        "INSERT INTO callback_due (event_id, shop_id, lane_id, attempts_made, lease_token)"
        " SELECT c.event_id, c.shop_id, l.id, 1, gen_random_uuid() FROM callbacks c JOIN callback_lanes l USING (shop_id)"
        " WHERE c.event_id = :id",
        id=events[1],
    )
    page = await in_transaction(ops, lambda tx: replay_page(tx, replay_id, rows_max=10))
    assert page is not None
    assert (page.sent, page.passed_over, page.finished) == (2, 0, True), "it is no longer exhausted"
    assert await floor.count("callback_due", "lease_token IS NULL") == 2
