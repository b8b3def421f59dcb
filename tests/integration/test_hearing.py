"""What a rail says by itself: applied once, in whatever order and however often it comes; contradictions move no money."""

import asyncio
from collections.abc import AsyncIterator
from itertools import count, permutations
from typing import Any
from uuid import UUID

import pytest

from common.canceling import cancel
from common.db.engine import in_transaction
from common.db.rail_events import NewRailEvent, append_rail_events
from tests.factories import Merchant, execute, fetch
from tests.flows import LOCK_WAIT_SECONDS, Desk, assert_sound, desk, let_pass, obstruct
from tests.stack import eventually
from worker.conclusions import Ended
from worker.hearing import EVENTS_MAX, Heard, hear
from worker.rails import Answer, Outcome

FUNDS_MINOR = 100_000_000
AMOUNT_MINOR = 1000
_numbers = count(1)


@pytest.fixture
async def working(database_url: str) -> AsyncIterator[Desk]:
    async with desk(database_url) as opened:
        yield opened
        await assert_sound(opened.owner)


async def say(working: Desk, payout_id: UUID, outcome: str, **fields: Any) -> None:
    """The rail says a word about a payout that was sent to it."""
    row = await working.one(
        "SELECT reference FROM payout_attempts WHERE payout_id = :id AND attempt_no = 1", id=payout_id
    )
    values: dict[str, Any] = {
        "event_id": f"e-{next(_numbers)}",
        "amount_minor": AMOUNT_MINOR,
        "currency": "BDT",
    } | fields
    event = NewRailEvent(rail="sandbox", reference=row.reference, outcome=outcome, **values)
    await in_transaction(working.worker, lambda tx: append_rail_events(tx, [event]))


async def listen(working: Desk) -> list[Heard]:
    """Until there is nothing to hear."""
    heard = []
    while (last := await hear(working.worker)).count:
        heard.append(last)
    return heard


async def effects(working: Desk) -> list[str | None]:
    return [
        row.effect
        for row in await fetch(working.owner, "SELECT effect FROM rail_events ORDER BY received_at, event_id")
    ]


async def discrepancies(working: Desk) -> list[tuple[str, str, str | None]]:
    rows = await fetch(working.owner, "SELECT kind, word, state FROM discrepancies ORDER BY opened_at")
    return [(row.kind, row.word, row.state) for row in rows]


async def in_state(working: Desk, merchant: Merchant, state: str) -> UUID:
    """A payout that was sent, in that state."""
    payout_id = await working.create(merchant, callback_url="http://127.0.0.1:9/")
    (call,) = await working.claim()
    answers = {
        "queued": Answer(Outcome.NOT_ACCEPTED),
        "submitted": Answer(Outcome.SUBMITTED),
        "verifying": Answer(Outcome.UNKNOWN),
        "success": Answer(Outcome.PAID),
        "failed": Answer(Outcome.DECLINED),
        "canceled": Answer(Outcome.NOT_ACCEPTED),
    }
    if state in answers:
        await working.record(Ended(call, answers[state]))
    if state == "canceled":
        external_id = (await working.one("SELECT external_id FROM payouts WHERE id = :id", id=payout_id)).external_id
        await in_transaction(
            working.gateway, lambda tx: cancel(tx, merchant.shop.id, external_id, wait_seconds=LOCK_WAIT_SECONDS)
        )
    assert await working.state(payout_id) == state
    return payout_id


OPEN = ("queued", "sending", "submitted", "verifying")


