"""The whole way at a steady rate: accepted, settled, delivered; and whether anything falls behind.

An open loop brings payouts, one gateway accepts, or two, a worker of each role does the rest, the merchant answers its
callbacks. The ages of what has been due for the longest are looked at all the time. Afterwards each answer is laid beside
its payout, each payout beside its money, and each callback beside what the merchant saw. Of each figure the median of
the turns counts.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from statistics import median
from typing import Any, Final

from rich.progress import Progress
from rich.table import Table
from sqlalchemy import text

from bench import accept
from bench.accept import GATEWAY_COUNTS, draw_costs, render_costs
from bench.answers import IN_RUN, Answers, check, in_run, send
from bench.figures import Spread, counted, spread_of
from bench.filling import Shop, add_senders, add_shops
from bench.goals import Goal, render_goals
from bench.load import Plan, Sender
from bench.picture import Bar, Bars, Chart, Lines
from bench.scene import Scene, end_watch, numbered
from bench.settle import count_unsettled
from common.db.ages import find_ages
from common.db.engine import Tx, in_transaction
from common.db.invariants import verify
from common.domain.ids import EVENT, render_id

GOAL_PER_SECOND: Final = 2000.0
_CONNECTIONS: Final = 128
_SAMPLE_SECONDS: Final = 0.5
_POLL_SECONDS: Final = 0.2
_DEADLINE_SECONDS: Final = 600.0
# Below this nobody would say that anything falls behind; it is what the scan waits before it looks after messages.
_AGE_SECONDS: Final = 1.5
_GROWTH_MAX: Final = 1.1


@dataclass(slots=True)
class Ages:
    """Seconds by which the oldest payout and callback that nobody has taken were late, sample by sample."""

    at: list[float] = field(default_factory=list)
    payout: list[float] = field(default_factory=list)
    callback: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Delivered:
    """What the merchants saw: how many in the time that counts, the seconds from 201 to the callback and whether they stayed
    what they were, what was not as recorded.
    """

    counted: int
    lag: Spread
    flat: bool
    differing: int


def processes(gateways: int) -> list[str]:
    """The names of so many gateways and of a worker of each role."""
    return [*numbered("gateway", gateways), "settle", "callbacks", "sweep"]


async def measure(
    on: Scene,
    *,
    rate: int,
    seconds: float,
    merchants: int,
    turns: int,
    carriers: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """One gateway and two, with each carrier for that long, turn about."""
    shops = await add_shops(on, "whole-way", [f"{on.origin(n)}/ok/callbacks" for n in range(merchants)])
    senders = await add_senders(on, shops)
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {case: [] for case in product(GATEWAY_COUNTS, carriers)}
    done = progress.add_task("runs", total=turns * len(runs))
    for turn in range(turns):
        for place, ((gateways, carrier), taken) in enumerate(runs.items()):
            await on.maintain()
            await on.forget()
            prefix = f"whole-{turn}-{place}-"
            async with on.running(*processes(gateways), carrier=carrier):
                taken.append(await run_load(on, shops, senders, carrier, prefix, rate, seconds, progress))
            progress.advance(done)
    cases = [
        summarize(f"{counted(gateways, 'gateway')}, {carrier}", taken) for (gateways, carrier), taken in runs.items()
    ]
    return {
        "wanted_per_second": rate,
        "seconds": seconds,
        "merchants": merchants,
        "cases": cases,
        "goals": [goal.told() for case in cases for goal in _goals(case)],
        "broken": [finding.rule.name for finding in await verify(on.ops) if finding.count],
    }


async def run_load(
    on: Scene,
    shops: Sequence[Shop],
    senders: list[Sender],
    carrier: str,
    prefix: str,
    rate: int,
    seconds: float,
    progress: Progress,
    *,
    alone: bool = True,
) -> dict[str, Any]:
    """Bring payouts at that rate for so long, wait for the last callback, and lay everything beside everything.

    What `processes` names must run. `alone`: nobody else has callbacks.
    """
    plan = Plan(
        port=on.gateway_port,
        path=accept.PATH,
        prefix=prefix,
        senders=senders,
        connections=_CONNECTIONS,
        seconds=seconds,
        warm_seconds=2.0,
        rate=float(rate),
    )
    before = await on.usage()
    async with watching_ages(on) as ages:
        answers = await send(plan, progress, f"{carrier}, {rate:,}/s")
    created = len(answers.statuses) - answers.failed
    of_run = in_run(shops, prefix)
    await (_until_quiet(on, created, progress) if alone else _until_delivered(on, of_run, created, progress))
    costs = (await on.usage()).since(before, max(1, created))
    await on.analyze()
    arrivals: dict[str, list[float]] = await on.ask_receiver("arrivals")
    delivered = await in_transaction(on.superuser, lambda tx: lay_beside(tx, answers, of_run, arrivals, alone=alone))
    unsettled = await in_transaction(on.superuser, lambda tx: count_unsettled(tx, of_run))
    return {
        "told": answers.summary(),
        "delivered_per_second": round(delivered.counted / seconds, 1),
        "lag": asdict(delivered.lag),
        "differing": await check(on, answers, shops) + unsettled + delivered.differing,
        "ages": asdict(ages),
        # What waits in a lane that is full is overdue to nobody; so what the merchants saw is judged as well.
        "flat": is_flat(ages.payout) and is_flat(ages.callback) and delivered.flat,
        "costs": asdict(costs),
    }


def summarize(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians of the turns of one case, and what was wrong in any of them.

    `cost_ms`: processor time of one payout, all processes together. `growing`: in how many turns something fell behind.
    """
    return {
        "name": name,
        "accepted_per_second": median(run["told"]["per_second"] for run in runs),
        "delivered_per_second": median(run["delivered_per_second"] for run in runs),
        **{figure: median(run["told"][figure] for run in runs) for figure in ("p50_ms", "p99_ms", "p99.9_ms")},
        "lag": {figure: median(run["lag"][figure] for run in runs) for figure in ("p50", "p99", "max")},
        "cost_ms": median(sum(run["costs"]["cpu_ms"].values()) / 1000 for run in runs),
        "failed": sum(run["told"]["failed"] for run in runs),
        "differing": sum(run["differing"] for run in runs),
        "growing": sum(not run["flat"] for run in runs),
        "turns": list(runs),
    }


