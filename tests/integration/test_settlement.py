"""Settlement: what each answer of a rail does to a payout, its money and what is told, whatever happens to the worker."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from typing import Any
from uuid import UUID, uuid4

import pytest

from common.canceling import cancel
from common.db.due import Claim, History
from common.db.engine import in_transaction
from common.db.payouts import LockedPayout
from common.db.rail_events import NewRailEvent, append_rail_events, find_rail_events_due
from common.db.tables import metadata
from common.domain.payout import STAGES, State
from common.domain.schedule import LOOK_UP_DELAYS, SUBMIT_DELAYS, SUBMITTED_SILENCE_SECONDS
from common.errors import NotCancelable
from common.moving import Conclusion
from common.recipients import Recipient
from gateway.deciding import decide_batch
from tests.factories import execute, fetch, order
from tests.faults.merchants import account_locked
from tests.flows import LOCK_WAIT_SECONDS, Desk, assert_sound, desk
from tests.stack import eventually
from worker.claiming import find_calls
from worker.conclusions import LOOK_UP, SUBMIT, Call, Ended, Terms, conclude, storable
from worker.hearing import apply_words
from worker.rails import Answer, Outcome, PayinTerms, PaymentOrder

FUNDS_MINOR = 100_000_000
AMOUNT_MINOR = 1000


class TestRail:
    """A rail that answers what it is told to, and remembers what it was asked. `None`: it never answers."""

    __test__ = False

    def __init__(
        self, submit: Answer | Exception | None, look_up: Answer | Exception | None = None, *, lag_seconds: float = 0.0
    ) -> None:
        self.lag_seconds = lag_seconds
        self.denial_seconds = 0.0
        self.calls_max: int | None = None
        self.submitted: list[str] = []
        self.looked_up: list[str] = []
        self._submit = submit
        self._look_up = look_up

    async def submit(self, order: PaymentOrder) -> Answer:
        self.submitted.append(order.reference)
        return await self._say(self._submit)

    async def look_up(self, reference: str) -> Answer:
        self.looked_up.append(reference)
        return await self._say(self._look_up)

    async def look_up_payin(self, payin: PayinTerms) -> Answer:
        raise NotImplementedError(payin.reference)

    async def _say(self, answer: Answer | Exception | None) -> Answer:
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer


PAID = Answer(Outcome.PAID, provider_reference="bank-1")


async def _everything(desk: Desk) -> dict[str, list[Any]]:
    """All rows of all tables."""
    return {name: sorted(map(repr, await fetch(desk.owner, f"SELECT * FROM {name}"))) for name in metadata.tables}


async def _due_in_seconds(desk: Desk, payout_id: UUID) -> float:
    query = "SELECT extract(epoch FROM due_at - now())::float8 AS s FROM payout_due WHERE payout_id = :id"
    return float((await desk.one(query, id=payout_id)).s)


async def _run_to_the_end(desk: Desk, payout_id: UUID, rounds_max: int = 6) -> None:
    """Settle, and travel from one due time to the next, until the payout is final or the rounds are up."""
    settler = desk.settler(rail_timeout_seconds=1.0)
    for _ in range(rounds_max):
        await desk.settle(settler)
        if State(await desk.state(payout_id)).is_final:
            return
        await desk.make_due()


NO_WORD = [("look_up", "unknown")] * 5
# What the contract says of each recipient: where the payout ends, why, and what was tried until then.
RECIPIENTS: dict[str, tuple[State, str | None, list[tuple[str, str]]]] = {
    "any other": (State.SUCCESS, None, [("submit", "paid")]),
    "0001": (State.SUCCESS, None, [("submit", "submitted"), ("look_up", "paid")]),
    "0100": (State.FAILED, "other", [("submit", "declined")]),
    "0101": (State.FAILED, "recipient_not_found", [("submit", "declined")]),
    "0102": (State.FAILED, "recipient_account_closed", [("submit", "declined")]),
    "0103": (State.FAILED, "recipient_account_blocked", [("submit", "declined")]),
    "0104": (State.FAILED, "recipient_limit_reached", [("submit", "declined")]),
    "0105": (State.FAILED, "compliance_rejected", [("submit", "declined")]),
    "0120": (State.SUCCESS, None, [("submit", "not_accepted"), ("submit", "not_accepted"), ("submit", "paid")]),
    "0200": (State.VERIFYING, None, [("submit", "unknown"), *NO_WORD]),
    "0201": (State.SUCCESS, None, [("submit", "unknown"), ("look_up", "paid")]),
    "0202": (State.SUCCESS, None, [("submit", "unknown"), ("look_up", "not_found"), ("submit", "paid")]),
    "0203": (State.FAILED, "provider_declined", [("submit", "unknown"), ("look_up", "declined")]),
}
MONEY = {
    State.SUCCESS: (["hold", "capture"], FUNDS_MINOR - AMOUNT_MINOR, 0),
    State.FAILED: (["hold", "release"], FUNDS_MINOR, 0),
    State.VERIFYING: (["hold"], FUNDS_MINOR, AMOUNT_MINOR),
}


@pytest.mark.parametrize("recipient", RECIPIENTS)
async def test_every_sandbox_recipient_reaches_what_the_contract_says(database_url: str, recipient: str) -> None:
    state, failure_code, tried = RECIPIENTS[recipient]
    number = "01712345678" if recipient == "any other" else f"0171234{recipient}"
    async with desk(database_url) as working:
        merchant = await working.merchant()
        url = "http://127.0.0.1:9/told"
        payout_id = await working.create(merchant, recipient=number, external_id="PAY-1", callback_url=url)
        await _run_to_the_end(working, payout_id)

        row = await working.one("SELECT * FROM payouts WHERE id = :id", id=payout_id)
        assert (row.state, row.failure_code) == (state, failure_code)
        assert await working.attempts(payout_id) == tried
        kinds, posted, held = MONEY[state]
        assert await working.entries(payout_id) == kinds
        assert await working.balance(merchant) == (posted, held)
        assert await working.count("payout_due") == (0 if state.is_final else 1)
        references = await fetch(working.owner, "SELECT DISTINCT reference FROM payout_attempts")
        assert len(references) == 1
        bank = await working.one("SELECT * FROM sandbox.payments")
        assert (bank.reference, bank.amount_minor, bank.currency) == (references[0].reference, AMOUNT_MINOR, "BDT")
        assert bank.submits == sum(action == "submit" for action, _ in tried)
        assert (bank.state == "paid") == (state is State.SUCCESS)
        assert row.provider_reference == (f"sandbox-{bank.reference}" if state.is_final else None)
        await _assert_told(working, row, url)
        await assert_sound(working.owner)


async def _assert_told(working: Desk, payout: Any, url: str | None) -> None:
    """A final payout has its one event, as the contract writes it, and its callback that is due now; others have none."""
    events = await fetch(working.owner, "SELECT * FROM events")
    callbacks = await fetch(
        working.owner,
        "SELECT c.*, d.step, d.attempts_made, d.due_at <= now() AS is_due FROM callbacks c"
        " LEFT JOIN callback_due d USING (event_id, shop_id)",
    )
    if payout.finalized_at is None:
        assert (events, callbacks) == ([], [])
        return
    (event,) = events
    body = json.loads(event.body)
    assert event.body == json.dumps(body, separators=(",", ":")).encode("ascii")
    assert body | {"failure": None, "updated_at": None, "id": None} == {
        "type": f"payout.{payout.state}",
        "id": None,
        "external_id": "PAY-1",
        "shop_code": "shop-001",
        "status": payout.state,
        "amount": "10.00",
        "currency": "BDT",
        "sequence": payout.version,
        "failure": None,
        "updated_at": None,
    }
    assert body.get("failure", {}).get("code") == payout.failure_code
    assert datetime.fromisoformat(body["updated_at"]) == payout.updated_at == payout.finalized_at
    assert (event.type, event.sequence, event.payout_id) == (body["type"], payout.version, payout.id)
    assert [(c.event_id, c.url, c.state, c.step, c.attempts_made, c.is_due) for c in callbacks] == (
        [] if url is None else [(event.id, url, "pending", 0, 0, True)]
    )


@pytest.mark.parametrize(
    ("own", "shops", "told"),
    [
        ("http://127.0.0.1:9/own", "http://127.0.0.1:9/shop", "http://127.0.0.1:9/own"),
        (None, "http://127.0.0.1:9/shop", "http://127.0.0.1:9/shop"),
        (None, None, None),
    ],
)
async def test_the_callback_goes_to_the_payouts_url_else_the_shops_else_nowhere(
    database_url: str, own: str | None, shops: str | None, told: str | None
) -> None:
    async with desk(database_url) as working:
        merchant = await working.merchant(webhook_url=shops)
        payout_id = await working.create(merchant, external_id="PAY-1", callback_url=own)
        await working.settle()
        await _assert_told(working, await working.one("SELECT * FROM payouts WHERE id = :id", id=payout_id), told)


async def test_submitted_stays_submitted_until_the_bank_has_settled(database_url: str) -> None:
    async with desk(database_url) as working:
        merchant = await working.merchant()
        payout_id = await working.create(merchant, recipient="017000000001")
        settler = working.settler({"sandbox": working.sandbox(settle_seconds=60.0)})
        await working.settle(settler)
        for delay in LOOK_UP_DELAYS[:4]:
            assert await working.state(payout_id) == "submitted"
            assert delay - 2 < await _due_in_seconds(working, payout_id) <= delay
            await working.make_due()
            await working.settle(settler)
        await execute(working.owner, "UPDATE sandbox.payments SET settles_at = now()")
        await working.make_due()
        await working.settle(settler)
        assert await working.state(payout_id) == "success"
        await assert_sound(working.owner)


async def test_not_accepted_to_the_end_of_the_schedule_is_provider_unavailable(database_url: str) -> None:
    async with desk(database_url) as working:
        merchant = await working.merchant()
        payout_id = await working.create(merchant)
        rail = TestRail(Answer(Outcome.NOT_ACCEPTED))
        settler = working.settler({"sandbox": rail})
        for delay in SUBMIT_DELAYS:
            await working.settle(settler)
            assert await working.state(payout_id) == "queued"
            assert delay - 2 < await _due_in_seconds(working, payout_id) <= delay
            await working.make_due()
        await working.settle(settler)
        assert len(rail.submitted) == len(SUBMIT_DELAYS) + 1
        assert len(set(rail.submitted)) == 1
        row = await working.one("SELECT state, failure_code FROM payouts")
        assert (row.state, row.failure_code) == ("failed", "provider_unavailable")
        assert await working.balance(merchant) == (FUNDS_MINOR, 0)
        await assert_sound(working.owner)


@pytest.mark.parametrize(
    ("submit", "detail"),
    [(RuntimeError("the rail is broken"), "RuntimeError"), (None, "time-out")],
    ids=["raises", "hangs"],
)
async def test_a_rail_that_raises_or_never_answers_leaves_the_money_held(
    database_url: str, submit: Exception | None, detail: str
) -> None:
    async with desk(database_url) as working:
        merchant = await working.merchant()
        payout_id = await working.create(merchant)
        settler = working.settler({"sandbox": TestRail(submit, submit)}, rail_timeout_seconds=0.1)
        for _ in range(3):
            await working.settle(settler)
            await working.make_due()
            assert await working.state(payout_id) == "verifying"
            assert await working.balance(merchant) == (FUNDS_MINOR, AMOUNT_MINOR)
        details = await fetch(working.owner, "SELECT DISTINCT outcome, detail FROM payout_attempts")
        assert details == [("unknown", detail)]
        assert (await working.attempts(payout_id))[:2] == [("submit", "unknown"), ("look_up", "unknown")]
        await assert_sound(working.owner)


async def test_an_answer_that_makes_no_sense_is_recorded_all_the_same(database_url: str) -> None:
    """What a rail says may be odd in its details; the payout must not hang on them."""
    odd = {
        "a failure code of its own": Answer(Outcome.DECLINED, failure_code="insufficient_float"),
        "a long reference": Answer(Outcome.PAID, provider_reference="x" * 201),
        "an empty reference": Answer(Outcome.PAID, provider_reference=""),
        "a NUL in the detail": Answer(Outcome.DECLINED, failure_code="other", detail="a\0b"),
    }
    async with desk(database_url) as working:
        merchant = await working.merchant()
        ends = {}
        for name, answer in odd.items():
            payout_id = await working.create(merchant)
            await working.settle(working.settler({"sandbox": TestRail(answer)}))
            ends[name] = await working.state(payout_id)
        assert [name for name, state in ends.items() if not State(state).is_final] == []


@pytest.mark.parametrize(
    ("amount_minor", "currency"),
    [
        (0, "BDT"),
        (AMOUNT_MINOR, ""),
        (0, ""),
        (-AMOUNT_MINOR, "BDT"),
        (10**600, "BDT"),
        (AMOUNT_MINOR, "B\0\ud800" * 700),
    ],
    ids=["nothing", "no currency", "neither", "less than nothing", "absurd", "no text"],
)
@pytest.mark.parametrize("outcome", [Outcome.PAID, Outcome.DECLINED])
async def test_whatever_other_sum_a_rail_names_nothing_moves_and_people_are_told(
    floor: Desk, outcome: Outcome, amount_minor: int, currency: str
) -> None:
    merchant = await floor.merchant()
    payout_id = await floor.create(merchant)
    bank = TestRail(Answer(outcome, amount_minor=amount_minor, currency=currency), Answer(Outcome.UNKNOWN))
    await floor.settle(floor.settler({"sandbox": bank}))
    assert await floor.state(payout_id) == "verifying"
    assert await floor.balance(merchant) == (FUNDS_MINOR, AMOUNT_MINOR)
    assert (await floor.one("SELECT kind FROM discrepancies")).kind == "amount"
    await assert_sound(floor.owner)


@pytest.mark.parametrize(
    ("named", "kept"), [(1, 1), (10**15, 10**15), (0, None), (-1, None), (10**15 + 1, None), (10**600, None)]
)
def test_of_a_payin_a_sum_that_no_ledger_holds_is_none(named: int, kept: int | None) -> None:
    told = storable(Answer(Outcome.DECLINED, amount_minor=named, currency="B\0D\ud800T" * 9))
    assert (told.amount_minor, told.currency) == (kept, "BD?TBD?TBD?TBD?T")


async def test_what_was_not_taken_leaves_no_reference_by_which_it_would_seem_to_have_been(floor: Desk) -> None:
    payout_id = await floor.create(await floor.merchant())
    refusing = TestRail(Answer(Outcome.NOT_ACCEPTED, provider_reference="B-1"))
    await floor.settle(floor.settler({"sandbox": refusing}))
    await floor.make_due()
    losing = TestRail(Answer(Outcome.UNKNOWN), Answer(Outcome.NOT_FOUND))
    await floor.settle(floor.settler({"sandbox": losing}))
    await floor.make_due()
    await floor.settle(floor.settler({"sandbox": TestRail(Answer(Outcome.PAID), Answer(Outcome.NOT_FOUND))}))
    assert await floor.state(payout_id) == "success"


async def test_a_rail_that_no_longer_exists_fails_what_is_queued_and_keeps_what_was_sent(database_url: str) -> None:
    async with desk(database_url) as working:
        merchants = sorted([await working.merchant(rail="gone") for _ in range(3)], key=lambda m: m.shop.id)
        sent = await working.create(merchants[0])
        (call,) = await working.claim("gone")
        await working.record(Ended(call, Answer(Outcome.UNKNOWN)))
        queued = [await working.create(merchant, external_id="PAY-1") for merchant in merchants]
        for _ in merchants:
            await working.make_due()
            await working.settle()
        assert [await working.state(payout_id) for payout_id in queued] == ["failed"] * 3
        codes = await fetch(working.owner, "SELECT DISTINCT failure_code FROM payouts WHERE state = 'failed'")
        assert codes == [("no_route",)]
        assert await working.state(sent) == "verifying"
        assert await working.balance(merchants[0]) == (FUNDS_MINOR, AMOUNT_MINOR)
        assert await working.balance(merchants[2]) == (FUNDS_MINOR, 0)
        await assert_sound(working.owner)


async def test_a_rail_that_no_longer_exists_is_noticed_while_the_others_are_busy(database_url: str) -> None:
    async with desk(database_url) as working:
        busy, stranded = await working.merchant(), await working.merchant(rail="gone")
        payout_id = await working.create(stranded)
        settler = working.settler(settle_concurrency=1)
        for _ in range(5):
            await working.create(busy)
            assert await settler.run_round()
            await settler.drain(10)
        assert await working.state(payout_id) == "failed"


# --- conclude, as a table -------------------------------------------------------------------------------------------


def _locked(state: State, provider_reference: str | None) -> LockedPayout:
    return LockedPayout(
        id=uuid4(),
        shop_id=uuid4(),
        account_id=1,
        external_id="PAY-1",
        amount_minor=AMOUNT_MINOR,
        currency="BDT",
        recipient_sealed=b"",
        callback_url=None,
        state=state,
        version=2,
        provider_reference=provider_reference,
        expires_at=None,
        traceparent=None,
        shop_code="shop-001",
        currency_exponent=2,
        webhook_url=None,
        shop_status="active",
        locked_at=datetime.now(UTC),
    )


def _ended(payout: LockedPayout, action: str, outcome: Outcome, history: History | None) -> Ended:
    code = "recipient_not_found" if outcome is Outcome.DECLINED else None
    return Ended(
        Call(payout, "sandbox", action, 1, "reference", history, uuid4(), Terms(0.0)),
        Answer(outcome, failure_code=code),
    )


def _stay(seconds: float) -> Conclusion:
    return Conclusion(None, seconds)


_SUCCESS = Conclusion(State.SUCCESS, None)
_FAILED = Conclusion(State.FAILED, None, "recipient_not_found")
_AGAIN = LOOK_UP_DELAYS[1]
# What a lease that is ours concludes of the answer to a submit, and to a look-up from either state. Only what is here moves.
_HELD: dict[tuple[State, str, Outcome], Conclusion] = {
    (State.SENDING, SUBMIT, Outcome.PAID): _SUCCESS,
    (State.SENDING, SUBMIT, Outcome.DECLINED): _FAILED,
    (State.SENDING, SUBMIT, Outcome.SUBMITTED): Conclusion(State.SUBMITTED, LOOK_UP_DELAYS[0]),
    (State.SENDING, SUBMIT, Outcome.NOT_ACCEPTED): Conclusion(State.QUEUED, SUBMIT_DELAYS[0]),
    (State.SENDING, SUBMIT, Outcome.NOT_FOUND): Conclusion(State.VERIFYING, LOOK_UP_DELAYS[0]),
    (State.SENDING, SUBMIT, Outcome.UNKNOWN): Conclusion(State.VERIFYING, LOOK_UP_DELAYS[0]),
    (State.SENDING, SUBMIT, Outcome.RETURNED): Conclusion(State.VERIFYING, LOOK_UP_DELAYS[0]),
    (State.SUBMITTED, LOOK_UP, Outcome.PAID): _SUCCESS,
    (State.SUBMITTED, LOOK_UP, Outcome.DECLINED): _FAILED,
    (State.SUBMITTED, LOOK_UP, Outcome.SUBMITTED): _stay(_AGAIN),
    (State.SUBMITTED, LOOK_UP, Outcome.NOT_ACCEPTED): _stay(_AGAIN),
    (State.SUBMITTED, LOOK_UP, Outcome.NOT_FOUND): Conclusion(State.VERIFYING, _AGAIN),
    (State.SUBMITTED, LOOK_UP, Outcome.UNKNOWN): _stay(_AGAIN),
    (State.SUBMITTED, LOOK_UP, Outcome.RETURNED): _stay(_AGAIN),
    (State.VERIFYING, LOOK_UP, Outcome.PAID): _SUCCESS,
    (State.VERIFYING, LOOK_UP, Outcome.DECLINED): _FAILED,
    (State.VERIFYING, LOOK_UP, Outcome.SUBMITTED): Conclusion(State.SUBMITTED, _AGAIN),
    (State.VERIFYING, LOOK_UP, Outcome.NOT_ACCEPTED): _stay(_AGAIN),
    (State.VERIFYING, LOOK_UP, Outcome.NOT_FOUND): Conclusion(State.QUEUED, 0.0),
    (State.VERIFYING, LOOK_UP, Outcome.UNKNOWN): _stay(_AGAIN),
    (State.VERIFYING, LOOK_UP, Outcome.RETURNED): _stay(_AGAIN),
}
# What the rail seemed not to have, and has.
_QUEUED = {
    Outcome.PAID: Conclusion(State.SUCCESS, None, passing=State.SENDING),
    Outcome.SUBMITTED: Conclusion(State.SUBMITTED, LOOK_UP_DELAYS[0], passing=State.SENDING),
}
_ACTIONS = {State.SENDING: SUBMIT, State.SUBMITTED: LOOK_UP, State.VERIFYING: LOOK_UP}


@pytest.mark.parametrize("held", [True, False], ids=["held", "lost"])
@pytest.mark.parametrize(("state", "outcome"), list(product(State, Outcome)))
def test_conclude_moves_only_by_a_held_lease_or_because_it_was_paid(state: State, outcome: Outcome, held: bool) -> None:
    for action in [_ACTIONS[state]] if state in _ACTIONS else [SUBMIT, LOOK_UP]:
        payout = _locked(state, None)
        expected = _QUEUED.get(outcome) if state is State.QUEUED else None
        if state in _ACTIONS and (held or outcome is Outcome.PAID):
            expected = _HELD[state, action, outcome]
        assert conclude(payout, _ended(payout, action, outcome, None), held=held) == expected


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_late_answer_to_the_submit_counts_only_when_it_says_paid(state: State, outcome: Outcome) -> None:
    payout = _locked(state, None)
    expected = _SUCCESS if outcome is Outcome.PAID and state in _ACTIONS else None
    if state is State.QUEUED:
        expected = _QUEUED.get(outcome)
    assert conclude(payout, _ended(payout, SUBMIT, outcome, None), held=False) == expected


def test_what_was_taken_once_is_not_sent_again_because_it_is_denied() -> None:
    payout = _locked(State.VERIFYING, "bank-1")
    assert conclude(payout, _ended(payout, LOOK_UP, Outcome.NOT_FOUND, None), held=True) == _stay(_AGAIN)


@pytest.mark.parametrize("refused", range(len(SUBMIT_DELAYS) + 2))
def test_refusals_count_towards_the_end_of_the_schedule(refused: int) -> None:
    payout = _locked(State.SENDING, None)
    history = History(refused, "reference", submits_refused=refused, look_ups=0)
    concluded = conclude(payout, _ended(payout, SUBMIT, Outcome.NOT_ACCEPTED, history), held=True)
    if refused < len(SUBMIT_DELAYS):
        assert concluded == Conclusion(State.QUEUED, SUBMIT_DELAYS[refused])
    else:
        assert concluded == Conclusion(State.FAILED, None, "provider_unavailable")


@pytest.mark.parametrize(
    "recipient", ["01712345678", "01712340001", "01712340200"], ids=["queued", "submitted", "verifying"]
)
async def test_the_calls_of_a_claim_that_nobody_heard_of_are_found_as_they_were_made(
    floor: Desk, recipient: str
) -> None:
    await floor.create(await floor.merchant(), recipient=recipient)
    if recipient != "01712345678":
        await floor.settle(floor.settler(rail_timeout_seconds=1.0))
        await floor.make_due()
    (call,) = await floor.claim()
    claim = Claim(call.rail, call.token, lease_seconds=60.0, claim_max=1, shop_max=1, shops_max=1)
    (found,) = await in_transaction(floor.worker, partial(find_calls, claim=claim, terms=call.terms))
    assert replace(found.payout, locked_at=call.payout.locked_at) == call.payout
    for name in ("rail", "action", "attempt_no", "reference", "token", "terms"):
        assert getattr(found, name) == getattr(call, name)
    before = call.history or History(0, call.reference, submits_refused=0, look_ups=0)
    for name in ("look_ups", "submits_refused", "was_taken", "open_no"):
        assert getattr(found.history, name) == getattr(before, name)
    another = replace(claim, token=uuid4())
    assert await in_transaction(floor.worker, partial(find_calls, claim=another, terms=call.terms)) == []


async def test_a_recipient_that_we_cannot_open_is_no_refusal_of_the_rail_however_often_it_is_tried(
    floor: Desk,
) -> None:
    payout_id = await floor.create(await floor.merchant())
    another = floor.settler(master_keys=dict.fromkeys(floor.settings.master_keys, bytes(32)))
    for _ in range(len(SUBMIT_DELAYS) + 2):
        await floor.settle(another)
        assert await floor.state(payout_id) == "queued"
        assert (await floor.one("SELECT due_at > now() + interval '30 seconds' AS later FROM payout_due")).later
        await floor.make_due()
    await floor.settle()
    assert await floor.state(payout_id) == "success"
    await assert_sound(floor.owner)


@pytest.mark.parametrize("look_ups", [0, 1, 5, 9, 10, 1000])
def test_look_ups_never_end_by_themselves(look_ups: int) -> None:
    payout = _locked(State.VERIFYING, None)
    history = History(look_ups + 1, "reference", submits_refused=0, look_ups=look_ups)
    delay = LOOK_UP_DELAYS[min(look_ups + 1, len(LOOK_UP_DELAYS) - 1)]
    assert conclude(payout, _ended(payout, LOOK_UP, Outcome.UNKNOWN, history), held=True) == _stay(delay)


@pytest.mark.parametrize(
    ("silent_seconds", "expected"),
    [
        (SUBMITTED_SILENCE_SECONDS - 1, _stay(_AGAIN)),
        (SUBMITTED_SILENCE_SECONDS + 1, Conclusion(State.VERIFYING, _AGAIN)),
    ],
)
def test_what_a_rail_has_taken_and_cannot_tell_of_for_a_day_is_in_doubt(
    silent_seconds: float, expected: Conclusion
) -> None:
    payout = _locked(State.SUBMITTED, "bank-1")
    history = History(2, "reference", submits_refused=0, look_ups=0, was_taken=True, taken_seconds_ago=silent_seconds)
    assert conclude(payout, _ended(payout, LOOK_UP, Outcome.UNKNOWN, history), held=True) == expected
    again = conclude(payout, _ended(payout, LOOK_UP, Outcome.SUBMITTED, history), held=True)
    assert again == _stay(_AGAIN), "it has told of it just now"


def test_a_decline_without_a_reason_has_one_all_the_same() -> None:
    payout = _locked(State.SENDING, None)
    ended = Ended(Call(payout, "sandbox", SUBMIT, 1, "reference", None, uuid4(), Terms(0.0)), Answer(Outcome.DECLINED))
    assert conclude(payout, ended, held=True) == Conclusion(State.FAILED, None, "provider_declined")


# --- a worker that dies, sleeps, or speaks twice --------------------------------------------------------------------


async def _reach_the_bank(working: Desk, call: Call, number: str) -> None:
    """The rail got the order; its answer did not get through."""
    order = PaymentOrder(call.reference, AMOUNT_MINOR, "BDT", Recipient(number, None), time.time())
    with suppress(TimeoutError):
        await asyncio.wait_for(working.sandbox().submit(order), 0.2)


@pytest.mark.parametrize(
    ("number", "reached", "end", "tried"),
    [
        ("01712345678", True, "success", [("submit", "unknown"), ("look_up", "paid")]),
        ("01712340100", True, "failed", [("submit", "unknown"), ("look_up", "declined")]),
        ("01712345678", False, "success", [("submit", "unknown"), ("look_up", "not_found"), ("submit", "paid")]),
        ("01712340200", True, "verifying", [("submit", "unknown"), ("look_up", "unknown")]),
    ],
    ids=["after it was paid", "after it was declined", "before the call", "and nobody knows"],
)
async def test_a_worker_that_died_leaves_the_truth_to_a_look_up(
    database_url: str, number: str, reached: bool, end: str, tried: list[tuple[str, str]]
) -> None:
    async with desk(database_url) as working:
        merchant = await working.merchant()
        payout_id = await working.create(merchant, recipient=number)
        (call,) = await working.claim()
        if reached:
            await _reach_the_bank(working, call, number)
        await working.settle()
        assert await working.attempts(payout_id) == [("submit", None)], "the lease still stands"

        await working.make_due()
        await working.settle()
        assert await working.state(payout_id) == "verifying"
        row = await working.one("SELECT detail FROM payout_attempts")
        assert row.detail == "worker lost"
        assert await _due_in_seconds(working, payout_id) > LOOK_UP_DELAYS[0] - 2

        await working.make_due()
        await working.settle()
        assert await working.state(payout_id) == end
        assert await working.attempts(payout_id) == tried
        bank = await fetch(working.owner, "SELECT submits FROM sandbox.payments")
        assert bank == [(1,)]
        await assert_sound(working.owner)


async def test_a_worker_that_died_in_a_look_up_costs_another_look_up(database_url: str) -> None:
    async with desk(database_url) as working:
        merchant = await working.merchant()
        payout_id = await working.create(merchant)
        (call,) = await working.claim()
        await working.record(Ended(call, Answer(Outcome.UNKNOWN)))
        await working.make_due()
        assert [call.action for call in await working.claim()] == [LOOK_UP]
        await working.make_due()
        await working.settle(working.settler({"sandbox": TestRail(None, PAID)}))
        assert await working.attempts(payout_id) == [("submit", "unknown"), ("look_up", "unknown"), ("look_up", "paid")]
        assert await working.state(payout_id) == "success"
        await assert_sound(working.owner)


LAG_SECONDS = 3600.0


async def test_unknown_is_not_believed_before_the_rails_lag_is_over_when_the_worker_died(database_url: str) -> None:
    async with desk(database_url) as working:
        payout_id = await working.create(await working.merchant())
        await working.claim()
        await working.make_due()
        assert await working.claim(lag_seconds=LAG_SECONDS) == []
        assert await _due_in_seconds(working, payout_id) > LAG_SECONDS - 2


@pytest.mark.parametrize("submit", [None, Answer(Outcome.UNKNOWN)], ids=["time-out", "ambiguous"])
async def test_unknown_is_not_believed_before_the_rails_lag_is_over(database_url: str, submit: Answer | None) -> None:
    """Architecture 5: "Unknown reference" is believed only after the call's deadline plus the rail's greatest lag."""
    async with desk(database_url) as working:
        payout_id = await working.create(await working.merchant())
        rail = TestRail(submit, Answer(Outcome.NOT_FOUND), lag_seconds=LAG_SECONDS)
        await working.settle(working.settler({"sandbox": rail}, rail_timeout_seconds=0.1))
        assert await working.state(payout_id) == "verifying"
        assert await _due_in_seconds(working, payout_id) > LAG_SECONDS - 2


async def _pause_and_lose(working: Desk) -> tuple[Call, Call]:
    """A worker claims and is paused until its lease has run out; another one looks up now."""
    (paused,) = await working.claim()
    await working.make_due()
    assert await working.claim() == []
    await working.make_due()
    (current,) = await working.claim()
    return paused, current


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_a_paused_worker_counts_only_when_it_says_paid(database_url: str, outcome: Outcome) -> None:
    async with desk(database_url) as working:
        merchant = await working.merchant()
        payout_id = await working.create(merchant)
        paused, current = await _pause_and_lose(working)
        await working.record(Ended(paused, Answer(outcome)))
        if outcome is Outcome.PAID:
            assert await working.state(payout_id) == "success"
        else:
            assert await working.state(payout_id) == "verifying"
            assert await working.balance(merchant) == (FUNDS_MINOR, AMOUNT_MINOR)
            token = await working.one("SELECT lease_token FROM payout_due")
            assert token.lease_token == current.token

        await working.record(Ended(current, PAID))
        assert await working.state(payout_id) == "success"
        assert await working.entries(payout_id) == ["hold", "capture"]
        assert await working.count("events") == 1
        await assert_sound(working.owner)


async def test_paid_and_denied_in_one_batch_is_paid(database_url: str) -> None:
    """One worker may hear both: it was paused for longer than its lease and took the payout again."""
    for step in (1, -1):
        async with desk(database_url) as working:
            payout_id = await working.create(await working.merchant())
            paused, current = await _pause_and_lose(working)
            await working.record(*[Ended(paused, PAID), Ended(current, Answer(Outcome.NOT_FOUND))][::step])
            assert await working.state(payout_id) == "success"
            await assert_sound(working.owner)


async def test_what_a_rail_once_called_paid_is_never_released(database_url: str) -> None:
    """It denied the payout, so we queued it again; then the first call's answer came after all."""
    async with desk(database_url) as working:
        merchant = await working.merchant()
        payout_id = await working.create(merchant)
        paused, current = await _pause_and_lose(working)
        await working.record(Ended(current, Answer(Outcome.NOT_FOUND)))
        assert await working.state(payout_id) == "queued"
        await working.record(Ended(paused, PAID))
        settler = working.settler({"sandbox": TestRail(Answer(Outcome.NOT_ACCEPTED), Answer(Outcome.NOT_FOUND))})
        for _ in range(len(SUBMIT_DELAYS) + 1):
            await working.make_due()
            await working.settle(settler)
        assert await working.entries(payout_id) in (["hold"], ["hold", "capture"])
        assert await working.state(payout_id) != "failed"


