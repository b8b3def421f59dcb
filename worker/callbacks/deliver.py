"""Delivery: claim callbacks under a lease, send the stored bytes, record each attempt. The same three steps as settlement."""

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from time import monotonic
from typing import Final
from uuid import UUID, uuid4

from aiohttp import ClientSession

from common.batching import Batcher
from common.db.callbacks import (
    CallbackAttempt,
    ClaimedCallback,
    append_callback_attempts,
    claim_callbacks,
    finish_callbacks,
    lock_callback_due,
    reschedule_callbacks,
)
from common.db.engine import Engine, Tx, in_transaction
from common.domain.ids import EVENT, render_id
from common.domain.schedule import callback_delay
from common.log import LogEvent, get_logger
from common.messaging.codec import WorkMessage
from common.process import end_tasks
from common.sealing import WEBHOOK_SECRET_PURPOSE, Keyring, SealBroken
from common.settings import Settings
from worker.callbacks.send import Attempt, render_headers, send_callback
from worker.scanning import OVERDUE_SECONDS

_CLAIM_MAX: Final = 64
_RECORD_BATCH_MAX: Final = 64
# An attempt that failed by our fault says nothing of the receiver: the same step again, when we may have recovered.
_OURS_AGAIN_SECONDS: Final = 30.0
# Longer than other transactions: an attempt that is not recorded is made again.
_RECORD_ATTEMPTS_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class Ended:
    """A claimed callback and how its attempt went. `luck` in [0, 1) is its share of the jitter."""

    callback: ClaimedCallback
    token: UUID
    attempt: Attempt
    ended_at: float
    luck: float