@asynccontextmanager
async def watching_ages(on: Scene) -> AsyncIterator[Ages]:
    """Look at the ages of what is due, again and again, as long as the context lasts."""
    ages, started = Ages(), time.monotonic()

    async def look() -> None:
        while True:
            found = await in_transaction(on.ops, find_ages)
            ages.at.append(round(time.monotonic() - started, 1))
            ages.payout.append(round(found.payout_seconds, 3))
            ages.callback.append(round(found.callback_seconds, 3))
            await asyncio.sleep(_SAMPLE_SECONDS)

    looking = asyncio.create_task(look())
    try:
        yield ages
    finally:
        await end_watch(looking)


def is_flat(ages: Sequence[float]) -> bool:
    """Whether nothing falls behind: in the last third they are hardly above those of the third before, or short anyway."""
    third = len(ages) // 3
    if not third:
        return max(ages, default=0.0) <= _AGE_SECONDS
    before, after = median(ages[third : 2 * third]), median(ages[2 * third :])
    return after <= max(_AGE_SECONDS, before * _GROWTH_MAX)


async def _until_quiet(on: Scene, count: int, progress: Progress) -> None:
    """Wait until nothing is due any more; of so many payouts the merchants have heard then, or never will."""
    waiting = progress.add_task("callbacks", total=count)
    deadline = time.monotonic() + _DEADLINE_SECONDS
    query = text("SELECT EXISTS (SELECT 1 FROM callback_due) OR EXISTS (SELECT 1 FROM payout_due)")
    while await in_transaction(on.ops, lambda tx: tx.scalar(query)):
        assert time.monotonic() < deadline, "what is left would disturb the next run"
        progress.update(waiting, completed=(await on.ask_receiver("totals"))["received"])
        await asyncio.sleep(_POLL_SECONDS)
    progress.remove_task(waiting)


async def _until_delivered(on: Scene, of_run: Mapping[str, Any], count: int, progress: Progress) -> None:
    """Wait until so many callbacks of a run are delivered, whatever others have waiting."""
    waiting = progress.add_task("callbacks", total=count)
    deadline = time.monotonic() + _DEADLINE_SECONDS
    query = text(
        "SELECT count(*) FROM payouts p JOIN callbacks c ON c.payout_id = p.id AND c.shop_id = p.shop_id"
        f" WHERE {IN_RUN} AND c.state = 'delivered'"
    )
    while (delivered := await in_transaction(on.superuser, lambda tx: tx.scalar(query, of_run)) or 0) < count:
        if time.monotonic() > deadline:
            break
        progress.update(waiting, completed=delivered)
        await asyncio.sleep(_POLL_SECONDS)
    progress.remove_task(waiting)


