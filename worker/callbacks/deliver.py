"""Delivery: claim callbacks under a lease, send the stored bytes, record each attempt.

The same three steps as settlement; but whoever records makes room, and takes the next callbacks in the same transaction.
"""

import asyncio
import math
import random
import time
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Final
from uuid import UUID, uuid4

from aiohttp import ClientSession
from prometheus_client import Counter, Histogram

from common import tracing
from common.batching import Batcher
from common.db.engine import Engine, Tx, in_transaction
from common.db.lanes import (
    FIRST_LANE,
    ClaimedCallback,
    Lapsed,
    Lease,
    Room,
    claim_in_turn,
    claim_told_of,
    find_claimed,
    release_lapsed,
    wake_lanes,
)
from common.db.webhook_secrets import SealedWebhookSecret, find_webhook_secrets
from common.deadlines import TimeLimit
from common.domain.ids import EVENT, PAYIN, PAYOUT, made_at, render_id
from common.domain.lane import MERCHANT_UNPROVEN_MAX, SLOW_MILLISECONDS
from common.errors import AccountBusy, Transient
from common.log import LogEvent, get_logger
from common.messaging.codec import WorkMessage
from common.process import end_tasks
from common.sealing import Keyring, SealBroken
from common.settings import Settings
from common.tracing import Attributes, Kind
from common.webhook_secrets import open_webhook_secrets
from worker.callbacks.recording import Ended, record_attempts
from worker.callbacks.send import Attempt, render_headers, send_callback
from worker.scanning import OVERDUE_SECONDS

_CLAIM_MAX: Final = 128
_RECORD_BATCH_MAX: Final = 128
# Nobody waits for the record of an attempt, but its slot: together they cost little.
_RECORD_LINGER_SECONDS: Final = 0.01
# Between two tries to record what is of a merchant whom somebody else holds; for all the same, so that what was one batch comes
# back as one.
_RECORD_AGAIN_SECONDS: Final = 0.02
# Lanes with callbacks that nobody has told of, in one look; the next look goes on behind them.
_LANES_LOOKED_AT: Final = 256
# Longer than other transactions: an attempt that is not recorded is made again.
_RECORD_ATTEMPTS_MAX: Final = 20
# While something is in flight, a claim for less than this part of all that may be, or after one that left nothing, is put off
# until nobody has claimed for a moment: so few transactions take many, and those that record are mostly the ones.
_ROOM_MIN_SHARE: Final = 1 / 16
_CLAIM_APART_SECONDS: Final = 0.05
_LANDING_WAIT_SECONDS: Final = 0.02


