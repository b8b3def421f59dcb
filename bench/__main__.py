"""`python -m bench [SCENARIO …]`: how fast, how fair and how steady the product is, each figure beside its baseline.

Everything runs on this machine in a folder of its own, which is removed afterwards.
"""

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import accept, callbacks, isolation, latency, soak
from bench.baseline import BaselineFailed
from bench.scene import ALONE, RABBITMQ, Scene, describe_machine, scene
from ops.servers import ServerFailed


@dataclass(frozen=True, slots=True)
class Options:
    """How much of it."""

    callbacks: int
    turns: int
    waiting: int
    seconds: float
    rate: int
    minutes: float
    accept_seconds: float
    latency_seconds: float
    rates: Sequence[int]


@dataclass(frozen=True, slots=True)
class Scenario:
    """How something is measured, and how it is told. `carriers`: of what it measures; there is no broker for the others."""

    measure: Callable[[Scene, Options, Progress], Awaitable[dict[str, Any]]]
    render: Callable[[dict[str, Any]], Sequence[Table]]
    carriers: Sequence[str] = (RABBITMQ, ALONE)


SCENARIOS: Final = {
    "accept": Scenario(
        lambda on, o, progress: accept.measure(
            on, seconds=o.accept_seconds, turns=o.turns, carriers=(RABBITMQ, ALONE), progress=progress
        ),
        accept.render,
    ),
    "latency": Scenario(
        lambda on, o, progress: latency.measure(
            on, seconds=o.latency_seconds, rates=o.rates, carriers=(RABBITMQ, ALONE), progress=progress
        ),
        latency.render,
    ),
    "callbacks": Scenario(
        lambda on, o, progress: callbacks.measure(on, callbacks=o.callbacks, turns=o.turns, progress=progress),
        callbacks.render,
        carriers=(ALONE,),
    ),
    "isolation": Scenario(
        lambda on, o, progress: isolation.measure(
            on, waiting=o.waiting, seconds=o.seconds, rate=o.rate, progress=progress
        ),
        isolation.render,
        carriers=(ALONE,),
    ),
    "soak": Scenario(
        lambda on, o, progress: soak.measure(on, minutes=o.minutes, rate=o.rate, progress=progress),
        soak.render,
        carriers=(ALONE,),
    ),
}
_USUAL: Final = ("accept", "latency", "callbacks", "isolation")


async def run(scenario: Scenario, options: Options, console: Console) -> dict[str, Any]:
    """Measure one thing, on a scene of its own."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    folder = Path(tempfile.mkdtemp(prefix="payouts-bench-"))

    def say(subject: str, words: str) -> None:
        console.print(f"{subject}: {words}", markup=False, highlight=False)

    try:
        with Progress(*columns, console=console, transient=True) as progress:
            async with scene(folder, say, carriers=scenario.carriers) as on:
                return await scenario.measure(on, options, progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@click.command()
@click.argument("scenarios", nargs=-1, type=click.Choice(list(SCENARIOS)))
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where the results go, as JSON.")
@click.option("--turns", default=3, show_default=True, help="accept, callbacks: how often; the median counts.")
@click.option("--accept-seconds", default=5.0, show_default=True, help="accept: how long each.")
@click.option("--latency-seconds", default=20.0, show_default=True, help="latency: how long each.")
@click.option("--rates", default=(100, 500, 1000, 2000), show_default=True, multiple=True, help="latency: each rate.")
@click.option("--callbacks", default=20_000, show_default=True, help="callbacks: how many wait at the start.")
@click.option("--waiting", default=300_000, show_default=True, help="isolation: how many wait for the dead merchant.")
@click.option("--seconds", default=60.0, show_default=True, help="isolation: how long the healthy are told of payouts.")
@click.option("--rate", default=100, show_default=True, help="isolation, soak: how many payouts a second.")
@click.option("--minutes", default=10.0, show_default=True, help="soak: how long.")
def main(scenarios: Sequence[str], file: Path | None, **how_much: Any) -> None:
    """Measure these scenarios, or all but the soak."""
    console = Console()
    options = Options(**how_much)
    results: dict[str, Any] = {"machine": describe_machine()}
    for name in scenarios or _USUAL:
        scenario = SCENARIOS[name]
        try:
            results[name] = asyncio.run(run(scenario, options, console))
        except (BaselineFailed, ServerFailed) as failure:
            sys.exit(f"error: {failure}")
        console.print(*scenario.render(results[name]), sep="\n")
        if file is not None:
            file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
