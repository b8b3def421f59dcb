"""The plans of the hot statements on 50,000 payouts that nobody has ever analysed: by index, whatever the planner guesses.

A statement is taken on its way to the driver, so that what is explained is what the product sends, parameters included.
"""

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from time import time
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import CursorResult, event, text
from sqlalchemy.engine import make_url

from common.db.accepting import accept_unopposed
from common.db.ages import find_ages
from common.db.callbacks import (
    Again,
    finish_callbacks,
    list_put_aside,
    lock_callback_due,
    reschedule_callbacks,
    resend_callback,
)
from common.db.checks import begin_checks, check_step
from common.db.deliveries import find_callbacks, find_payin_callbacks
from common.db.due import (
    FIRST_TO_EXPIRE,
    Claim,
    FinishedAttempt,
    claim_due,
    claim_due_ids,
    find_expired,
    find_histories,
    find_rails_gone,
    finish_attempts,
    lock_due,
)
from common.db.ending import end_unopposed
from common.db.engine import Engine, Tx
from common.db.exports import Wanted, find_exported_shops, stream_callbacks, stream_entries, stream_payouts
from common.db.feed import FEED_BEGIN, Place, read_feed
from common.db.invariants import ACCOUNTS, RULES, WALKS, Walk
from common.db.lanes import FIRST_LANE, Lease, Room, claim_in_turn, claim_told_of, release_lapsed, wake_lanes
from common.db.ledger import find_balance
from common.db.merchants import find_active_shops, find_api_keys
from common.db.payins import append_payin, claim_questions, find_payin, lock_payins
from common.db.payouts import find_by_external_ids, find_moves, find_payout, lock_payouts
from common.db.rail_events import find_rail_events_due, lock_rail_events
from common.db.rails import find_rail_secrets
from common.db.reconciling import find_by_references, find_moved
from common.db.resolutions import count_doubts, list_waiting
from common.db.sealed import COLUMNS, SealedValue, count_sealed, find_sealed_otherwise, save_sealed_anew
from common.db.stuck import TooOld, find_stuck
from common.db.webhook_secrets import find_webhook_secrets
from gateway.deciding import Order, decide_batch
from tests.conftest import Server
from tests.factories import Merchant, engine, execute, fetch, new_payin, order
from tests.flows import LOCK_WAIT_SECONDS, Desk, cloned, desk, forge, take_callbacks
from worker.callbacks.recording import Ended as Delivered
from worker.callbacks.recording import record_attempts
from worker.callbacks.send import Attempt
from worker.claiming import claim_calls
from worker.conclusions import Ended, Terms
from worker.crediting import record_answer
from worker.rails import Answer, Outcome
from worker.recording import find_endings, record_answers

PAYOUTS, SHOPS, LANES = 50_000, 5, 1_000
BATCH = 128
ROOM = Room(total=BATCH, retries=BATCH, slow=BATCH, lane=64, busy={})
WATCHED = (
    "payouts",
    "payout_due",
    "payout_attempts",
    "callback_due",
    "callback_lanes",
    "callbacks",
    "events",
    "entries",
    "callback_attempts",
    "payins",
    "payin_due",
    "payin_moves",
    "payin_words",
    "webhook_secrets",
    "rail_events",
    "discrepancies",
    "resolutions",
)
# By name, the weeks of the log of attempts included.
_WATCHED = f"(relname = ANY (ARRAY{list(WATCHED)}) OR relname LIKE 'callback_attempts%')"


@dataclass(frozen=True, slots=True)
class Crowd:
    """A database full of payouts, some of their ids, and where they came from."""

    url: str
    keys: list[tuple[UUID, UUID]]
    external_ids: list[tuple[UUID, str]]
    payins: list[tuple[UUID, str, str]]
    merchant: Merchant

    @property
    def ids(self) -> list[UUID]:
        """The ids of payouts, and as well of their events."""
        return [payout_id for payout_id, _ in self.keys]


