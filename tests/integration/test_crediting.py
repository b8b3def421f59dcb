"""Payins at work: credited once and for exactly the amount, by whoever tells first; ended only by the rail's word."""

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from common.db.engine import in_transaction
from common.db.payins import claim_questions
from common.db.rail_events import NewRailEvent, append_rail_events
from common.domain.ids import PAYIN, render_id
from tests.bank import add_rail
from tests.factories import Merchant, execute, fetch
from tests.flows import Desk, assert_sound, desk
from worker.crediting import record_answer
from worker.hearing import hear
from worker.rails import Answer, Outcome, PayinTerms, PaymentOrder

URL = "http://127.0.0.1:9/told"
AMOUNT = 1000


@pytest.fixture
async def floor(database_url: str) -> AsyncIterator[Desk]:
    async with desk(database_url) as opened:
        yield opened


@pytest.fixture
async def merchant(floor: Desk) -> Merchant:
    return await floor.merchant(funds="5.00")


class Teller:
    """A rail that says of every payin what it is told to say."""

    lag_seconds = 0.0
    denial_seconds = 0.0
    calls_max: int | None = None

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers = list(answers)

    async def submit(self, order: PaymentOrder) -> Answer:
        raise NotImplementedError(order.reference)

    async def look_up(self, reference: str) -> Answer:
        raise NotImplementedError(reference)

    async def look_up_payin(self, payin: PayinTerms) -> Answer:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def paid(amount_minor: int | None = AMOUNT, currency: str | None = "BDT", **fields: str) -> Answer:
    return Answer(Outcome.PAID, amount_minor=amount_minor, currency=currency, **fields)


async def say(floor: Desk, payin_id: UUID, outcome: str, *, event_id: str | None = None, **fields: object) -> None:
    """The sandbox speaks by itself about a payin."""
    values = {"amount_minor": AMOUNT, "currency": "BDT"} | fields
    event = NewRailEvent("sandbox", event_id or str(uuid4()), render_id(PAYIN, payin_id), outcome, **values)  # type: ignore[arg-type]
    await in_transaction(floor.worker, lambda tx: append_rail_events(tx, [event]))


async def listen(floor: Desk) -> None:
    """Hear everything that is due, or was only put off because somebody else was at it."""
    soon = "applied_at IS NULL AND due_at <= now() + interval '5 seconds'"
    while (await hear(floor.worker)).count or await floor.count("rail_events", soon):
        await execute(floor.owner, f"UPDATE rail_events SET due_at = now() WHERE {soon}")


async def events(floor: Desk) -> list[str]:
    return [row.type for row in await fetch(floor.owner, "SELECT type FROM events ORDER BY payin_id, sequence")]


async def kinds(floor: Desk) -> list[str]:
    rows = await fetch(floor.owner, "SELECT kind FROM entries WHERE payin_id IS NOT NULL ORDER BY account_id, seq")
    return [row.kind for row in rows]


async def discrepancies(floor: Desk) -> list[tuple[str, str, str | None, str]]:
    rows = await fetch(floor.owner, "SELECT kind, word, state, detail FROM discrepancies ORDER BY opened_at, id")
    return [tuple(row) for row in rows]


# What a look-up says


async def test_a_look_up_that_finds_it_paid_credits_exactly_the_amount_once(floor: Desk, merchant: Merchant) -> None:
    payin_id = await floor.create_payin(merchant, callback_url=URL)
    await floor.collect({"sandbox": Teller(paid(provider_reference="B-1"))})

    assert await floor.payin_state(payin_id) == "success"
    assert await floor.balance(merchant) == (500 + AMOUNT, 0)
    assert await events(floor) == ["payin.success"]
    assert await floor.count("callbacks", "payin_id IS NOT NULL") == 1
    assert await floor.count("payin_due") == 0
    await assert_sound(floor.owner)