@pytest.mark.parametrize("late", [Outcome.PAID, Outcome.DECLINED])
@pytest.mark.parametrize("final", [Outcome.PAID, Outcome.DECLINED])
async def test_a_word_against_a_final_status_moves_no_money(database_url: str, final: Outcome, late: Outcome) -> None:
    async with desk(database_url) as working:
        await working.create(await working.merchant())
        paused, current = await _pause_and_lose(working)
        await working.record(Ended(current, Answer(final)))
        before = await _everything(working)
        await working.record(Ended(paused, Answer(late)))
        after = await _everything(working)
        del before["payout_attempts"], after["payout_attempts"]
        # The contradiction itself is for people.
        assert len(after.pop("discrepancies")) - len(before.pop("discrepancies")) == (final is not late)
        assert after == before


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_an_answer_recorded_twice_changes_nothing_the_second_time(database_url: str, outcome: Outcome) -> None:
    async with desk(database_url) as working:
        await working.create(await working.merchant(), callback_url="http://127.0.0.1:9/")
        (call,) = await working.claim()
        await working.record(Ended(call, Answer(outcome)))
        before = await _everything(working)
        await working.record(Ended(call, Answer(outcome)))
        after = await _everything(working)
        if outcome is Outcome.UNKNOWN:
            # The one thing that may be learned twice is when.
            del before["payout_attempts"], after["payout_attempts"]
        assert after == before
        await assert_sound(working.owner)


