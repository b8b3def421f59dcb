"""A bank for tests: the simulator's own, on a free port, that behaves as it is told."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from common.db.engine import in_transaction
from common.db.rails import append_http_rail
from common.domain.ids import new_id
from common.sealing import RAIL_SECRET_PURPOSE
from ops.simulator.bank import Bank
from ops.simulator.ledger import Ledger, Payment
from ops.simulator.moods import Behaviour, Manner
from tests.flows import Desk

SECRET = "rk_tests"
SLOW_SECONDS = 30.0


@dataclass(slots=True)
class Script:
    """A mood that does what it is told: behaviours for the submits to come, manners for the look-ups; then it is calm."""

    submits: list[Behaviour] = field(default_factory=list)
    look_ups: list[Manner] = field(default_factory=list)

    def submit(self, _reference: str, _submits: int) -> Behaviour:
        return self.submits.pop(0) if self.submits else Behaviour()

    def look_up(self, _reference: str) -> Manner:
        return self.look_ups.pop(0) if self.look_ups else Manner.ANSWER


@dataclass(frozen=True, slots=True)
class RunningBank:
    """A bank that answers at `base_url`."""

    base_url: str
    bank: Bank
    ledger: Ledger
    script: Script

    def payment(self, reference: str) -> Payment:
        """A payment that it was asked for."""
        payment = self.ledger.find(reference)
        assert payment is not None, f"nobody asked for {reference}"
        return payment


async def add_rail(working: Desk, name: str, base_url: str, **terms: Any) -> None:
    """A rail to a bank that signs with `SECRET`."""
    rail_id, keyring = new_id(), working.settings.keyring
    values: dict[str, Any] = {
        "authoritative": True,
        "lag_seconds": 0.0,
        "concurrency": None,
        "payin_link": None,
    } | terms
    sealed = keyring.seal(SECRET.encode(), owner=rail_id, row=rail_id, purpose=RAIL_SECRET_PURPOSE, now=time.time())
    await in_transaction(
        working.owner,
        lambda tx: append_http_rail(tx, rail_id=rail_id, name=name, base_url=base_url, secret_sealed=sealed, **values),
    )


@asynccontextmanager
async def bank(
    folder: Path, *, events_url: str | None = None, pace_seconds: float = 0.0, slow_seconds: float = SLOW_SECONDS
) -> AsyncIterator[RunningBank]:
    """A bank that tells its events to `events_url`, if there is one."""
    script, ledger = Script(), Ledger(folder / "bank.sqlite")
    made = Bank(
        ledger, script, secret=SECRET, events_url=events_url, pace_seconds=pace_seconds, slow_seconds=slow_seconds
    )
    runner = web.AppRunner(made.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        yield RunningBank(f"http://127.0.0.1:{port}", made, ledger, script)
    finally:
        await runner.cleanup()
        ledger.close()