@pytest.mark.parametrize(
    "answer", [paid(AMOUNT + 1), paid(AMOUNT - 1), paid(currency="USD"), paid(None), paid(AMOUNT * 100)]
)
async def test_another_sum_credits_nothing_and_is_for_people(floor: Desk, merchant: Merchant, answer: Answer) -> None:
    payin_id = await floor.create_payin(merchant)
    await floor.collect({"sandbox": Teller(answer)})

    assert await floor.payin_state(payin_id) == "pending"
    assert await floor.balance(merchant) == (500, 0)
    assert [(kind, word, state) for kind, word, state, _ in await discrepancies(floor)] == [
        ("amount", "paid", "pending")
    ]
    # Its rail is asked again, and the same contradiction stays one.
    await floor.make_payins_due()
    await floor.collect({"sandbox": Teller(answer)})
    assert len(await discrepancies(floor)) == 1
    await assert_sound(floor.owner)


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (Answer(Outcome.DECLINED, failure_code="no such word"), "failed"),
        (Answer(Outcome.NOT_FOUND), "pending"),
        (Answer(Outcome.SUBMITTED), "pending"),
        (Answer(Outcome.UNKNOWN), "pending"),
        (RuntimeError("a crash"), "pending"),
    ],
)
async def test_only_a_definite_word_ends_it(
    floor: Desk, merchant: Merchant, answer: Answer | Exception, state: str
) -> None:
    payin_id = await floor.create_payin(merchant)
    await floor.collect({"sandbox": Teller(answer)})
    assert await floor.payin_state(payin_id) == state
    assert await floor.balance(merchant) == (500, 0)
    if state == "failed":
        assert (await floor.one("SELECT failure_code FROM payins")).failure_code == "other"
        assert await events(floor) == ["payin.failed"]
    else:
        row = await floor.one("SELECT due_at > now() AS later, lease_token FROM payin_due")
        assert tuple(row) == (True, None)
    await assert_sound(floor.owner)


async def test_look_ups_follow_their_schedule(floor: Desk, merchant: Merchant) -> None:
    await floor.create_payin(merchant)
    waits = []
    for _ in range(4):
        await floor.make_payins_due()
        await floor.collect(
            {"sandbox": Teller(Answer(Outcome.NOT_FOUND))}, payin_look_up_delays_seconds=(10.0, 100.0, 1000.0)
        )
        row = await floor.one("SELECT extract(epoch FROM due_at - now()) AS seconds FROM payin_due")
        waits.append(round(float(row.seconds), -1))
    assert waits == [100, 1000, 1000, 1000], "the first delay was the create's"


async def test_a_payin_expires_only_when_the_rail_says_after_its_end_that_nobody_has_paid(
    floor: Desk, merchant: Merchant
) -> None:
    end = datetime.now(UTC) + timedelta(seconds=60)
    payin_id = await floor.create_payin(merchant, expires_at=end)
    await floor.collect({"sandbox": Teller(Answer(Outcome.NOT_FOUND))}, payin_look_up_delays_seconds=(3600.0,))
    assert await floor.payin_state(payin_id) == "pending"
    row = await floor.one("SELECT due_at FROM payin_due")
    assert row.due_at == end, "it is asked right after its end"

    await _let_time_pass(floor, payin_id)
    for answer in (Answer(Outcome.UNKNOWN), Answer(Outcome.SUBMITTED)):
        await floor.make_payins_due()
        await floor.collect({"sandbox": Teller(answer)})
        assert await floor.payin_state(payin_id) == "pending"
    await floor.make_payins_due()
    await floor.collect({"sandbox": Teller(Answer(Outcome.NOT_FOUND))})
    assert await floor.payin_state(payin_id) == "expired"
    assert await events(floor) == ["payin.expired"]
    await assert_sound(floor.owner)

    await say(floor, payin_id, "paid")
    await listen(floor)
    assert await floor.payin_state(payin_id) == "expired"
    assert await floor.balance(merchant) == (500, 0)
    assert await discrepancies(floor) == [("status", "paid", "expired", "")]