async def test_a_first_outcome_stands_unless_it_was_unknown(database_url: str) -> None:
    async with desk(database_url) as working:
        payout_id = await working.create(await working.merchant())
        (call,) = await working.claim()
        for said, stands in [("unknown", "unknown"), ("declined", "declined"), ("submitted", "declined")]:
            await working.record(Ended(call, Answer(Outcome(said))))
            assert await working.attempts(payout_id) == [("submit", stands)]


async def test_a_call_whose_lease_ran_out_is_not_made(database_url: str) -> None:
    async with desk(database_url) as working:
        payout_id = await working.create(await working.merchant())
        rail = TestRail(PAID)
        settler = working.settler({"sandbox": rail})
        (call,) = await working.claim(start_until=0.0)
        settler._start("sandbox", rail, [call])
        await settler.drain(10)
        assert rail.submitted == []
        assert await working.attempts(payout_id) == [("submit", "not_accepted")]
        assert await working.state(payout_id) == "queued"


async def test_a_recipient_that_does_not_open_is_never_sent(database_url: str) -> None:
    async with desk(database_url) as working:
        merchant = await working.merchant()
        foreign = order(working.settings, merchant.shop).recipient_sealed
        payout_id = await working.create(merchant, recipient_sealed=foreign)
        rail = TestRail(PAID)
        await working.settle(working.settler({"sandbox": rail}))
        assert rail.submitted == []
        assert await working.attempts(payout_id) == [("submit", "not_accepted")]


