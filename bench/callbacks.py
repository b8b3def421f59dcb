"""Delivered and recorded callbacks per second, to one merchant and to many, by one process of the product and by one for each
of the machine's processors, beside a client that does nothing else.

The two take turns, so that both meet the same machine. Both are counted by the merchants, from the first request that came:
the baseline until its last one, the product until the last one is recorded as well.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from statistics import median
from typing import Any, Final
from uuid import UUID

from rich.progress import Progress
from rich.table import Table
from sqlalchemy import text

from bench.figures import counted
from bench.filling import Shop, add_shops, fill
from bench.picture import Bar, Bars, Chart
from bench.scene import Scene, numbered
from common.db.engine import in_transaction
from common.domain.ids import EVENT, render_id
from ops import database
from ops.state import CHECKOUT

MERCHANTS: Final = 500
WORKERS: Final = (1, 2)
GOAL: Final = 0.35
# Asking costs what is measured: seldom while it goes on, often at its end.
_POLL_SECONDS: Final = 0.2
_POLL_AT_END_SECONDS: Final = 0.02
_DEADLINE_SECONDS: Final = 120.0
_WORKERS: Final = "workers"


@dataclass(frozen=True, slots=True)
class Run:
    """One turn: the baseline, then the product. Rates are callbacks per second, costs microseconds of processor for each."""

    bare: float
    ours: float
    bare_cost: float
    costs: dict[str, float]
    differing: int


@dataclass(slots=True)
class Outcome:
    """All turns of one case. `differing`: callbacks whose record and whose merchant do not agree, of all turns."""

    merchants: int
    workers: int
    callbacks: int
    carrier: str
    runs: list[Run] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The medians, and their ratio."""
        bare, ours = median(run.bare for run in self.runs), median(run.ours for run in self.runs)
        return {
            "bare_per_second": round(bare),
            "ours_per_second": round(ours),
            "ratio": round(ours / bare, 3),
            "ratios": [round(run.ours / run.bare, 3) for run in self.runs],
            "bare_cost_us": round(median(run.bare_cost for run in self.runs), 1),
            "costs_us": {name: median(run.costs[name] for run in self.runs) for name in self.runs[0].costs},
            "differing": sum(run.differing for run in self.runs),
        }