@pytest.mark.parametrize("state", OPEN)
@pytest.mark.parametrize(
    ("word", "end", "entries", "balance"),
    [
        ("paid", "success", ["hold", "capture"], (FUNDS_MINOR - AMOUNT_MINOR, 0)),
        ("declined", "failed", ["hold", "release"], (FUNDS_MINOR, 0)),
        ("returned", "refunded", ["hold", "capture", "payout_return"], (FUNDS_MINOR, 0)),
        ("submitted", "submitted", ["hold"], (FUNDS_MINOR, AMOUNT_MINOR)),
    ],
)
async def test_a_final_word_ends_a_payout_in_whatever_stage_it_is(
    working: Desk, state: str, word: str, end: str, entries: list[str], balance: tuple[int, int]
) -> None:
    merchant = await working.merchant()
    payout_id = await in_state(working, merchant, state)

    await say(working, payout_id, word)
    heard = await listen(working)
    if state == "sending" and word in ("declined", "submitted"):
        # A call is under way, and the word may be about an earlier one.
        assert (heard, await working.state(payout_id)) == ([], "sending")
        await working.make_due()
        await working.claim()

        async def applied() -> bool:
            heard.extend(await listen(working))
            return await working.state(payout_id) == end

        await eventually(applied, "the word is heard when the call has ended")

    assert await working.state(payout_id) == end
    assert await working.entries(payout_id) == entries
    assert await working.balance(merchant) == balance
    told = [event.type for each in heard for event in each.events]
    assert (
        told
        == {
            "success": ["payout.success"],
            "failed": ["payout.failed"],
            "refunded": ["payout.success", "payout.refunded"],
            "submitted": [],
        }[end]
    )
    assert await discrepancies(working) == []
    await working.make_due()
    await working.settle()


async def test_words_after_the_end_are_heard_though_a_worker_died_in_a_question(working: Desk) -> None:
    payout_id = await in_state(working, await working.merchant(), "verifying")
    await working.make_due()
    (call,) = await working.claim()
    assert call.action == "look_up"
    await say(working, payout_id, "paid")
    await listen(working)
    assert await working.state(payout_id) == "success"
    await say(working, payout_id, "submitted")
    await say(working, payout_id, "declined")
    await listen(working)
    assert await effects(working) == ["moved", "known", "discrepancy"]
    assert await discrepancies(working) == [("status", "declined", "success")]


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ("success", "declined"),
        ("failed", "paid"),
        ("failed", "returned"),
        ("canceled", "paid"),
        ("canceled", "submitted"),
    ],
)
async def test_a_word_against_a_final_status_opens_one_discrepancy_and_moves_no_money(
    working: Desk, state: str, word: str
) -> None:
    merchant = await working.merchant()
    payout_id = await in_state(working, merchant, state)
    before = await working.balance(merchant), await working.entries(payout_id)

    for _ in range(3):
        await say(working, payout_id, word)
        await listen(working)

    assert await working.state(payout_id) == state
    assert (await working.balance(merchant), await working.entries(payout_id)) == before
    assert await discrepancies(working) == [("status", word, state)]
    assert await effects(working) == ["discrepancy"] * 3


@pytest.mark.parametrize(("state", "word"), [("success", "paid"), ("success", "submitted"), ("failed", "declined")])
async def test_a_word_that_is_known_changes_nothing(working: Desk, state: str, word: str) -> None:
    merchant = await working.merchant()
    payout_id = await in_state(working, merchant, state)
    attempts = await working.attempts(payout_id)

    await say(working, payout_id, word)
    await listen(working)

    assert (await working.state(payout_id), await working.attempts(payout_id)) == (state, attempts)
    assert await effects(working) == ["known"]
    assert await discrepancies(working) == []


@pytest.mark.parametrize("fields", [{"amount_minor": AMOUNT_MINOR + 1}, {"amount_minor": 1}, {"currency": "USD"}])
async def test_another_amount_is_a_discrepancy_and_never_money(working: Desk, fields: dict[str, Any]) -> None:
    merchant = await working.merchant()
    payout_id = await in_state(working, merchant, "verifying")

    await say(working, payout_id, "paid", **fields)
    await listen(working)

    assert await working.state(payout_id) == "verifying"
    assert await working.balance(merchant) == (FUNDS_MINOR, AMOUNT_MINOR)
    assert await discrepancies(working) == [("amount", "paid", "verifying")]