# --- many workers, many shops ---------------------------------------------------------------------------------------


async def test_eight_claimers_call_each_of_500_payouts_once(database_url: str) -> None:
    async with desk(database_url) as working:
        merchants = [await working.merchant() for _ in range(3)]
        for merchant, count in zip(merchants, (300, 150, 50), strict=True):
            await working.create_many(merchant, count)
        rail = TestRail(PAID)
        settlers = [
            working.settler({"sandbox": rail}, settle_batch_max=8, settle_concurrency=16, settle_shop_concurrency=8)
            for _ in range(8)
        ]
        await asyncio.gather(*(working.settle(settler) for settler in settlers))
        await asyncio.gather(*(settler.drain(30) for settler in settlers))
        assert len(rail.submitted) == len(set(rail.submitted)) == 500
        assert await fetch(working.owner, "SELECT state, count(*) FROM payouts GROUP BY 1") == [("success", 500)]
        assert await fetch(working.owner, "SELECT max(attempt_no), count(*) FROM payout_attempts") == [(1, 500)]
        for merchant, count in zip(merchants, (300, 150, 50), strict=True):
            assert await working.balance(merchant) == (FUNDS_MINOR - count * AMOUNT_MINOR, 0)
        await assert_sound(working.owner)


@pytest.mark.parametrize("flooding", [0, 1], ids=["the first shop floods", "the last shop floods"])
async def test_a_flood_of_one_shop_does_not_delay_another(database_url: str, flooding: int) -> None:
    async with desk(database_url) as working:
        merchants = sorted([await working.merchant() for _ in range(2)], key=lambda m: m.shop.id)
        await working.create_many(merchants[flooding], 200)
        await working.create(merchants[1 - flooding])
        rail = TestRail(PAID)
        settler = working.settler({"sandbox": rail}, settle_concurrency=4, settle_shop_concurrency=4)
        for _ in range(2):
            assert await settler.run_round()
            await settler.drain(10)
        assert len(rail.submitted) < 20
        quiet = "SELECT state FROM payouts WHERE shop_id = :shop"
        assert await fetch(working.owner, quiet, shop=merchants[1 - flooding].shop.id) == [("success",)]


