"""Settlement: claim what is due, call the rail, record what it said. Transactions of their own, and the call in none of them.

The transactions are in `worker.claiming` and `worker.recording`. A payout whose lease ran out while it was being sent goes to
`verifying`, never back to `queued`: only the rail can tell what became of it.
"""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache, partial
from time import monotonic, time
from typing import Final
from uuid import UUID, uuid4
from weakref import WeakValueDictionary

from prometheus_client import Histogram

from common import tracing
from common.batching import Batcher
from common.db.callbacks import Event
from common.db.due import DOES_NOT_OPEN, TOO_LATE, Claim, Claimed, find_rails_gone
from common.db.engine import Engine, Tx, in_transaction
from common.deadlines import TimeLimit
from common.domain.ids import PAYOUT, made_at, render_id
from common.errors import AccountBusy, PayoutsError, Transient
from common.log import LogEvent, get_logger, since_ms
from common.messaging.codec import WorkMessage
from common.process import end_tasks
from common.recipients import open_recipient
from common.sealing import Keyring, SealBroken
from common.settings import Settings
from common.tracing import Attributes, Kind
from worker.claiming import claim_calls, find_calls
from worker.conclusions import SUBMIT, Call, Ended, Terms
from worker.hearing import hear, note_discrepancies
from worker.rails import Answer, Outcome, PaymentOrder, Rail, Rails
from worker.recording import Recorded, fail_without_route, record
from worker.scanning import OVERDUE_SECONDS

Tell = Callable[[Sequence[Event]], None]

# Shops one claim visits; the next claim goes on behind them.
_SHOPS_MAX: Final = 64
_FIRST_SHOP: Final = UUID(int=0)
_RECORD_BATCH_MAX: Final = 256
_RECORD_ATTEMPTS_MAX: Final = 5
_RECORD_PAUSE_SECONDS: Final = 0.2
# How long answers of several shops wait for an account: longer than our transactions hold one, as a rule.
_TURN_SECONDS: Final = 0.05
# How long a shop that is behind waits for its account before others get the connection.
_BUSY_TURN_SECONDS: Final = 0.2
# Between two looks for what rails have said, when there was nothing.
_HEAR_SECONDS: Final = 0.2
# How often rails are looked for that have payouts and no longer exist.
_NO_ROUTE_SECONDS: Final = 5.0

CALL_SECONDS: Final = Histogram(
    "payouts_rail_call_seconds",
    "How long calls to rails took, by what they asked and what was answered",
    ["rail", "action", "outcome"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0),
)
SETTLED_SECONDS: Final = Histogram(
    "payouts_settled_seconds",
    "How long payouts took from their acceptance until they ended by the word of a rail, or of operators",
    ["outcome"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0, 86400.0),
)


