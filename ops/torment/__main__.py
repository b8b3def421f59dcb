"""`python -m ops.torment`: first a bank in its worst mood, then a storm; exit code 1 when anything is wrong."""

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from ops.stage import print_differences
from ops.torment import bad_bank, storm

_Report = TypeVar("_Report", bad_bank.Report, storm.Report)


@click.command()
@click.option(
    "--payouts", default=10_000, show_default=True, type=click.IntRange(min=0), help="Through a bad bank; 0: none."
)
@click.option("--seed", default=1, show_default=True, help="Of every chance.")
@click.option("--kill-seconds", default=3.0, show_default=True, help="About how often somebody is killed meanwhile.")
@click.option("--deadline", default=1800.0, show_default=True, help="Seconds until all must be quiet.")
@click.option("--storm-seconds", default=600.0, show_default=True, help="How long it storms; 0: not at all.")
@click.option("--storm-rate", default=300.0, show_default=True, help="Payouts per second offered in the storm.")
@click.option("--storm-kill-seconds", default=5.0, show_default=True, help="How often somebody is killed in it.")
@click.option("--storm-deadline", default=1200.0, show_default=True, help="Seconds after it until all must be quiet.")
def main(
    payouts: int,
    seed: int,
    kill_seconds: float,
    deadline: float,
    storm_seconds: float,
    storm_rate: float,
    storm_kill_seconds: float,
    storm_deadline: float,
) -> None:
    """Torment the product; exit code 1 when something is lost, doubled or stuck, or a rule is broken."""
    console = Console()
    sound = True
    if payouts:
        console.rule("a bank in its worst mood")
        calm = _run(
            lambda folder: bad_bank.run(
                folder, count=payouts, seed=seed, kill_seconds=kill_seconds, deadline_seconds=deadline, console=console
            ),
            console,
        )
        console.print(bad_bank.render_table(calm, payouts))
        sound = calm.is_sound and sum(calm.comparison.states.values()) == payouts
    if storm_seconds:
        console.rule("a storm")
        report = _run(
            lambda folder: storm.run(
                folder,
                seconds=storm_seconds,
                rate=storm_rate,
                kill_seconds=storm_kill_seconds,
                seed=seed,
                deadline_seconds=storm_deadline,
                console=console,
            ),
            console,
        )
        console.print(storm.render_table(report))
        sound = sound and report.is_sound
    sys.exit(0 if sound else 1)


def _run(torment: Callable[[Path], Coroutine[Any, Any, _Report]], console: Console) -> _Report:
    """Run it in a folder of its own. When something is wrong the logs and the answers stay there, and it is named."""
    folder = Path(tempfile.mkdtemp(prefix="payouts-torment-"))
    kept = True
    try:
        report = asyncio.run(torment(folder))
        kept = not report.is_sound
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    print_differences(console, report.differences)
    if kept:
        console.print(f"logs and answers are kept in {folder}", markup=False, highlight=False)
    return report


if __name__ == "__main__":
    main()