async def _let_time_pass(floor: Desk, payin_id: UUID) -> None:
    """Move a payin's end into the past, behind the schema's back."""
    async with floor.owner.begin() as tx:
        await tx.exec_driver_sql("ALTER TABLE payins DISABLE TRIGGER payins_terms_fixed")
        await tx.exec_driver_sql(f"UPDATE payins SET expires_at = now() - interval '1 second' WHERE id = '{payin_id}'")
        await tx.exec_driver_sql("ALTER TABLE payins ENABLE TRIGGER payins_terms_fixed")


async def test_a_rail_with_a_lag_is_asked_after_it(floor: Desk, merchant: Merchant) -> None:
    payin_id = await floor.create_payin(merchant, expires_at=datetime.now(UTC) + timedelta(seconds=60))
    await _let_time_pass(floor, payin_id)
    late = Teller(Answer(Outcome.NOT_FOUND))
    late.lag_seconds = 3600.0
    await floor.collect({"sandbox": late})
    assert await floor.payin_state(payin_id) == "pending"


async def test_what_the_rail_has_said_and_nobody_has_heard_yet_keeps_it_from_expiring(
    floor: Desk, merchant: Merchant
) -> None:
    payin_id = await floor.create_payin(merchant, expires_at=datetime.now(UTC) + timedelta(seconds=60))
    await _let_time_pass(floor, payin_id)
    await say(floor, payin_id, "paid")
    await floor.collect({"sandbox": Teller(Answer(Outcome.NOT_FOUND))})
    assert await floor.payin_state(payin_id) == "pending"
    await listen(floor)
    assert await floor.payin_state(payin_id) == "success"


# What the rail says by itself


async def test_an_event_credits_once_however_often_and_in_whatever_order_it_comes(
    floor: Desk, merchant: Merchant
) -> None:
    payin_id = await floor.create_payin(merchant)
    for event_id in ("E-1", "E-1", "E-2", "E-3"):
        await say(floor, payin_id, "paid", event_id=event_id)
    await say(floor, payin_id, "submitted")
    await asyncio.gather(*(listen(floor) for _ in range(4)))
    await floor.make_payins_due()
    await floor.collect({"sandbox": Teller()})

    assert await floor.payin_state(payin_id) == "success"
    assert await kinds(floor) == ["payin"]
    assert await floor.balance(merchant) == (500 + AMOUNT, 0)
    assert await floor.count("rail_events", "applied_at IS NULL") == 0
    assert await discrepancies(floor) == []
    await assert_sound(floor.owner)


async def test_an_event_and_a_look_up_at_the_same_time_credit_once(floor: Desk, merchant: Merchant) -> None:
    for _ in range(10):
        payin_id = await floor.create_payin(merchant)
        await say(floor, payin_id, "paid")
        await asyncio.gather(
            listen(floor), floor.collect({"sandbox": Teller(paid())}), listen(floor), return_exceptions=False
        )
    assert (await kinds(floor)) == ["payin"] * 10
    assert await floor.balance(merchant) == (500 + 10 * AMOUNT, 0)
    await assert_sound(floor.owner)


@pytest.mark.parametrize(("amount_minor", "currency"), [(AMOUNT + 1, "BDT"), (1, "BDT"), (AMOUNT, "USD")])
async def test_an_event_about_another_sum_credits_nothing(
    floor: Desk, merchant: Merchant, amount_minor: int, currency: str
) -> None:
    payin_id = await floor.create_payin(merchant)
    await say(floor, payin_id, "paid", amount_minor=amount_minor, currency=currency)
    await listen(floor)
    assert await floor.payin_state(payin_id) == "pending"
    assert await floor.balance(merchant) == (500, 0)
    assert await discrepancies(floor) == [("amount", "paid", "pending", f"{amount_minor} {currency}")]
    # The right sum is still welcome.
    await say(floor, payin_id, "paid")
    await listen(floor)
    assert await floor.payin_state(payin_id) == "success"
    await assert_sound(floor.owner)


