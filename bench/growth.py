"""Whether it stays as it is: under load for minutes, with millions of payouts behind it, with a million callbacks waiting.

First accepting and settling in an empty database, then the whole way and latencies behind what that has left; then minutes of
load, while memory, connections and tables are looked at; then a long history, and accepting, settling, the whole way and
latencies again; then callbacks that wait for a merchant who is dead, and accepting and settling once more, with the whole way
of another beside him.

Hours of the same machine differ more than what is looked for here. So each turn of each stage begins with the bare handler, and
what is set against the empty database is the part of its rate, the median of the turns.

The history is written by SQL, behind the triggers: payouts that were paid (a hold, a capture), payins that were refunded (a
credit, a refund), half of them of one merchant. Of what else they would have left behind (attempts, events) there is nothing,
so the rules of the ledger are asked before it comes; afterwards each measurement is checked by itself.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final
from uuid import UUID

from rich.progress import Progress, TaskID
from rich.table import Table
from sqlalchemy import text

from bench import accept, end_to_end, latency, settle
from bench.accept import BARE, MANY, ONE, Crowd
from bench.figures import counted, trend_of
from bench.filling import Shop, add_senders, add_shops, fill
from bench.picture import Bar, Bars, Chart, Lines
from bench.scene import Scene, end_watch
from bench.soak import readable
from common.db.engine import in_transaction
from common.db.invariants import verify

_GATEWAYS: Final = latency.GATEWAYS
# With which `end_to_end` gets further on two processors.
_GATEWAYS_OF_WHOLE_WAY: Final = 1
_ENTRIES_PER_PAYOUT: Final = 4
_CHUNK: Final = 50_000
_SAMPLE_SECONDS: Final = 5.0
_REST_SECONDS_MAX: Final = 900.0
_REST_POLL_SECONDS: Final = 1.0
_BESIDE_SECONDS: Final = 20.0
_BESIDE_RATE: Final = 100
_HOT: Final = ("accounts", "payout_due", "callback_due", "callback_lanes", "callback_shares")
_MUST_BE_FLAT: Final = ("memory of", "open files of", "connections")

# Sizes with all indexes: what an update leaves dead must be used again.
_LOOK: Final = text(
    """
    SELECT 'connections' AS name, count(*)::float8 AS value FROM pg_stat_activity
     WHERE application_name LIKE 'payouts-%' AND application_name <> 'payouts-bench'
    UNION ALL
    SELECT 'size of ' || relname, pg_total_relation_size(oid) FROM pg_class WHERE relname = ANY (:hot) AND relkind = 'r'
    UNION ALL
    SELECT 'dead rows of ' || relname, n_dead_tup FROM pg_stat_user_tables WHERE relname = ANY (:hot)
    """
)

_WRITE_HISTORY: Final = text(
    """
    WITH fresh AS MATERIALIZED (
      SELECT uuidv7() AS payout_id, uuidv7() AS payin_id, a.id AS account_id, a.shop_id, n, a.held_minor AS held,
             a.posted_minor - (n - 1) * 100 AS posted, a.last_seq + (n - 1) * 4 AS seq
        FROM generate_series(1, CAST(:each AS int)) AS n CROSS JOIN accounts a
       WHERE a.shop_id = ANY (CAST(:shops AS uuid[])) ORDER BY n, a.id),
    paid AS (
      INSERT INTO payouts (id, shop_id, account_id, external_id, amount_minor, currency, recipient_sealed, recipient_masked,
                           recipient_digest, state, version, provider_reference, hold_seq, resolution_seq, finalized_at)
      SELECT payout_id, shop_id, account_id, 'HISTORY-' || seq, 100, 'BDT', sha256('x'), '*******5678', sha256('x'),
             'success', 3, 'history-' || payout_id, seq + 2, seq + 3, now()
        FROM fresh),
    refunded AS (
      INSERT INTO payins (id, shop_id, account_id, external_id, amount_minor, currency, rail, reference, state, version,
                          credit_seq, refund_seq, finalized_at)
      SELECT payin_id, shop_id, account_id, 'HISTORY-' || seq, 100, 'BDT', 'sandbox', payin_id::text, 'refunded', 3,
             seq + 1, seq + 4, now()
        FROM fresh),
    moved AS (
      UPDATE accounts SET posted_minor = posted_minor - :each * 100, last_seq = last_seq + :each * 4
       WHERE shop_id = ANY (CAST(:shops AS uuid[])))
    INSERT INTO entries (account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, held_delta_minor,
                         posted_after_minor, held_after_minor, payout_id, payin_id)
    SELECT f.account_id, f.seq + e.place, f.shop_id, e.kind, e.contra, 100, e.posted, e.held, f.posted + e.posted_after,
           f.held + e.held_after, CASE WHEN e.of_payout THEN f.payout_id END, CASE WHEN NOT e.of_payout THEN f.payin_id END
      FROM fresh f CROSS JOIN (VALUES
        (1, 'payin', 'provider_clearing', 100, 0, 100, 0, false),
        (2, 'hold', 'holds', 0, 100, 100, 100, true),
        (3, 'capture', 'provider_clearing', -100, -100, 0, 0, true),
        (4, 'payin_refund', 'provider_clearing', -100, 0, -100, 0, false))
        AS e (place, kind, contra, posted, held, posted_after, held_after, of_payout)
     ORDER BY f.n, f.account_id, e.place
    """
)


async def write_history(on: Scene, shops: Sequence[Shop], payouts: int, progress: Progress) -> int:
    """About so many payouts and payins that are over, evenly of these shops; returns how many payouts."""
    writing = progress.add_task(f"history of {len(shops):,}", total=payouts)
    written, each = 0, max(1, min(_CHUNK, payouts) // len(shops))
    while written < payouts:
        async with on.superuser.begin() as tx:
            await tx.execute(text("SET LOCAL session_replication_role = replica"))
            await tx.execute(_WRITE_HISTORY, {"shops": [shop.id for shop in shops], "each": each})
        written += each * len(shops)
        progress.update(writing, completed=written)
    progress.remove_task(writing)
    return written


@dataclass(frozen=True, slots=True)
class Stage:
    """What could be done in a second at one stage, by name, turn by turn. `differing`: what was not as it was claimed."""

    turns: Sequence[Mapping[str, float]]
    differing: int

    def share(self, name: str) -> float:
        """A figure as a part of the bare handler's."""
        return median(rates[name] / rates[BARE] for rates in self.turns)