def _fill(shops: int, lanes: int, due: int) -> str:
    """Payouts, half of them tried, each with an event and a callback. `lanes` and `due`: how many of each shop."""
    each = PAYOUTS // shops
    return f"""
    WITH fresh AS MATERIALIZED (
      SELECT uuidv7() AS id, a.id AS account_id, a.shop_id, a.posted_minor, a.last_seq,
             row_number() OVER (PARTITION BY a.id) AS n
        FROM accounts a CROSS JOIN generate_series(1, {each})),
    due AS (
      INSERT INTO payout_due (payout_id, shop_id, rail, due_at)
      SELECT id, shop_id, 'sandbox', now() + make_interval(secs => n - {due}) FROM fresh),
    holds AS (
      INSERT INTO entries (account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, held_delta_minor,
                           posted_after_minor, held_after_minor, payout_id)
      SELECT account_id, last_seq + n, shop_id, 'hold', 'holds', 1, 0, 1, posted_minor, n, id FROM fresh),
    tried AS (
      INSERT INTO payout_attempts (payout_id, shop_id, attempt_no, action, rail, reference, finished_at, outcome)
      SELECT id, shop_id, 1, 'submit', 'sandbox', id::text, now(), 'not_accepted' FROM fresh WHERE n % 2 = 0),
    told AS (
      INSERT INTO events (id, shop_id, payout_id, sequence, type, body)
      SELECT id, shop_id, id, 1, 'payout.success', '{{}}' FROM fresh),
    called AS (
      INSERT INTO callbacks (event_id, shop_id, payout_id, url) SELECT id, shop_id, id, 'http://localhost' FROM fresh),
    shares AS (
      INSERT INTO callback_shares (merchant_id) SELECT id FROM merchants),
    lanes AS (
      INSERT INTO callback_lanes (id, shop_id, merchant_id, origin, cap, latency_ms, ready_at)
      SELECT callback_lane_id(s.id, 'http://' || n), s.id, s.merchant_id, 'http://' || n, 256, 5,
             CASE WHEN n % 4 < 3 THEN now() ELSE 'infinity' END
        FROM shops s CROSS JOIN generate_series(0, {lanes - 1}) n),
    again AS (
      INSERT INTO callback_due (event_id, shop_id, lane_id, in_lane, due_at)
      SELECT id, shop_id, callback_lane_id(shop_id, 'http://' || n % {lanes}), n % 3 > 0,
             now() + make_interval(secs => n - {due}) FROM fresh),
    moved AS (
      UPDATE accounts SET held_minor = {each}, last_seq = last_seq + {each})
    INSERT INTO payouts (id, shop_id, account_id, external_id, amount_minor, currency, recipient_sealed,
                         recipient_masked, recipient_digest, hold_seq, version)
    SELECT id, shop_id, account_id, 'CROWD-' || n, 1, 'BDT', '', '*', sha256('x'), last_seq + n,
           CASE WHEN n % 2 = 0 THEN 3 ELSE 1 END FROM fresh
"""


def _fill_payins(shops: int, due: int) -> str:
    """Pending payins; `due`: how many of each shop."""
    return f"""
    WITH fresh AS MATERIALIZED (
      SELECT uuidv7() AS id, a.id AS account_id, a.shop_id, row_number() OVER (PARTITION BY a.id) AS n
        FROM accounts a CROSS JOIN generate_series(1, {PAYOUTS // shops})),
    due AS (
      INSERT INTO payin_due (payin_id, shop_id, rail, due_at)
      SELECT id, shop_id, 'sandbox', now() + make_interval(secs => n - {due}) FROM fresh),
    heard AS (
      INSERT INTO payin_words (payin_id, shop_id, word_no, source, rail, outcome)
      SELECT id, shop_id, 1, 'event', 'sandbox', 'declined' FROM fresh)
    INSERT INTO payins (id, shop_id, account_id, external_id, amount_minor, currency, rail, reference)
    SELECT id, shop_id, account_id, 'CROWD-' || n, 1000, 'BDT', 'sandbox', id FROM fresh
"""


