"""`python -m ops.send`: payouts of the demo merchant, steadily, to the stack that runs on this machine."""

import asyncio
import itertools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Final

import aiohttp
import click

from ops.cli.sign import Credentials, sign_request
from ops.seed import SHOP
from ops.state import FOLDER, Demo, find_demo

_PATH: Final = "/api/v1/payouts"
_TIMEOUT_SECONDS: Final = 30.0


@click.command()
@click.option("--name", help="The first external id; further ones get a number.  [default: one of the time]")
@click.option("--count", default=1, show_default=True, type=click.IntRange(min=1), help="How many payouts.")
@click.option("--per-second", default=10.0, show_default=True, type=click.FloatRange(0.1, 100), help="How fast.")
@click.option("--shop", "shops", multiple=True, default=[SHOP], show_default=True, help="Whose; several take turns.")
@click.option(
    "--recipient", default="01700005678", show_default=True, help="Its last four digits tell the sandbox what to do."
)
@click.option(
    "--folder", envvar="STACK", type=click.Path(path_type=Path), default=FOLDER, help="Of the stack; or STACK."
)
def main(name: str | None, count: int, per_second: float, shops: tuple[str, ...], recipient: str, folder: Path) -> None:
    """Send payouts, and show how many were answered with which status."""
    demo = find_demo(folder)
    if demo is None:
        raise click.ClickException("no stack has run here; start it with `make run`")
    first = name or f"sent-{time.time_ns() // 1_000_000}"
    bodies = [
        {
            "external_id": first if number == 0 else f"{first}-{number}",
            "amount": "1.00",
            "currency": demo.currency,
            "card_number": recipient,
            "shop_code": shop,
            "callback_url": f"{demo.receiver_url}/callbacks",
        }
        for number, shop in zip(range(count), itertools.cycle(shops), strict=False)
    ]
    statuses = asyncio.run(_send_all(demo, bodies, 1 / per_second))
    click.echo(", ".join(f"{status}: {times}" for status, times in sorted(statuses.items())))


async def _send_all(demo: Demo, bodies: list[dict[str, str]], interval_seconds: float) -> "Counter[str]":
    """Begin one each interval, however long the answers take."""
    statuses: Counter[str] = Counter()
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
    credentials = Credentials(demo.api_key, demo.api_secret, demo.base_url)
    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as sending:
        for number, body in enumerate(bodies):
            await asyncio.sleep(interval_seconds if number else 0)
            sending.create_task(_send(session, credentials, json.dumps(body).encode(), statuses))
    return statuses


async def _send(session: aiohttp.ClientSession, by: Credentials, body: bytes, statuses: "Counter[str]") -> None:
    headers = sign_request(by, "POST", _PATH, body, now=time.time())
    try:
        async with session.post(by.base_url + _PATH, data=body, headers=headers) as response:
            statuses[str(response.status)] += 1
    except (aiohttp.ClientError, TimeoutError):
        statuses["no answer"] += 1


if __name__ == "__main__":
    main()
