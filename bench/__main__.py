"""`python -m bench [SCENARIO …]`: how fast, how fair and how steady the product is, each figure beside its baseline.

Everything runs on this machine in a folder of its own, which is removed afterwards.
"""

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import accept, callbacks, end_to_end, growth, isolation, latency, settle, soak
from bench.baseline import BaselineFailed
from bench.picture import Chart, render_picture
from bench.scene import ALONE, RABBITMQ, Scene, describe_machine, scene
from ops.processes import ProcessFailed
from ops.servers import ServerFailed
from ops.state import FOLDER


@dataclass(frozen=True, slots=True)
class Options:
    """How much of it, and what carries the work."""

    carriers: Sequence[str]
    callbacks: int
    turns: int
    waiting: int
    seconds: float
    rate: int
    minutes: float
    accept_seconds: float
    latency_seconds: float
    rates: Sequence[int]
    payouts: int
    end_to_end_rate: int
    end_to_end_seconds: float
    merchants: int
    history: int
    callbacks_waiting: int
    load_rate: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """How something is measured, and how it is told and drawn. `broker`: whether what carries the work matters to it."""

    measure: Callable[[Scene, Options, Progress], Awaitable[dict[str, Any]]]
    render: Callable[[dict[str, Any]], Sequence[Table]]
    draw: Callable[[dict[str, Any]], Sequence[Chart]]
    broker: bool = True


SCENARIOS: Final = {
    "accept": Scenario(
        lambda on, o, progress: accept.measure(
            on, seconds=o.accept_seconds, turns=o.turns, carriers=o.carriers, progress=progress
        ),
        accept.render,
        accept.draw,
    ),
    "latency": Scenario(
        lambda on, o, progress: latency.measure(
            on, seconds=o.latency_seconds, rates=o.rates, turns=o.turns, carriers=o.carriers, progress=progress
        ),
        latency.render,
        latency.draw,
    ),
    "settle": Scenario(
        lambda on, o, progress: settle.measure(
            on, payouts=o.payouts, turns=o.turns, carriers=o.carriers, progress=progress
        ),
        settle.render,
        settle.draw,
    ),
    "end-to-end": Scenario(
        lambda on, o, progress: end_to_end.measure(
            on,
            rate=o.end_to_end_rate,
            seconds=o.end_to_end_seconds,
            merchants=o.merchants,
            turns=o.turns,
            carriers=o.carriers,
            progress=progress,
        ),
        end_to_end.render,
        end_to_end.draw,
    ),
    "growth": Scenario(
        lambda on, o, progress: growth.measure(
            on,
            history=o.history,
            waiting=o.callbacks_waiting,
            minutes=o.minutes,
            rate=o.load_rate,
            seconds=o.accept_seconds,
            latency_seconds=o.latency_seconds,
            whole_rate=o.end_to_end_rate,
            whole_seconds=o.end_to_end_seconds,
            payouts=o.payouts,
            turns=o.turns,
            carrier=o.carriers[0],
            progress=progress,
        ),
        growth.render,
        growth.draw,
    ),
    "callbacks": Scenario(
        lambda on, o, progress: callbacks.measure(
            on, callbacks=o.callbacks, turns=o.turns, carriers=o.carriers, progress=progress
        ),
        callbacks.render,
        callbacks.draw,
    ),
    "isolation": Scenario(
        lambda on, o, progress: isolation.measure(
            on, waiting=o.waiting, seconds=o.seconds, rate=o.rate, progress=progress
        ),
        isolation.render,
        isolation.draw,
        broker=False,
    ),
    "soak": Scenario(
        lambda on, o, progress: soak.measure(on, minutes=o.minutes, rate=o.rate, progress=progress),
        soak.render,
        soak.draw,
        broker=False,
    ),
}
_CARRIERS: Final = {"rabbitmq": RABBITMQ, "postgresql": ALONE}
_RESULTS: Final = FOLDER / "bench"
_USUAL: Final = ("accept", "latency", "settle", "end-to-end", "callbacks", "isolation")