async def measure(
    on: Scene,
    *,
    history: int,
    waiting: int,
    minutes: float,
    rate: int,
    seconds: float,
    latency_seconds: float,
    whole_rate: int,
    whole_seconds: float,
    payouts: int,
    turns: int,
    carrier: str,
    progress: Progress,
) -> dict[str, Any]:
    """All of it, one after the other; `rate` and `minutes` are of the load, `latency_seconds` and `whole_…` of the first two
    stages, the others of each.
    """
    one, many = (crowd for crowd in await accept.gather_crowds(on) if crowd.name in (ONE, MANY))

    async def measure_stage(prefix: str) -> Stage:
        taken = [
            await _take_turn(on, f"{prefix}-{turn}", one, many, carrier, seconds, payouts, progress)
            for turn in range(turns)
        ]
        return Stage([rates for rates, _ in taken], sum(differing for _, differing in taken))

    async def measure_whole(prefix: str) -> dict[str, Any]:
        taken = [
            await _take_whole_turn(
                on, f"{prefix}-{turn}", one, carrier, seconds, latency_seconds, whole_rate, whole_seconds, progress
            )
            for turn in range(turns)
        ]
        return _summarize_whole(taken)

    stages = {"empty": await measure_stage("empty")}
    whole = {"empty": await measure_whole("empty")}
    load = await _run_load(on, one, carrier, minutes, rate, progress)
    broken = [finding.rule.name for finding in await verify(on.ops) if finding.count]
    written = await write_history(on, one.shops, history // 2, progress)
    written += await write_history(on, many.shops, history - history // 2, progress)
    name = f"{written:,} payouts and {written * _ENTRIES_PER_PAYOUT:,} entries behind it"
    stages[name] = await measure_stage("history")
    whole[name] = await measure_whole("history")
    (dead,) = await add_shops(on, "dead", [f"{on.origin(accept.MERCHANTS + 1)}/hang/callbacks"])
    filling = progress.add_task("callbacks of the dead", total=waiting)
    await fill(on, [dead], waiting, lambda count: progress.update(filling, completed=count))
    progress.remove_task(filling)
    name = f"and {waiting:,} callbacks waiting"
    stages[name] = await measure_stage("waiting")
    await _deliver_rest(on, carrier, progress, but=dead.id)
    beside = await _run_beside(on, carrier, progress)
    empty = stages["empty"]
    told = {
        name: {**asdict(stage), "of_empty": {of: round(stage.share(of) / empty.share(of), 3) for of in empty.turns[0]}}
        for name, stage in stages.items()
    }
    return {
        "carrier": carrier,
        "stages": told,
        "whole_way": {"wanted_per_second": whole_rate, "seconds": whole_seconds, "stages": whole},
        "load": load,
        "beside": beside,
        "broken": broken,
    }


async def _take_turn(
    on: Scene, prefix: str, one: Crowd, many: Crowd, carrier: str, seconds: float, payouts: int, progress: Progress
) -> tuple[dict[str, float], int]:
    """The bare handler; accepting and settling, of one merchant and of many. Rates per second, and what is not as claimed."""
    await on.maintain()
    bare = await accept.run_bare(on, one, f"{prefix}-bare-", seconds, progress)
    found, differing = {BARE: bare.per_second}, 0
    for crowd in (one, many):
        await on.maintain()
        figure = await accept.run_ours(
            on, crowd, _GATEWAYS, carrier, f"{prefix}-{len(found)}-", seconds=seconds, progress=progress
        )
        found[f"accepted, {crowd.name}"] = figure.per_second
        differing += figure.differing + figure.failed
        await _settle_rest(on, carrier, progress)
        outcome = settle.Outcome(crowd.name, payouts)
        await settle.take_turn(on, crowd, carrier, f"{prefix}-{len(found)}-", outcome, progress)
        found[f"settled, {crowd.name}"] = outcome.per_second[-1]
        differing += outcome.differing
    return found, differing


@dataclass(frozen=True, slots=True)
class WholeTurn:
    """The whole way as `end_to_end.run_load` tells it, accepting at each rate, and what the bare handler did just before."""

    bare_per_second: float
    whole: dict[str, Any]
    latencies: Mapping[int, latency.Run]


async def _take_whole_turn(
    on: Scene,
    prefix: str,
    one: Crowd,
    carrier: str,
    seconds: float,
    latency_seconds: float,
    whole_rate: int,
    whole_seconds: float,
    progress: Progress,
) -> WholeTurn:
    """The bare handler; the whole way of one merchant; and his accepting alone, at steady rates. Leaves nothing due."""
    await _deliver_rest(on, carrier, progress)
    await on.maintain()
    bare = await accept.run_bare(on, one, f"{prefix}-bare-", seconds, progress)
    await on.forget()
    async with on.running(*end_to_end.processes(_GATEWAYS_OF_WHOLE_WAY), carrier=carrier):
        whole = await end_to_end.run_load(
            on, one.shops, one.senders, carrier, f"{prefix}-whole-", whole_rate, whole_seconds, progress
        )
    latencies = {}
    for at in latency.GOALS_MS:
        await on.maintain()
        latencies[at] = await latency.run_ours(
            on, one.shops[0], one.senders, carrier, at, f"{prefix}-{at}-", seconds=latency_seconds, progress=progress
        )
    await _deliver_rest(on, carrier, progress)
    return WholeTurn(bare.per_second, whole, latencies)


def _summarize_whole(turns: Sequence[WholeTurn]) -> dict[str, Any]:
    """The medians. `cost_in_answers`: how often the bare handler would have answered in the processor time of one payout."""
    found = end_to_end.summarize("the whole way", [turn.whole for turn in turns])
    costs = [turn.bare_per_second * sum(turn.whole["costs"]["cpu_ms"].values()) / 1e6 for turn in turns]
    runs = [run for turn in turns for run in turn.latencies.values()]
    found["failed"] += sum(run.told["failed"] for run in runs)
    found["differing"] += sum(run.differing for run in runs)
    return {
        **found,
        "cost_in_answers": median(costs),
        "bare_per_second": [turn.bare_per_second for turn in turns],
        "accept_p99_ms": {at: median(turn.latencies[at].told["p99_ms"] for turn in turns) for at in turns[0].latencies},
        "accept": {at: [turn.latencies[at].told for turn in turns] for at in turns[0].latencies},
    }


async def _settle_rest(on: Scene, carrier: str, progress: Progress) -> None:
    """Settle what was accepted to see how fast that goes, so that nothing of it is there when settling is measured."""
    async with on.running(settle.WORKER, carrier=carrier):
        query = "SELECT count(*) FROM payout_due WHERE expires_at IS NULL"
        await _until_none(on, query, {}, progress.add_task("settling what was accepted", total=None), progress)


async def _run_load(
    on: Scene, crowd: Crowd, carrier: str, minutes: float, rate: int, progress: Progress
) -> dict[str, Any]:
    """The whole way at a steady rate for minutes, while everything is looked at."""
    await _deliver_rest(on, carrier, progress)
    await on.maintain()
    await on.forget()
    samples: dict[str, list[tuple[float, float]]] = {}
    async with on.running(*end_to_end.processes(_GATEWAYS), carrier=carrier), _looking(on, samples):
        case = await end_to_end.run_load(
            on, crowd.shops, crowd.senders, carrier, "growth-", rate, minutes * 60, progress
        )
    trends = {name: asdict(trend_of(found)) for name, found in samples.items() if len(found) > 1}
    return {"minutes": minutes, "rate": rate, "case": case, "trends": trends, "samples": samples}


async def _deliver_rest(on: Scene, carrier: str, progress: Progress, *, but: UUID | None = None) -> None:
    """Settle and deliver what is there already, but for one shop's callbacks, so that nothing but what is measured goes on."""
    await _settle_rest(on, carrier, progress)
    async with on.worker():
        query = "SELECT count(*) FROM callback_due WHERE shop_id IS DISTINCT FROM CAST(:but AS uuid)"
        task = progress.add_task("delivering what was settled", total=None)
        await _until_none(on, query, {"but": but}, task, progress)


async def _until_none(on: Scene, query: str, values: Mapping[str, Any], task: TaskID, progress: Progress) -> None:
    """Wait until a query counts nothing any more."""
    deadline, most = time.monotonic() + _REST_SECONDS_MAX, 1
    while left := int(await in_transaction(on.superuser, lambda tx: tx.scalar(text(query), values)) or 0):
        assert time.monotonic() < deadline, f"still there: {query}"
        most = max(most, left)
        progress.update(task, total=most, completed=most - left)
        await asyncio.sleep(_REST_POLL_SECONDS)
    progress.remove_task(task)


async def _run_beside(on: Scene, carrier: str, progress: Progress) -> dict[str, Any]:
    """The whole way of a merchant who answers, while the dead one's callbacks wait and are tried."""
    shops = await add_shops(on, "beside", [f"{on.origin(accept.MERCHANTS + 2)}/ok/callbacks"])
    senders = await add_senders(on, shops)
    await on.maintain()
    await on.forget()
    async with on.running(*end_to_end.processes(_GATEWAYS), carrier=carrier):
        return await end_to_end.run_load(
            on, shops, senders, carrier, "beside-", _BESIDE_RATE, _BESIDE_SECONDS, progress, alone=False
        )


@asynccontextmanager
async def _looking(on: Scene, samples: dict[str, list[tuple[float, float]]]) -> AsyncIterator[None]:
    """Look at memory, open files, connections and tables every few seconds, as long as the context lasts."""
    processes = {name: on.find_process(name) for name in end_to_end.processes(_GATEWAYS)}

    async def look() -> None:
        while True:
            now = time.monotonic()
            rows = await in_transaction(on.superuser, lambda tx: tx.execute(_LOOK, {"hot": list(_HOT)}))
            found = {row.name: row.value for row in rows}
            for name, process in processes.items():
                found[f"memory of {name}"] = process.memory_info().rss
                found[f"open files of {name}"] = process.num_fds()
            for name, value in found.items():
                samples.setdefault(name, []).append((now, float(value)))
            await asyncio.sleep(_SAMPLE_SECONDS)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        await end_watch(looking)


def _medians(stage: Mapping[str, Any]) -> dict[str, float]:
    return {name: median(rates[name] for rates in stage["turns"]) for name in stage["turns"][0]}


def render(found: dict[str, Any]) -> Sequence[Table]:
    """What can be done at each stage, beside the empty database; how everything went under load; who was beside the dead."""
    names = list(found["stages"]["empty"]["turns"][0])
    title = f"{_GATEWAYS} gateways, one worker, {found['carrier']}; in brackets: of empty, both as parts of the {BARE}"
    rates = Table("per second", *names, "records", title=title)
    for name, stage in found["stages"].items():
        of_empty = stage["of_empty"]
        cells = [
            f"{rate:,.0f}" + ("" if of == BARE else f" ({of_empty[of]:.2f})") for of, rate in _medians(stage).items()
        ]
        rates.add_row(name, *cells, "as claimed" if not stage["differing"] else f"{stage['differing']:,} differ")
    rates.caption = f"the rules of the ledger, before the history: {', '.join(found['broken']) or 'all hold'}"
    of_way = found["whole_way"]
    costs = {name: stage["cost_in_answers"] for name, stage in of_way["stages"].items()}
    title = f"{of_way['wanted_per_second']:,} payouts per second for {of_way['seconds']:g} s,"
    title += (
        f" {counted(_GATEWAYS_OF_WHOLE_WAY, 'gateway')}; accepting at steady rates, {counted(_GATEWAYS, 'gateway')}"
    )
    whole = Table(
        "", "accepted/s", "delivered/s", "201 to callback p50 s", "", "a payout costs, ms", "in answers of the bare handler",
        *(f"accept p99 at {rate:,}/s, ms" for rate in latency.GOALS_MS), "records",
        title=title,
    )  # fmt: skip
    for name, stage in of_way["stages"].items():
        whole.add_row(
            name,
            f"{stage['accepted_per_second']:,.0f}",
            f"{stage['delivered_per_second']:,.0f}",
            f"{stage['lag']['p50']:.3f}",
            "flat" if not stage["growing"] else f"GROWS in {stage['growing']} of {len(stage['turns'])}",
            f"{stage['cost_ms']:.2f}",
            f"{costs[name]:.1f} ({costs[name] / costs['empty']:.2f})",
            *(f"{p99_ms:.1f}" for p99_ms in stage["accept_p99_ms"].values()),
            "as claimed"
            if not stage["differing"] + stage["failed"]
            else f"{stage['differing'] + stage['failed']:,} differ",
        )
    load = found["load"]
    case = load["case"]
    title = (
        f"{load['minutes']:g} minutes at {load['rate']:,} per second, {counted(_GATEWAYS, 'gateway')}:"
        f" {case['told']['requests']:,} payouts, {case['differing'] + case['told']['failed']:,} lost, doubled or wrong"
    )
    trends = Table("", "first", "last", "max", "slope per hour", "", title=title)
    for name, trend in load["trends"].items():
        must = name.startswith(_MUST_BE_FLAT)
        values = [readable(name, trend[key]) for key in ("first", "last", "max", "slope_per_hour")]
        trends.add_row(name, *values, "flat" if trend["flat"] else "GROWS" if must else "grows")
    lag, told = found["beside"]["lag"], found["beside"]["told"]
    beside = Table(
        "accept p50",
        "p99 ms",
        "201 to callback p50",
        "p99",
        "max s",
        "records",
        title=f"beside the dead merchant, {counted(_GATEWAYS, 'gateway')}",
    )
    beside.add_row(
        *(f"{told[name]:.1f}" for name in ("p50_ms", "p99_ms")),
        *(f"{lag[name]:.3f}" for name in ("p50", "p99", "max")),
        "nothing lost" if not found["beside"]["differing"] else f"{found['beside']['differing']:,} differ",
    )
    return rates, whole, trends, beside


def draw(found: dict[str, Any]) -> Sequence[Chart]:
    """What can be done at each stage; memory, and the sizes of the tables that must not grow, under load."""
    stages = {name: _medians(stage) for name, stage in found["stages"].items()}
    names = [name for name in stages["empty"] if name != BARE]
    samples = found["load"]["samples"]

    def lines(start: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(at, value / 2**20) for at, value in line]
            for name, line in samples.items()
            if name.startswith(start)
        }

    return (
        *(Bars(f"{name}, per second", [Bar(stage, of[name]) for stage, of in stages.items()]) for name in names),
        Lines("memory under load, MiB", lines("memory of")),
        Lines("tables with their indexes under load, MiB", lines("size of")),
    )