class Settler:
    """Settles payouts through its rails until told to stop: those it is told of, and those it finds overdue.

    `refresh_rails` brings `rails` up to date. `messages_arrive` says whether somebody tells it; then the scan leaves payouts
    alone until they are overdue. `tell` hears of events whose callbacks can leave now.
    """

    def __init__(
        self,
        engine: Engine,
        keyring: Keyring,
        rails: Rails,
        settings: Settings,
        *,
        refresh_rails: Callable[[], Awaitable[None]] | None = None,
        messages_arrive: Callable[[], bool] = lambda: False,
        tell: Tell = lambda _: None,
    ) -> None:
        self._refresh_rails = refresh_rails
        self._messages_arrive = messages_arrive
        self._tell = tell
        # Messages told of payouts that did not fit: the scan takes them without waiting until they are overdue.
        self._left_behind = False
        self._leaving = False
        # One claim at a time of each rail, so that each knows how much room there is.
        self._claiming: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._engine = engine
        self._keyring = keyring
        self._rails = rails
        self._settings = settings
        self._limit = TimeLimit(settings.rail_timeout_seconds)
        self._calls: set[asyncio.Task[None]] = set()
        self._calls_by_shop: defaultdict[str, Counter[UUID]] = defaultdict(Counter)
        # Claims whose COMMIT nobody heard the answer of: how to find their calls, by rail.
        self._unheard: defaultdict[str, list[Callable[[Tx], Awaitable[list[Call]]]]] = defaultdict(list)
        self._next_shop: defaultdict[str, UUID] = defaultdict(lambda: _FIRST_SHOP)
        self._records: Batcher[Ended, bool] = Batcher(self._record_in_turn, batch_max=_RECORD_BATCH_MAX)
        # Of shops that are behind; gone when nobody waits on them.
        self._busy_records: WeakValueDictionary[UUID, Batcher[Ended, bool]] = WeakValueDictionary()
        self._busy_slots = asyncio.Semaphore(max(1, settings.database_pool_max // 3))
        self._no_route_at = 0.0
        self._hear_at = 0.0

    async def run_round(self) -> bool:
        """Claim what is due and start its calls. Returns whether there was anything."""
        if self._leaving:
            return False
        await self._refresh()
        behind, self._left_behind = self._left_behind, False
        overdue_seconds = OVERDUE_SECONDS if self._messages_arrive() and not behind else 0.0
        claimed = [await self._claim(name, rail, overdue_seconds) for name, rail in list(self._rails.items())]
        self._left_behind = self._left_behind or (behind and any(claimed))
        heard = await self._hear()
        if monotonic() >= self._no_route_at:
            self._no_route_at = monotonic() + _NO_ROUTE_SECONDS
            await self._fail_without_route()
        return any(claimed) or heard

    async def _hear(self) -> bool:
        """Apply some of what rails have said by themselves. Returns whether there was anything."""
        if monotonic() < self._hear_at:
            return False
        heard = await hear(self._engine, self._settings.patience)
        _note_settled(heard.events)
        self._tell(heard.events)
        if heard.count == 0:
            self._hear_at = monotonic() + _HEAR_SECONDS
        return heard.count > 0

    async def claim_messages(self, messages: Sequence[WorkMessage]) -> bool:
        """Claim what messages tell of and start its calls; False when it was given up, since we leave.

        What another has is left, and what does not fit into a rail's room or a shop's share: the scan takes it.
        Raises: `Transient`; then nothing, or only a part, was claimed, and it may be called again.
        """
        await self._refresh()
        ids = [payout_id for message in messages for payout_id in message.ids]
        with tracing.receive("payouts", [text for message in messages for text in message.traceparents]) as received:
            return await self._claim_ids(ids, received.traceparent)

    async def _claim_ids(self, ids: Sequence[UUID], received: str | None) -> bool:
        for name, rail in list(self._rails.items()):
            first = 0
            while first < len(ids) and not self._leaving:
                size = min(self._room(name, rail), self._settings.settle_batch_max)
                some = ids[first : first + size]
                claimed = await self._take(name, rail, payout_ids=some, received=received) if size > 0 else None
                if claimed is None:
                    # No room, maybe for long; messages about other rails come behind this one.
                    self._left_behind = True
                    break
                first += size
                self._left_behind = self._left_behind or claimed.left_count > 0
        return not self._leaving

    async def _refresh(self) -> None:
        if self._refresh_rails is not None:
            await self._refresh_rails()

    def leave(self) -> None:
        """Claim nothing more from now on."""
        self._leaving = True

    async def drain(self, deadline_seconds: float) -> None:
        """Let calls that are under way end and be recorded, for at most that long; leases take care of the rest."""
        await end_tasks(self._calls, deadline_seconds)

    async def _claim(self, name: str, rail: Rail, overdue_seconds: float) -> bool:
        """Take what fits from one rail, shops in turn: from where the last claim ended, then from the beginning."""
        for start in dict.fromkeys((self._next_shop[name], _FIRST_SHOP)):
            after_shop: UUID | None = start
            while after_shop is not None:
                claimed = await self._take(name, rail, after_shop=after_shop, overdue_seconds=overdue_seconds)
                if claimed is None:
                    return False
                self._next_shop[name] = claimed.next_shop or _FIRST_SHOP
                if claimed.shop_ids:
                    return True
                after_shop = claimed.next_shop
        return False

    def _room(self, name: str, rail: Rail) -> int:
        most = self._settings.settle_concurrency
        most = most if rail.calls_max is None else min(most, rail.calls_max)
        return most - self._calls_by_shop[name].total()

    async def _take(
        self,
        name: str,
        rail: Rail,
        *,
        after_shop: UUID = _FIRST_SHOP,
        payout_ids: Sequence[UUID] | None = None,
        overdue_seconds: float = 0.0,
        received: str | None = None,
    ) -> Claimed | None:
        """One claim, of those payouts or of what is overdue, and the start of its calls; None when there is no room.

        `received`: the context of the messages that told of them.
        """
        async with self._claiming[name]:
            for unheard in list(self._unheard[name]):
                self._start(name, rail, await in_transaction(self._engine, unheard), received)
                self._unheard[name].remove(unheard)
            settings, room = self._settings, self._room(name, rail)
            if room <= 0:
                return None
            claim = Claim(
                rail=name,
                token=uuid4(),
                lease_seconds=settings.settle_lease_seconds,
                claim_max=min(room, settings.settle_batch_max),
                shop_max=settings.settle_shop_concurrency,
                shops_max=_SHOPS_MAX,
                overdue_seconds=overdue_seconds,
            )
            terms = self._terms(rail)
            find = partial(find_calls, claim=claim, terms=terms)
            tries = 0

            async def work(tx: Tx) -> tuple[Claimed, list[Call]]:
                nonlocal tries
                tries += 1
                if tries > 1 and (calls := await find(tx)):
                    return Claimed({call.payout.id: call.payout.shop_id for call in calls}, None), calls
                busy = self._calls_by_shop[name]
                return await claim_calls(
                    tx, claim=claim, terms=terms, after_shop=after_shop, busy=busy, payout_ids=payout_ids
                )

            try:
                claimed, calls = await in_transaction(self._engine, work)
            except Transient:
                self._unheard[name].append(find)
                raise
            self._start(name, rail, calls, received)
            return claimed

    def _terms(self, rail: Rail) -> Terms:
        """Of a claim that is made now."""
        settings = self._settings
        # So long after its claim a call may still begin.
        begin_seconds = settings.settle_lease_seconds - settings.rail_timeout_seconds
        return Terms(
            start_until=monotonic() + begin_seconds,
            lag_seconds=rail.lag_seconds,
            denial_seconds=rail.denial_seconds and rail.denial_seconds + begin_seconds,
            patience=settings.patience,
        )

    def _start(self, name: str, rail: Rail, calls: Iterable[Call], received: str | None = None) -> None:
        for call in calls:
            self._calls_by_shop[name][call.payout.shop_id] += 1
            task = asyncio.create_task(self._make_call(name, rail, call, received))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _make_call(self, name: str, rail: Rail, call: Call, received: str | None) -> None:
        """Ask and record; the attempt leaves one line in the log, whatever happens."""
        started, rail_ms = monotonic(), None
        answer, failure = Answer(Outcome.UNKNOWN), "canceled"
        about: Attributes = {"payouts.payout_id": render_id(PAYOUT, call.payout.id), "payouts.attempt": call.attempt_no}
        with tracing.follow(
            "settle", Kind.CONSUMER, call.payout.traceparent, links=[received], attributes=about
        ) as span:
            try:
                with span.child(f"{call.action} {name}", Kind.CLIENT) as asking:
                    answer = await self._ask(rail, call)
                    asking.note({"payouts.outcome": answer.outcome, "payouts.failure": answer.failure_code})
                rail_ms = since_ms(started)
                _call_timer(name, call.action, answer.outcome).observe(rail_ms / 1000)
                with span.child("record"):
                    await self._keep(Ended(call, answer))
                failure = ""
            except Exception as error:
                # Not recorded: the lease runs out, and a look-up will tell.
                failure = _name(error)
            finally:
                if failure:
                    span.fail(failure)
                _log_attempt(call, answer, failure or None, started, rail_ms)
                self._end_call(name, call.payout.shop_id)

    def _end_call(self, name: str, shop_id: UUID) -> None:
        busy = self._calls_by_shop[name]
        busy[shop_id] -= 1
        if not busy[shop_id]:
            del busy[shop_id]

    async def _ask(self, rail: Rail, call: Call) -> Answer:
        """Ask the rail within its deadline; whatever goes wrong from then on is `UNKNOWN`."""
        payout = call.payout
        order = None
        if call.action == SUBMIT:
            try:
                recipient = open_recipient(
                    self._keyring, payout.recipient_sealed, shop_id=payout.shop_id, payout_id=payout.id
                )
            except SealBroken as error:
                get_logger().error(LogEvent.SECRET_UNSEALABLE, payout_id=render_id(PAYOUT, payout.id), error=str(error))
                return Answer(Outcome.NOT_ACCEPTED, detail=DOES_NOT_OPEN)
            order = PaymentOrder(call.reference, payout.amount_minor, payout.currency, recipient, asked_at=time())
        if monotonic() > call.terms.start_until:
            return Answer(Outcome.NOT_ACCEPTED if order else Outcome.UNKNOWN, detail=TOO_LATE)
        try:
            return await self._limit.keep(rail.look_up(call.reference) if order is None else rail.submit(order))
        except TimeoutError:
            return Answer(Outcome.UNKNOWN, detail="time-out")
        except Exception as error:
            get_logger().error(LogEvent.RAIL_CRASHED, payout_id=render_id(PAYOUT, payout.id), error=_name(error))
            return Answer(Outcome.UNKNOWN, detail=_name(error))

    async def _keep(self, ended: Ended) -> None:
        """Record an answer, together with others; for as long as the lease lasts, whatever stands in the way.

        A shop whose account somebody else holds keeps no other waiting: it goes on by itself, in short turns.
        """
        batcher = self._records
        until = ended.call.terms.start_until + self._settings.rail_timeout_seconds
        while True:
            try:
                if await batcher.submit(ended):
                    return
                busy = True
            except Transient as error:
                if monotonic() >= until:
                    raise
                busy = isinstance(error, AccountBusy)
                await asyncio.sleep(_RECORD_PAUSE_SECONDS)
            if busy:
                batcher = self._busy_records.setdefault(
                    ended.call.payout.shop_id, Batcher(self._record_busy, batch_max=_RECORD_BATCH_MAX)
                )

    async def _record_in_turn(self, ended: Sequence[Ended]) -> list[bool]:
        try:
            return await self._record(ended, _TURN_SECONDS)
        except AccountBusy:
            # One account is held for longer. Without waiting the others pass, and it is known which one it is.
            return await self._record(ended, 0)

    async def _record(self, ended: Sequence[Ended], wait_seconds: float) -> list[bool]:
        """Record what can be recorded; with `wait_seconds` 0, False where the account is somebody else's at the moment."""
        busy = await record(
            self._engine, ended, wait_seconds=wait_seconds, attempts_max=_RECORD_ATTEMPTS_MAX, note=self._note
        )
        return [item.call.payout.id not in busy for item in ended]

    def _note(self, recorded: Recorded) -> None:
        note_discrepancies(recorded.discrepancies)
        _note_settled(recorded.events)
        self._tell(recorded.events)

    async def _record_busy(self, ended: Sequence[Ended]) -> list[bool]:
        async with self._busy_slots:
            return await self._record(ended, _BUSY_TURN_SECONDS)

    async def _fail_without_route(self) -> None:
        for name in await in_transaction(self._engine, find_rails_gone):
            after_shop: UUID | None = _FIRST_SHOP
            while after_shop is not None:
                claim = Claim(
                    name, uuid4(), self._settings.settle_lease_seconds, _RECORD_BATCH_MAX, _RECORD_BATCH_MAX, _SHOPS_MAX
                )
                after_shop = await in_transaction(
                    self._engine, partial(fail_without_route, claim=claim, after_shop=after_shop)
                )


def _log_attempt(call: Call, answer: Answer, failure: str | None, started: float, rail_ms: float | None) -> None:
    """The one line of an attempt. `error`: why it could not be recorded, which is for people; the rail's words are no error."""
    get_logger().log(
        logging.INFO if failure is None else logging.ERROR,
        LogEvent.PAYOUT_ATTEMPTED,
        payout_id=render_id(PAYOUT, call.payout.id),
        shop_id=str(call.payout.shop_id),
        rail=call.rail,
        action=call.action,
        attempt=call.attempt_no,
        outcome=answer.outcome,
        failure=answer.failure_code,
        error=failure,
        rail_ms=rail_ms,
        duration_ms=since_ms(started),
        trace_id=tracing.trace_id_of(call.payout.traceparent),
    )


def _note_settled(events: Iterable[Event]) -> None:
    """How long it took, until now: the id of a payout tells when it was made."""
    now = time()
    for event in events:
        if event.payout_id is not None:
            outcome = event.type.rpartition(".")[2]
            _settled_timer(outcome).observe(max(0.0, now - made_at(event.payout_id)))


@cache
def _call_timer(rail: str, action: str, outcome: Outcome) -> Histogram:
    """The one of these labels, at hand: to look it up costs as much as to use it."""
    return CALL_SECONDS.labels(rail, action, outcome)


@cache
def _settled_timer(outcome: str) -> Histogram:
    return SETTLED_SECONDS.labels(outcome)


def _name(error: Exception) -> str:
    return error.reason if isinstance(error, PayoutsError) else type(error).__name__