LEASES_LAPSED: Final = Counter(
    "payouts_callback_leases_lapsed", "Callbacks given back because their worker was silent for too long"
)
ATTEMPT_SECONDS: Final = Histogram(
    "payouts_callback_attempt_seconds",
    "How long attempts to deliver took, by what came of them",
    ["outcome"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 17.0),
)
DELIVERED_SECONDS: Final = Histogram(
    "payouts_callback_delivered_seconds",
    "How long callbacks took from their event until their receiver took them",
    buckets=(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0, 86400.0),
)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A callback in flight, and when it took off."""

    callback: ClaimedCallback
    since: float


@dataclass(frozen=True, slots=True)
class _Taken:
    """What a claim took, and the sealed secrets of its shops."""

    claimed: list[ClaimedCallback]
    secrets: dict[UUID, list[SealedWebhookSecret]]


class Deliverer:
    """Sends callbacks until told to stop: those it is told of, and those whose lane's turn has come.

    It wakes lanes in which callbacks are due that nobody has told of; where somebody tells (`messages_arrive`), when they are
    overdue.
    """

    def __init__(
        self,
        engine: Engine,
        keyring: Keyring,
        session: ClientSession,
        settings: Settings,
        *,
        messages_arrive: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine = engine
        self._keyring = keyring
        self._session = session
        self._settings = settings
        self._limit = TimeLimit(settings.callback_timeout_seconds)
        self._messages_arrive = messages_arrive
        self._flights: dict[asyncio.Task[None], _Flight] = {}
        self._landed = asyncio.Event()
        self._leaving = False
        self._draining = False
        self._looked_at = -math.inf
        self._claimed_at = -math.inf
        self._more_waits = True
        # Claims whose COMMIT nobody heard the answer of, and when they were made.
        self._unheard: dict[Lease, float] = {}
        self._behind = FIRST_LANE
        # One claim at a time, so that each knows how much room there is.
        self._claiming = asyncio.Lock()
        self._records: Batcher[Ended, bool] = Batcher(
            self._record, batch_max=_RECORD_BATCH_MAX, linger_seconds=_RECORD_LINGER_SECONDS
        )

    async def run_round(self) -> bool:
        """Look for callbacks that can leave now and start sending them. Returns whether to look again at once."""
        await self._look()
        while not self._leaving and not self._worth_a_claim():
            # Not for the next landing: whoever records it claims as well.
            await asyncio.sleep(_LANDING_WAIT_SECONDS)
            await self._look()
        if self._leaving:
            return False
        claimed, _ = await self._claim(claim_in_turn)
        # What is in flight may make room in a lane that is full.
        return bool(claimed) or (bool(self._flights) and await self._await_landing())

    async def claim_messages(self, messages: Sequence[WorkMessage]) -> bool:
        """Claim what messages tell of and start sending it; False when it was given up, since we leave.

        What has no room now waits in its lane from now on. What another has is left.
        Raises: `Transient`; then nothing, or only a part, was claimed, and it may be called again.
        """
        ids = [event_id for message in messages for event_id in message.ids]
        with tracing.receive("callbacks", [text for message in messages for text in message.traceparents]) as received:
            for first in range(0, len(ids), _CLAIM_MAX):
                if self._leaving:
                    return False
                some = ids[first : first + _CLAIM_MAX]
                await self._claim(partial(claim_told_of, event_ids=some), received=received.traceparent)
        return True

    async def _look(self) -> None:
        """Once in an interval of the scan: give back what workers that are gone had taken, and wake lanes."""
        if monotonic() - self._looked_at < self._settings.scan_interval_seconds:
            return
        self._looked_at = monotonic()
        overdue_seconds = OVERDUE_SECONDS if self._messages_arrive() else 0.0

        async def work(tx: Tx) -> tuple[list[Lapsed], UUID | None]:
            lapsed = await release_lapsed(tx)
            behind, _ = await wake_lanes(
                tx, behind=self._behind, overdue_seconds=overdue_seconds, lanes_max=_LANES_LOOKED_AT
            )
            return lapsed, behind

        lapsed, behind = await in_transaction(self._engine, work)
        self._behind = behind or FIRST_LANE
        for callback in lapsed:
            _tell_of_lapsed(callback)

    def leave(self) -> None:
        """Claim nothing more from now on."""
        self._leaving = True
        self._landed.set()

    async def drain(self, deadline_seconds: float) -> None:
        """Let attempts that are under way end and be recorded, for at most that long; leases take care of the rest."""
        ends_at = monotonic() + deadline_seconds
        self._draining = True
        try:
            await end_tasks(self._flights, deadline_seconds)
            # And what a record claimed that was under way just then.
            await end_tasks(self._flights, max(0.0, ends_at - monotonic()))
        finally:
            self._draining = False

    def _worth_a_claim(self) -> bool:
        """Whether there is room for a claim, and enough of it, or nobody has claimed for a moment."""
        room = self._settings.callback_concurrency - len(self._flights)
        if not self._flights or monotonic() > self._claimed_at + _CLAIM_APART_SECONDS:
            return room > 0
        return self._more_waits and room >= self._settings.callback_concurrency * _ROOM_MIN_SHARE

    async def _await_landing(self) -> bool:
        """Wait a moment for something in flight to end; whether it has."""
        self._landed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LANDING_WAIT_SECONDS):
                await self._landed.wait()
        return self._landed.is_set()

    def _room(self, ended: Sequence[Ended]) -> Room:
        """What may be taken when these are recorded. What has been in flight for long is slow, whatever was known of its lane.

        Of the share of the slow, those that were thought fast take up no more than half: one receiver that falls silent leaves
        the others of whom nothing is known theirs. What is free last is a reserve for merchants who have little in flight:
        several that fall silent together leave it to the others.
        """
        settings = self._settings
        slow_since = monotonic() - SLOW_MILLISECONDS / 1000
        # By identity: to hash the ids of all that is in flight takes longer than everything else here.
        ending = {id(item.callback) for item in ended}
        flights = [flight for flight in self._flights.values() if id(flight.callback) not in ending]
        slow = sum(flight.callback.slow for flight in flights)
        late = sum(not flight.callback.slow and flight.since < slow_since for flight in flights)
        retries = sum(flight.callback.step > 0 for flight in flights)
        slow_share = _share(settings.callback_concurrency, settings.callback_slow_share)
        free = max(0, settings.callback_concurrency - len(flights))
        reserve = int(settings.callback_concurrency * settings.callback_reserve_share)
        large = settings.callback_lane_concurrency
        return Room(
            total=min(_CLAIM_MAX, free - reserve if free > reserve else free),
            retries=max(0, _share(settings.callback_concurrency, settings.callback_retry_share) - retries),
            slow=max(0, slow_share - slow - min(late, slow_share // 2)),
            lane=large if free > reserve else min(large, MERCHANT_UNPROVEN_MAX),
            busy=Tally(flight.callback.lane_id for flight in flights),
            busy_merchants=Tally(flight.callback.merchant_id for flight in flights),
        )

    async def _claim(
        self,
        claim: Callable[[Tx, Lease, Room], Awaitable[list[ClaimedCallback]]],
        ended: Sequence[Ended] = (),
        received: str | None = None,
    ) -> tuple[list[ClaimedCallback], set[UUID]]:
        """One claim and the start of sending; in the same transaction, before it, the record of what has ended.

        `received`: the context of the messages that told of what is claimed.
        Returns: what was claimed, and the lanes that were not recorded.
        """
        async with self._claiming:
            now, leaving = monotonic(), self._leaving
            room = self._room(ended)
            lease = Lease(uuid4(), self._settings.callback_lease_seconds)
            tries = 0

            async def work(tx: Tx) -> tuple[_Taken, set[UUID]]:
                nonlocal tries
                tries += 1
                left = await record_attempts(tx, ended, now=now) if ended else set()
                claimed = await find_claimed(tx, lease) if tries > 1 else []
                if not (claimed or leaving):
                    claimed = await claim(tx, lease, room)
                return await _with_secrets(tx, claimed), left

            for unheard in list(self._unheard):
                await self._take_up(unheard)
            try:
                taken, left = await in_transaction(self._engine, work)
            except Transient:
                self._unheard[lease] = now
                raise
            self._start(taken, lease, now, received)
            if claim is claim_in_turn:
                self._claimed_at = monotonic()
                self._more_waits = len(taken.claimed) >= room.total
            return taken.claimed, left

    async def _take_up(self, lease: Lease) -> None:
        """Send what a claim took of which nobody heard, unless it is too late for that."""
        since = self._unheard[lease]
        if monotonic() < since + lease.seconds:

            async def work(tx: Tx) -> _Taken:
                return await _with_secrets(tx, await find_claimed(tx, lease))

            self._start(await in_transaction(self._engine, work), lease, since)
        del self._unheard[lease]

    def _start(self, taken: "_Taken", lease: Lease, since: float, received: str | None = None) -> None:
        """Start sending what was claimed at `since`."""
        start_until = since + lease.seconds - self._settings.callback_timeout_seconds
        secrets = {shop_id: self._open(of_shop) for shop_id, of_shop in taken.secrets.items()}
        for callback in taken.claimed:
            task = asyncio.create_task(
                self._deliver(callback, secrets.get(callback.shop_id, []), lease.token, start_until, received)
            )
            self._flights[task] = _Flight(callback, since)
            task.add_done_callback(self._land)

    def _land(self, task: "asyncio.Task[None]") -> None:
        del self._flights[task]
        self._landed.set()

    def _open(self, sealed: Sequence[SealedWebhookSecret]) -> list[str]:
        """A shop's secrets, newest first; none when they do not open, which is our fault and not the merchant's."""
        try:
            return open_webhook_secrets(self._keyring, sealed)
        except SealBroken as error:
            get_logger().error(LogEvent.SECRET_UNSEALABLE, shop_id=str(sealed[0].shop_id), error=str(error))
            return []

    async def _deliver(
        self,
        callback: ClaimedCallback,
        secrets: list[str],
        token: UUID,
        start_until: float,
        received: str | None,
    ) -> None:
        """Send and record; the attempt leaves one line in the log. `error`: `not_made` when none was, by our own fault."""
        event, attempt = render_id(EVENT, callback.event_id), None
        about: Attributes = {"payouts.event_id": event, "payouts.attempt": callback.attempt_no}
        with tracing.follow("callback", Kind.CLIENT, callback.traceparent, links=[received], attributes=about) as span:
            if secrets and monotonic() <= start_until:
                attempt = await self._send(callback, secrets, event)
            error = "not_made" if attempt is None else attempt.error
            status = None if attempt is None else attempt.http_status
            span.note({"http.request.method": "POST", "http.response.status_code": status})
            if error is not None:
                span.fail(error)
        if attempt is not None:
            ATTEMPT_SECONDS.labels(error or "delivered").observe(attempt.duration_ms / 1000)
        if error is None:
            DELIVERED_SECONDS.observe(max(0.0, time.time() - made_at(callback.event_id)))
        await self._submit(Ended(callback, token, attempt, monotonic(), random.random() if attempt else 0.0))  # noqa: S311 jitter
        get_logger().info(
            LogEvent.CALLBACK_ATTEMPTED,
            event_id=event,
            shop_id=str(callback.shop_id),
            payout_id=callback.payout_id and render_id(PAYOUT, callback.payout_id),
            payin_id=callback.payin_id and render_id(PAYIN, callback.payin_id),
            attempt=callback.attempt_no,
            status=status,
            error=error,
            duration_ms=0 if attempt is None else attempt.duration_ms,
            trace_id=tracing.trace_id_of(callback.traceparent),
        )

    async def _send(self, callback: ClaimedCallback, secrets: list[str], event: str) -> Attempt:
        return await send_callback(
            self._session,
            callback.url,
            render_headers(event, secrets, time.time(), callback.body),
            callback.body,
            limit=self._limit,
            shop_http=callback.callback_http,
            shop_ports=None if callback.callback_ports is None else frozenset(callback.callback_ports),
        )

    async def _submit(self, ended: Ended) -> None:
        """Have an attempt recorded, again and again for as long as a lease: what is not recorded is made once more.

        The last try begins after that: a process that stood still for longer still tells what it has heard.
        """
        patient_until = ended.ended_at + self._settings.callback_lease_seconds
        failure, tried_at = "AccountBusy", 0.0
        while tried_at < patient_until:
            tried_at = monotonic()
            try:
                if await self._records.submit(ended):
                    return
            except Transient as error:
                failure = error.reason
            except Exception as error:
                failure = type(error).__name__
                break
            await asyncio.sleep(_RECORD_AGAIN_SECONDS)
        event = render_id(EVENT, ended.callback.event_id)
        get_logger().error(LogEvent.ROUND_FAILED, round="record", event_id=event, error=failure)

    async def _record(self, ended: Sequence[Ended]) -> list[bool]:
        """Record what can be; whether each was: what is of merchants whom somebody else holds keeps nobody waiting.

        Whoever records makes room, and holds the lanes in which it is: so it claims as well, unless somebody does just then.
        A record never fails because of a claim.
        """
        if not (self._leaving or self._draining or self._claiming.locked()):
            try:
                _, left = await self._claim(claim_in_turn, ended)
            except AccountBusy:
                raise
            except Exception as error:
                get_logger().warning(LogEvent.ROUND_FAILED, round="record and claim", error=type(error).__name__)
            else:
                return [item.callback.lane_id not in left for item in ended]
        now = monotonic()
        left = await in_transaction(
            self._engine, lambda tx: record_attempts(tx, ended, now=now), attempts_max=_RECORD_ATTEMPTS_MAX
        )
        return [item.callback.lane_id not in left for item in ended]


async def _with_secrets(tx: Tx, claimed: list[ClaimedCallback]) -> _Taken:
    return _Taken(claimed, await find_webhook_secrets(tx, {callback.shop_id for callback in claimed}))


def _share(concurrency: int, share: float) -> int:
    """How many of these, at least one: with none, what nobody knows would never become known."""
    return max(1, int(concurrency * share))


def _tell_of_lapsed(lapsed: Lapsed) -> None:
    LEASES_LAPSED.inc()
    if lapsed.put_aside:
        event = render_id(EVENT, lapsed.event_id)
        get_logger().error(LogEvent.CALLBACK_PUT_ASIDE, event_id=event, leases_lost=lapsed.lost_leases)
