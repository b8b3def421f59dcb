"""The rails of this worker: what the table says, looked at again every few seconds, so that `payouts rail off` holds soon.

A mapping of the rails that are switched on. An adapter is kept as long as its row stays the same.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from time import monotonic
from typing import Final

import aiohttp
from prometheus_client import Gauge
from yarl import URL

from common.db.engine import Engine, in_transaction
from common.db.rails import RailRow, find_rails
from common.log import LogEvent, get_logger
from common.sealing import RAIL_SECRET_PURPOSE, Keyring, SealBroken
from common.settings import Settings
from worker.rails import Rail
from worker.rails.breaker import Breaker
from worker.rails.http import HttpRail
from worker.rails.sandbox import SandboxRail

RELOAD_SECONDS: Final = 2.0

BREAKER_OPEN: Final = Gauge(
    "payouts_rail_breaker_open", "1 while a rail does not answer and is left in peace", ["rail"]
)


class Registry(Mapping[str, Rail]):
    """The rails that are switched on, by name; empty until `refresh` was called."""

    def __init__(self, engine: Engine, keyring: Keyring, settings: Settings, session: aiohttp.ClientSession) -> None:
        self._engine = engine
        self._keyring = keyring
        self._settings = settings
        self._session = session
        self._known: dict[RailRow, Rail | None] = {}
        self._on: dict[str, Rail] = {}
        self._refresh_at = 0.0

    def __getitem__(self, name: str) -> Rail:
        return self._on[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._on)

    def __len__(self) -> int:
        return len(self._on)

    async def refresh(self) -> None:
        """Look at the table again, if it was not looked at lately."""
        if monotonic() < self._refresh_at:
            return
        rows = await in_transaction(self._engine, find_rails)
        self._known = {row: self._known[row] if row in self._known else self._make(row) for row in rows}
        self._on = {row.name: rail for row, rail in self._known.items() if rail is not None and row.status == "on"}
        self._refresh_at = monotonic() + RELOAD_SECONDS

    def _make(self, row: RailRow) -> Rail | None:
        """The adapter of a row; None when this code has none for it: its payouts wait."""
        if row.kind == "sandbox":
            return SandboxRail(self._engine, settle_seconds=self._settings.sandbox_settle_seconds)
        if row.kind != "http" or row.base_url is None or row.secret_sealed is None:
            get_logger().error(LogEvent.RAIL_UNUSABLE, rail=row.name, kind=row.kind, error="no adapter")
            return None
        try:
            secret = self._keyring.open(row.secret_sealed, owner=row.id, row=row.id, purpose=RAIL_SECRET_PURPOSE)
        except SealBroken as error:
            get_logger().error(LogEvent.RAIL_UNUSABLE, rail=row.name, kind=row.kind, error=str(error))
            return None
        BREAKER_OPEN.labels(rail=row.name).set(0)
        return HttpRail(
            session=self._session,
            base_url=URL(row.base_url, encoded=True),
            secret=secret.decode(),
            authoritative=row.authoritative,
            lag_seconds=row.lag_seconds,
            concurrency=row.concurrency,
            breaker=Breaker(
                failures_max=self._settings.rail_breaker_failures,
                rest_seconds=self._settings.rail_breaker_rest_seconds,
                changed=partial(_note_breaker, row.name),
            ),
        )


def _note_breaker(name: str, is_open: bool) -> None:
    BREAKER_OPEN.labels(rail=name).set(is_open)
    event = LogEvent.RAIL_BREAKER_OPENED if is_open else LogEvent.RAIL_BREAKER_CLOSED
    get_logger().warning(event, rail=name)
