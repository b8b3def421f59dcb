"""Whether one dead merchant delays others: how late first attempts of the healthy come, without him and with him.

He has callbacks waiting, and an endpoint that accepts and never answers. The healthy are told of payouts at a steady
rate. The lag counts from the beginning of the transaction that stored the event, so it is a little too long and never too
short; of what did not come at all it counts until the merchants were asked.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from uuid import UUID

from rich.progress import Progress
from rich.table import Table
from sqlalchemy import text

from bench.figures import Spread, percentile, spread_of
from bench.filling import Shop, add_shops, fill, queue_payouts, tell_steadily
from bench.picture import Chart, Lines
from bench.scene import Scene, end_watch
from common.db.engine import Tx, in_transaction
from common.domain.ids import EVENT, render_id

HEALTHY: Final = 500
GOAL_SECONDS: Final = 2.0
_SAMPLE_SECONDS: Final = 0.1
_GRACE_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """How many callbacks of the dead merchant are in flight, and how many may be, at one moment of the database."""

    at: float
    in_flight: int
    cap: int


@dataclass(slots=True)
class Phase:
    """A stretch of steady telling. `missing`: told of and never come. `by_second`: the longest lag of what was told in each."""

    lag: Spread
    missing: int
    rate: float
    by_second: list[float]


@dataclass(slots=True)
class Watch:
    """What was sampled of the dead merchant."""

    samples: list[Sample] = field(default_factory=list)


# A lease is due in the future; what waits for its first attempt is due in the past, so hardly a row too many is read.
_SAMPLE: Final = text(
    """
    SELECT l.cap,
           (SELECT count(*) FROM callback_due d
             WHERE d.due_at > now() AND d.due_at <= now() + make_interval(secs => CAST(:lease_seconds AS float8))
               AND d.lane_id = l.id AND d.lease_token IS NOT NULL) AS in_flight
      FROM callback_lanes l WHERE l.shop_id = :shop_id
    """
)


async def find_sample(tx: Tx, on: Scene, shop_id: UUID) -> Sample:
    """A look at the only lane of the dead merchant's shop: the leases themselves, not what the lane says of them."""
    rows = await tx.execute(_SAMPLE, {"shop_id": shop_id, "lease_seconds": on.settings.callback_lease_seconds})
    row = rows.one()
    return Sample(time.time(), row.in_flight, row.cap)