async def measure(
    on: Scene, *, callbacks: int, turns: int, carriers: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Each case with each carrier, turn about."""
    shops = {
        merchants: await add_shops(on, f"of-{merchants}", [f"{on.origin(n)}/ok/callbacks" for n in range(merchants)])
        for merchants in (1, MERCHANTS)
    }
    outcomes = [
        Outcome(merchants, workers, callbacks // merchants * merchants, carrier)
        for merchants, workers, carrier in product(shops, WORKERS, carriers)
    ]
    done = progress.add_task("turns", total=turns * len(outcomes))
    for _ in range(turns):
        for outcome in outcomes:
            outcome.runs.append(await _take_turn(on, shops[outcome.merchants], outcome, progress))
            progress.advance(done)
    return {"goal": GOAL, "cases": [{**asdict(outcome), **outcome.summary()} for outcome in outcomes]}


async def _take_turn(on: Scene, shops: Sequence[Shop], outcome: Outcome, progress: Progress) -> Run:
    callbacks = outcome.callbacks
    filling = progress.add_task(f"callbacks of {len(shops)}", total=callbacks)
    event_ids = await fill(on, shops, callbacks // len(shops), lambda count: progress.update(filling, completed=count))
    progress.remove_task(filling)
    await on.maintain()
    await on.forget()
    bare, bare_cost = await _post_bare(on, event_ids)
    await on.forget()
    names = numbered("callbacks", outcome.workers)
    async with on.running(*names, carrier=outcome.carrier):
        before = await on.usage()
        ours = await _until_recorded(on, len(event_ids))
        costs = (await on.usage()).since(before, callbacks).cpu_us
    costs[_WORKERS] = sum(costs[name] for name in names)
    return Run(bare, ours, bare_cost, costs, await _count_differing(on, event_ids))


async def _post_bare(on: Scene, event_ids: Sequence[UUID]) -> tuple[float, float]:
    """What the bare client does with the very same callbacks: per second, and in microseconds of processor for each."""
    rows = await in_transaction(
        on.ops,
        lambda tx: tx.execute(
            text(
                "SELECT e.id, c.url, e.body FROM unnest(CAST(:ids AS uuid[])) WITH ORDINALITY AS w (id, n)"
                " JOIN events e USING (id) JOIN callbacks c ON c.event_id = e.id ORDER BY w.n"
            ),
            {"ids": list(event_ids)},
        ),
    )
    file = on.folder / "requests"
    file.write_bytes(b"".join(b"%s\t%s\t%s\n" % (str(row.id).encode(), row.url.encode(), row.body) for row in rows))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.bare", str(file)),
        *("--concurrency", str(on.settings.callback_concurrency)),
        stdout=asyncio.subprocess.PIPE,
        cwd=CHECKOUT,
        env=on.environment,
    )
    printed, _ = await process.communicate()
    told, totals = json.loads(printed), await on.ask_receiver("totals")
    assert told["delivered"] == totals["received"] == len(event_ids), "the baseline delivers everything once"
    rate = totals["received"] / (totals["last"] - totals["first"])
    return rate, round(told["cpu_seconds"] / len(event_ids) * 1e6, 1)


async def _until_recorded(on: Scene, callbacks: int) -> float:
    """Wait until nothing is due any more; the rate since the first callback came."""
    deadline = time.time() + _DEADLINE_SECONDS
    while (totals := await on.ask_receiver("totals"))["received"] < callbacks and time.time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(_POLL_SECONDS)
    while await _anything_due(on) and time.time() < deadline:  # noqa: ASYNC110 - other processes work
        await asyncio.sleep(_POLL_AT_END_SECONDS)
    return callbacks / (time.time() - float(totals["first"]))


async def _anything_due(on: Scene) -> bool:
    found = await in_transaction(on.ops, lambda tx: tx.scalar(text("SELECT EXISTS (SELECT 1 FROM callback_due)")))
    return bool(found)


async def _count_differing(on: Scene, event_ids: Sequence[UUID]) -> int:
    """How many callbacks are not delivered, or were attempted more or less often than their merchant saw them."""
    rows = await in_transaction(
        on.ops,
        lambda tx: tx.execute(
            text(
                "SELECT c.event_id, c.state, count(a.attempt_no) AS attempts FROM callbacks c"
                " LEFT JOIN callback_attempts a ON a.event_id = c.event_id AND a.shop_id = c.shop_id"
                " WHERE c.event_id = ANY (CAST(:ids AS uuid[])) GROUP BY c.event_id, c.state"
            ),
            {"ids": list(event_ids)},
        ),
    )
    arrivals = await on.ask_receiver("arrivals")
    recorded = {render_id(EVENT, row.event_id): row.attempts for row in rows if row.state == "delivered"}
    seen = {webhook_id: len(times) for webhook_id, times in arrivals.items()}
    differing = [key for key in recorded.keys() | seen.keys() if recorded.get(key) != seen.get(key)]
    return len(differing) + len(event_ids) - len(recorded)


def _name(case: dict[str, Any]) -> str:
    workers = case["workers"]
    return f"{case['callbacks']:,} to {case['merchants']:,}, {counted(workers, 'worker')}, {case['carrier']}"


def render(found: dict[str, Any]) -> Sequence[Table]:
    """Rates, then what they cost; a row for each case."""
    title = f"delivered and recorded callbacks per second; the goal is {found['goal']:g} of the bare client"
    rates = Table("callbacks", "bare client", "ours", "ratio", "of each turn", "records", title=title)
    costs = Table(
        "callbacks", "bare client", "workers", "ratio", "database", title="processor time of each, microseconds"
    )
    for case in found["cases"]:
        name, ratios, cost = _name(case), case["ratios"], case["costs_us"]
        rates.add_row(
            name,
            f"{case['bare_per_second']:,}",
            f"{case['ours_per_second']:,}",
            f"{case['ratio']:.2f}",
            " ".join(f"{ratio:.2f}" for ratio in ratios),
            "as received" if not case["differing"] else f"{case['differing']:,} differ",
        )
        workers = cost[_WORKERS]
        figures = (case["bare_cost_us"], workers, case["bare_cost_us"] / workers, cost[database.NAME])
        costs.add_row(name, *(f"{figure:.{2 if figure < 1 else 0}f}" for figure in figures))
    return rates, costs


def draw(found: dict[str, Any]) -> Sequence[Chart]:
    """The rates beside the bare client."""
    bars = [
        bar
        for case in found["cases"]
        for name in (_name(case),)
        for bar in (
            Bar(f"{name}, bare client", case["bare_per_second"], ours=False),
            Bar(name, case["ours_per_second"], goal=found["goal"] * case["bare_per_second"]),
        )
    ]
    return (Bars("callbacks delivered and recorded per second (red: at least)", bars),)
