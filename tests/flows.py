"""The way of a payout in steps that a test can take one by one, each through the product's own code and roles."""

import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from sqlalchemy.engine import make_url

from common.db.checks import begin_checks, check_step
from common.db.due import Claim
from common.db.engine import Engine, Tx, create_engine, in_transaction
from common.db.invariants import verify
from common.db.lanes import FIRST_LANE, ClaimedCallback, Lease, Room, claim_in_turn, release_lapsed, wake_lanes
from common.db.payins import append_payin
from common.errors import PayoutsError
from common.settings import Settings
from gateway.deciding import Accepted, Order, decide_batch
from tests.conftest import Server
from tests.factories import Merchant, add_funded_merchant, execute, fetch, new_payin, order, settings
from worker.claiming import claim_calls
from worker.collecting import Collector
from worker.conclusions import Call, Ended, Terms
from worker.rails import Rail, Rails
from worker.rails.sandbox import SandboxRail
from worker.recording import record
from worker.settlement import Settler

DRAIN_SECONDS = 20.0
# Enough for every worker of a test to be in a transaction at the same time.
POOL_MAX = 16
# For an account that another transaction of the test holds; longer than any takes.
LOCK_WAIT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Desk:
    """A migrated database and the engines that act on it, one per role."""

    url: str
    settings: Settings
    owner: Engine
    gateway: Engine
    worker: Engine

    async def merchant(self, **options: Any) -> Merchant:
        """A merchant with money."""
        return await add_funded_merchant(self.owner, self.settings, **options)

    async def accept(self, *orders: Order) -> list[Accepted | PayoutsError]:
        """Decide orders as one batch of a gateway."""

        async def work(tx: Tx) -> Sequence[Any]:
            return await decide_batch(tx, orders, wait_seconds=LOCK_WAIT_SECONDS)

        return list(await in_transaction(self.gateway, work))

    async def create(self, merchant: Merchant, **fields: Any) -> UUID:
        """A payout that is accepted; its id."""
        (payout_id,) = await self.create_many(merchant, 1, **fields)
        return payout_id

    async def create_many(self, merchant: Merchant, count: int, **fields: Any) -> list[UUID]:
        """As many payouts of one shop, in batches; their ids."""
        orders = [order(self.settings, merchant.shop, **fields) for _ in range(count)]
        verdicts = [verdict for at in range(0, count, 128) for verdict in await self.accept(*orders[at : at + 128])]
        assert all(isinstance(verdict, Accepted) for verdict in verdicts), verdicts
        return [item.id for item in orders]

    async def create_payin(self, merchant: Merchant, **fields: Any) -> UUID:
        """A payin that is stored and due; its id."""
        payin = new_payin(merchant.shop, **fields)
        await in_transaction(self.gateway, lambda tx: append_payin(tx, payin))
        return payin.id

    async def collect(self, rails: Rails | None = None, **overrides: Any) -> None:
        """Ask about payins until nothing is due; every answer is recorded."""
        config = replace(self.settings, **overrides)
        collector = Collector(self.worker, rails if rails is not None else {"sandbox": self.sandbox()}, config)
        while await collector.run_round():
            await collector.drain(DRAIN_SECONDS)

    def settler(self, rails: Rails | None = None, **overrides: Any) -> Settler:
        """A settling worker of its own, by default with the sandbox rail; `overrides` are fields of the settings."""
        config = replace(self.settings, **overrides)
        return Settler(self.worker, config.keyring, rails if rails is not None else {"sandbox": self.sandbox()}, config)

    def sandbox(self, settle_seconds: float = 0.0) -> Rail:
        """The sandbox rail on this database."""
        return SandboxRail(self.worker, settle_seconds=settle_seconds)

    async def settle(self, settler: Settler | None = None) -> None:
        """Rounds until nothing is due; every call has ended and is recorded."""
        settler = settler or self.settler()
        while await settler.run_round():
            await settler.drain(DRAIN_SECONDS)

    async def claim(
        self, rail: str = "sandbox", *, lag_seconds: float = 0.0, start_until: float = math.inf
    ) -> list[Call]:
        """What a worker does before it calls a rail, and nothing more: as if it were killed or paused there."""
        work = partial(
            claim_calls,
            claim=Claim(rail, uuid4(), lease_seconds=60.0, claim_max=128, shop_max=128, shops_max=128),
            after_shop=UUID(int=0),
            busy=Counter(),
            terms=Terms(start_until, lag_seconds),
        )
        _, calls = await in_transaction(self.worker, work, attempts_max=1)
        return calls

    async def record(self, *ended: Ended) -> None:
        """What a worker does with answers, as one batch."""
        await record(self.worker, ended, wait_seconds=LOCK_WAIT_SECONDS, attempts_max=1)

    async def make_due(self, *payout_ids: UUID) -> None:
        """Travel to the time when these payouts, or all, are due, leases included."""
        await execute(
            self.owner,
            "UPDATE payout_due SET due_at = now() - interval '1 second'"
            " WHERE cardinality(CAST(:ids AS uuid[])) = 0 OR payout_id = ANY (CAST(:ids AS uuid[]))",
            ids=list(payout_ids),
        )

    async def make_payins_due(self) -> None:
        """Travel to the time when all payins are due, leases included."""
        await execute(self.owner, "UPDATE payin_due SET due_at = now() - interval '1 second'")

    async def payin_state(self, payin_id: UUID) -> str:
        """The state of a payin."""
        return str((await self.one("SELECT state FROM payins WHERE id = :id", id=payin_id)).state)

    async def one(self, query: str, **values: Any) -> Any:
        """The only row of a query."""
        (row,) = await fetch(self.owner, query, **values)
        return row

    async def count(self, table: str, where: str = "true", **values: Any) -> int:
        """How many rows of a table there are."""
        return int((await self.one(f"SELECT count(*) AS n FROM {table} WHERE {where}", **values)).n)

    async def state(self, payout_id: UUID) -> str:
        """The state of a payout."""
        row = await self.one("SELECT state FROM payouts WHERE id = :id", id=payout_id)
        return str(row.state)

    async def attempts(self, payout_id: UUID) -> list[tuple[str, str | None]]:
        """What was tried for a payout: action and outcome, in order."""
        query = "SELECT action, outcome FROM payout_attempts WHERE payout_id = :id ORDER BY attempt_no"
        return [(row.action, row.outcome) for row in await fetch(self.owner, query, id=payout_id)]

    async def entries(self, payout_id: UUID) -> list[str]:
        """How a payout's money moved: the kinds of its entries, in order."""
        query = "SELECT kind FROM entries WHERE payout_id = :id ORDER BY account_id, seq"
        return [row.kind for row in await fetch(self.owner, query, id=payout_id)]

    async def balance(self, merchant: Merchant) -> tuple[int, int]:
        """What is posted and what is held, in minor units."""
        query = "SELECT posted_minor, held_minor FROM accounts WHERE id = :id"
        row = await self.one(query, id=merchant.shop.account_id)
        return row.posted_minor, row.held_minor