class Deliverer:
    """Sends callbacks until told to stop: those it is told of, and those it finds overdue.

    `messages_arrive` says whether somebody tells it; then the scan leaves callbacks alone until they are overdue.
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
        self._messages_arrive = messages_arrive
        self._sends: set[asyncio.Task[None]] = set()
        self._send_ended = asyncio.Event()
        self._leaving = False
        # One claim at a time, so that each knows how much room there is.
        self._claiming = asyncio.Lock()
        self._records: Batcher[Ended, None] = Batcher(self._record, batch_max=_RECORD_BATCH_MAX)

    async def run_round(self) -> bool:
        """Look for due callbacks and start sending them. Returns whether there was anything."""
        if self._leaving:
            return False
        return bool(await self._claim(overdue_seconds=OVERDUE_SECONDS if self._messages_arrive() else 0.0))

    async def claim_messages(self, messages: Sequence[WorkMessage]) -> bool:
        """Claim what messages tell of and start sending it, as room comes; False when it was given up, since we leave.

        What another has is left.
        Raises: `Transient`; then nothing, or only a part, was claimed, and it may be called again.
        """
        ids = [event_id for message in messages for event_id in message.ids]
        first = 0
        while first < len(ids):
            while self._room() <= 0 and not self._leaving:
                self._send_ended.clear()
                await self._send_ended.wait()
            if self._leaving:
                return False
            size = min(self._room(), _CLAIM_MAX)
            if await self._claim(event_ids=ids[first : first + size]) is not None:
                first += size
        return True

    def leave(self) -> None:
        """Claim nothing more from now on."""
        self._leaving = True
        self._send_ended.set()

    async def drain(self, deadline_seconds: float) -> None:
        """Let attempts that are under way end and be recorded, for at most that long; leases take care of the rest."""
        await end_tasks(self._sends, deadline_seconds)

    def _room(self) -> int:
        return self._settings.callback_concurrency - len(self._sends)

    async def _claim(self, *, event_ids: Sequence[UUID] | None = None, overdue_seconds: float = 0.0) -> int | None:
        """One claim, of those events or of what is overdue, and the start of sending; how many, or None without room."""
        async with self._claiming:
            settings, room = self._settings, self._room()
            if room <= 0:
                return None
            token = uuid4()
            start_until = monotonic() + settings.callback_lease_seconds - settings.callback_timeout_seconds
            claimed = await in_transaction(
                self._engine,
                lambda tx: claim_callbacks(
                    tx,
                    token=token,
                    lease_seconds=settings.callback_lease_seconds,
                    claim_max=min(room, _CLAIM_MAX),
                    event_ids=event_ids,
                    overdue_seconds=overdue_seconds,
                ),
            )
            for callback in claimed:
                task = asyncio.create_task(self._deliver(callback, token, start_until))
                self._sends.add(task)
                task.add_done_callback(self._end)
            return len(claimed)

    def _end(self, task: "asyncio.Task[None]") -> None:
        self._sends.discard(task)
        self._send_ended.set()

    async def _deliver(self, callback: ClaimedCallback, token: UUID, start_until: float) -> None:
        event = render_id(EVENT, callback.event_id)
        try:
            headers = self._headers(callback, event)
        except SealBroken as error:
            # Our fault, not the merchant's: no step of the schedule is used, the lease runs out, somebody reads the log.
            get_logger().error(LogEvent.SECRET_UNSEALABLE, event_id=event, error=str(error))
            return
        if monotonic() > start_until:
            return
        attempt = await send_callback(
            self._session,
            callback.url,
            headers,
            callback.body,
            timeout_seconds=self._settings.callback_timeout_seconds,
            shop_http=callback.callback_http,
            shop_ports=None if callback.callback_ports is None else frozenset(callback.callback_ports),
        )
        try:
            await self._records.submit(Ended(callback, token, attempt, monotonic(), random.random()))  # noqa: S311 jitter
        except Exception as error:
            get_logger().error(LogEvent.ROUND_FAILED, round="record", event_id=event, error=type(error).__name__)
        get_logger().info(
            LogEvent.CALLBACK_ATTEMPTED,
            event_id=event,
            attempt=callback.attempt_no,
            status=attempt.http_status,
            error=attempt.error,
            duration_ms=attempt.duration_ms,
        )

    def _headers(self, callback: ClaimedCallback, event: str) -> dict[str, str]:
        secret = self._keyring.open(
            callback.webhook_secret_sealed,
            owner=callback.shop_id,
            row=callback.shop_id,
            purpose=WEBHOOK_SECRET_PURPOSE,
        ).decode()
        return render_headers(event, [secret], time.time(), callback.body)

    async def _record(self, ended: Sequence[Ended]) -> list[None]:
        now = monotonic()
        await in_transaction(
            self._engine, lambda tx: record_attempts(tx, ended, now=now), attempts_max=_RECORD_ATTEMPTS_MAX
        )
        return [None] * len(ended)


async def record_attempts(tx: Tx, ended: Sequence[Ended], *, now: float) -> None:
    """Log attempts, and what follows from each: delivered, rejected, exhausted, or due again.

    A lease that is no longer ours leaves only the log line, marked late; but a late 2xx still ends the callback. `now` is
    monotonic, as `Ended.ended_at`.
    Locks: the due rows, in event id order.
    Repeat: an attempt that is recorded already finds its lease gone.
    """
    tokens = await lock_callback_due(tx, [item.callback.event_id for item in ended])
    finished: dict[UUID, str] = {}
    again: dict[UUID, tuple[int, float]] = {}
    attempts = []
    for item in ended:
        event_id = item.callback.event_id
        held = tokens.get(event_id) == item.token
        attempts.append(_logged(item, late=not held, now=now))
        if item.attempt.delivered and event_id in tokens:
            finished[event_id] = "delivered"
        elif held and finished.get(event_id) != "delivered":
            _conclude(item, finished, again)
    await append_callback_attempts(tx, attempts)
    await finish_callbacks(tx, finished)
    await reschedule_callbacks(tx, again)


def _conclude(item: Ended, finished: dict[UUID, str], again: dict[UUID, tuple[int, float]]) -> None:
    """A failed attempt: 410 is the receiver's "never again", the end of the schedule is ours. A fault of ours uses no step."""
    event_id, step = item.callback.event_id, item.callback.step
    if item.attempt.ours:
        again[event_id] = (step, _OURS_AGAIN_SECONDS)
        return
    delay_seconds = callback_delay(step, item.luck, item.attempt.retry_after_seconds)
    if item.attempt.http_status == HTTPStatus.GONE:
        finished[event_id] = "rejected"
    elif delay_seconds is None:
        finished[event_id] = "exhausted"
    else:
        again[event_id] = (step + 1, delay_seconds)


def _logged(item: Ended, *, late: bool, now: float) -> CallbackAttempt:
    attempt, callback = item.attempt, item.callback
    return CallbackAttempt(
        event_id=callback.event_id,
        shop_id=callback.shop_id,
        attempt_no=callback.attempt_no,
        age_seconds=now - item.ended_at + attempt.duration_ms / 1000,
        duration_ms=attempt.duration_ms,
        http_status=attempt.http_status,
        error=attempt.error,
        response_excerpt=attempt.response_excerpt,
        address=attempt.address,
        late=late,
        dns_ms=attempt.dns_ms,
        connect_ms=attempt.connect_ms,
        first_byte_ms=attempt.first_byte_ms,
        reused=attempt.reused,
        retry_after_seconds=math.ceil(attempt.retry_after_seconds) or None,
    )
