"""The baseline of delivery: `python -m bench.bare FILE` posts what a file holds as fast as aiohttp alone can.

The same loop (uvloop), the same client, the same URLs, bodies and headers, the signatures left out; no database, no log,
no guard. A line of the file is the `webhook-id`, the URL and the body, separated by tabs.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import click
import uvloop

Request = tuple[str, dict[str, str], bytes]


def read_requests(file: Path) -> list[Request]:
    """What there is to post, ready to be sent."""
    seconds = int(time.time())
    requests = []
    for line in file.read_bytes().splitlines():
        webhook_id, url, body = line.split(b"\t", 2)
        headers = {
            "webhook-id": webhook_id.decode(),
            "webhook-timestamp": str(seconds),
            "X-Timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)),
            "content-type": "application/json",
            "user-agent": "bare",
            "accept-encoding": "identity",
        }
        requests.append((url.decode(), headers, body))
    return requests


async def post_all(requests: list[Request], concurrency: int) -> int:
    """Post everything, that many at a time. Returns how many were answered with 200."""
    left, delivered = iter(requests), 0

    async def post(session: aiohttp.ClientSession, left: Iterator[Request]) -> None:
        nonlocal delivered
        for url, headers, body in left:
            async with session.post(url, data=body, headers=headers) as response:
                await response.read()
                delivered += response.status == 200

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(post(session, left) for _ in range(concurrency)))
    return delivered


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--concurrency", default=200, show_default=True)
def main(file: Path, concurrency: int) -> None:
    """Post what the file holds, and print as JSON how many were delivered and what it took of this process."""
    requests = read_requests(file)
    began = time.process_time()
    delivered = uvloop.run(post_all(requests, concurrency))
    print(json.dumps({"delivered": delivered, "cpu_seconds": time.process_time() - began}))


if __name__ == "__main__":
    main()
