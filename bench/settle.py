"""How many payouts are settled in a second: so many wait, then a worker comes, or two.

They were accepted by the product's own gateways. The time counts from the first attempt that was written down until the money
of the last one is captured: claim, call to the sandbox rail, record, event and callback row are all in it.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from statistics import median
from typing import Any, Final

from rich.progress import Progress
from rich.table import Table
from sqlalchemy import text

from bench import accept, baseline
from bench.accept import MANY, ONE, SQL_BATCHED, Crowd, draw_costs, render_costs
from bench.answers import IN_RUN, check, in_run, send
from bench.figures import counted
from bench.filling import Shop
from bench.goals import Goal, render_goals
from bench.latency import GATEWAYS
from bench.load import Plan
from bench.picture import Bar, Bars, Chart
from bench.scene import Scene, numbered
from common.db.engine import Tx, in_transaction
from common.db.invariants import verify

GOAL_PER_SECOND: Final = 8000.0
WORKER: Final = "settle"
WORKERS: Final = (1, 2)
_FILL_SECONDS_MAX: Final = 60.0
_BASELINE_SECONDS: Final = 5.0
_DEADLINE_SECONDS: Final = 300.0
_POLL_SECONDS: Final = 0.05


@dataclass(slots=True)
class Outcome:
    """All turns of one case. `differing`: payouts that were not settled whole and once, or answers that nothing bears out."""

    name: str
    payouts: int
    workers: int = 1
    per_second: list[float] = field(default_factory=list)
    differing: int = 0
    costs: dict[str, Any] = field(default_factory=dict)


async def measure(
    on: Scene, *, payouts: int, turns: int, carriers: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """One merchant, and many; each with one worker and with two, with each carrier, turn about."""
    cases = [
        (crowd, carrier, Outcome(f"{crowd.name}, {counted(workers, 'worker')}, {carrier}", payouts, workers))
        for crowd, workers, carrier in product(await accept.gather_crowds(on), WORKERS, carriers)
        if crowd.name in (ONE, MANY)
    ]
    ceiling: list[float] = []
    done = progress.add_task("turns", total=turns * (len(cases) + 1))
    for turn in range(turns):
        await baseline.prepare(on)
        run = await baseline.run_sql(
            on, "batched.sql", shops=1, batch=baseline.BATCH, seconds=min(_BASELINE_SECONDS, payouts / 1000)
        )
        ceiling.append(run.per_second)
        progress.advance(done)
        for place, (crowd, carrier, outcome) in enumerate(cases):
            await take_turn(on, crowd, carrier, f"settle-{turn}-{place}-", outcome, progress)
            progress.advance(done)
    found = [{**asdict(outcome), "median": round(median(outcome.per_second), 1)} for _, _, outcome in cases]
    goals = [Goal(f"settled: {c['name']}", c["median"], "per second", least=GOAL_PER_SECOND).told() for c in found]
    return {
        "ceiling": {"name": SQL_BATCHED, "per_second": ceiling},
        "cases": found,
        "goals": goals,
        "broken": [finding.rule.name for finding in await verify(on.ops) if finding.count],
    }


async def take_turn(on: Scene, crowd: Crowd, carrier: str, prefix: str, outcome: Outcome, progress: Progress) -> None:
    """Have payouts wait, let the workers come, and add to the outcome how fast it was and what is not as it should be."""
    await on.maintain()
    async with on.running(*numbered("gateway", GATEWAYS), carrier=carrier):
        plan = Plan(
            port=on.gateway_port,
            path=accept.PATH,
            prefix=prefix,
            senders=crowd.senders,
            connections=accept.CONNECTIONS,
            seconds=_FILL_SECONDS_MAX,
            count=outcome.payouts,
        )
        answers = await send(plan, progress, f"filling for {outcome.name}")
    outcome.differing += await check(on, answers, crowd.shops)
    await on.vacuum()
    waiting = len(answers.statuses) - answers.failed
    before = await _count_entries(on, crowd.shops)
    settling = progress.add_task(f"settling, {outcome.name}", total=waiting)
    async with on.running(*numbered(WORKER, outcome.workers), carrier=carrier):
        usage, early = await on.usage(), await _count_entries(on, crowd.shops) - before
        deadline = time.time() + _DEADLINE_SECONDS
        while (settled := await _count_entries(on, crowd.shops) - before) < waiting and time.time() < deadline:
            progress.update(settling, completed=settled)
            await asyncio.sleep(_POLL_SECONDS)
        ended = time.time()
        outcome.costs = asdict((await on.usage()).since(usage, max(1, settled - early)))
    progress.remove_task(settling)
    of_run = in_run(crowd.shops, prefix)
    began = await in_transaction(on.superuser, lambda tx: _find_first_attempt(tx, of_run))
    outcome.per_second.append(round(settled / (ended - began), 1))
    outcome.differing += await in_transaction(on.superuser, lambda tx: count_unsettled(tx, of_run))


async def _count_entries(on: Scene, shops: Sequence[Shop]) -> int:
    """How many ledger entries these shops have: each capture is one more."""
    found = await in_transaction(
        on.superuser,
        lambda tx: tx.scalar(
            text("SELECT sum(last_seq)::bigint FROM accounts WHERE shop_id = ANY (CAST(:shops AS uuid[]))"),
            {"shops": [shop.id for shop in shops]},
        ),
    )
    return int(found or 0)


async def _find_first_attempt(tx: Tx, of_run: Mapping[str, Any]) -> float:
    """When the first call to the rail was written down, in Unix seconds."""
    found = await tx.scalar(
        text(
            "SELECT extract(epoch FROM min(t.started_at))::float8 FROM payouts p"
            f" JOIN payout_attempts t ON t.payout_id = p.id AND t.shop_id = p.shop_id WHERE {IN_RUN}"
        ),
        of_run,
    )
    return float(found)


async def count_unsettled(tx: Tx, of_run: Mapping[str, Any]) -> int:
    """How many payouts of a run are not paid once: by one attempt and one booking of the rail, with one capture of the
    amount and one event, and nothing due any more.
    """
    found = await tx.scalar(
        text(
            f"""
            SELECT count(*) FROM payouts p WHERE {IN_RUN} AND NOT (
              p.state = 'success'
              AND (SELECT count(*) FROM entries e WHERE e.payout_id = p.id AND e.shop_id = p.shop_id
                      AND e.kind = 'capture' AND e.amount_minor = p.amount_minor) = 1
              AND (SELECT count(*) FROM payout_attempts t WHERE t.payout_id = p.id AND t.shop_id = p.shop_id) = 1
              AND (SELECT count(*) FROM events v WHERE v.payout_id = p.id AND v.shop_id = p.shop_id) = 1
              AND (SELECT count(*) FROM payout_attempts t JOIN sandbox.payments b ON b.reference = t.reference
                    WHERE t.payout_id = p.id AND t.shop_id = p.shop_id AND t.attempt_no = 1
                      AND b.submits = 1 AND b.amount_minor = p.amount_minor) = 1
              AND NOT EXISTS (SELECT 1 FROM payout_due d WHERE d.payout_id = p.id AND d.shop_id = p.shop_id))
            """
        ),
        of_run,
    )
    return int(found)


def render(found: dict[str, Any]) -> Sequence[Table]:
    """Rates, a row for each case; the goals; what they cost."""
    table = Table("settled per second", "payouts", "median", "of each turn", "records", title="settlement drain")
    ceiling = found["ceiling"]
    rates = " ".join(f"{rate:,.0f}" for rate in ceiling["per_second"])
    table.add_row(
        f"accepting by SQL: {ceiling['name']}", "", f"{median(ceiling['per_second']):,.0f}", rates, "as claimed"
    )
    for case in found["cases"]:
        table.add_row(
            case["name"],
            f"{case['payouts']:,}",
            f"{case['median']:,.0f}",
            " ".join(f"{rate:,.0f}" for rate in case["per_second"]),
            "all settled once" if not case["differing"] else f"{case['differing']:,} differ",
        )
    table.caption = f"the rules of the ledger: {', '.join(found['broken']) or 'all hold'}"
    costs = {case["name"]: case["costs"] for case in found["cases"]}
    return table, *render_goals(found["goals"]), render_costs(costs)


def draw(found: dict[str, Any]) -> Sequence[Chart]:
    """The rates, and what a thousand payouts cost."""
    ceiling = found["ceiling"]
    bars = [
        Bar(f"by SQL, {ceiling['name']}", median(ceiling["per_second"]), ours=False),
        *(Bar(case["name"], case["median"], goal=GOAL_PER_SECOND) for case in found["cases"]),
    ]
    costs = {case["name"]: case["costs"] for case in found["cases"]}
    return Bars("settled per second (red: at least)", bars), draw_costs("settling", costs)
