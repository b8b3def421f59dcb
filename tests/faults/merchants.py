"""A merchant as the fault tests play it: sends creates, hangs up, repeats what got no answer; and the state afterwards."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final
from uuid import UUID

import aiohttp
import asyncpg

from common.db.engine import Engine
from common.db.invariants import verify
from tests.factories import Merchant, fetch
from tests.faults.locks import Superuser

CREATE_PATH: Final = "/api/v1/payouts"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came, and the seconds it took."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]
    seconds: float

    def assert_unavailable(self) -> None:
        """A 503 of the contract's shape, which says when to come back."""
        assert self.status == 503, self
        assert self.body["message"] == "Service unavailable. Repeat the same request."
        assert self.body["code"] == self.body["error"]["code"] == "unavailable"
        assert self.body["error"]["message"] == self.body["message"]
        assert int(self.headers["Retry-After"]) >= 1


class Sender:
    """Sends a merchant's signed requests to one address, each over a connection of the session's pool."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, merchant: Merchant) -> None:
        self._session = session
        self.base_url = base_url
        self.merchant = merchant

    async def create(self, body: bytes) -> Answer:
        """`POST /payouts`. Raises: `aiohttp.ClientError` when there is no answer."""
        return await self.request("POST", CREATE_PATH, body)

    async def request(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Any signed request. Raises: `aiohttp.ClientError` when there is no answer."""
        started = monotonic()
        headers = self.merchant.headers(method, path, body)
        async with self._session.request(method, self.base_url + path, data=body or None, headers=headers) as response:
            answer = await response.json()
            return Answer(response.status, answer, dict(response.headers), monotonic() - started)


@asynccontextmanager
async def sender(base_url: str, merchant: Merchant, *, keep_alive: bool = True) -> AsyncIterator[Sender]:
    """A sender with connections of its own; without `keep_alive` each request opens one, which any gateway may take."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=not keep_alive)) as session:
        yield Sender(session, base_url, merchant)


@asynccontextmanager
async def raw_request(
    base_url: str, merchant: Merchant, body: bytes, *, send_bytes: int
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A signed create on a bare connection: all of its head, that many bytes of its body; hangs up at the end."""
    host, _, port = base_url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    headers = merchant.headers("POST", CREATE_PATH, body) | {"Host": host, "Content-Length": str(len(body))}
    head = f"POST {CREATE_PATH} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    try:
        writer.write(head.encode() + b"\r\n" + body[:send_bytes])
        await writer.drain()
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


@dataclass(frozen=True, slots=True)
class Stored:
    """What the tables say of one (shop, external_id)."""

    payouts: int
    holds: int
    amount_minor: int


async def find_stored(owner: Engine, shop_id: UUID, external_id: str) -> Stored:
    """How often a payout is there, how often its money is held, and how much."""
    (row,) = await fetch(
        owner,
        """
        SELECT count(DISTINCT p.id) AS payouts, count(e.seq) AS holds, coalesce(sum(e.amount_minor), 0)::bigint AS amount
          FROM payouts p LEFT JOIN entries e ON e.payout_id = p.id AND e.kind = 'hold'
         WHERE p.shop_id = :shop_id AND p.external_id = :external_id
        """,
        shop_id=shop_id,
        external_id=external_id,
    )
    return Stored(row.payouts, row.holds, row.amount)


async def find_held(owner: Engine, shop_id: UUID) -> int:
    """What the shop's account holds, in minor units."""
    (row,) = await fetch(owner, "SELECT held_minor FROM accounts WHERE shop_id = :shop_id", shop_id=shop_id)
    held: int = row.held_minor
    return held


async def assert_invariants(owner: Engine) -> None:
    """Every rule of the ledger's checker holds."""
    broken = {finding.rule.name: finding.offenders for finding in await verify(owner) if finding.count}
    assert not broken, broken


def external_id_of(body: bytes) -> str:
    """The external_id in a create's body."""
    external_id: str = json.loads(body)["external_id"]
    return external_id


@asynccontextmanager
async def account_locked(owner: Engine, shop_id: UUID) -> AsyncIterator[None]:
    """Somebody else holds a shop's account for the length of the context."""
    # A session of its own: the pool's few are for the test itself.
    somebody = await asyncpg.connect(owner.url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        async with somebody.transaction():
            await somebody.execute("SET LOCAL ROLE payouts_owner")
            await somebody.execute("SELECT FROM accounts WHERE shop_id = $1 FOR UPDATE", shop_id)
            yield
    finally:
        await somebody.close()


async def count_lock_waiters(superuser: Superuser, application: str) -> int:
    """How many sessions of applications whose names begin so wait for a lock right now."""
    waiting: int = await superuser.fetchval(
        """
        SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND application_name LIKE $1 || '%' AND wait_event_type = 'Lock'
        """,
        application,
    )
    return waiting
