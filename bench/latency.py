"""How long an accept takes at a given rate: an open loop, one merchant, beside a handler that only answers.

Arrivals are a Poisson process; each latency counts from when its request was meant to be sent, so nothing that stalls can
hide it. Of each figure the median of the turns counts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from typing import Any, Final

from rich.progress import Progress
from rich.table import Table

from bench import accept, baseline
from bench.accept import BARE, render_costs
from bench.answers import check, send
from bench.filling import Shop, add_senders, add_shops
from bench.goals import Goal, render_goals
from bench.load import Plan, Sender
from bench.picture import Bar, Bars, Chart
from bench.scene import Scene, numbered
from common.db.invariants import verify

# Beyond what any rate needs that can be kept up; what finds none free waits in the generator, and that counts.
CONNECTIONS: Final = 128
GATEWAYS: Final = 2
# At most these milliseconds for 99 of 100, by the rate.
GOALS_MS: Final = {500: 15.0, 2000: 30.0}


@dataclass(frozen=True, slots=True)
class Run:
    """One turn of one rate: what the generator tells, and how many answers and payouts do not bear each other out.

    `costs`: None for the bare handler.
    """

    told: dict[str, Any]
    differing: int = 0
    costs: dict[str, Any] | None = None


async def measure(
    on: Scene, *, seconds: float, rates: Sequence[int], turns: int, carriers: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Each rate: the bare handler, then ours with each carrier; turn about. Nobody settles what the turns before have left."""
    (shop,) = shops = await add_shops(on, "one", [f"{on.origin(0)}/ok/callbacks"])
    senders = await add_senders(on, shops)
    runs: dict[tuple[int, str], list[Run]] = {(rate, who): [] for rate, who in product(rates, (BARE, *carriers))}
    done = progress.add_task("runs", total=turns * len(runs))
    for turn in range(turns):
        for place, (rate, who) in enumerate(runs):
            prefix = f"latency-{turn}-{place}-"
            await on.maintain()
            if who == BARE:
                async with baseline.bare_handler(on) as port:
                    plan = _plan(port, baseline.PATH, prefix, senders, rate, seconds)
                    run = Run((await send(plan, progress, f"{BARE}, {rate:,}/s")).summary())
            else:
                run = await run_ours(on, shop, senders, who, rate, prefix, seconds=seconds, progress=progress)
            runs[rate, who].append(run)
            progress.advance(done)
    found = [{"who": who, "rate": rate, **_summary(taken)} for (rate, who), taken in runs.items()]
    goals = [
        Goal(f"{run['who']}, {run['rate']:,}/s: p99", run["p99_ms"], "ms", most=GOALS_MS[run["rate"]])
        for run in found
        if run["who"] != BARE and run["rate"] in GOALS_MS
    ]
    return {
        "seconds": seconds,
        "gateways": GATEWAYS,
        "runs": found,
        "goals": [goal.told() for goal in goals],
        "broken": [finding.rule.name for finding in await verify(on.ops) if finding.count],
    }


async def run_ours(
    on: Scene,
    shop: Shop,
    senders: list[Sender],
    carrier: str,
    rate: int,
    prefix: str,
    *,
    seconds: float,
    progress: Progress,
) -> Run:
    """The product, with two gateways and nobody who settles."""
    async with on.running(*numbered("gateway", GATEWAYS), carrier=carrier):
        before = await on.usage()
        plan = _plan(on.gateway_port, accept.PATH, prefix, senders, rate, seconds)
        answers = await send(plan, progress, f"{carrier}, {rate:,}/s")
        costs = (await on.usage()).since(before, len(answers.statuses))
    return Run(answers.summary(), await check(on, answers, [shop]), asdict(costs))


def _summary(runs: Sequence[Run]) -> dict[str, Any]:
    figures = ("per_second", "p50_ms", "p99_ms", "p99.9_ms", "max_ms")
    return {
        **{name: round(median(run.told[name] for run in runs), 2) for name in figures},
        "late_ms": median(run.told["generator"]["late_p99_ms"] for run in runs),
        "failed": sum(run.told["failed"] for run in runs),
        "differing": sum(run.differing for run in runs),
        "costs": runs[-1].costs,
        "turns": [run.told for run in runs],
    }


def _plan(port: int, path: str, prefix: str, senders: list[Sender], rate: int, seconds: float) -> Plan:
    return Plan(
        port=port,
        path=path,
        prefix=prefix,
        senders=senders,
        connections=CONNECTIONS,
        seconds=seconds,
        warm_seconds=2.0,
        rate=float(rate),
    )


def render(found: dict[str, Any]) -> Sequence[Table]:
    """Latencies, a row for each run; the goals; what ours cost."""
    title = f"milliseconds from the intended start to the whole answer, one merchant, {found['gateways']} gateways"
    columns = ("p50", "p99", "p99.9", "max", "late", "failed", "records")
    table = Table("per second", "", *columns, title=title)
    for run in found["runs"]:
        table.add_row(
            f"{run['per_second']:,.0f} of {run['rate']:,}",
            run["who"],
            *(f"{run[name]:.1f}" for name in ("p50_ms", "p99_ms", "p99.9_ms", "max_ms", "late_ms")),
            f"{run['failed']:,}",
            "as claimed" if not run["differing"] else f"{run['differing']:,} differ",
        )
    table.caption = (
        f"late: the generator itself, p99; the rules of the ledger: {', '.join(found['broken']) or 'all hold'}"
    )
    costs = {f"{run['rate']:,}/s, {run['who']}": run["costs"] for run in found["runs"] if run["costs"]}
    return table, *render_goals(found["goals"]), render_costs(costs)


def draw(found: dict[str, Any]) -> Sequence[Chart]:
    """The 99th percentile of each run."""
    bars = [
        Bar(
            f"{run['rate']:,}/s, {run['who']}",
            run["p99_ms"],
            ours=run["who"] != BARE,
            goal=None if run["who"] == BARE else GOALS_MS.get(run["rate"]),
        )
        for run in found["runs"]
    ]
    return (Bars("accept p99 from the intended start, milliseconds (red: at most)", bars),)
