"""A payout that nobody has sent yet ends by its merchant's word or by its time; its money is available again, once."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.exc import DBAPIError

from common.canceling import cancel, expire_page
from common.db.due import FIRST_TO_EXPIRE, Expiring, NewWord, append_words
from common.db.engine import in_transaction
from common.db.rail_events import NewRailEvent, append_rail_events
from common.errors import (
    AccessDenied,
    AccountBusy,
    InvalidApiKey,
    InvalidRequest,
    NotCancelable,
    PayoutNotFound,
    PayoutsError,
    ShopNotFound,
    Transient,
)
from gateway.cancel import Canceler
from gateway.schemas import parse_create_payout
from tests.factories import Merchant, create_body, engine, execute, order
from tests.flows import LOCK_WAIT_SECONDS, Desk, assert_sound, desk, let_pass, obstruct
from tests.stack import client, eventually, stack
from worker.conclusions import Ended
from worker.hearing import hear
from worker.rails import Answer, Outcome
from worker.sweep import Sweeper

FUNDS_MINOR = 100_000_000
AMOUNT_MINOR = 1000
HOUR = timedelta(hours=1)


@pytest.fixture
async def working(database_url: str) -> AsyncIterator[Desk]:
    async with desk(database_url) as opened:
        yield opened
        await assert_sound(opened.owner)


async def external_id(working: Desk, payout_id: UUID) -> str:
    row = await working.one("SELECT external_id FROM payouts WHERE id = :id", id=payout_id)
    return str(row.external_id)


async def cancel_one(
    working: Desk, merchant: Merchant, payout_id: UUID, *, wait_seconds: float = LOCK_WAIT_SECONDS
) -> Any:
    """As the gateway does it."""
    name = await external_id(working, payout_id)
    return await in_transaction(
        working.gateway, lambda tx: cancel(tx, merchant.shop.id, name, wait_seconds=wait_seconds), attempts_max=1
    )


async def events_of(working: Desk, payout_id: UUID) -> int:
    return await working.count("events", "payout_id = :id", id=payout_id)


# Canceling


async def test_a_canceled_payout_gives_its_money_back_and_is_never_sent(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant, callback_url="http://127.0.0.1:9/hook")
    assert await working.balance(merchant) == (FUNDS_MINOR, AMOUNT_MINOR)

    payout, events = await cancel_one(working, merchant, payout_id)

    assert (payout.state, payout.failure_code) == ("canceled", None)
    assert payout.finalized_at is not None
    assert [event.type for event in events] == ["payout.canceled"]
    assert await working.balance(merchant) == (FUNDS_MINOR, 0)
    await working.settle()
    assert await working.attempts(payout_id) == []
    assert await working.entries(payout_id) == ["hold", "release"]
    assert await working.count("callback_due", "event_id = :id", id=events[0].id) == 1


async def test_canceling_twice_is_canceling_once(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant)

    first, _ = await cancel_one(working, merchant, payout_id)
    second, events = await cancel_one(working, merchant, payout_id)

    assert (second, events) == (first, [])
    assert await events_of(working, payout_id) == 1


@pytest.mark.parametrize(
    ("recipient", "state"),
    [("01700009999", "success"), ("01700000100", "failed"), ("01700000001", "submitted"), ("01700000200", "verifying")],
)
async def test_what_has_been_sent_can_not_be_canceled(working: Desk, recipient: str, state: str) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant, recipient=recipient)
    await working.settle(working.settler(rail_timeout_seconds=1.0))

    with pytest.raises(NotCancelable):
        await cancel_one(working, merchant, payout_id)

    assert await working.state(payout_id) == state


async def test_what_a_worker_has_just_taken_can_not_be_canceled(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant)
    await working.claim()

    with pytest.raises(NotCancelable):
        await cancel_one(working, merchant, payout_id)


async def test_a_payout_that_its_rail_refused_can_be_canceled_while_it_waits(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant, recipient="01700000120")
    settler = working.settler()
    await settler.run_round()
    await settler.drain(10)
    assert await working.attempts(payout_id) == [("submit", "not_accepted")]

    await cancel_one(working, merchant, payout_id)

    await working.make_due()
    await working.settle()
    assert await working.state(payout_id) == "canceled"
    assert await working.attempts(payout_id) == [("submit", "not_accepted")]


async def test_what_the_rail_says_it_has_can_not_be_canceled_though_it_is_queued(working: Desk) -> None:
    """The schema has the last word: such a payout is not given back, whatever was forgotten to be looked at."""
    merchant = await working.merchant()
    payout_id = await working.create(merchant)
    (call,) = await working.claim()
    await working.record(Ended(call, Answer(Outcome.NOT_ACCEPTED)))
    word = [NewWord(payout_id, merchant.shop.id, 2, "sandbox", call.reference, "paid", None)]
    await in_transaction(working.worker, lambda tx: append_words(tx, word))
    canceler = Canceler(working.gateway, slots=1, busy_seconds_max=1.0, tell=lambda _: None)

    with pytest.raises(NotCancelable):
        await canceler.cancel(merchant.shop.id, await external_id(working, payout_id))

    assert await working.balance(merchant) == (FUNDS_MINOR, AMOUNT_MINOR)
    event = NewRailEvent("sandbox", "e-1", call.reference, "paid")
    await in_transaction(working.worker, lambda tx: append_rail_events(tx, [event]))
    await hear(working.worker)
    assert await working.state(payout_id) == "success"


async def test_canceling_and_sending_at_once_has_one_winner(working: Desk) -> None:
    merchant = await working.merchant()
    ids = await working.create_many(merchant, 60)
    settler = working.settler()

    async def settle() -> None:
        for _ in range(30):
            await settler.run_round()
        await settler.drain(20)

    async def cancel_all(some: list[UUID]) -> list[UUID]:
        canceled = []
        for payout_id in some:
            try:
                await cancel_one(working, merchant, payout_id)
                canceled.append(payout_id)
            except NotCancelable:
                continue
        return canceled

    *both, _ = await asyncio.gather(cancel_all(ids), cancel_all(ids[::-1]), settle())
    await working.settle()

    canceled = {payout_id for some in both if some for payout_id in some}
    states = {payout_id: await working.state(payout_id) for payout_id in ids}
    assert {payout_id for payout_id, state in states.items() if state == "canceled"} == canceled
    assert set(states.values()) <= {"canceled", "success"}
    sent = {payout_id for payout_id in ids if await working.attempts(payout_id)}
    assert sent == set(ids) - canceled
    posted, held = await working.balance(merchant)
    assert (posted, held) == (FUNDS_MINOR - AMOUNT_MINOR * len(sent), 0)


async def test_a_shop_whose_account_somebody_holds_is_told_to_come_back(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant)
    async with working.owner.begin() as tx:
        await tx.exec_driver_sql(f"SELECT 1 FROM accounts WHERE id = {merchant.shop.account_id} FOR UPDATE")
        with pytest.raises(AccountBusy):
            await cancel_one(working, merchant, payout_id, wait_seconds=0.1)

    assert await working.state(payout_id) == "queued"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("UPDATE merchants SET status = 'suspended'", AccessDenied),
        ("UPDATE merchants SET status = 'closed'", InvalidApiKey),
        ("UPDATE shops SET status = 'inactive'", ShopNotFound),
    ],
)
async def test_who_may_not_create_may_not_cancel_either(working: Desk, change: str, error: type[PayoutsError]) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant)
    await execute(working.owner, change)

    with pytest.raises(error):
        await cancel_one(working, merchant, payout_id)

    assert await working.state(payout_id) == "queued"


async def test_nobody_cancels_what_is_not_theirs(working: Desk) -> None:
    merchant, other = await working.merchant(), await working.merchant()
    payout_id = await working.create(merchant)

    with pytest.raises(PayoutNotFound):
        await cancel_one(working, other, payout_id)


# Expiring


async def sweep(working: Desk) -> None:
    await Sweeper(working.worker).run_round()


async def let_expire(working: Desk, *payout_ids: UUID) -> None:
    """Travel to the time when these have expired; the owner may, with the schema's guards aside."""
    for table, key in (("payouts", "id"), ("payout_due", "payout_id")):
        async with working.owner.begin() as tx:
            await tx.exec_driver_sql(f"ALTER TABLE {table} DISABLE TRIGGER USER")
            ids = ", ".join(f"'{payout_id}'" for payout_id in payout_ids)
            await tx.exec_driver_sql(f"UPDATE {table} SET expires_at = now() - interval '1 s' WHERE {key} IN ({ids})")
            await tx.exec_driver_sql(f"ALTER TABLE {table} ENABLE TRIGGER USER")