async def test_a_shop_whose_calls_hang_leaves_slots_to_the_others(database_url: str) -> None:
    async with desk(database_url) as working:
        merchants = sorted([await working.merchant() for _ in range(2)], key=lambda m: m.shop.id)
        await working.create_many(merchants[0], 50)
        hanging = TestRail(None)
        settler = working.settler({"sandbox": hanging}, settle_concurrency=4, settle_shop_concurrency=2)

        async def called(count: int) -> bool:
            await settler.run_round()
            return len(hanging.submitted) == count

        await eventually(lambda: called(2), "the share of the first shop is under way")
        quiet = await working.create(merchants[1])
        await eventually(lambda: called(3), "the other shop's payout is called")
        assert await working.state(quiet) == "sending"
        assert await working.count("payouts", "state = 'sending'") == 3
        await _cancel_calls(settler._calls)


async def _cancel_calls(calls: set["asyncio.Task[None]"]) -> None:
    for task in list(calls):
        task.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("waiting", [64, 65, 130])
async def test_shops_that_only_wait_hide_nobody_behind_them(database_url: str, waiting: int) -> None:
    """A shop has a row for every unfinished payout: leased, to be looked up tomorrow. That is no turn of its own."""
    async with desk(database_url) as working:
        merchants = sorted([await working.merchant() for _ in range(waiting + 1)], key=lambda m: m.shop.id)
        for merchant in merchants[:-1]:
            await working.create(merchant)
        assert len(await working.claim()) == min(waiting, 128)
        await execute(working.owner, "UPDATE payout_due SET due_at = now() + interval '1 day'")
        last = await working.create(merchants[-1])
        await working.settle()
        assert await working.state(last) == "success"