async def lay_beside(
    tx: Tx, answers: Answers, of_run: Mapping[str, Any], arrivals: Mapping[str, Sequence[float]], *, alone: bool
) -> Delivered:
    """What the merchants saw, beside what is recorded: each callback delivered, with as many attempts as they counted."""
    rows = await tx.execute(
        text(
            "SELECT p.external_id, c.event_id, c.state, (SELECT count(*) FROM callback_attempts t"
            "   WHERE t.event_id = c.event_id AND t.shop_id = c.shop_id) AS attempts"
            f" FROM payouts p LEFT JOIN callbacks c ON c.payout_id = p.id AND c.shop_id = p.shop_id WHERE {IN_RUN}"
        ),
        of_run,
    )
    lags, counted, differing, seen = list[tuple[float, float]](), 0, 0, set[str]()
    for row in rows:
        webhook_id = "" if row.event_id is None else render_id(EVENT, row.event_id)
        times = arrivals.get(webhook_id, [])
        seen.add(webhook_id)
        differing += row.state != "delivered" or len(times) != row.attempts
        if times:
            counted += answers.began <= min(times) < answers.ended
            # 0: accepted, and the answer never came; then nothing was promised that the callback could be late for.
            done = answers.done[int(row.external_id.removeprefix(answers.plan.prefix))]
            if done:
                lags.append((done, min(times) - done))
    in_order = [lag for _, lag in sorted(lags)]
    differing += len(arrivals.keys() - seen) if alone else 0
    return Delivered(counted, spread_of(in_order), is_flat(in_order), differing)


def _goals(case: dict[str, Any]) -> list[Goal]:
    name = case["name"]
    # As with all figures the median counts: most turns must be flat.
    growing_max = (len(case["turns"]) - 1) // 2
    return [
        Goal(f"{name}: accepted", case["accepted_per_second"], "per second", least=GOAL_PER_SECOND),
        Goal(f"{name}: delivered", case["delivered_per_second"], "per second", least=GOAL_PER_SECOND),
        Goal(f"{name}: refused or without an answer", case["failed"], "", most=0),
        Goal(f"{name}: lost, doubled or wrong", case["differing"], "", most=0),
        Goal(
            f"{name}: turns of {len(case['turns'])} in which ages or lags grow", case["growing"], "", most=growing_max
        ),
    ]


def render(found: dict[str, Any]) -> Sequence[Table]:
    """Rates, latencies and ages, a row for each case; the goals; what it cost."""
    title = (
        f"{found['wanted_per_second']:,} payouts per second for {found['seconds']:g} s,"
        f" {counted(found['merchants'], 'merchant')}"
    )
    rates = Table(
        "", "accepted/s", "delivered/s", "of each turn", "accept p50", "p99", "p99.9 ms", "records", title=title
    )
    ages = Table(
        "", "201 to callback p50", "p99", "max", "oldest payout p50", "max", "oldest callback p50", "max", "",
        title="seconds",
    )  # fmt: skip
    for case in found["cases"]:
        lag, turns = case["lag"], case["turns"]
        rates.add_row(
            case["name"],
            f"{case['accepted_per_second']:,.0f}",
            f"{case['delivered_per_second']:,.0f}",
            " ".join(f"{run['delivered_per_second']:,.0f}" for run in turns),
            *(f"{case[name]:.1f}" for name in ("p50_ms", "p99_ms", "p99.9_ms")),
            ("nothing lost" if not case["differing"] else f"{case['differing']:,} differ")
            + (f", {case['failed']:,} refused or without an answer" if case["failed"] else ""),
        )
        ages.add_row(
            case["name"],
            *(f"{lag[name]:.3f}" for name in ("p50", "p99", "max")),
            *(
                f"{figure:.2f}"
                for kind in ("payout", "callback")
                for figure in (
                    median(median(run["ages"][kind] or [0.0]) for run in turns),
                    median(max(run["ages"][kind], default=0.0) for run in turns),
                )
            ),
            "flat" if not case["growing"] else f"GROW in {case['growing']} of {len(turns)}",
        )
    rates.caption = f"the rules of the ledger: {', '.join(found['broken']) or 'all hold'}"
    return rates, ages, *render_goals(found["goals"]), render_costs(_costs(found))


def draw(found: dict[str, Any]) -> Sequence[Chart]:
    """The rates, the ages of the last turn, and what a thousand payouts cost."""
    bars = [
        Bar(f"{what}, {case['name']}", case[f"{what}_per_second"], goal=GOAL_PER_SECOND)
        for case in found["cases"]
        for what in ("accepted", "delivered")
    ]
    ages = {
        f"{kind}, {case['name']}": list(zip(ages["at"], ages[kind], strict=True))
        for case in found["cases"]
        for ages in [case["turns"][-1]["ages"]]
        for kind in ("payout", "callback")
    }
    return (
        Bars("the whole way, per second (red: at least)", bars),
        Lines("age of the oldest due, seconds", ages),
        draw_costs("the whole way", _costs(found)),
    )


def _costs(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {case["name"]: case["turns"][-1]["costs"] for case in found["cases"]}