async def test_a_second_payment_under_the_reference_is_for_people(floor: Desk, merchant: Merchant) -> None:
    payin_id = await floor.create_payin(merchant)
    await say(floor, payin_id, "paid", provider_reference="B-1")
    await listen(floor)
    await say(floor, payin_id, "paid", provider_reference="B-2")
    await listen(floor)
    assert await kinds(floor) == ["payin"]
    assert await discrepancies(floor) == [("status", "paid", "success", "another payment: B-2")]


async def test_a_rail_that_speaks_of_anothers_payin_is_not_believed(floor: Desk, merchant: Merchant) -> None:
    payin_id = await floor.create_payin(merchant)
    await add_rail(floor, "other", "http://127.0.0.1:9")
    event = NewRailEvent("other", "E-1", render_id(PAYIN, payin_id), "paid", amount_minor=AMOUNT, currency="BDT")
    unknown = NewRailEvent("sandbox", "E-2", "pi_nobody", "paid", amount_minor=AMOUNT, currency="BDT")
    await in_transaction(floor.worker, lambda tx: append_rail_events(tx, [event, unknown]))
    await listen(floor)
    assert await floor.payin_state(payin_id) == "pending"
    assert [kind for kind, *_ in await discrepancies(floor)] == ["reference", "reference"]


# Refunds


async def test_a_refund_takes_back_exactly_the_amount_once(floor: Desk, merchant: Merchant) -> None:
    payin_id = await floor.create_payin(merchant, callback_url=URL)
    for _ in range(2):
        await say(floor, payin_id, "paid")
    await listen(floor)
    for _ in range(2):
        await say(floor, payin_id, "returned")
    await listen(floor)

    assert await floor.payin_state(payin_id) == "refunded"
    assert await kinds(floor) == ["payin", "payin_refund"]
    assert await floor.balance(merchant) == (500, 0)
    assert await events(floor) == ["payin.success", "payin.refunded"]
    assert await discrepancies(floor) == []
    await assert_sound(floor.owner)


async def test_a_refund_that_comes_before_its_payment_is_both(floor: Desk, merchant: Merchant) -> None:
    payin_id = await floor.create_payin(merchant)
    await say(floor, payin_id, "returned")
    await say(floor, payin_id, "paid")
    await listen(floor)
    assert await floor.payin_state(payin_id) == "refunded"
    assert await floor.balance(merchant) == (500, 0)
    assert await events(floor) == ["payin.success", "payin.refunded"]
    await assert_sound(floor.owner)


async def test_a_refund_that_the_account_cannot_bear_waits_and_people_are_told_once(
    floor: Desk, merchant: Merchant
) -> None:
    payin_id = await floor.create_payin(merchant)
    await say(floor, payin_id, "paid")
    await listen(floor)
    spent = await floor.create(merchant, amount_minor=600)
    await say(floor, payin_id, "returned")
    for _ in range(3):
        await execute(floor.owner, "UPDATE rail_events SET due_at = now() WHERE applied_at IS NULL")
        await listen(floor)
    assert await floor.payin_state(payin_id) == "success"
    assert await floor.balance(merchant) == (500 + AMOUNT, 600)
    assert await discrepancies(floor) == [("funds", "returned", "success", "")]
    assert await floor.count("rail_events", "applied_at IS NULL") == 1
    await assert_sound(floor.owner)

    other = await floor.create_payin(merchant)
    await say(floor, other, "paid")
    await listen(floor)
    await execute(floor.owner, "UPDATE rail_events SET due_at = now() WHERE applied_at IS NULL")
    await listen(floor)
    assert await floor.payin_state(payin_id) == "refunded"
    assert await floor.state(spent) == "queued"
    assert await floor.balance(merchant) == (500 + AMOUNT, 600)
    await assert_sound(floor.owner)