async def test_every_shop_gets_its_turn(database_url: str) -> None:
    async with desk(database_url) as working:
        merchants = [await working.merchant() for _ in range(70)]
        for merchant in merchants:
            await working.create_many(merchant, 2)
        settler = working.settler({"sandbox": TestRail(PAID)}, settle_concurrency=10, settle_shop_concurrency=1)
        for _ in range(7):
            assert await settler.run_round()
            await settler.drain(10)
        served = "SELECT shop_id, count(*) FROM payouts WHERE state = 'success' GROUP BY 1"
        assert Counter(count for _, count in await fetch(working.owner, served)) == {1: 70}


# --- locks ----------------------------------------------------------------------------------------------------------


async def test_whoever_records_holds_what_is_due_before_it_waits_for_an_account(database_url: str) -> None:
    """As whoever claims, cancels and hears: due rows first, accounts last. The other way round they would deadlock."""
    async with desk(database_url) as working:
        merchant = await working.merchant()
        await working.create(merchant)
        (call,) = await working.claim()
        waiting = (
            "SELECT 1 FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            " WHERE NOT l.granted AND a.datname = current_database()"
        )
        async with account_locked(working.owner, merchant.shop.id):
            recording = asyncio.create_task(working.record(Ended(call, PAID)))
            await eventually(lambda: fetch(working.owner, waiting), "the record waits for the account")
            assert await fetch(working.owner, "SELECT 1 FROM payout_due FOR UPDATE SKIP LOCKED") == []
        await recording
        assert await fetch(working.owner, "SELECT 1 FROM payout_due") == []


