"""The record: what came of attempts, what follows for their callbacks, and what it teaches about their lanes."""

import math
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final
from uuid import UUID

from prometheus_client import Counter

from common.db.callbacks import (
    Again,
    CallbackAttempt,
    CallbackKey,
    DueCallback,
    append_callback_attempts,
    finish_callbacks,
    lock_callback_due,
    reschedule_callbacks,
)
from common.db.engine import Tx
from common.db.lanes import ClaimedCallback, find_paces, lock_shares, save_lanes
from common.domain.lane import Exchange, learn
from common.domain.schedule import callback_delay
from worker.callbacks.send import Attempt

# An attempt that failed by our fault says nothing of the receiver: the same step again, when we may have recovered.
_OURS_AGAIN_SECONDS: Final = 30.0

# What a receiver asks for with these holds for all that goes to it.
_ASKING: Final = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})

LATE: Final = Counter(
    "payouts_callback_attempts_late", "Attempts whose lease had passed to somebody else when they ended"
)


@dataclass(frozen=True, slots=True)
class Ended:
    """A claimed callback and how its attempt went; None: none was made, which is our fault and not the receiver's.

    `luck` in [0, 1) is its share of the jitter.
    """

    callback: ClaimedCallback
    token: UUID
    attempt: Attempt | None
    ended_at: float
    luck: float


async def record_attempts(tx: Tx, ended: Sequence[Ended], *, now: float) -> set[UUID]:
    """Log attempts, and what follows from each: delivered, rejected, exhausted, or due again; and what they teach about lanes.

    A lease that is no longer ours leaves only the log line, marked late; but a late 2xx still ends the callback, unless it
    had ended and was sent again since. What could not be attempted is given back as it was. `now` is monotonic, as
    `Ended.ended_at`.
    Returns: the lanes that were not recorded, since somebody else holds their merchants.
    Locks: the shares of the lanes' merchants by id, then the due rows in event id order.
    Repeat: an attempt that is in the log already changes nothing.
    """
    wanted = {item.callback.lane_id for item in ended}
    lanes = set(await lock_shares(tx, wanted, waits=False))
    ended = [item for item in ended if item.callback.lane_id in lanes]
    if not ended:
        return wanted
    lane_ids = {item.callback.key: item.callback.lane_id for item in ended}
    due = await lock_callback_due(tx, lane_ids)
    paces = await find_paces(tx, lanes)
    finished: dict[CallbackKey, str] = {}
    again: dict[CallbackKey, Again] = {}
    exchanges = defaultdict(list)
    logged = [_logged(item, item.attempt, due, now=now) for item in ended if item.attempt is not None]
    fresh = await append_callback_attempts(tx, logged)
    LATE.inc(sum(line.late and (line.event_id, line.attempt_no) in fresh for line in logged))
    for item in ended:
        callback, attempt = item.callback, item.attempt
        key, held = callback.key, _is_held(item, due)
        if attempt is None:
            if held and key not in finished:
                again[key] = Again(callback.step, _OURS_AGAIN_SECONDS, ours=True)
            continue
        if not held and (callback.event_id, callback.attempt_no) not in fresh:
            continue
        if attempt.delivered and _is_of_this_life(callback, due):
            finished[key] = "delivered"
        elif held and finished.get(key) != "delivered":
            _conclude(item, attempt, finished, again)
        if held or attempt.delivered:
            exchanges[callback.lane_id].append(_exchange(attempt))
    await finish_callbacks(tx, finished)
    await reschedule_callbacks(tx, again)
    leases_ended = Tally(lane_ids[key] for key in {*finished, *again} if due[key].lease_token is not None)
    luck = ended[0].luck
    await save_lanes(tx, {lane: learn(pace, exchanges[lane], luck) for lane, pace in paces.items()}, leases_ended)
    return wanted - lanes


def _conclude(item: Ended, attempt: Attempt, finished: dict[CallbackKey, str], again: dict[CallbackKey, Again]) -> None:
    """A failed attempt: 410 is the receiver's "never again", the end of the schedule is ours.

    One out of turn uses no step, nor does one that failed by our fault.
    """
    key, step, out_of_turn = item.callback.key, item.callback.step, item.callback.resume_at is not None
    if attempt.ours:
        again[key] = Again(step, _OURS_AGAIN_SECONDS, ours=True)
        return
    delay_seconds = callback_delay(0 if out_of_turn else step, item.luck, attempt.retry_after_seconds)
    if attempt.http_status == HTTPStatus.GONE:
        finished[key] = "rejected"
    elif delay_seconds is None:
        finished[key] = "exhausted"
    else:
        again[key] = Again(step if out_of_turn else step + 1, delay_seconds)


def _exchange(attempt: Attempt) -> Exchange:
    """What an attempt says of its lane: "too many" and "gone" are answers of somebody who is well."""
    asked_seconds = attempt.retry_after_seconds if attempt.http_status in _ASKING else 0.0
    if attempt.http_status == HTTPStatus.TOO_MANY_REQUESTS or attempt.ours or attempt.error == "address_blocked":
        return Exchange(None, attempt.duration_ms, asked_seconds)
    healthy = attempt.delivered or attempt.http_status == HTTPStatus.GONE
    return Exchange(healthy, attempt.duration_ms, asked_seconds)


def _is_held(item: Ended, due: Mapping[CallbackKey, DueCallback]) -> bool:
    """Whether the lease under which it was attempted is still ours."""
    row = due.get(item.callback.key)
    return row is not None and row.lease_token == item.token


def _is_of_this_life(callback: ClaimedCallback, due: Mapping[CallbackKey, DueCallback]) -> bool:
    """Whether it is still to be sent, and was not sent again since it ended: somebody then wants it once more."""
    row = due.get(callback.key)
    return row is not None and callback.attempt_no > row.attempts_before


def _logged(item: Ended, attempt: Attempt, due: Mapping[CallbackKey, DueCallback], *, now: float) -> CallbackAttempt:
    callback = item.callback
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
        late=not _is_held(item, due),
        dns_ms=attempt.dns_ms,
        connect_ms=attempt.connect_ms,
        first_byte_ms=attempt.first_byte_ms,
        reused=attempt.reused,
        retry_after_seconds=math.ceil(attempt.retry_after_seconds) or None,
    )
