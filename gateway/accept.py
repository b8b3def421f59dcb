"""Group commit: creates that arrive while a transaction is in flight are decided by the next one, together.

Where nothing speaks against any of an account's orders, one statement accepts them, and is the whole transaction. The others
take the careful way, `decide_batch`: lock the accounts, read which ids exist already, decide in arrival order and write only
what was accepted. It is also what tells when nobody heard what became of a transaction: a row with our own id is ours, and the
account's lock makes it wait for the first try to end.

A first try that is one statement may not even have begun, and come late; so it accepts nothing after a moment on the
database's clock, and nobody is told that its orders were refused before that moment has passed.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic
from typing import Final
from uuid import UUID

from common.batching import flush_by_halves, settle_future
from common.db.accepting import accept_unopposed
from common.db.engine import Engine, Tx, constraint_name, each_alone, in_transaction
from common.deadlines import Deadlines
from common.errors import AccountBusy, DatabaseSlow, DatabaseUnavailable, InvariantViolated, Overloaded, PayoutsError
from common.log import LogEvent, get_logger
from gateway.deciding import Accepted, Order, Verdict, decide_batch, new_payout

_ATTEMPTS_MAX: Final = 3
# How long a batch of several shops waits for an account: longer than our transactions hold one, as a rule.
_TURN_SECONDS: Final = 0.05
# How long a shop that is behind waits for its account before others get the committer.
_BUSY_TURN_SECONDS: Final = 0.2
# For how long a statement that is on its way may still accept; and how much later, however clocks go, it certainly does not.
_UNTIL_SECONDS: Final = 0.5
_CERTAIN_SECONDS: Final = 0.5


Tell = Callable[[Sequence[Order]], None]


@dataclass(slots=True, eq=False)
class _Waiting:
    """An order and who waits for its verdict, until `ends_at`. `withdrawn`: nobody does any more, and it is not accepted unless
    a transaction has it already. `unsure_until`: before that, a statement that was lost might still accept it.
    """

    order: Order
    future: asyncio.Future[Accepted]
    ends_at: float
    busy_until: float = 0.0
    unsure_until: float = 0.0
    withdrawn: bool = False


class Acceptor:
    """Accepts payouts. Creates of one shop always wait in one line; lines share a few committers.

    A shop whose account somebody else holds gets a line of its own until it has caught up, and waits there in short turns
    for at most `busy_seconds_max`; so it delays only itself.
    `tell` hears after the commit of what was accepted.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        committers: int,
        busy_committers: int,
        busy_seconds_max: float,
        batch_max: int,
        queue_max: int,
        wait_seconds: float,
        tell: Tell = lambda _: None,
    ) -> None:
        self._engine = engine
        self._engine_of_one = each_alone(engine)
        self._tell = tell
        self._batch_max = batch_max
        self._queue_max = queue_max
        self._clock = _ServerClock()
        self._wait_seconds = wait_seconds
        self._deadlines = Deadlines(wait_seconds, _withdraw)
        self._lines = [_Line() for _ in range(committers)]
        self._busy_lines: dict[UUID, _Line] = {}
        self._busy_seconds_max = busy_seconds_max
        self._busy_slots = asyncio.Semaphore(busy_committers)
        self._waiting_count = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def accept(self, order: Order) -> Accepted:
        """Decide one create durably, exactly once per (shop, external_id).

        A caller that goes away cancels nothing. After `wait_seconds` an order that no transaction has taken yet is
        withdrawn; one that is in flight is left to end, its outcome unknown to the caller. A place is free again when its
        line has come to it: while the database stands still, whoever finds no place is refused at once.
        Raises: `Overloaded`, `AccountBusy`, `DatabaseUnavailable`; `ExternalIdReused`, `InsufficientBalance`,
        `ShopNotFound`, `AccessDenied`, `InvalidApiKey`; `InvariantViolated`.
        """
        if self._waiting_count >= self._queue_max:
            raise Overloaded
        future = asyncio.get_running_loop().create_future()
        waiting = _Waiting(order, future, monotonic() + self._wait_seconds)
        self._waiting_count += 1
        shop_id = order.shop_id
        line = self._busy_lines.get(shop_id) or self._lines[shop_id.int % len(self._lines)]
        line.waiting.append(waiting)
        if not line.running:
            line.running = True
            self._start(self._run_line(line))
        self._deadlines.begin(waiting)
        try:
            return await waiting.future
        except asyncio.CancelledError:
            if waiting.withdrawn:
                raise Overloaded from None
            raise
        finally:
            self._deadlines.end(waiting)

    async def close(self, deadline_seconds: float) -> None:
        """Let every transaction in flight end, for at most that long."""
        started = monotonic()
        while self._tasks and (left := deadline_seconds - (monotonic() - started)) > 0:
            await asyncio.wait(self._tasks, timeout=left)

    def _start(self, run: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(run)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_line(self, line: "_Line") -> None:
        try:
            while batch := self._take_shared(line):
                if busy := await self._commit(batch, wait_seconds=_TURN_SECONDS):
                    # One account is held for longer. Without waiting the others pass, and it is known which one it is.
                    busy = await self._commit(busy, wait_seconds=0)
                for waiting in busy:
                    waiting.busy_until = monotonic() + self._busy_seconds_max
                    self._to_busy_line(waiting)
        finally:
            line.running = False

    def _take(self, line: "_Line") -> list[_Waiting]:
        """The next few of a line that are still wanted; the others give up their places."""
        batch: list[_Waiting] = []
        while line.waiting and len(batch) < self._batch_max:
            waiting = line.waiting.popleft()
            if waiting.withdrawn:
                self._waiting_count -= 1
            else:
                batch.append(waiting)
        return batch

    def _take_shared(self, line: "_Line") -> list[_Waiting]:
        """The same of a line of several shops; those whose shop has a line of its own by now go there."""
        while batch := self._take(line):
            shared: list[_Waiting] = []
            for waiting in batch:
                if waiting.order.shop_id in self._busy_lines:
                    self._to_busy_line(waiting)
                else:
                    shared.append(waiting)
            if shared:
                return shared
        return []

    def _to_busy_line(self, waiting: _Waiting) -> None:
        shop_id = waiting.order.shop_id
        line = self._busy_lines.get(shop_id)
        if line is None:
            line = self._busy_lines[shop_id] = _Line(running=True)
            self._start(self._run_busy_line(shop_id, line))
        line.waiting.append(waiting)

    async def _run_busy_line(self, shop_id: UUID, line: "_Line") -> None:
        try:
            while line.waiting:
                async with self._busy_slots:
                    if batch := self._take(line):
                        self._again(line, await self._commit(batch, wait_seconds=_BUSY_TURN_SECONDS))
        finally:
            del self._busy_lines[shop_id]

    def _again(self, line: "_Line", busy: list[_Waiting]) -> None:
        """Back to the front of the line, in their order, but for those that have waited long enough."""
        now = monotonic()
        for waiting in reversed(busy):
            # One that came straight to this line begins to count now.
            waiting.busy_until = waiting.busy_until or now + self._busy_seconds_max
            if now < waiting.busy_until:
                line.waiting.appendleft(waiting)
            else:
                settle_future(waiting.future, AccountBusy())
                self._waiting_count -= 1

    async def _commit(self, batch: list[_Waiting], *, wait_seconds: float) -> list[_Waiting]:
        """Decide a batch and settle it; returns those whose account somebody else holds."""
        verdicts = await self._find_verdicts(batch, wait_seconds)
        busy: list[_Waiting] = []
        new: list[Order] = []
        for waiting in batch:
            verdict = verdicts[waiting]
            if verdict is None or isinstance(verdict, AccountBusy):
                busy.append(waiting)
                continue
            if not isinstance(verdict, Accepted) and monotonic() < waiting.unsure_until:
                verdict = DatabaseUnavailable()
            settle_future(waiting.future, _ours(verdict, waiting.order))
            if isinstance(verdict, Accepted) and not verdict.replayed:
                new.append(waiting.order)
        self._waiting_count -= len(batch) - len(busy)
        self._tell(new)
        return busy

    async def _find_verdicts(
        self, batch: list[_Waiting], wait_seconds: float
    ) -> Mapping[_Waiting, Verdict | Exception | None]:
        """The verdict of each, or the error that it met; None where somebody else holds the account."""
        failure: Exception | None = None
        accepted_at: Mapping[int, datetime | None] = {waiting.order.account_id: None for waiting in batch}
        try:
            accepted_at = await self._accept_unopposed(batch, wait_seconds)
        except (AccountBusy, DatabaseSlow) as error:
            return dict.fromkeys(batch, error)
        except Exception as error:
            # It is undone. The careful way finds out whose fault it was, if it was anybody's but the statement's.
            failure = error
        verdicts: dict[_Waiting, Verdict | Exception | None] = {}
        opposed: list[_Waiting] = []
        for waiting in batch:
            order = waiting.order
            if order.account_id not in accepted_at:
                verdicts[waiting] = None
            elif (moment := accepted_at[order.account_id]) is None:
                opposed.append(waiting)
            else:
                verdicts[waiting] = Accepted(new_payout(order, moment), replayed=False)
        if opposed:
            verdicts |= await self._decide_carefully(opposed, wait_seconds)
        if failure is not None and all(
            verdict is None or isinstance(verdict, Verdict) for verdict in verdicts.values()
        ):
            _log_failure(failure, None)
        return verdicts

    async def _accept_unopposed(self, batch: list[_Waiting], wait_seconds: float) -> Mapping[int, datetime | None]:
        """When the orders of each account were accepted; None where the careful way has to decide, or to tell.

        Nothing is accepted while it is not certain that it would be before one of them is withdrawn.
        """
        nothing = dict.fromkeys(waiting.order.account_id for waiting in batch)
        wanted = [waiting.order for waiting in batch]
        ends_at = min(waiting.ends_at for waiting in batch)
        certain_at = 0.0

        async def work(tx: Tx) -> Mapping[int, datetime | None]:
            nonlocal certain_at
            certain_at = monotonic() + _UNTIL_SECONDS + _CERTAIN_SECONDS
            until = self._clock.reads_in(_UNTIL_SECONDS)
            if until is None or ends_at < certain_at:
                return nothing
            found = await accept_unopposed(tx, wanted, wait_seconds=wait_seconds, until=until)
            self._clock.set(found.told_at)
            return found.accepted_at

        try:
            return await in_transaction(self._engine_of_one, work, attempts_max=1)
        except DatabaseUnavailable:
            # If it was sent, nobody knows what becomes of it.
            for waiting in batch:
                waiting.unsure_until = certain_at
            return nothing

    async def _decide_carefully(
        self, batch: list[_Waiting], wait_seconds: float
    ) -> Mapping[_Waiting, Verdict | Exception | None]:
        by_id = {waiting.order.id: waiting for waiting in batch}

        def is_wanted(order: Order) -> bool:
            return not by_id[order.id].withdrawn

        async def decide(orders: Sequence[Order]) -> list[Verdict | None]:
            return await in_transaction(
                self._engine,
                lambda tx: decide_batch(tx, orders, wait_seconds=wait_seconds, is_wanted=is_wanted),
                attempts_max=_ATTEMPTS_MAX,
            )

        verdicts = await flush_by_halves(decide, [waiting.order for waiting in batch])
        for verdict in verdicts:
            if isinstance(verdict, Accepted) and not verdict.replayed:
                self._clock.set(verdict.payout.created_at)
        return dict(zip(batch, verdicts, strict=True))


def _withdraw(waiting: _Waiting) -> None:
    if not waiting.future.done():
        waiting.withdrawn = True
        waiting.future.cancel()


def _ours(verdict: Accepted | Exception, order: Order) -> Accepted | Exception:
    """What the caller may see: errors of ours as they are, any other only as `InvariantViolated`, and in the log."""
    if isinstance(verdict, Accepted | PayoutsError):
        return verdict
    _log_failure(verdict, order)
    return InvariantViolated()


def _log_failure(error: Exception, order: Order | None) -> None:
    get_logger().error(
        LogEvent.ACCEPT_BATCH_FAILED,
        payout_id=None if order is None else str(order.id),
        error=type(error).__name__,
        constraint=constraint_name(error),
    )


class _ServerClock:
    """The database's clock as it was when we last heard of it, and the time that has passed since: never more than it shows."""

    def __init__(self) -> None:
        self._told: tuple[datetime, float] | None = None

    def set(self, told_at: datetime | None) -> None:
        """It showed this, or more."""
        if told_at is not None:
            self._told = told_at, monotonic()

    def reads_in(self, seconds: float) -> datetime | None:
        """What it will have reached by then; None while nothing is known of it."""
        if self._told is None:
            return None
        told_at, heard_at = self._told
        return told_at + timedelta(seconds=monotonic() - heard_at + seconds)


@dataclass(slots=True)
class _Line:
    waiting: deque[_Waiting] = field(default_factory=deque)
    running: bool = False