async def test_a_word_about_nothing_of_ours_is_kept_for_people(working: Desk) -> None:
    event = NewRailEvent("sandbox", "e-1", "nobody", "paid", amount_minor=1, currency="BDT")
    await in_transaction(working.worker, lambda tx: append_rail_events(tx, [event]))

    await listen(working)

    assert await discrepancies(working) == [("reference", "paid", None)]


async def test_the_same_event_is_one_event(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await in_state(working, merchant, "submitted")
    for _ in range(3):
        await say(working, payout_id, "paid", event_id="the-same")
    await listen(working)
    await say(working, payout_id, "paid", event_id="the-same")

    assert await listen(working) == []
    assert await effects(working) == ["moved"]
    assert [action for action, _ in await working.attempts(payout_id)] == ["submit", "event"]


@pytest.mark.parametrize("words", list(permutations(["submitted", "paid", "returned"])), ids=" ".join)
async def test_any_order_of_words_leads_to_the_same_end(working: Desk, words: tuple[str, ...]) -> None:
    merchant = await working.merchant()
    payout_id = await in_state(working, merchant, "verifying")

    for word in words:
        await say(working, payout_id, word)
        await listen(working)

    assert await working.state(payout_id) == "refunded"
    assert await working.balance(merchant) == (FUNDS_MINOR, 0)
    assert await discrepancies(working) == []


async def test_many_ears_hear_each_word_once(working: Desk) -> None:
    merchant = await working.merchant()
    ids = await working.create_many(merchant, 80)
    calls = await working.claim()
    await working.record(*(Ended(call, Answer(Outcome.SUBMITTED)) for call in calls))
    for payout_id in ids:
        await say(working, payout_id, "paid")
        await say(working, payout_id, "returned")

    async def listen_until_silent() -> None:
        silent = 0
        while silent < 5:
            silent = 0 if (await hear(working.worker)).count else silent + 1

    async def all_refunded() -> bool:
        await asyncio.gather(*(listen_until_silent() for _ in range(4)))
        return {await working.state(payout_id) for payout_id in ids} == {"refunded"}

    await eventually(all_refunded, "every word is heard")
    assert await working.balance(merchant) == (FUNDS_MINOR, 0)
    assert await discrepancies(working) == []


async def test_a_shop_whose_account_somebody_holds_delays_no_other(working: Desk) -> None:
    merchant, other = await working.merchant(), await working.merchant()
    waiting, free = [await in_state(working, each, "submitted") for each in (merchant, other)]
    for payout_id in (waiting, free):
        await say(working, payout_id, "paid")
    async with working.owner.begin() as tx:
        await tx.exec_driver_sql(f"SELECT 1 FROM accounts WHERE id = {merchant.shop.account_id} FOR UPDATE")
        await listen(working)
        assert (await working.state(waiting), await working.state(free)) == ("submitted", "success")

    async def heard() -> bool:
        await listen(working)
        return await working.state(waiting) == "success"

    await eventually(heard, "the word that waited is heard")

    assert await working.state(waiting) == "success"


async def test_a_word_that_the_database_refuses_holds_up_no_other_and_comes_again(
    working: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    merchant = await working.merchant()
    ids = await working.create_many(merchant, 5)
    await working.record(*(Ended(call, Answer(Outcome.SUBMITTED)) for call in await working.claim()))
    for payout_id in ids:
        await say(working, payout_id, "paid")
    await obstruct(working.owner, ids[0])

    await listen(working)

    assert [await working.state(payout_id) for payout_id in ids] == ["submitted"] + ["success"] * 4
    assert "rail.event_refused" in capsys.readouterr().out
    await let_pass(working.owner)
    await execute(working.owner, "UPDATE rail_events SET due_at = now() WHERE applied_at IS NULL")
    await listen(working)
    assert await working.state(ids[0]) == "success"


async def test_many_repeats_of_one_word_do_not_hold_up_the_next_payout(working: Desk) -> None:
    merchant = await working.merchant()
    repeated, other = await working.create_many(merchant, 2)
    await working.record(*(Ended(call, Answer(Outcome.SUBMITTED)) for call in await working.claim()))
    for _ in range(3 * EVENTS_MAX):
        await say(working, repeated, "paid")
    await say(working, other, "paid")

    rounds = await listen(working)

    assert (await working.state(repeated), await working.state(other)) == ("success", "success")
    assert len(rounds) == 4
    assert sum(heard.count for heard in rounds) == 3 * EVENTS_MAX + 1


async def test_other_wrong_amounts_are_other_discrepancies(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await in_state(working, merchant, "verifying")

    for amount_minor in (1, 2, 2, 3):
        await say(working, payout_id, "paid", amount_minor=amount_minor)
    await listen(working)

    rows = await fetch(working.owner, "SELECT detail FROM discrepancies ORDER BY detail")
    assert [row.detail for row in rows] == ["1 BDT", "2 BDT", "3 BDT"]


async def test_the_answer_to_a_call_that_comes_after_the_event_says_nothing_new(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant)
    (call,) = await working.claim()
    await say(working, payout_id, "paid")
    await listen(working)
    assert await working.state(payout_id) == "success"

    await working.record(Ended(call, Answer(Outcome.PAID)))

    assert await working.attempts(payout_id) == [("submit", "paid"), ("event", "paid")]
    assert await working.entries(payout_id) == ["hold", "capture"]


@pytest.mark.parametrize(
    ("recipient", "end", "open_words"),
    [
        ("01700000300", "refunded", []),
        ("01700000301", "failed", [("status", "paid", "failed")]),
        ("01700000400", "success", []),
        ("01700000401", "success", []),
    ],
)
async def test_the_sandbox_bank_speaks_by_itself(
    working: Desk, recipient: str, end: str, open_words: list[tuple[str, str, str]]
) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant, recipient=recipient)
    await working.settle()
    async with working.owner.begin() as tx:
        await tx.exec_driver_sql("UPDATE rail_events SET due_at = now() WHERE applied_at IS NULL")
    await listen(working)

    assert await working.state(payout_id) == end
    assert await discrepancies(working) == open_words


async def test_a_decline_of_an_earlier_try_releases_nothing_while_the_next_one_is_under_way(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await in_state(working, merchant, "queued")
    await working.make_due()
    (second,) = await working.claim()

    await say(working, payout_id, "declined")
    await listen(working)
    assert await working.balance(merchant) == (FUNDS_MINOR, AMOUNT_MINOR)
    await working.record(Ended(second, Answer(Outcome.PAID)))

    async def told() -> bool:
        await listen(working)
        return await discrepancies(working) == [("status", "declined", "success")]

    await eventually(told, "people hear of the contradiction")
    assert await working.entries(payout_id) == ["hold", "capture"]


async def test_a_return_that_names_the_banks_reference_first_is_heard(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await in_state(working, merchant, "success")

    await say(working, payout_id, "returned", provider_reference="B-77")
    await listen(working)

    assert await working.state(payout_id) == "refunded"
    assert await effects(working) == ["moved"]


@pytest.mark.parametrize(("late", "end"), [(Outcome.PAID, "success"), (Outcome.SUBMITTED, "submitted")])
async def test_a_late_answer_for_a_payout_that_is_queued_again_is_believed(
    working: Desk, late: Outcome, end: str
) -> None:
    """A worker slept through its lease, a look-up did not know the payout yet; then the worker wakes up with the answer."""
    merchant = await working.merchant()
    payout_id = await working.create(merchant)
    (paused,) = await working.claim()
    await working.make_due()
    await working.claim()
    await working.make_due()
    (look_up,) = await working.claim()
    await working.record(Ended(look_up, Answer(Outcome.NOT_FOUND)))
    assert await working.state(payout_id) == "queued"

    await working.record(Ended(paused, Answer(late)))

    assert await working.state(payout_id) == end
    assert await discrepancies(working) == []
