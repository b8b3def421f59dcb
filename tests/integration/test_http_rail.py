"""The http rail against a bank on the wire: only its signed word counts, everything else leaves the money held."""

import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from common.recipients import Recipient
from ops.simulator.moods import Behaviour, Fate, Manner
from tests.bank import SECRET, RunningBank, bank
from tests.factories import execute, fetch
from tests.flows import Desk, assert_sound, desk
from tests.receivers import Peer, head, receiver
from worker.rails import Answer, Outcome, PayinTerms, PaymentOrder
from worker.rails.breaker import Breaker
from worker.rails.http import HttpRail, open_rail_session

FUNDS_MINOR = 100_000_000
AMOUNT_MINOR = 1000
TIMEOUT_SECONDS = 2.0


def order(clock: Callable[[], float] = time.time, *, seconds_ago: float = 0.0) -> PaymentOrder:
    recipient = Recipient("01712345678", {"bank": "x"})
    return PaymentOrder("po_1", AMOUNT_MINOR, "BDT", recipient, clock() - seconds_ago)


@asynccontextmanager
async def rail_to(base_url: str, **changes: Any) -> AsyncIterator[HttpRail]:
    async with open_rail_session(connect_timeout_seconds=TIMEOUT_SECONDS, timeout_seconds=TIMEOUT_SECONDS) as session:
        rail = HttpRail(
            session=session,
            base_url=URL(base_url),
            secret=SECRET,
            authoritative=True,
            lag_seconds=0.0,
            concurrency=None,
            breaker=Breaker(failures_max=1000, rest_seconds=1.0),
        )
        yield replace(rail, **changes)


@pytest.mark.parametrize(
    ("behaviour", "outcome", "times_paid"),
    [
        (Behaviour(), Outcome.PAID, 1),
        (Behaviour(fate=Fate.DECLINED), Outcome.DECLINED, 0),
        (Behaviour(fate=Fate.SUBMITTED_PAID), Outcome.SUBMITTED, 0),
        (Behaviour(fate=Fate.NOT_ACCEPTED), Outcome.NOT_ACCEPTED, 0),
        (Behaviour(Manner.SLOW), Outcome.UNKNOWN, 1),
        (Behaviour(Manner.DROP_BEFORE), Outcome.UNKNOWN, 0),
        (Behaviour(Manner.DROP_AFTER), Outcome.UNKNOWN, 1),
        (Behaviour(Manner.ERROR_BEFORE), Outcome.UNKNOWN, 0),
        (Behaviour(Manner.ERROR_AFTER), Outcome.UNKNOWN, 1),
        (Behaviour(Manner.BADLY_SIGNED), Outcome.UNKNOWN, 1),
        (Behaviour(Manner.GARBAGE), Outcome.UNKNOWN, 1),
    ],
    ids=str,
)
async def test_only_a_signed_answer_says_something(
    tmp_path: Path, behaviour: Behaviour, outcome: Outcome, times_paid: int
) -> None:
    async with bank(tmp_path) as there, rail_to(there.base_url) as rail:
        there.script.submits.append(behaviour)
        answer = await rail.submit(order())
        assert answer.outcome is outcome, answer
        assert there.payment("po_1").times_paid == times_paid
        if behaviour.manner is Manner.ANSWER and outcome is not Outcome.NOT_ACCEPTED:
            assert (answer.amount_minor, answer.currency, answer.provider_reference) == (AMOUNT_MINOR, "BDT", "B-po_1")
        assert await rail.submit(order()) == await rail.submit(order())
        assert there.payment("po_1").times_paid <= 1


async def test_what_was_to_be_asked_long_ago_is_not_taken_any_more_and_until_then_not_found_is_no_proof(
    tmp_path: Path,
) -> None:
    async with bank(tmp_path) as there, rail_to(there.base_url, lag_seconds=5.0) as rail:
        assert rail.denial_seconds == 5.0 + 2 * 60
        late = await rail.submit(order(seconds_ago=61))
        assert late.outcome is Outcome.UNKNOWN
        assert (await rail.look_up("po_1")).outcome is Outcome.NOT_FOUND
        assert (await rail.submit(order(seconds_ago=50))).outcome is Outcome.PAID