async def test_a_payout_whose_time_is_over_is_ended_by_the_sweep(working: Desk) -> None:
    merchant = await working.merchant()
    expiring = await working.create_many(merchant, 3, expires_at=datetime.now(UTC) + HOUR)
    later = await working.create(merchant, expires_at=datetime.now(UTC) + HOUR)
    never = await working.create(merchant)
    await let_expire(working, *expiring)

    await sweep(working)

    assert [await working.state(payout_id) for payout_id in expiring] == ["expired"] * 3
    assert [await working.state(payout_id) for payout_id in (later, never)] == ["queued"] * 2
    assert await working.balance(merchant) == (FUNDS_MINOR, 2 * AMOUNT_MINOR)
    assert [await events_of(working, payout_id) for payout_id in expiring] == [1] * 3


async def test_a_payout_expires_also_while_the_sweep_cannot_look_at_the_whole(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant, expires_at=datetime.now(UTC) + HOUR)
    await let_expire(working, payout_id)
    impatient = engine(working.url, role="payouts_worker", PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS="0.5")

    async with working.owner.begin() as tx:
        await tx.exec_driver_sql("LOCK TABLE discrepancies IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(Transient):
            await Sweeper(impatient).run_round()
        assert await working.state(payout_id) == "expired"
    await impatient.dispose()


async def test_a_payout_whose_time_is_over_is_not_sent_even_if_no_sweep_came(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant, expires_at=datetime.now(UTC) + HOUR)
    await let_expire(working, payout_id)

    await working.settle()

    assert (await working.state(payout_id), await working.attempts(payout_id)) == ("queued", [])
    with pytest.raises(DBAPIError, match="payouts_worker may not move a payout to sending now"):
        await execute(working.worker, "UPDATE payouts SET state = 'sending', version = 2 WHERE id = :id", id=payout_id)
    await sweep(working)
    assert await working.state(payout_id) == "expired"


async def test_what_was_sent_in_time_does_not_expire(working: Desk) -> None:
    merchant = await working.merchant()
    payout_id = await working.create(merchant, recipient="01700000001", expires_at=datetime.now(UTC) + HOUR)
    await working.settle()
    await let_expire(working, payout_id)

    await sweep(working)
    assert await working.state(payout_id) == "submitted"
    await working.make_due()
    await working.settle()

    assert await working.state(payout_id) == "success"


async def test_a_shop_whose_account_somebody_holds_expires_later_and_delays_no_other(working: Desk) -> None:
    merchant, other = await working.merchant(), await working.merchant()
    held, free = [await working.create(each, expires_at=datetime.now(UTC) + HOUR) for each in (merchant, other)]
    await let_expire(working, held, free)
    async with working.owner.begin() as tx:
        await tx.exec_driver_sql(f"SELECT 1 FROM accounts WHERE id = {merchant.shop.account_id} FOR UPDATE")
        await sweep(working)
        assert (await working.state(held), await working.state(free)) == ("queued", "expired")

    await sweep(working)

    assert await working.state(held) == "expired"


async def test_what_was_sent_in_time_stands_in_nobodys_way(working: Desk) -> None:
    merchant = await working.merchant()
    sent = await working.create_many(merchant, 20, recipient="01700000001", expires_at=datetime.now(UTC) + HOUR)
    await working.settle()
    queued = await working.create(merchant, expires_at=datetime.now(UTC) + 2 * HOUR)
    await let_expire(working, *sent, queued)

    behind: Expiring | None = FIRST_TO_EXPIRE
    while behind is not None:
        behind, _ = await expire_page(working.worker, behind=behind, payouts_max=7)

    assert await working.state(queued) == "expired"
    assert {await working.state(payout_id) for payout_id in sent} == {"submitted"}


async def test_a_payout_that_the_database_does_not_let_expire_holds_up_no_other(
    working: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    merchant = await working.merchant()
    ids = await working.create_many(merchant, 5, expires_at=datetime.now(UTC) + HOUR)
    await let_expire(working, *ids)
    await obstruct(working.owner, ids[0])

    await sweep(working)

    assert [await working.state(payout_id) for payout_id in ids] == ["queued"] + ["expired"] * 4
    assert "payout.expiry_refused" in capsys.readouterr().out
    await let_pass(working.owner)
    await sweep(working)
    assert await working.state(ids[0]) == "expired"


async def test_two_sweeps_at_once_expire_each_payout_once(working: Desk) -> None:
    merchant = await working.merchant()
    ids = await working.create_many(merchant, 40, expires_at=datetime.now(UTC) + HOUR)
    await let_expire(working, *ids)

    await asyncio.gather(*(expire_page(working.worker, behind=FIRST_TO_EXPIRE, payouts_max=10) for _ in range(8)))
    await sweep(working)

    assert {await working.state(payout_id) for payout_id in ids} == {"expired"}
    assert await working.balance(merchant) == (FUNDS_MINOR, 0)


async def test_an_order_that_is_over_before_it_is_accepted_is_refused(working: Desk) -> None:
    merchant = await working.merchant()
    (verdict,) = await working.accept(order(working.settings, merchant.shop, expires_at=datetime.now(UTC) - HOUR))

    assert isinstance(verdict, PayoutsError)
    assert str(verdict) == "expires_at must be a time in the future"


# Over HTTP


async def test_a_merchant_cancels_and_reads_the_history(database_url: str, working: Desk) -> None:
    merchant = await working.merchant()
    async with stack(database_url) as running:
        await running.start("gateway")
        async with client(running.base_url, merchant) as sender:
            status, created = await sender.create(
                create_body(external_id="PAY-1", expires_at="2100-01-01T02:00:00+02:00")
            )
            assert (status, created["expires_at"]) == (201, "2100-01-01T00:00:00.000000Z")

            status, canceled = await sender.request("POST", "/api/v1/payouts/PAY-1/cancel")
            again = await sender.request("POST", "/api/v1/payouts/PAY-1/cancel")
            assert (status, canceled["status"], "stage" in canceled) == (200, "canceled", False)
            assert again == (200, canceled)

            status, history = await sender.request("GET", "/api/v1/payouts/PAY-1/events")
            assert (status, [(line["sequence"], line["status"], line.get("stage")) for line in history["data"]]) == (
                200,
                [(1, "pending", "queued"), (2, "canceled", None)],
            )
            assert history["data"][1]["at"] == canceled["finalization_date"]

            status, balance = await sender.request("GET", "/api/v1/balance")
            assert (balance["available"], balance["pending"]) == ("1000000.00", "0.00")

            status, missing = await sender.request("POST", "/api/v1/payouts/PAY-404/cancel")
            assert (status, missing["message"]) == (404, "Payout not found")
            assert (await sender.request("GET", "/api/v1/payouts/PAY-404/events"))[0] == 404

            await sender.create(create_body(external_id="PAY-2"))
            await running.start("worker", "settle")

            async def paid() -> bool:
                _, answer = await sender.request("GET", "/api/v1/payouts/PAY-2")
                return bool(answer["status"] == "success")

            await eventually(paid, "PAY-2 is paid")
            status, answer = await sender.request("POST", "/api/v1/payouts/PAY-2/cancel")
            assert (status, answer["code"], answer["error"]["reason"]) == (422, "not_cancelable", "not_cancelable")
            status, history = await sender.request("GET", "/api/v1/payouts/PAY-2/events")
            assert [line.get("stage", line["status"]) for line in history["data"]] == ["queued", "sending", "success"]


async def test_many_cancels_of_a_busy_shop_leave_connections_to_everybody_else(
    database_url: str, working: Desk
) -> None:
    busy, other = await working.merchant(), await working.merchant()
    ids = await working.create_many(busy, 20)
    names = [await external_id(working, payout_id) for payout_id in ids]
    patience = {"PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS": "20", "PAYOUTS_REQUEST_SECONDS_MAX": "30"}
    async with stack(database_url, **patience) as running:
        await running.start("gateway")
        async with client(running.base_url, busy) as busy_sender, client(running.base_url, other) as sender:
            async with working.owner.begin() as tx:
                await tx.exec_driver_sql(f"SELECT 1 FROM accounts WHERE id = {busy.shop.account_id} FOR UPDATE")
                canceling = [
                    asyncio.create_task(busy_sender.request("POST", f"/api/v1/payouts/{name}/cancel")) for name in names
                ]
                for _ in range(20):
                    assert (await sender.request("GET", "/api/v1/balance"))[0] == 200
                assert not any(task.done() for task in canceling)
            answers = [status for status, _ in await asyncio.gather(*canceling)]
    assert set(answers) <= {200, 503}
    assert answers.count(200) == await working.count("payouts", "state = 'canceled'")
    assert 200 in answers


@pytest.mark.parametrize(
    "value",
    ["tomorrow", "", 5, True, [], "2100-01-01", "2100-01-01T00:00:00", "2100-13-01T00:00:00Z", "2100-01-01 00:00:00Z"],
)
def test_an_expiry_that_is_no_time_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="expires_at must be an RFC 3339 time"):
        parse_create_payout(create_body(expires_at=value), private_callbacks=False)
