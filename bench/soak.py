"""Whether the worker stays as it is: memory, open files and tables, while some endpoints fail and some hang, for minutes."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import psutil
from rich.progress import Progress
from rich.table import Table
from sqlalchemy import text

from bench.figures import trend_of
from bench.filling import add_shops, queue_payouts, tell_steadily
from bench.picture import Chart, Lines
from bench.scene import Scene, end_watch
from common.db.engine import in_transaction

SHOPS: Final = 100
FAILING, HANGING = 10, 5
_SAMPLE_SECONDS: Final = 5.0
_SAMPLES_MIN: Final = 3

# Of the worker itself: only these must be flat. The tables grow with the callbacks that wait for their next attempt.
_MUST_BE_FLAT: Final = ("rss_bytes", "open_files")

_SIZES: Final = text(
    """
    SELECT 'size of ' || c.relname AS name, pg_relation_size(c.oid) AS value
      FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid
     WHERE 'callback_due'::regclass IN (c.oid, i.indrelid)
    UNION ALL
    SELECT 'dead rows of callback_due', n_dead_tup FROM pg_stat_user_tables WHERE relname = 'callback_due'
    UNION ALL
    SELECT 'rows of callback_due', count(*) FROM callback_due
    """
)


async def measure(on: Scene, *, minutes: float, rate: int, progress: Progress) -> dict[str, Any]:
    """Tell of payouts at a steady rate, for that long, and look every few seconds."""
    kinds = ["fail"] * FAILING + ["hang"] * HANGING + ["ok"] * (SHOPS - FAILING - HANGING)
    shops = await add_shops(on, "soak", [f"{on.origin(n)}/{kind}/callbacks" for n, kind in enumerate(kinds)])
    payout_ids = await queue_payouts(on, shops, -(-round(minutes * 60 * rate) // SHOPS))
    await on.maintain()
    samples: dict[str, list[tuple[float, float]]] = {}
    telling = progress.add_task("told", total=len(payout_ids))
    async with on.worker() as worker:
        looking = asyncio.create_task(_look(on, worker, samples))
        started = time.time()
        event_ids = await tell_steadily(on, payout_ids, rate, lambda count: progress.update(telling, completed=count))
        seconds = time.time() - started
        while not looking.done() and min((len(found) for found in samples.values()), default=0) < _SAMPLES_MIN:
            await asyncio.wait([looking], timeout=_SAMPLE_SECONDS)
        await end_watch(looking)
        totals = await on.ask_receiver("totals")
    return {
        "seconds": round(seconds),
        "told": len(event_ids),
        "told_per_second": round(len(event_ids) / seconds, 1),
        "received": totals["received"],
        "trends": {name: asdict(trend_of(found)) for name, found in samples.items()},
        "must_be_flat": list(_MUST_BE_FLAT),
        "samples": samples,
    }


async def _look(on: Scene, worker: psutil.Process, samples: dict[str, list[tuple[float, float]]]) -> None:
    """Look at the worker and at the table of what is due; for ever."""
    while True:
        now = time.monotonic()
        rows = await in_transaction(on.superuser, lambda tx: tx.execute(_SIZES))
        found = {
            "rss_bytes": worker.memory_info().rss,
            "open_files": worker.num_fds(),
            **{row.name: row.value for row in rows},
        }
        for name, value in found.items():
            samples.setdefault(name, []).append((now, float(value)))
        await asyncio.sleep(_SAMPLE_SECONDS)


def render(found: dict[str, Any]) -> Sequence[Table]:
    """A row for each thing that was looked at."""
    title = f"{found['told']:,} told in {found['seconds']:,} s, {found['received']:,} received"
    table = Table("", "first", "last", "max", "slope per hour", "", title=title)
    for name, trend in found["trends"].items():
        verdict = "flat" if trend["flat"] else "GROWS" if name in found["must_be_flat"] else "grows"
        values = [readable(name, trend[key]) for key in ("first", "last", "max", "slope_per_hour")]
        table.add_row(name.replace("_", " "), *values, verdict)
    return (table,)


def readable(name: str, value: float) -> str:
    """A value as people read it; those of sizes and memory are bytes."""
    in_bytes = name.endswith("_bytes") or name.startswith(("size of", "memory of"))
    return f"{value / 2**20:,.1f} MiB" if in_bytes else f"{value:,.0f}"


def draw(found: dict[str, Any]) -> Sequence[Chart]:
    """The memory of the worker."""
    return (Lines("memory, MiB", {"worker": [(at, size / 2**20) for at, size in found["samples"]["rss_bytes"]]}),)