@pytest.mark.parametrize(
    ("manner", "outcome"),
    [
        (Manner.ANSWER, Outcome.PAID),
        (Manner.SLOW, Outcome.UNKNOWN),
        (Manner.DROP_BEFORE, Outcome.UNKNOWN),
        (Manner.ERROR_BEFORE, Outcome.UNKNOWN),
        (Manner.BADLY_SIGNED, Outcome.UNKNOWN),
        (Manner.GARBAGE, Outcome.UNKNOWN),
    ],
)
async def test_a_look_up_is_believed_like_a_submit(tmp_path: Path, manner: Manner, outcome: Outcome) -> None:
    async with bank(tmp_path) as there, rail_to(there.base_url) as rail:
        await rail.submit(order())
        # A dropped connection is tried once more by the client: a look-up changes nothing.
        there.script.look_ups += [manner] * 2
        assert (await rail.look_up("po_1")).outcome is outcome


@pytest.mark.parametrize(("authoritative", "outcome"), [(True, Outcome.NOT_FOUND), (False, Outcome.UNKNOWN)])
async def test_not_found_is_an_answer_only_of_a_rail_that_promises_to_know(
    tmp_path: Path, authoritative: bool, outcome: Outcome
) -> None:
    async with bank(tmp_path) as there, rail_to(there.base_url, authoritative=authoritative) as rail:
        assert (await rail.look_up("po_1")).outcome is outcome


@pytest.mark.parametrize("changes", [{"secret": "another"}, {"clock": lambda: 1_000_000.0}], ids=["secret", "clock"])
async def test_whose_secret_or_clock_is_another_learns_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    async with bank(tmp_path) as there, rail_to(there.base_url, **changes) as rail:
        assert (await rail.submit(order(rail.clock))).outcome is Outcome.UNKNOWN
        assert there.ledger.payments() == []


async def test_a_bank_that_answers_without_end_and_never_finally_is_left() -> None:
    async def flood(peer: Peer) -> None:
        while not await peer.hung_up(within_seconds=0):
            await peer.send(head("100 Continue") * 100)

    async with receiver(flood) as there, rail_to(f"http://127.0.0.1:{there.port}") as rail:
        answer = await rail.submit(order())
    assert answer == Answer(Outcome.UNKNOWN, detail="connection lost: ClientResponseError")


async def test_only_a_connection_that_could_not_be_opened_was_not_accepted_by_itself() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with rail_to(nobody) as rail:
            assert await rail.submit(order()) == Answer(Outcome.NOT_ACCEPTED, detail="not connected")
            assert await rail.look_up("po_1") == Answer(Outcome.UNKNOWN, detail="not connected")


async def test_another_content_under_the_same_reference_is_paid_by_nobody(tmp_path: Path) -> None:
    async with bank(tmp_path) as there, rail_to(there.base_url) as rail:
        await rail.submit(order())
        assert (await rail.submit(replace(order(), amount_minor=2))).outcome is Outcome.UNKNOWN
        assert (there.payment("po_1").amount_minor, there.payment("po_1").times_paid) == (AMOUNT_MINOR, 1)


async def test_a_silent_bank_is_left_in_peace(tmp_path: Path) -> None:
    breaker = Breaker(failures_max=3, rest_seconds=60)
    async with bank(tmp_path) as there, rail_to(there.base_url, breaker=breaker, concurrency=7) as rail:
        assert rail.calls_max == 7
        there.script.submits += [Behaviour(Manner.ERROR_AFTER)] * 3
        for number in range(3):
            await rail.submit(replace(order(), reference=f"po_{number}"))
        assert rail.calls_max == 7, "an error that is signed is an answer"
        there.script.submits += [Behaviour(Manner.DROP_AFTER)] * 3
        for number in range(3):
            await rail.submit(replace(order(), reference=f"po_x{number}"))
        assert rail.calls_max == 0


# A payout's whole way


@asynccontextmanager
async def at_the_bank(
    database_url: str, tmp_path: Path, **changes: Any
) -> AsyncIterator[tuple[Desk, RunningBank, HttpRail]]:
    async with desk(database_url) as working, bank(tmp_path) as there, rail_to(there.base_url, **changes) as rail:
        yield working, there, rail
        await assert_sound(working.owner)


