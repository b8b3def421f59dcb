"""How many payouts are accepted in a second: one merchant, a few busy ones, a thousand alike; beside what could be.

Ours and the baselines take turns, so that all meet the same machine. Closed loop, the same generator and as many connections
for everything that is reached over HTTP. Of each figure the median of the turns counts; of each ratio the median of
the ratios of each turn.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any, Final

from rich.progress import Progress
from rich.table import Table

from bench import baseline
from bench.answers import Answers, check, count_differing, send
from bench.figures import counted
from bench.filling import Shop, add_senders, add_shops
from bench.goals import Goal, render_goals
from bench.load import Plan, Sender
from bench.picture import Bar, Bars, Chart
from bench.scene import RABBITMQ, Scene, numbered
from common.db.invariants import verify

PATH: Final = "/api/v1/payouts"
MERCHANTS: Final = 1000
CONNECTIONS: Final = 64
GATEWAY_COUNTS: Final = (1, 2)
_ZIPF: Final = 1.0
# Until every process knows every merchant's key and shop.
_WARM_SECONDS: Final = 2.0

ONE, ZIPF, MANY = "one merchant", f"{MERCHANTS:,}, Zipf {_ZIPF:g}", f"{MERCHANTS:,} merchants"
BARE, PLAIN = "bare handler", "plain implementation"
SQL_ONE, SQL_MANY = (
    "one transaction per payout, one account",
    f"one transaction per payout, {baseline.SHOPS:,} accounts",
)
SQL_BATCHED = f"{baseline.BATCH} payouts per transaction, one account"

# At least these, of the first as a multiple of the second.
_GOALS: Final = (
    (ONE, PLAIN, 20.0),
    (ONE, SQL_ONE, 4.0),
    (ONE, MANY, 0.95),
    (ONE, BARE, 0.4),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """What one of them did in one turn. `differing`: what it claims and what is stored do not bear each other out."""

    per_second: float
    failed: int
    differing: int
    costs: dict[str, Any] | None = None
    told: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Crowd:
    """Merchants who send payouts."""

    name: str
    shops: Sequence[Shop]
    senders: list[Sender]
    zipf: float


async def gather_crowds(on: Scene) -> list[Crowd]:
    """One merchant; many of whom the first are much busier; many alike."""
    (one,) = await add_shops(on, "one", [f"{on.origin(0)}/ok/callbacks"])
    many = await add_shops(on, "many", [f"{on.origin(n)}/ok/callbacks" for n in range(1, MERCHANTS + 1)])
    senders = await add_senders(on, many)
    return [
        Crowd(ONE, [one], await add_senders(on, [one]), 0.0),
        Crowd(ZIPF, many, senders, _ZIPF),
        Crowd(MANY, many, senders, 0.0),
    ]


def name_of(crowd: str, gateways: int, carrier: str) -> str:
    """How one of ours is called in the results."""
    return f"{crowd}, {counted(gateways, 'gateway')}, {carrier}"


async def measure(
    on: Scene, *, seconds: float, turns: int, carriers: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """All of them, turn about."""
    crowds = await gather_crowds(on)
    runs: dict[str, Callable[[str], Awaitable[Figure]]] = {
        BARE: lambda prefix: run_bare(on, crowds[0], prefix, seconds, progress),
        SQL_ONE: lambda _: _sql(on, "one_per_transaction.sql", 1, 1, seconds),
        SQL_MANY: lambda _: _sql(on, "one_per_transaction.sql", baseline.SHOPS, 1, seconds),
        SQL_BATCHED: lambda _: _sql(on, "batched.sql", 1, baseline.BATCH, seconds),
    }
    has_plain = baseline.has_plain() and RABBITMQ in on.carriers
    if has_plain:
        runs[PLAIN] = lambda prefix: _plain(on, crowds[0], prefix, seconds, progress)
    for crowd, gateways, carrier in product(crowds, GATEWAY_COUNTS, carriers):
        runs[name_of(crowd.name, gateways, carrier)] = partial(
            run_ours, on, crowd, gateways, carrier, seconds=seconds, progress=progress
        )
    figures: dict[str, list[Figure]] = {name: [] for name in runs}
    done = progress.add_task("runs", total=turns * len(runs))
    for turn in range(turns):
        await baseline.prepare(on)
        for place, (name, run) in enumerate(runs.items()):
            await on.maintain()
            figures[name].append(await run(f"accept-{turn}-{place}-"))
            progress.advance(done)
    return {
        "seconds": seconds,
        "connections": CONNECTIONS,
        "runs": {name: _summary(found) for name, found in figures.items()},
        "goals": [goal.told() for goal in _goals(figures, carriers)],
        "broken": [finding.rule.name for finding in await verify(on.ops) if finding.count],
        "plain": has_plain,
    }


async def run_ours(
    on: Scene, crowd: Crowd, gateways: int, carrier: str, prefix: str, *, seconds: float, progress: Progress
) -> Figure:
    """The product, with so many gateways and nobody who settles."""
    async with on.running(*numbered("gateway", gateways), carrier=carrier):
        before = await on.usage()
        name = name_of(crowd.name, gateways, carrier)
        answers = await send(_plan(on.gateway_port, PATH, crowd, prefix, seconds), progress, name)
        costs = (await on.usage()).since(before, len(answers.statuses))
    return _figure(answers, await check(on, answers, crowd.shops), asdict(costs))


async def run_bare(on: Scene, crowd: Crowd, prefix: str, seconds: float, progress: Progress) -> Figure:
    """A handler that answers and does nothing: what this machine can do at the moment."""
    async with baseline.bare_handler(on) as port:
        answers = await send(_plan(port, baseline.PATH, crowd, prefix, seconds), progress, BARE)
    return _figure(answers, 0)


async def _plain(on: Scene, crowd: Crowd, prefix: str, seconds: float, progress: Progress) -> Figure:
    async with baseline.plain(on) as port:
        answers = await send(_plan(port, baseline.PATH, crowd, prefix, seconds), progress, PLAIN)
    stored = await baseline.find_stored(on, prefix)
    unpublished = abs(await baseline.count_published(on) - len(stored))
    return _figure(answers, count_differing(answers, stored) + unpublished)


async def _sql(on: Scene, script: str, shops: int, batch: int, seconds: float) -> Figure:
    run = await baseline.run_sql(on, script, shops=shops, batch=batch, seconds=seconds)
    return Figure(run.per_second, 0, run.differing)


def _plan(port: int, path: str, crowd: Crowd, prefix: str, seconds: float) -> Plan:
    return Plan(
        port=port,
        path=path,
        prefix=prefix,
        senders=crowd.senders,
        connections=CONNECTIONS,
        seconds=seconds,
        warm_seconds=_WARM_SECONDS,
        zipf=crowd.zipf,
    )


def _figure(answers: Answers, differing: int, costs: dict[str, Any] | None = None) -> Figure:
    return Figure(answers.rate, answers.failed, differing, costs, answers.summary())


def _summary(figures: Sequence[Figure]) -> dict[str, Any]:
    return {
        "per_second": round(median(figure.per_second for figure in figures), 1),
        "of_each_turn": [round(figure.per_second, 1) for figure in figures],
        "failed": sum(figure.failed for figure in figures),
        "differing": sum(figure.differing for figure in figures),
        "costs": figures[-1].costs,
        "told": figures[-1].told,
    }


def _goals(figures: dict[str, list[Figure]], carriers: Sequence[str]) -> list[Goal]:
    """Each goal for each carrier and number of gateways; those whose baseline could not be had are left out."""
    goals = []
    for (ours, theirs, least), gateways, carrier in product(_GOALS, GATEWAY_COUNTS, carriers):
        name = name_of(ours, gateways, carrier)
        other = name_of(theirs, gateways, carrier) if theirs == MANY else theirs
        if other in figures:
            pairs = zip(figures[name], figures[other], strict=True)
            ratio = median(mine.per_second / its.per_second for mine, its in pairs)
            goals.append(Goal(f"{name}: of {theirs}", round(ratio, 3), "times", least=least))
    return goals


def render(found: dict[str, Any]) -> Sequence[Table]:
    """Rates, a row for each; the goals; what ours cost."""
    rates = Table(
        "accepted per second",
        "median",
        "of each turn",
        "p99 ms",
        "generator",
        "failed",
        "records",
        title=f"{found['connections']} connections, closed loop; baselines first",
    )
    for name, run in found["runs"].items():
        told = run["told"]
        rates.add_row(
            name,
            f"{run['per_second']:,.0f}",
            " ".join(f"{rate:,.0f}" for rate in run["of_each_turn"]),
            f"{told['p99_ms']:.1f}" if told else "",
            f"{told['generator']['cpu_share']:.0%}" if told else "",
            f"{run['failed']:,}",
            "as claimed" if not run["differing"] else f"{run['differing']:,} differ",
        )
    rates.caption = f"the rules of the ledger: {', '.join(found['broken']) or 'all hold'}"
    if not found["plain"]:
        rates.caption += f"; without the {PLAIN}, which needs RabbitMQ, and fastapi and uvicorn installed"
    costs = {name: run["costs"] for name, run in found["runs"].items() if run["costs"]}
    return rates, *render_goals(found["goals"]), render_costs(costs)


def draw(found: dict[str, Any]) -> Sequence[Chart]:
    """The rates, and what a thousand payouts cost."""
    runs = found["runs"]
    rates = [Bar(name, run["per_second"], ours=run["costs"] is not None) for name, run in runs.items()]
    costs = {name: run["costs"] for name, run in runs.items() if run["costs"]}
    return Bars("accepted per second, closed loop", rates), draw_costs("accepting", costs)


def draw_costs(what: str, costs: dict[str, dict[str, Any]]) -> Chart:
    """The processor time of a thousand payouts, all processes together."""
    bars = [Bar(name, sum(cost["cpu_ms"].values())) for name, cost in costs.items()]
    return Bars(f"{what}: processor time of a thousand payouts, all processes, milliseconds", bars)


def render_costs(costs: dict[str, dict[str, Any]]) -> Table:
    """What a thousand payouts cost, a row for each run and part."""
    table = Table("a thousand payouts cost", "processor, ms", "on disk, KiB", title="costs, of the last turn")
    for name, cost in costs.items():
        cpu = " · ".join(f"{part} {ms:,.0f}" for part, ms in cost["cpu_ms"].items() if ms >= 1)
        disk = " · ".join(f"{part} {size / 1024:,.0f}" for part, size in cost["disk_bytes"].items() if size >= 1024)
        table.add_row(name, cpu, disk)
    return table
