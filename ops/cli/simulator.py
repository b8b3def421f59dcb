"""`payouts rail-simulator`: a bank on this machine that speaks the rail protocol."""

import asyncio
from pathlib import Path

import click
from aiohttp import web

from common.process import stop_requested
from ops.simulator.bank import Bank
from ops.simulator.ledger import Ledger
from ops.simulator.moods import MOODS, SeededMood


@click.command("rail-simulator")
@click.option("--port", type=click.IntRange(1, 65_535), required=True, help="Where it listens, on loopback.")
@click.option(
    "--secret",
    envvar="RAIL_SECRET",
    required=True,
    metavar="TEXT",
    help="As `payouts rail add` showed it; or RAIL_SECRET.",
)
@click.option("--events-url", metavar="URL", help="Where it tells by itself: …/api/v1/rails/NAME/events of a gateway.")
@click.option(
    "--ledger", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Its books, an SQLite file."
)
@click.option("--mood", type=click.Choice(MOODS), default="calm", show_default=True, help="How well it behaves.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the mood's chances.")
@click.option(
    "--pace-seconds", type=click.FloatRange(0, 3600), default=1.0, show_default=True, help="Until it settles and tells."
)
@click.option(
    "--slow-seconds",
    type=click.FloatRange(0, 3600),
    default=30.0,
    show_default=True,
    help="How long a slow answer takes.",
)
def simulator_command(
    port: int,
    secret: str,
    events_url: str | None,
    ledger: Path,
    mood: str,
    seed: int,
    pace_seconds: float,
    slow_seconds: float,
) -> None:
    """Be a bank: answer `worker/rails/PROTOCOL.md` below http://127.0.0.1:PORT until Ctrl-C, and keep books of it.

    Payers pay in at its counter: POST /counter/REFERENCE {"amount_minor": 5000, "currency": "BDT"}, and get their money back
    by POST /counter/REFERENCE/return.
    """
    bank = Bank(
        Ledger(ledger),
        SeededMood(mood, seed),
        secret=secret,
        events_url=events_url,
        pace_seconds=pace_seconds,
        slow_seconds=slow_seconds,
    )
    asyncio.run(_run(bank, port))


async def _run(bank: Bank, port: int) -> None:
    stop = stop_requested()
    runner = web.AppRunner(bank.app(), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, reuse_port=True).start()
        click.echo(f"a bank listens on http://127.0.0.1:{port}")
        await stop.wait()
    finally:
        await runner.cleanup()