@pytest.mark.parametrize("manner", [manner for manner in Manner if manner is not Manner.ANOTHER_SUM])
async def test_whatever_happens_to_the_answer_a_payout_is_paid_once(
    database_url: str, tmp_path: Path, manner: Manner
) -> None:
    async with at_the_bank(database_url, tmp_path) as (working, there, rail):
        merchant = await working.merchant()
        payout_id = await working.create(merchant)
        there.script.submits.append(Behaviour(manner))
        settler = working.settler({"sandbox": rail})
        await working.settle(settler)
        if await working.state(payout_id) == "verifying":
            assert await working.balance(merchant) == (FUNDS_MINOR, AMOUNT_MINOR)
            await working.make_due()
            await working.settle(settler)
        if await working.state(payout_id) == "verifying":
            # The bank knows nothing of it, and that is not believed before no request can be on its way any more.
            assert await working.attempts(payout_id) == [("submit", "unknown"), ("look_up", "not_found")]
            (reference,) = [payment.reference for payment in there.ledger.payments()]
            await execute(working.owner, "UPDATE payout_attempts SET started_at = started_at - interval '10 minutes'")
            await working.make_due()
            await working.settle(settler)
            assert there.payment(reference).submits == 2
        assert await working.state(payout_id) == "success"
        (payment,) = there.ledger.payments()
        assert payment.times_paid == 1
        assert await working.balance(merchant) == (FUNDS_MINOR - AMOUNT_MINOR, 0)


@pytest.mark.parametrize("sum_named", [{"amount_minor": 0}, {"currency": ""}], ids=str)
async def test_nothing_is_a_sum_too(tmp_path: Path, sum_named: dict[str, Any]) -> None:
    async with bank(tmp_path) as there, rail_to(there.base_url) as rail:
        answer = await rail.submit(replace(order(), **sum_named))
        assert (answer.amount_minor, answer.currency) == (
            sum_named.get("amount_minor", AMOUNT_MINOR),
            sum_named.get("currency", "BDT"),
        )


async def test_an_answer_about_another_sum_moves_nothing_and_is_for_people(database_url: str, tmp_path: Path) -> None:
    async with at_the_bank(database_url, tmp_path) as (working, there, rail):
        merchant = await working.merchant()
        payout_id = await working.create(merchant)
        there.script.submits.append(Behaviour(Manner.ANOTHER_SUM))
        await working.settle(working.settler({"sandbox": rail}))
        assert await working.state(payout_id) == "verifying"
        assert await working.balance(merchant) == (FUNDS_MINOR, AMOUNT_MINOR)
        rows = await fetch(working.owner, "SELECT kind, word, detail FROM discrepancies")
        assert [tuple(row) for row in rows] == [("amount", "paid", f"{AMOUNT_MINOR + 1} BDT")]


PAYIN = PayinTerms("pi_1", AMOUNT_MINOR, "BDT")


@pytest.mark.parametrize(
    ("manner", "outcome"),
    [
        (Manner.ANSWER, Outcome.PAID),
        (Manner.SLOW, Outcome.UNKNOWN),
        (Manner.DROP_BEFORE, Outcome.UNKNOWN),
        (Manner.ERROR_BEFORE, Outcome.UNKNOWN),
        (Manner.BADLY_SIGNED, Outcome.UNKNOWN),
        (Manner.GARBAGE, Outcome.UNKNOWN),
    ],
    ids=str,
)
async def test_only_a_signed_answer_says_that_a_payin_was_paid(
    tmp_path: Path, manner: Manner, outcome: Outcome
) -> None:
    async with bank(tmp_path) as there, rail_to(there.base_url) as rail, aiohttp.ClientSession() as payer:
        counter = f"{there.base_url}/counter/pi_1"
        for status in (200, 409):
            answered = await payer.post(counter, json={"amount_minor": AMOUNT_MINOR + 5, "currency": "BDT"})
            assert answered.status == status
        # The client asks once more by itself when a connection is dropped; a question may be put twice.
        there.script.look_ups += [manner] * (2 if manner is Manner.DROP_BEFORE else 1)
        answer = await rail.look_up_payin(PAYIN)
        assert answer.outcome is outcome, answer
        if outcome is Outcome.PAID:
            assert (answer.amount_minor, answer.currency) == (AMOUNT_MINOR + 5, "BDT"), (
                "what was paid, not what was asked"
            )
        assert (await payer.post(f"{counter}/return")).status == 200
        assert (await rail.look_up_payin(PAYIN)).outcome is Outcome.RETURNED
        assert (await payer.post(f"{counter}/return")).status == 409
        assert (await rail.look_up_payin(replace(PAYIN, reference="pi_2"))).outcome is Outcome.NOT_FOUND