def _answers(calls: list[Call], chance: random.Random) -> Iterator[Ended]:
    outcomes = [Outcome.PAID, Outcome.DECLINED, Outcome.NOT_ACCEPTED, Outcome.UNKNOWN, Outcome.SUBMITTED]
    for call in calls:
        outcome = chance.choice(outcomes)
        yield Ended(call, Answer(outcome, failure_code="other" if outcome is Outcome.DECLINED else None))


async def test_accepting_claiming_recording_canceling_and_hearing_never_deadlock(database_url: str) -> None:
    """No transaction is repeated: the first deadlock, or lock not to be had, fails the test."""
    patient = {"PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS": "30", "PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS": "60"}
    async with desk(database_url, **patient) as working:
        merchants = [await working.merchant() for _ in range(3)]
        chance = random.Random(20251205)

        async def accept() -> None:
            orders = [order(working.settings, chance.choice(merchants).shop) for _ in range(24)]
            await in_transaction(
                working.gateway, lambda tx: decide_batch(tx, orders, wait_seconds=LOCK_WAIT_SECONDS), attempts_max=1
            )

        async def settle() -> None:
            ended = list(_answers(await working.claim(), chance))
            # As if workers had been thought dead and were not: the same answers in several batches at the same time.
            batches = [chance.sample(ended, len(ended)) for _ in range(3)] + [ended[::2], ended[1::2]]
            await asyncio.gather(*(working.record(*batch) for batch in batches))

        async def cancel_some() -> None:
            query = "SELECT shop_id, external_id FROM payouts WHERE state = 'queued' ORDER BY random() LIMIT 8"
            for row in await fetch(working.owner, query):
                key = (row.shop_id, row.external_id)
                with suppress(NotCancelable):
                    await in_transaction(
                        working.gateway,
                        lambda tx, key=key: cancel(tx, *key, wait_seconds=LOCK_WAIT_SECONDS),  # type: ignore[misc]
                        attempts_max=1,
                    )

        async def say_and_hear() -> None:
            query = """
                SELECT reference FROM payout_attempts t JOIN payouts p ON p.id = t.payout_id
                 WHERE t.attempt_no = 1 AND t.finished_at IS NOT NULL AND p.state IN ('submitted', 'verifying')
                 ORDER BY random() LIMIT 8
            """
            references = [row.reference for row in await fetch(working.owner, query)]
            words = [NewRailEvent("sandbox", str(uuid4()), reference, Outcome.PAID) for reference in references]
            await in_transaction(working.worker, lambda tx: append_rail_events(tx, words), attempts_max=1)
            keys = await in_transaction(working.worker, lambda tx: find_rail_events_due(tx, events_max=8, payins=False))
            await in_transaction(working.worker, lambda tx: apply_words(tx, keys), attempts_max=1)

        async def repeat(work: Callable[[], Awaitable[None]], times: int) -> None:
            for _ in range(times):
                await work()

        async def travel() -> None:
            # As whoever claims: rows that somebody holds are left alone.
            await execute(
                working.owner,
                "UPDATE payout_due SET due_at = now() - interval '1 second' WHERE payout_id IN"
                " (SELECT payout_id FROM payout_due ORDER BY random() LIMIT 20 FOR UPDATE SKIP LOCKED)",
            )

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(repeat(accept, 10))
                group.create_task(repeat(settle, 12))
            for _ in range(2):
                group.create_task(repeat(cancel_some, 10))
                group.create_task(repeat(say_and_hear, 10))
            group.create_task(repeat(travel, 10))
        await assert_sound(working.owner)
        assert await working.count("payouts") == 4 * 10 * 24


def test_the_table_of_conclusions_is_complete() -> None:
    assert {(state, outcome) for state, _, outcome in _HELD} == set(product(STAGES - {State.QUEUED}, Outcome))