async def run(scenario: Scenario, options: Options, console: Console) -> dict[str, Any]:
    """Measure one thing, on a scene of its own."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    folder = Path(tempfile.mkdtemp(prefix="payouts-bench-"))

    def say(subject: str, words: str) -> None:
        console.print(f"{subject}: {words}", markup=False, highlight=False)

    try:
        with Progress(*columns, console=console, transient=True) as progress:
            carriers = options.carriers if scenario.broker else (ALONE,)
            async with scene(folder, say, carriers=carriers) as on:
                return await scenario.measure(on, options, progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@click.command()
@click.argument("scenarios", nargs=-1, type=click.Choice(list(SCENARIOS)))
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where the results go; else .local/bench/….json.")
@click.option("--picture", type=click.Path(path_type=Path), help="Where they go as SVG; else .local/bench/….svg.")
@click.option(
    "--carrier", "carriers", type=click.Choice(list(_CARRIERS)), multiple=True, default=list(_CARRIERS), show_default=True,
    help="What carries the work, each in its turn; the first one for growth.",
)  # fmt: skip
@click.option("--turns", default=3, show_default=True, help="All but isolation and soak: how often; the median counts.")
@click.option("--accept-seconds", default=5.0, show_default=True, help="accept, growth: how long each.")
@click.option("--latency-seconds", default=20.0, show_default=True, help="latency, growth: how long each.")
@click.option("--rates", default=(100, 500, 1000, 2000), show_default=True, multiple=True, help="latency: each rate.")
@click.option("--payouts", default=40_000, show_default=True, help="settle, growth: how many wait at the start.")
@click.option(
    "--end-to-end-rate", default=2_100, show_default=True, help="end-to-end, growth: how many payouts a second."
)
@click.option("--end-to-end-seconds", default=60.0, show_default=True, help="end-to-end, growth: how long.")
@click.option("--merchants", default=1, show_default=True, help="end-to-end: of how many merchants.")
@click.option("--history", default=5_000_000, show_default=True, help="growth: how many payouts of the past.")
@click.option(
    "--callbacks-waiting", default=1_000_000, show_default=True, help="growth: how many, for a dead merchant."
)
@click.option("--load-rate", default=500, show_default=True, help="growth: how many payouts a second, for minutes.")
@click.option("--callbacks", default=20_000, show_default=True, help="callbacks: how many wait at the start.")
@click.option("--waiting", default=300_000, show_default=True, help="isolation: how many wait for the dead merchant.")
@click.option("--seconds", default=60.0, show_default=True, help="isolation: how long the healthy are told of payouts.")
@click.option("--rate", default=100, show_default=True, help="isolation, soak: how many payouts a second.")
@click.option("--minutes", default=10.0, show_default=True, help="soak, growth: how long the load lasts.")
def main(scenarios: Sequence[str], file: Path | None, picture: Path | None, **how_much: Any) -> None:
    """Measure these scenarios, or all but the long ones: growth and soak."""
    console = Console()
    options = Options(**{**how_much, "carriers": [_CARRIERS[name] for name in how_much["carriers"]]})
    started = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
    results: dict[str, Any] = {"started": started, "machine": describe_machine(), "options": how_much}
    charts: list[Chart] = []
    file, picture = file or _RESULTS / f"{started}.json", picture or _RESULTS / f"{started}.svg"
    for name in scenarios or _USUAL:
        scenario = SCENARIOS[name]
        try:
            results[name] = asyncio.run(run(scenario, options, console))
        except (BaselineFailed, ProcessFailed, ServerFailed) as failure:
            sys.exit(f"error: {name}: {failure}")
        console.print(*scenario.render(results[name]), sep="\n")
        charts += scenario.draw(results[name])
        for path in (file, picture):
            path.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n")
        picture.write_text(render_picture(_describe(results), charts))
    console.print(f"results: {file}, {picture}", markup=False, highlight=False, soft_wrap=True)


def _describe(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return f"{results['started']}: {machine['cpus']} processors, Python {machine['python']}, everything on one machine"


if __name__ == "__main__":
    main()
