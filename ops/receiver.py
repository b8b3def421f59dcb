"""A merchant's side of callbacks, as small as it can be: verifies both signatures and remembers what came.

`python -m ops.receiver --port N --folder .local`. Whatever is posted is received; `GET /received?prefix=P` tells of the
payouts whose `external_id` begins with P. The webhook secret is read from the folder's `demo.json` at every request.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
from aiohttp import web

from common.domain.signing import parse_timestamp, sign_body, sign_webhook, signatures_equal
from ops.ports import LOOPBACK
from ops.state import find_demo

# Standard Webhooks 1.0.0, "Verifying webhook authenticity": leave some tolerance, refuse what is older.
_TOLERANCE_SECONDS: Final = 300
PAYOUTS_MAX: Final = 100_000


class Memory:
    """What came, by payout; of the oldest payouts nothing when there are too many."""

    def __init__(self, payouts_max: int = PAYOUTS_MAX) -> None:
        self._payouts_max = payouts_max
        self._callbacks: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()

    def record(self, event_id: str, body: dict[str, Any], *, verified: bool) -> None:
        """Remember a callback, and when it came, in Unix seconds."""
        seen = {
            "event": event_id,
            "verified": verified,
            "type": body.get("type"),
            "sequence": body.get("sequence"),
            "received_at": time.time(),
        }
        self._callbacks.setdefault(str(body.get("external_id")), []).append(seen)
        if len(self._callbacks) > self._payouts_max:
            self._callbacks.popitem(last=False)

    def render(self, prefix: str) -> dict[str, Any]:
        """Everything about the payouts whose `external_id` begins with `prefix`."""
        by_external_id = {key: seen for key, seen in self._callbacks.items() if key.startswith(prefix)}
        verdicts = [callback["verified"] for seen in by_external_id.values() for callback in seen]
        return {
            "received": len(verdicts),
            "verified": verdicts.count(True),
            "rejected": verdicts.count(False),
            "by_external_id": by_external_id,
        }


MEMORY: Final = web.AppKey("MEMORY", Memory)
FOLDER: Final = web.AppKey("FOLDER", Path)


def create_app(folder: Path, payouts_max: int = PAYOUTS_MAX) -> web.Application:
    """The application, with an empty memory for so many payouts."""
    app = web.Application()
    app[MEMORY] = Memory(payouts_max)
    app[FOLDER] = folder
    app.add_routes([web.get("/readyz", readyz), web.get("/received", show_received), web.post("/{any:.*}", receive)])
    return app


async def readyz(_request: web.Request) -> web.Response:
    """It answers, so it is ready."""
    return web.json_response({"status": "ready"})


async def show_received(request: web.Request) -> web.Response:
    """What came, as JSON."""
    return web.json_response(request.app[MEMORY].render(request.query.get("prefix", "")))


async def receive(request: web.Request) -> web.Response:
    """204 when both signatures are right, 401 when not, 400 when it is no callback at all."""
    body = await request.read()
    try:
        content = json.loads(body)
    except ValueError:
        return web.Response(status=400)
    if not isinstance(content, dict):
        return web.Response(status=400)
    demo = find_demo(request.app[FOLDER])
    verified = demo is not None and is_authentic(request.headers, body, demo.webhook_secret, now=time.time())
    request.app[MEMORY].record(request.headers.get("webhook-id", ""), content, verified=verified)
    return web.Response(status=204 if verified else 401)


def is_authentic(headers: Mapping[str, str], body: bytes, secret: str, *, now: float) -> bool:
    """Whether both signatures of a callback are right and fresh: Standard Webhooks, and the body formula."""
    sent, sent_again = headers.get("webhook-timestamp", ""), headers.get("X-Timestamp", "")
    moments = parse_timestamp(sent), parse_timestamp(sent_again)
    if not sent.isdecimal() or any(at is None or abs(now - at) > _TOLERANCE_SECONDS for at in moments):
        return False
    webhook = sign_webhook([secret], headers.get("webhook-id", ""), int(sent), body)
    signatures = headers.get("webhook-signature", "").split(" ")
    return any(signatures_equal(webhook, signature) for signature in signatures) and signatures_equal(
        sign_body(secret, sent_again, body), headers.get("X-Signature", "")
    )


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True)
@click.option("--payouts-max", type=click.IntRange(min=1), default=PAYOUTS_MAX, help="How many it remembers.")
def main(port: int, folder: Path, payouts_max: int) -> None:
    """Receive callbacks on loopback until told to stop."""
    web.run_app(create_app(folder, payouts_max), host=LOOPBACK, port=port, access_log=None, print=None)


if __name__ == "__main__":
    main()
