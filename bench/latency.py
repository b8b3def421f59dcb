"""How long an accept takes at a given rate: an open loop, one merchant, beside a handler that only answers.

Arrivals are a Poisson process; each latency counts from when its request was meant to be sent, so nothing that stalls can
hide it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any, Final

from rich.progress import Progress
from rich.table import Table

from bench import accept, baseline
from bench.accept import BARE, render_costs
from bench.answers import check, send
from bench.filling import add_senders, add_shops
from bench.goals import Goal, render_goals
from bench.load import Plan, Sender
from bench.picture import Bar, Bars, Chart
from bench.scene import Scene
from common.db.invariants import verify

# Beyond what any rate needs that can be kept up; what finds none free waits in the generator, and that counts.
CONNECTIONS: Final = 128
GATEWAYS: Final = 2
# At most these milliseconds for 99 of 100, by the rate.
GOALS_MS: Final = {500: 15.0, 2000: 30.0}


async def measure(
    on: Scene, *, seconds: float, rates: Sequence[int], carriers: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Each rate: the bare handler, then ours with each carrier."""
    (shop,) = shops = await add_shops(on, "one", [f"{on.origin(0)}/ok/callbacks"])
    senders = await add_senders(on, shops)
    names = [f"gateway-{number}" for number in range(1, GATEWAYS + 1)]
    runs, goals = list[dict[str, Any]](), list[Goal]()
    done = progress.add_task("runs", total=len(rates) * (1 + len(carriers)))
    for place, (rate, who) in enumerate(product(rates, (BARE, *carriers))):
        prefix = f"latency-{place}-"
        await on.maintain()
        if who == BARE:
            async with baseline.bare_handler(on) as port:
                plan = _plan(port, baseline.PATH, prefix, senders, rate, seconds)
                told = (await send(plan, progress, f"{BARE}, {rate:,}/s")).summary()
            runs.append({"who": who, "rate": rate, "told": told, "differing": 0})
        else:
            async with on.running(*names, carrier=who):
                before = await on.usage()
                plan = _plan(on.gateway_port, accept.PATH, prefix, senders, rate, seconds)
                answers = await send(plan, progress, f"{who}, {rate:,}/s")
                costs = (await on.usage()).since(before, len(answers.statuses))
            told, differing = answers.summary(), await check(on, answers, [shop])
            runs.append({"who": who, "rate": rate, "told": told, "differing": differing, "costs": asdict(costs)})
            if rate in GOALS_MS:
                goals.append(Goal(f"{who}, {rate:,}/s: p99", told["p99_ms"], "ms", most=GOALS_MS[rate]))
        progress.advance(done)
    return {
        "seconds": seconds,
        "gateways": GATEWAYS,
        "runs": runs,
        "goals": [goal.told() for goal in goals],
        "broken": [finding.rule.name for finding in await verify(on.ops) if finding.count],
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
        told = run["told"]
        table.add_row(
            f"{told['per_second']:,.0f} of {run['rate']:,}",
            run["who"],
            *(f"{told[name]:.1f}" for name in ("p50_ms", "p99_ms", "p99.9_ms", "max_ms")),
            f"{told['generator']['late_p99_ms']:.1f}",
            f"{told['failed']:,}",
            "as claimed" if not run["differing"] else f"{run['differing']:,} differ",
        )
    table.caption = (
        f"late: the generator itself, p99; the rules of the ledger: {', '.join(found['broken']) or 'all hold'}"
    )
    costs = {f"{run['rate']:,}/s, {run['who']}": run["costs"] for run in found["runs"] if "costs" in run}
    return table, *render_goals(found["goals"]), render_costs(costs)


def draw(found: dict[str, Any]) -> Sequence[Chart]:
    """The 99th percentile of each run."""
    bars = [
        Bar(
            f"{run['rate']:,}/s, {run['who']}",
            run["told"]["p99_ms"],
            ours=run["who"] != BARE,
            goal=None if run["who"] == BARE else GOALS_MS.get(run["rate"]),
        )
        for run in found["runs"]
    ]
    return (Bars("accept p99 from the intended start, milliseconds (red: at most)", bars),)