async def _gather(server: Server, url: str, *, shops: int, lanes: int, due: int) -> Crowd:
    """Fill an empty database, of which the planner hears nothing."""
    async with desk(url) as working:
        for (table,) in await fetch(working.owner, f"SELECT relname FROM pg_class WHERE {_WATCHED} AND relkind = 'r'"):
            await execute(working.owner, f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
        merchants = [await working.merchant() for _ in range(shops)]
        await forge(server, url, _fill(shops, lanes, due))
        await forge(server, url, _fill_payins(shops, due))
        await assert_counted(working)
        some = await fetch(working.owner, f"SELECT id, shop_id, external_id FROM payouts ORDER BY id LIMIT {BATCH}")
        keys = [(row.id, row.shop_id) for row in some]
        waiting = await fetch(
            working.owner, f"SELECT shop_id, external_id, reference FROM payins ORDER BY id LIMIT {BATCH}"
        )
        payins = [(row.shop_id, row.external_id, row.reference) for row in waiting]
        return Crowd(url, keys, [(row.shop_id, row.external_id) for row in some], payins, merchants[0])


@pytest.fixture(scope="module")
def crowd(server: Server, template: str) -> Iterator[Crowd]:
    cloning = cloned(server, template)

    async def build() -> Crowd:
        return await _gather(server, await cloning.__aenter__(), shops=SHOPS, lanes=LANES, due=500)

    with asyncio.Runner() as runner:
        yield runner.run(build())
        runner.run(cloning.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def flood(server: Server, template: str) -> Iterator[Crowd]:
    """All of one shop, with one lane, and all of it due: and the planner knows."""
    cloning = cloned(server, template)

    async def build() -> Crowd:
        url = await cloning.__aenter__()
        crowd = await _gather(server, url, shops=1, lanes=1, due=PAYOUTS)
        await _analyze(server, url)
        return crowd

    with asyncio.Runner() as runner:
        yield runner.run(build())
        runner.run(cloning.__aexit__(None, None, None))


async def _analyze(server: Server, url: str) -> None:
    """Have the planner know everything."""
    database = make_url(server.admin_url).set(database=make_url(url).database)
    admin = await asyncpg.connect(database.render_as_string(hide_password=False))
    await admin.execute("VACUUM (ANALYZE)")
    await admin.close()


async def assert_counted(working: Desk) -> None:
    """As many as promised, and the planner knows nothing of them."""
    assert await working.count("payouts") == PAYOUTS
    assert await working.count("pg_stats", "tablename = 'payouts'") == 0


@contextmanager
def _statements(pool: Engine) -> Iterator[list[tuple[str, Any]]]:
    """What goes to the driver, with its parameters."""
    sent: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> None:
        sent.append((statement, parameters))

    event.listen(pool.sync_engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(pool.sync_engine, "before_cursor_execute", note)


async def _plans(
    url: str, role: str, work: Callable[[Tx], Awaitable[Any]], *, elsewhere: str | None = None
) -> list[dict[str, Any]]:
    """The plans of all statements of some work, each as it was sent; with `elsewhere`, as they would be in that database."""
    pool, other = engine(url, role=role), engine(elsewhere or url, role=role)
    try:
        async with pool.connect() as tx:
            with _statements(pool) as sent:
                await work(tx)
            assert sent
        async with other.connect() as tx:
            return await _explain_all(tx, sent)
    finally:
        await pool.dispose()
        await other.dispose()


async def _explain_all(tx: Tx, sent: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    plans: list[dict[str, Any]] = []
    generic = await tx.scalar(text("SHOW plan_cache_mode")) == "force_generic_plan"
    for statement, parameters in sent:
        explain = _explain_generic if generic else _explain
        plan = (await explain(tx, statement, parameters)).scalar_one()
        plans += plan if isinstance(plan, list) else json.loads(plan)
    return [item["Plan"] for item in plans]


async def _explain(tx: Tx, statement: str, parameters: Any) -> CursorResult[Any]:
    return await tx.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters)


async def _explain_generic(tx: Tx, statement: str, parameters: Any) -> CursorResult[Any]:
    """The plan that does for all parameters, as a session makes it once: whatever they are now, it does not see them."""
    nothing = f"({', '.join(['NULL'] * len(parameters))})" if parameters else ""
    await tx.exec_driver_sql(f"PREPARE hot AS {statement}")
    try:
        return await tx.exec_driver_sql(f"EXPLAIN (FORMAT JSON) EXECUTE hot{nothing}")
    finally:
        await tx.exec_driver_sql("DEALLOCATE hot")


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


def _claim() -> Claim:
    return Claim("sandbox", uuid4(), lease_seconds=60.0, claim_max=BATCH, shop_max=BATCH, shops_max=64)


Work = Callable[[Crowd], Callable[[Tx], Awaitable[Any]]]
GATEWAY, WORKER, OPS, READONLY, SEALER = (
    f"payouts_{name}" for name in ("gateway", "worker", "ops", "readonly", "sealer")
)
SEALED_PAYOUTS = next(column for column in COLUMNS if column.table == "payouts")


async def _read_all(stream: Any, tx: Tx, crowd: Crowd) -> None:
    """What an export reads of one merchant among others."""
    wanted = Wanted(crowd.merchant.code, None, datetime(2026, 1, 1, tzinfo=UTC), datetime(2999, 1, 1, tzinfo=UTC))
    async for _ in stream(tx, wanted, await find_exported_shops(tx, wanted)):
        pass


FIRST_SHOP = UUID(int=0)

# Both ways of accepting what nothing speaks against.
_ACCEPT: dict[str, Callable[[Tx, Sequence[Order]], Awaitable[Any]]] = {
    "unopposed": lambda tx, orders: accept_unopposed(
        tx, orders, wait_seconds=LOCK_WAIT_SECONDS, until=datetime(2999, 1, 1, tzinfo=UTC)
    ),
    "careful": lambda tx, orders: decide_batch(tx, orders, wait_seconds=LOCK_WAIT_SECONDS),
}


async def _end_unopposed(tx: Tx, answers: Sequence[Ended]) -> int:
    ended = await end_unopposed(tx, find_endings(answers), wait_seconds=LOCK_WAIT_SECONDS)
    rest = [item for item in answers if item.call.payout.id not in ended]
    return len(ended) + (await _end_carefully(tx, rest) if rest else 0)


async def _end_carefully(tx: Tx, answers: Sequence[Ended]) -> int:
    return len((await record_answers(tx, answers, wait_seconds=LOCK_WAIT_SECONDS)).events)


# And both of ending; how many ended.
_RECORD: dict[str, Callable[[Tx, Sequence[Ended]], Awaitable[int]]] = {
    "unopposed": _end_unopposed,
    "careful": _end_carefully,
}
_EACH_WAY = pytest.mark.parametrize("way", ["unopposed", "careful"])


HOT: dict[str, tuple[str, Work]] = {
    "find_by_external_ids": (GATEWAY, lambda crowd: lambda tx: find_by_external_ids(tx, crowd.external_ids)),
    "find_by_external_ids of one": (GATEWAY, lambda crowd: lambda tx: find_by_external_ids(tx, crowd.external_ids[:1])),
    "find_api_keys": (GATEWAY, lambda crowd: lambda tx: find_api_keys(tx, [crowd.merchant.api_key, "nobody's"])),
    "find_active_shops": (GATEWAY, lambda crowd: lambda tx: find_active_shops(
        tx, [(crowd.merchant.shop.merchant_id, None), (crowd.merchant.shop.merchant_id, crowd.merchant.shop.code)])),
    "find_rail_secrets": (GATEWAY, lambda _crowd: lambda tx: find_rail_secrets(tx, ["sandbox", "nobody's"])),
    "find_payout": (GATEWAY, lambda crowd: lambda tx: find_payout(tx, *crowd.external_ids[0])),
    "find_balance": (GATEWAY, lambda crowd: lambda tx: find_balance(tx, crowd.merchant.shop.account_id)),
    "claim_due": (WORKER, lambda _crowd: lambda tx: claim_due(tx, _claim(), FIRST_SHOP, {})),
    "claim_due of a busy worker": (
        WORKER,
        lambda crowd: lambda tx: claim_due(tx, _claim(), FIRST_SHOP, Counter(shop for _, shop in crowd.keys)),
    ),
    "find_rails_gone": (WORKER, lambda _crowd: find_rails_gone),
    "lock_payouts": (WORKER, lambda crowd: lambda tx: lock_payouts(tx, crowd.ids)),
    "lock_due": (WORKER, lambda crowd: lambda tx: lock_due(tx, crowd.ids)),
    "find_histories": (WORKER, lambda crowd: lambda tx: find_histories(tx, crowd.ids)),
    "finish_attempts": (
        WORKER,
        lambda crowd: lambda tx: finish_attempts(tx, [FinishedAttempt(*key, 1, "unknown", None) for key in crowd.keys]),
    ),
    "wake_lanes": (
        WORKER, lambda _crowd: lambda tx: wake_lanes(tx, behind=FIRST_LANE, overdue_seconds=0.0, lanes_max=BATCH)),
    "claim_in_turn": (WORKER, lambda _crowd: lambda tx: claim_in_turn(tx, Lease(uuid4(), 60.0), ROOM)),
    "release_lapsed": (WORKER, lambda _crowd: release_lapsed),
    "find_webhook_secrets": (
        WORKER, lambda crowd: lambda tx: find_webhook_secrets(tx, {shop for _, shop in crowd.keys})),
    "claim_due_ids": (WORKER, lambda crowd: lambda tx: claim_due_ids(tx, _claim(), crowd.ids, {})),
    "claim_told_of": (
        WORKER,
        lambda crowd: lambda tx: claim_told_of(tx, Lease(uuid4(), 60.0), ROOM, crowd.ids[:BATCH])),
    "lock_payouts to cancel": (GATEWAY, lambda crowd: lambda tx: lock_payouts(tx, crowd.ids[:1])),
    "lock_due to cancel": (GATEWAY, lambda crowd: lambda tx: lock_due(tx, crowd.ids[:1])),
    "find_moves": (GATEWAY, lambda crowd: lambda tx: find_moves(tx, *crowd.keys[0])),
    "find_expired": (WORKER, lambda _crowd: lambda tx: find_expired(tx, behind=FIRST_TO_EXPIRE, payouts_max=128)),
    "find_rail_events_due": (WORKER, lambda _crowd: lambda tx: find_rail_events_due(tx, events_max=64, payins=False)),
    "lock_rail_events": (WORKER, lambda crowd: lambda tx: lock_rail_events(tx, [("sandbox", str(i)) for i in crowd.ids])),
    "lock_callback_due": (WORKER, lambda crowd: lambda tx: lock_callback_due(tx, crowd.keys)),
    "finish_callbacks": (WORKER, lambda crowd: lambda tx: finish_callbacks(tx, dict.fromkeys(crowd.keys, "delivered"))),
    "reschedule_callbacks": (
        WORKER, lambda crowd: lambda tx: reschedule_callbacks(tx, dict.fromkeys(crowd.keys, Again(1, 60.0)))),
    "find_payin": (GATEWAY, lambda crowd: lambda tx: find_payin(tx, *crowd.payins[0][:2])),
    "claim_questions": (WORKER, lambda _crowd: lambda tx: claim_questions(
        tx, rail="sandbox", token=uuid4(), lease_seconds=60.0, claim_max=32, lag_seconds=0.0)),
    "lock_payins": (WORKER, lambda crowd: lambda tx: lock_payins(tx, [reference for *_, reference in crowd.payins])),
    "count_doubts": (WORKER, lambda _crowd: count_doubts),
    "list_waiting": (OPS, lambda _crowd: lambda tx: list_waiting(tx, rows_max=50)),
    "find_ages": (WORKER, lambda _crowd: find_ages),
    "find_stuck": (READONLY, lambda _crowd: lambda tx: find_stuck(tx, TooOld(0.0, 0.0), now=time(), rows_max=21)),
    "find_by_references": (OPS, lambda crowd: lambda tx: find_by_references(
        tx, [*map(str, crowd.ids), *(reference for *_, reference in crowd.payins)])),
    "find_moved": (OPS, lambda _crowd: lambda tx: find_moved(
        tx, "sandbox", since=datetime(2026, 1, 1, tzinfo=UTC), until=datetime(2999, 1, 1, tzinfo=UTC), behind=None)),
    "find_sealed_otherwise": (SEALER, lambda _crowd: lambda tx: find_sealed_otherwise(
        tx, SEALED_PAYOUTS, key_id=2, behind=None, rows_max=500)),
    "count_sealed": (SEALER, lambda _crowd: lambda tx: count_sealed(tx, SEALED_PAYOUTS, behind=None)),
    "save_sealed_anew": (SEALER, lambda crowd: lambda tx: save_sealed_anew(
        tx, SEALED_PAYOUTS, [(SealedValue(payout_id, shop_id, b"another"), b"") for payout_id, shop_id in crowd.keys])),
    "stream_payouts": (READONLY, lambda crowd: lambda tx: _read_all(stream_payouts, tx, crowd)),
    "stream_entries": (READONLY, lambda crowd: lambda tx: _read_all(stream_entries, tx, crowd)),
    "stream_callbacks": (READONLY, lambda crowd: lambda tx: _read_all(stream_callbacks, tx, crowd)),
    "list_put_aside": (OPS, lambda _crowd: list_put_aside),
    "read_feed": (GATEWAY, lambda crowd: lambda tx: read_feed(
        tx, crowd.merchant.shop.id, after=FEED_BEGIN, with_payins=False, rows_max=201)),
    "read_feed to its end": (GATEWAY, lambda crowd: lambda tx: read_feed(
        tx, crowd.merchant.shop.id, after=Place(1 << 60, 0, UUID(int=0)), with_payins=True, rows_max=201)),
    "find_callbacks": (GATEWAY, lambda crowd: lambda tx: find_callbacks(tx, *crowd.keys[0], attempts_max=100)),
    "find_payin_callbacks": (
        GATEWAY, lambda crowd: lambda tx: find_payin_callbacks(tx, *crowd.keys[0], attempts_max=100)),
    "resend_callback": (GATEWAY, lambda crowd: lambda tx: resend_callback(tx, crowd.ids[0])),
}  # fmt: skip


# Where more than one index would do, and all but one read everything that waits.
INDEXES: dict[str, set[str]] = {
    "claim_due_ids": {"payout_due_pkey"},
    "claim_told_of": {"callback_due_by_lane", "callback_due_pkey"},
    "claim_in_turn": {"callback_due_by_lane"},
    "wake_lanes": {"callback_due_by_lane", "callback_due_fresh"},
    "release_lapsed": {"callback_due_leased"},
    "find_expired": {"payout_due_by_expiry"},
    "list_put_aside": {"callback_due_put_aside"},
}
# Some of its statements only speak of settings, and of how far the server's transactions are.
READS_NOTHING = {"read_feed", "read_feed to its end"}


@pytest.mark.parametrize("name", HOT)
async def test_goes_by_index(crowd: Crowd, name: str) -> None:
    role, work = HOT[name]
    indexes: set[str] = set()
    for plan in await _plans(crowd.url, role, work(crowd)):
        read = {(node["Node Type"], node["Relation Name"]) for node in _nodes(plan) if "Relation Name" in node}
        assert read or name in READS_NOTHING, "the statement reads nothing"
        scanned = {relation for kind, relation in read if kind == "Seq Scan"}
        indexes |= {node["Index Name"] for node in _nodes(plan) if "Index Name" in node}
        assert scanned & set(WATCHED) == set()
    if name in INDEXES:
        assert {index for index in indexes if "_due_" in index} == INDEXES[name]


@pytest.fixture(scope="module")
def empty(server: Server, template: str) -> Iterator[str]:
    """A database of which the planner knows that there is nothing in it."""
    cloning = cloned(server, template)

    async def build() -> str:
        url = await cloning.__aenter__()
        await _analyze(server, url)
        return url

    with asyncio.Runner() as runner:
        yield runner.run(build())
        runner.run(cloning.__aexit__(None, None, None))


PLANNED_ONCE = (GATEWAY, WORKER, SEALER)


@pytest.mark.parametrize("name", [name for name, (role, _) in HOT.items() if role in PLANNED_ONCE])
async def test_an_index_is_entered_by_its_first_column_though_the_table_was_empty(
    crowd: Crowd, empty: str, name: str
) -> None:
    """Any way through nothing costs nothing; but a session keeps to the way that it has chosen when there is much."""
    role, work = HOT[name]
    async with desk(empty) as working:
        firsts = {
            row.name: row.first
            for row in await fetch(
                working.owner,
                "SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid, 1, true) AS first FROM pg_index",
            )
        }
    for plan in await _plans(crowd.url, role, work(crowd), elsewhere=empty):
        for node in _nodes(plan):
            if node.get("Relation Name") in WATCHED and "Index Cond" in node:
                entered = re.findall(r"\w+", node["Index Cond"])
                assert firsts[node["Index Name"]] in entered, (node["Index Name"], node["Index Cond"])


# What the gateway reads without a transaction around it: it would be of several moments, were it several statements.
ALONE = ("find_api_keys", "find_active_shops", "find_rail_secrets", "find_payout", "find_payin", "find_balance")


@pytest.mark.parametrize("name", ALONE)
async def test_what_needs_no_transaction_is_one_statement(crowd: Crowd, name: str) -> None:
    role, work = HOT[name]
    assert len(await _plans(crowd.url, role, work(crowd))) == 1


@pytest.mark.parametrize("name", [name for name, (role, _) in HOT.items() if role in (GATEWAY, WORKER)])
async def test_what_is_read_of_a_flood_does_not_grow_with_it(flood: Crowd, name: str) -> None:
    """A plan that is made once counts on a part of what there is, and would rather read all of it than look up that many."""
    role, work = HOT[name]
    pool = engine(flood.url, role=role)
    try:
        async with pool.connect() as tx:
            await work(flood)(tx)
            read = await _rows_read(tx)
            assert max(read.values(), default=0) <= 10 * BATCH, read
    finally:
        await pool.dispose()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
async def test_a_page_of_the_feed_reads_no_more_than_the_page_wherever_it_begins(crowd: Crowd, share: float) -> None:
    """In the order of its index, so that nothing is sorted; and from its place on, so that nothing is passed over."""
    async with desk(crowd.url) as working:
        behind = await fetch(
            working.owner,
            "SELECT CAST(e.txid AS text) AS txid, e.sequence, e.id FROM events e WHERE e.shop_id = :shop"
            " ORDER BY e.txid, e.sequence, e.id LIMIT 1 OFFSET :behind",
            shop=crowd.merchant.shop.id,
            behind=int(share * (PAYOUTS // SHOPS - 1)),
        )
        place = Place(int(behind[0].txid), behind[0].sequence, behind[0].id)

        async def read(tx: Tx) -> None:
            await read_feed(tx, crowd.merchant.shop.id, after=place, with_payins=True, rows_max=51)

        _, plan, *_ = await _plans(crowd.url, GATEWAY, read)
        nodes = list(_nodes(plan))
        assert [node["Node Type"] for node in nodes] == ["Limit", "Index Scan"]
        assert nodes[-1]["Index Name"] == "events_feed"
        assert "Filter" not in nodes[-1]
        async with working.gateway.connect() as tx:
            await read(tx)
            assert (await _rows_read(tx)).get("events", 0) <= 51
            assert await _scanned(tx) == {}


async def _scanned(tx: Tx) -> dict[str, int]:
    """The watched tables that this transaction has read from one end to the other, by whatever function, and how often."""
    scans = await tx.execute(
        text(f"SELECT relname, seq_scan FROM pg_stat_xact_user_tables WHERE {_WATCHED} AND seq_scan > 0")
    )
    return {row.relname: row.seq_scan for row in scans}


@_EACH_WAY
async def test_accepting_a_batch_scans_nothing(crowd: Crowd, way: str) -> None:
    """The guards' statements run inside functions, where EXPLAIN does not look: so it is counted what was read."""
    async with desk(crowd.url) as working, working.gateway.connect() as tx:
        orders = [order(working.settings, crowd.merchant.shop) for _ in range(BATCH)]
        await _ACCEPT[way](tx, orders)
        assert await _scanned(tx) == {}
        assert await tx.scalar(text("SELECT count(*) FROM payouts WHERE created_at = now()")) == BATCH


@_EACH_WAY
@pytest.mark.parametrize("outcome", [Outcome.PAID, Outcome.DECLINED, Outcome.SUBMITTED])
async def test_claiming_and_recording_a_batch_scans_nothing(crowd: Crowd, outcome: Outcome, way: str) -> None:
    async with desk(crowd.url) as working, working.worker.connect() as tx:
        _, calls = await claim_calls(tx, claim=_claim(), after_shop=FIRST_SHOP, busy=Counter(), terms=Terms(math.inf))
        assert len(calls) == BATCH
        assert await _scanned(tx) == {}
        code = "other" if outcome is Outcome.DECLINED else None
        count = await _RECORD[way](tx, [Ended(call, Answer(outcome, failure_code=code)) for call in calls])
        assert count == (0 if outcome is Outcome.SUBMITTED else BATCH)
        assert await _scanned(tx) == {}


@pytest.fixture(params=["crowd", "flood"])
def many(request: pytest.FixtureRequest) -> Crowd:
    """A crowd of which the planner knows nothing, or a flood of which it knows all."""
    found: Crowd = request.getfixturevalue(request.param)
    return found


@_EACH_WAY
async def test_what_a_batch_reads_does_not_depend_on_how_much_there_is(many: Crowd, way: str) -> None:
    """By index is not enough: an index can be read from one end to the other as well."""
    async with desk(many.url) as working:
        async with working.gateway.connect() as tx:
            orders = [order(working.settings, many.merchant.shop) for _ in range(BATCH)]
            await _ACCEPT[way](tx, orders)
            await _assert_read_few(tx)
        async with working.worker.connect() as tx:
            _, calls = await claim_calls(
                tx, claim=_claim(), after_shop=FIRST_SHOP, busy=Counter(), terms=Terms(math.inf)
            )
            await _assert_read_few(tx)
            answers = [Ended(call, Answer(Outcome.PAID)) for call in calls[: BATCH // 2]]
            answers += [Ended(call, Answer(Outcome.UNKNOWN)) for call in calls[BATCH // 2 :]]
            assert await _RECORD[way](tx, answers) == BATCH // 2
            await _assert_read_few(tx)


async def test_what_a_batch_of_callbacks_reads_of_a_flood_does_not_grow_with_it(flood: Crowd) -> None:
    attempt = Attempt(503, "http_5xx", b"", "127.0.0.1", 1, 0.0)
    async with desk(flood.url) as working, working.worker.connect() as tx:
        token = uuid4()
        claimed = await take_callbacks(tx, token, BATCH)
        assert claimed
        await _assert_read_few(tx)
        await record_attempts(tx, [Delivered(item, token, attempt, 0.0, 0.0) for item in claimed], now=0.0)
        await _assert_read_few(tx)


async def test_what_a_claim_of_questions_reads_of_a_flood_does_not_grow_with_it(flood: Crowd) -> None:
    async with desk(flood.url) as working, working.worker.connect() as tx:
        questions = await claim_questions(
            tx, rail="sandbox", token=uuid4(), lease_seconds=60.0, claim_max=32, lag_seconds=0.0
        )
        assert len(questions) == 32
        await _assert_read_few(tx)


@_EACH_WAY
async def test_sessions_that_began_on_an_empty_database_read_no_more_when_there_is_much(
    database_url: str, way: str
) -> None:
    """What they planned then is what they do now, in functions even where every statement of ours is planned anew.

    A table of a few pages may well be read whole, once for a batch; not once for each payout of it.
    """
    async with (
        desk(database_url) as working,
        working.gateway.connect() as accepting,
        working.worker.connect() as settling,
        working.worker.connect() as telling,
    ):
        shop = (await working.merchant()).shop
        attempt = Attempt(200, None, b"", "127.0.0.1", 1, 0.0)
        for _ in range(16):
            for tx in (accepting, settling, telling):
                await _end_counting(tx)
            orders = [order(working.settings, shop, callback_url="http://127.0.0.1:9/") for _ in range(BATCH)]
            await _ACCEPT[way](accepting, orders)
            accepted = await _rows_read(accepting)
            await accepting.commit()
            _, calls = await claim_calls(
                settling, claim=_claim(), after_shop=FIRST_SHOP, busy=Counter(), terms=Terms(math.inf)
            )
            answers = [Ended(call, Answer(Outcome.PAID)) for call in calls]
            assert await _RECORD[way](settling, answers) == BATCH
            settled = await _rows_read(settling)
            await settling.commit()
            token, told_count = uuid4(), 0
            while claimed := await take_callbacks(telling, token, BATCH):
                await record_attempts(telling, [Delivered(item, token, attempt, 0.0, 0.0) for item in claimed], now=0.0)
                told_count += len(claimed)
            assert told_count == BATCH
            told = await _rows_read(telling)
            await telling.commit()
            for read in (accepted, settled, told):
                assert max(read.values()) <= 50 * BATCH, read


@_EACH_WAY
@pytest.mark.parametrize("shops", [1, BATCH])
async def test_tables_that_were_nearly_empty_when_they_were_looked_at_are_not_read_from_end_to_end(
    server: Server, database_url: str, shops: int, way: str
) -> None:
    """What has come since is unknown to the planner, to which reading a row or two costs as much as a look-up."""
    async with desk(database_url) as working:
        merchants = [await working.merchant(webhook_url="http://127.0.0.1:9/") for _ in range(shops)]
        orders: list[Order] = []
        for _ in range(17):
            await working.accept(*orders)
            orders = [order(working.settings, merchants[n % shops].shop) for n in range(BATCH)]
        await forge(
            server,
            database_url,
            f"UPDATE pg_class SET (relpages, reltuples) = (100, 1) WHERE {_WATCHED} AND relkind = 'r'",
        )
        async with working.gateway.connect() as tx:
            await _end_counting(tx)
            await _ACCEPT[way](tx, orders)
            await _assert_read_few(tx)
            await tx.commit()
        for payout_ids in (None, [item.id for item in orders]):
            async with working.worker.connect() as tx:
                await _end_counting(tx)
                _, calls = await claim_calls(
                    tx, claim=_claim(), after_shop=FIRST_SHOP, busy=Counter(), terms=Terms(math.inf),
                    payout_ids=payout_ids,
                )  # fmt: skip
                answers = [Ended(call, Answer(Outcome.PAID)) for call in calls[: BATCH // 2]]
                answers += [Ended(call, Answer(Outcome.UNKNOWN)) for call in calls[BATCH // 2 :]]
                assert await _RECORD[way](tx, answers) == BATCH // 2
                assert len(answers) == BATCH
                await _assert_read_few(tx)


@_EACH_WAY
async def test_a_payout_that_is_sent_and_paid_leaves_the_indexes_alone(database_url: str, way: str) -> None:
    """What changes of it, and of its attempt, finds room beside what was there: HOT updates, all of them."""
    async with desk(database_url) as working, working.worker.connect() as tx:
        merchant = await working.merchant()
        for _ in range(4):
            await working.create_many(merchant, BATCH)
            _, calls = await claim_calls(
                tx, claim=_claim(), after_shop=FIRST_SHOP, busy=Counter(), terms=Terms(math.inf)
            )
            assert await _updates(tx) == {"payouts": (BATCH, BATCH)}
            await _end_counting(tx)
            answers = [Ended(call, Answer(Outcome.PAID)) for call in calls]
            assert await _RECORD[way](tx, answers) == BATCH
            assert await _updates(tx) == {"payouts": (BATCH, BATCH), "payout_attempts": (BATCH, BATCH)}
            await _end_counting(tx)


async def _end_counting(tx: Tx) -> None:
    """Commit; what this session does next is counted from nothing."""
    await tx.execute(text("SELECT pg_stat_force_next_flush()"))
    await tx.commit()


async def _updates(tx: Tx) -> dict[str, tuple[int, int]]:
    """How many payouts and attempts this transaction has changed, and how many of them without a change of an index."""
    updates = await tx.execute(
        text(
            "SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables"
            " WHERE relname IN ('payouts', 'payout_attempts') AND n_tup_upd > 0"
        )
    )
    return {row.relname: (row.n_tup_upd, row.n_tup_hot_upd) for row in updates}


async def _assert_read_few(tx: Tx) -> None:
    """Each table a few times the batch."""
    read = await _rows_read(tx)
    assert max(read.values()) <= 10 * BATCH, read


@pytest.mark.parametrize("status", [200, 503])
async def test_claiming_and_recording_callbacks_scans_nothing(crowd: Crowd, status: int) -> None:
    async with desk(crowd.url) as working, working.worker.connect() as tx:
        token = uuid4()
        claimed = await take_callbacks(tx, token, BATCH)
        assert claimed
        assert await _scanned(tx) == {}
        attempt = Attempt(status, None if status == 200 else "http_5xx", b"", "127.0.0.1", 1, 0.0)
        await record_attempts(tx, [Delivered(item, token, attempt, 0.0, 0.0) for item in claimed], now=0.0)
        assert await _scanned(tx) == {}


@pytest.mark.parametrize("outcome", [Outcome.PAID, Outcome.DECLINED, Outcome.NOT_FOUND])
async def test_accepting_and_crediting_a_payin_scans_nothing(crowd: Crowd, outcome: Outcome) -> None:
    async with desk(crowd.url) as working:
        async with working.gateway.connect() as tx:
            await append_payin(tx, new_payin(crowd.merchant.shop))
            assert await _scanned(tx) == {}
        async with working.worker.connect() as tx:
            token = uuid4()
            (question,) = await claim_questions(
                tx, rail="sandbox", token=token, lease_seconds=60.0, claim_max=1, lag_seconds=0.0
            )
            answer = Answer(outcome, amount_minor=question.amount_minor, currency=question.currency)
            await record_answer(tx, question, answer, token=token, again_in_seconds=1.0, lag_seconds=0.0)
            assert await _scanned(tx) == {}


async def _rows_read(tx: Tx) -> dict[str, int]:
    """How many rows this transaction has read of each watched table."""
    reads = await tx.execute(
        text(
            "SELECT relname, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) AS n FROM pg_stat_xact_user_tables"
            " WHERE relname = ANY (CAST(:tables AS text[]))"
        ),
        {"tables": list(WATCHED)},
    )
    return {row.relname: row.n for row in reads}


@pytest.mark.parametrize("walk", WALKS, ids=[walk.table for walk in WALKS])
async def test_a_step_of_the_checker_reads_its_page_and_what_the_page_leads_to(crowd: Crowd, walk: Walk) -> None:
    """Each rule a few times the page, whatever the table holds; of an account, all that is unfinished."""
    steps, page = 2, 1 if walk is ACCOUNTS else 200
    rules = sum(rule.walk is walk for rule in RULES)
    rows_max = steps * (rules + 1) * 2 * (PAYOUTS // SHOPS if walk is ACCOUNTS else page)
    async with desk(crowd.url) as working:
        for _ in range(steps):
            async with working.worker.connect() as tx:
                await begin_checks(tx)
                await tx.execute(
                    text("UPDATE checks SET due_at = 'infinity' WHERE walk <> :walk"), {"walk": walk.table}
                )
                step = await check_step(tx, rows_max=page)
                assert step is not None
                assert (step.table, step.rows) == (walk.table, page)
                assert await _scanned(tx) == {}
                read = await _rows_read(tx)
                assert read
                assert max(read.values()) <= rows_max, read
                await tx.execute(text("UPDATE checks SET due_at = now()"))
                await tx.commit()


async def test_a_change_of_state_touches_no_index(crowd: Crowd) -> None:
    """So that it is a HOT update: no index of `payouts` has a column that the worker may change."""
    async with desk(crowd.url) as working:
        touched = await fetch(
            working.owner,
            """
            SELECT i.indexrelid::regclass::text AS index, a.attname
              FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
             WHERE i.indrelid = 'payouts'::regclass
               AND has_column_privilege('payouts_worker', i.indrelid, a.attnum, 'UPDATE')
            """,
        )
    assert touched == []


async def test_a_scan_would_have_been_noticed(crowd: Crowd) -> None:
    async def scan(tx: Tx) -> None:
        await tx.execute(text("SELECT id FROM payouts WHERE state = 'queued'"))

    (plan,) = await _plans(crowd.url, WORKER, scan)
    assert ("Seq Scan", "payouts") in {(node["Node Type"], node.get("Relation Name")) for node in _nodes(plan)}