async def measure(on: Scene, *, waiting: int, seconds: float, rate: int, progress: Progress) -> dict[str, Any]:
    """First without the dead merchant, then with him."""
    healthy = await add_shops(on, "healthy", [f"{on.origin(n)}/ok/callbacks" for n in range(HEALTHY)])
    (dead,) = await add_shops(on, "dead", [f"{on.origin(HEALTHY)}/hang/callbacks"])
    each = -(-round(seconds * rate) // HEALTHY)
    payout_ids = await queue_payouts(on, healthy, each * 2)
    half = len(payout_ids) // 2
    await on.maintain()
    async with on.worker():
        alone = await _run_phase(on, payout_ids[:half], rate, "healthy alone", progress)
    filling = progress.add_task("callbacks of the dead", total=waiting)
    await fill(on, [dead], waiting, lambda count: progress.update(filling, completed=count))
    await on.maintain()
    await on.forget()
    async with on.worker(), _watching(on, dead) as watch:
        beside = await _run_phase(on, payout_ids[half:], rate, "beside the dead", progress)
    return {
        "goal_seconds": GOAL_SECONDS,
        "waiting": waiting,
        "alone": asdict(alone),
        "beside": asdict(beside),
        "dead": summarize(watch.samples, on.settings.callback_timeout_seconds),
    }


def summarize(samples: Sequence[Sample], timeout_seconds: float) -> dict[str, Any]:
    """What there is to say about samples in the order of time, at least one.

    `over`: samples above the cap of their moment. `over_any`: above every cap of the time that an attempt may take, too: what
    began under a wider cap may still be in flight when it has become narrower.
    """
    over = [sample for sample in samples if sample.in_flight > sample.cap]
    over_any = [
        sample
        for sample in over
        if sample.in_flight
        > max(other.cap for other in samples if sample.at - timeout_seconds <= other.at <= sample.at)
    ]
    in_flight = [sample.in_flight for sample in samples]
    return {
        "samples": len(samples),
        "in_flight_p99": percentile(in_flight, 0.99),
        "in_flight_max": max(in_flight),
        "cap_min": min(sample.cap for sample in samples),
        "cap_max": max(sample.cap for sample in samples),
        "over": len(over),
        "over_any": len(over_any),
    }


@asynccontextmanager
async def _watching(on: Scene, dead: Shop) -> AsyncIterator[Watch]:
    watch = Watch()

    async def look() -> None:
        while True:
            watch.samples.append(await in_transaction(on.superuser, lambda tx: find_sample(tx, on, dead.id)))
            await asyncio.sleep(_SAMPLE_SECONDS)

    looking = asyncio.create_task(look())
    try:
        yield watch
    finally:
        await end_watch(looking)


async def _run_phase(on: Scene, payout_ids: Sequence[UUID], rate: int, name: str, progress: Progress) -> Phase:
    """Tell of payouts at that rate, and see when the merchants hear of them."""
    telling = progress.add_task(name, total=len(payout_ids))
    started = time.time()
    event_ids = await tell_steadily(on, payout_ids, rate, lambda count: progress.update(telling, completed=count))
    took = time.time() - started
    arrivals = await _arrivals_of(on, event_ids)
    now = time.time()
    found = await in_transaction(
        on.ops,
        lambda tx: tx.execute(
            text(
                "SELECT id, extract(epoch FROM created_at)::float8 AS told_at FROM events"
                " WHERE id = ANY (CAST(:ids AS uuid[]))"
            ),
            {"ids": event_ids},
        ),
    )
    rows = found.all()
    lags = [min(arrivals.get(render_id(EVENT, row.id), [now])) - row.told_at for row in rows]
    missing = sum(render_id(EVENT, event_id) not in arrivals for event_id in event_ids)
    by_second: dict[int, float] = {}
    for row, lag in zip(rows, lags, strict=True):
        second = int(row.told_at - started)
        by_second[second] = max(lag, by_second.get(second, 0.0))
    longest = [round(by_second[second], 3) for second in sorted(by_second)]
    return Phase(spread_of(lags), missing, round(len(event_ids) / took, 1), longest)


async def _arrivals_of(on: Scene, event_ids: Sequence[UUID]) -> dict[str, list[float]]:
    """What came, once all of these have, or the time of grace is over."""
    deadline = time.time() + _GRACE_SECONDS
    wanted = {render_id(EVENT, event_id) for event_id in event_ids}
    while True:
        arrivals: dict[str, list[float]] = await on.ask_receiver("arrivals")
        if wanted <= arrivals.keys() or time.time() > deadline:
            return arrivals
        await asyncio.sleep(_POLL_SECONDS)


def render(found: dict[str, Any]) -> Sequence[Table]:
    """The healthy without the dead merchant and with him; then he himself."""
    title = f"from event to first attempt, seconds; the goal of p99 is {found['goal_seconds']:g}"
    lags = Table("healthy", "told", "per second", "p50", "p99", "max", "never came", title=title)
    for name, phase in (("alone", found["alone"]), ("beside the dead", found["beside"])):
        lag = phase["lag"]
        spread = [f"{lag[key]:.3f}" for key in ("p50", "p99", "max")]
        lags.add_row(name, f"{lag['count']:,}", f"{phase['rate']:g}", *spread, f"{phase['missing']:,}")
    dead = found["dead"]
    title = f"in flight to the dead merchant, who has {found['waiting']:,} waiting"
    flight = Table("samples", "p99", "max", "cap", "over it", "over every recent one", title=title)
    names = ("samples", "in_flight_p99", "in_flight_max")
    caps = f"{dead['cap_min']} to {dead['cap_max']}"
    flight.add_row(*(f"{dead[name]:,}" for name in names), caps, f"{dead['over']:,}", f"{dead['over_any']:,}")
    return lags, flight


def draw(found: dict[str, Any]) -> Sequence[Chart]:
    """The longest lag of each second, without the dead merchant and with him."""
    phases = {name: found[key]["by_second"] for name, key in (("alone", "alone"), ("beside the dead", "beside"))}
    lines = {name: list(enumerate(longest)) for name, longest in phases.items()}
    return (Lines("from event to first attempt: the longest of each second, seconds", lines),)