# Workers that die, are late, or are many


async def test_a_worker_that_dies_while_it_asks_loses_nothing(floor: Desk, merchant: Merchant) -> None:
    payin_id = await floor.create_payin(merchant)
    await in_transaction(
        floor.worker,
        lambda tx: claim_questions(
            tx, rail="sandbox", token=uuid4(), lease_seconds=60.0, claim_max=10, lag_seconds=0.0
        ),
    )
    await floor.collect({"sandbox": Teller()})
    assert await floor.payin_state(payin_id) == "pending", "the lease is another's"
    await floor.make_payins_due()
    await floor.collect({"sandbox": Teller(paid())})
    assert await floor.payin_state(payin_id) == "success"


async def test_an_answer_that_comes_after_its_lease_credits_once_and_leaves_the_schedule_alone(
    floor: Desk, merchant: Merchant
) -> None:
    first, second = await floor.create_payin(merchant), await floor.create_payin(merchant)
    late, now = uuid4(), uuid4()
    questions = []
    for token in (late, now):
        await floor.make_payins_due()
        questions.append(
            await in_transaction(
                floor.worker,
                lambda tx, token=token: claim_questions(  # type: ignore[misc]
                    tx, rail="sandbox", token=token, lease_seconds=60.0, claim_max=10, lag_seconds=0.0
                ),
            )
        )
    by_id = [{question.payin_id: question for question in claimed} for claimed in questions]
    leases = await fetch(floor.owner, "SELECT due_at, lease_token FROM payin_due ORDER BY payin_id")

    async def record(question: object, answer: Answer, token: UUID) -> None:
        await in_transaction(
            floor.worker,
            lambda tx: record_answer(tx, question, answer, token=token, again_in_seconds=5.0, lag_seconds=0.0),  # type: ignore[arg-type]
        )

    await record(by_id[0][second], Answer(Outcome.NOT_FOUND), late)
    assert await fetch(floor.owner, "SELECT due_at, lease_token FROM payin_due ORDER BY payin_id") == leases
    await record(by_id[0][first], paid(), late)
    await record(by_id[1][first], paid(), now)
    assert await kinds(floor) == ["payin"]
    assert await floor.payin_state(second) == "pending"
    await assert_sound(floor.owner)


async def test_many_collectors_and_listeners_credit_each_payin_once(floor: Desk) -> None:
    merchants = [await floor.merchant(funds=None) for _ in range(3)]
    ids = [await floor.create_payin(random.choice(merchants)) for _ in range(60)]
    for payin_id in ids[::2]:
        await say(floor, payin_id, "paid")
    await asyncio.gather(*(floor.collect() for _ in range(3)), *(listen(floor) for _ in range(3)))
    await listen(floor)
    assert await floor.count("payins", "state = 'success'") == 60
    total = sum([(await floor.balance(merchant))[0] for merchant in merchants])
    assert total == 60 * AMOUNT
    await assert_sound(floor.owner)


# The sandbox, by the last two digits of the amount


@pytest.mark.parametrize(
    ("amount_minor", "state", "found"),
    [
        (1000, "success", 0),
        (1001, "pending", 0),
        (1002, "failed", 0),
        (1003, "pending", 1),
        (1004, "refunded", 0),
        (1005, "success", 0),
        (1006, "pending", 0),
    ],
)
async def test_the_sandbox_plays_by_the_amount(
    floor: Desk, merchant: Merchant, amount_minor: int, state: str, found: int
) -> None:
    payin_id = await floor.create_payin(merchant, amount_minor=amount_minor)
    await floor.collect()
    await execute(floor.owner, "UPDATE rail_events SET due_at = now() WHERE applied_at IS NULL")
    await listen(floor)
    assert await floor.payin_state(payin_id) == state
    assert len(await discrepancies(floor)) == found
    await assert_sound(floor.owner)