@asynccontextmanager
async def desk(database_url: str, **overrides: str) -> AsyncIterator[Desk]:
    """A desk for the length of a test; `overrides` are environment variables."""
    config = settings(database_url, **overrides)
    owner, gateway, worker = (
        create_engine(config, role=role, application="payouts-tests", pool_max=POOL_MAX)
        for role in ("payouts_owner", "payouts_gateway", "payouts_worker")
    )
    try:
        yield Desk(database_url, config, owner, gateway, worker)
    finally:
        for pool in (owner, gateway, worker):
            await pool.dispose()


@asynccontextmanager
async def cloned(server: Server, template: str) -> AsyncIterator[str]:
    """The URL of a database of one's own, for whoever needs it longer or shorter than a test."""
    name = f"test_{uuid4().hex}"
    login = make_url(server.login_url).username
    await server.run(f'CREATE DATABASE {name} TEMPLATE {template} OWNER "{login}" STRATEGY file_copy')
    try:
        yield server.url(name)
    finally:
        await server.run(f"DROP DATABASE {name} WITH (FORCE)")


async def forge(server: Server, url: str, statement: str) -> None:
    """Change rows behind the schema's back: as a superuser, with no trigger and no foreign key in force."""
    database = make_url(server.admin_url).set(database=make_url(url).database)
    connection = await asyncpg.connect(database.render_as_string(hide_password=False))
    try:
        await connection.execute("SET session_replication_role = replica")
        await connection.execute(statement)
    finally:
        await connection.close()


async def obstruct(owner: Engine, payout_id: UUID) -> None:
    """Have the database refuse every further move of a payout, as a rule would that nobody has thought of."""
    statement = (
        f"CREATE TRIGGER obstructed BEFORE UPDATE ON payouts FOR EACH ROW WHEN (OLD.id = '{payout_id}')"
        " EXECUTE FUNCTION refuse_change()"
    )
    await execute(owner, statement)


async def let_pass(owner: Engine) -> None:
    """Take the obstruction away."""
    await execute(owner, "DROP TRIGGER obstructed ON payouts")


async def broken_rules(owner: Engine) -> dict[str, tuple[str, ...]]:
    """The rules of the ledger that do not hold, and the first offenders of each."""
    return {finding.rule.name: finding.offenders for finding in await verify(owner) if finding.count}


async def pass_over(worker: Engine, *, rows_max: int) -> dict[str, set[str]]:
    """The same, found in steps: one pass over everything, unless others take part in it."""
    await in_transaction(worker, begin_checks)
    found: dict[str, set[str]] = {}
    while step := await in_transaction(worker, lambda tx: check_step(tx, rows_max=rows_max)):
        for broken in step.broken:
            found.setdefault(broken.rule.name, set()).update(broken.offenders)
    return found


async def assert_sound(owner: Engine) -> None:
    """Every rule of the ledger holds."""
    assert await broken_rules(owner) == {}


async def take_callbacks(tx: Tx, token: UUID, claim_max: int = 100) -> list[ClaimedCallback]:
    """What a worker with room for so many claims after a look at everything."""
    await release_lapsed(tx)
    await wake_lanes(tx, behind=FIRST_LANE, overdue_seconds=0.0, lanes_max=10_000)
    return await claim_in_turn(tx, Lease(token, 60.0), _room(claim_max))


def _room(total: int) -> Room:
    return Room(total=total, retries=total, slow=total, lane=total, busy={})


async def pass_callback_time(owner: Engine) -> None:
    """Travel to the time when every callback is due, leases included, and lanes have nothing against their receivers."""
    await execute(owner, "UPDATE callback_due SET due_at = now() - interval '1 second'")
    await heal_lanes(owner)


async def heal_lanes(owner: Engine) -> None:
    """Have lanes forget whatever went wrong, and look when their next callback is due."""
    await execute(
        owner,
        "UPDATE callback_lanes SET cap = 256, trouble = 0, opened = 0, blocked_until = '-infinity', ready_at = now()"
        " WHERE held_at IS NULL",
    )
