"""What the schema refuses, whoever asks: each case is SQL under a role, and the one thing that must stop it.

All cases share one database and roll back. Those that need a payout in some state find it in `World`.
"""

import asyncio
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from common.db.engine import constraint_name, sqlstate
from common.db.tables import metadata
from common.domain.payin import MOVES as PAYIN_MOVES
from common.domain.payin import PayinState
from common.domain.payout import MOVES, STAGES, State
from ops.onboarding import add_http_rail
from tests.conftest import Server
from tests.factories import engine, execute, fetch
from tests.flows import Desk, assert_sound, cloned, desk

OWNER, GATEWAY, WORKER, OPS, READONLY, SEALER = (
    f"payouts_{name}" for name in ("owner", "gateway", "worker", "ops", "readonly", "sealer")
)
APPLICATION = (GATEWAY, WORKER, OPS, READONLY, SEALER)
NOT_ALLOWED = "42501"


# Where sealed values stand.
_SEALED = {
    "rails": "secret_sealed",
    "api_keys": "secret_sealed",
    "webhook_secrets": "sealed",
    "payouts": "recipient_sealed",
}


@dataclass(frozen=True, slots=True)
class World:
    """A database with a story, and the names by which cases refer to it as `{name}`."""

    url: str
    names: dict[str, str]


async def _tell_a_story(desk: Desk) -> dict[str, str]:
    """One payout in each state that this release reaches, a second shop, a second merchant."""
    merchant, other = await desk.merchant(), await desk.merchant()
    recipients = {"success": "017000009999", "submitted": "017000000001"}
    ids = {name: await desk.create(merchant, recipient=number) for name, number in recipients.items()}
    ids["failed"] = await desk.create(merchant, recipient="017000000100", callback_url="http://localhost")
    ids["verifying"] = await desk.create(merchant, recipient="017000000200")
    await desk.create(other, recipient="017000000100", callback_url="http://localhost")
    await desk.settle(desk.settler(rail_timeout_seconds=1.0))
    ids["sending"] = await desk.create(merchant)
    await execute(
        desk.worker,
        "UPDATE payouts SET state = 'sending', version = 2 WHERE id = CAST(:id AS uuid)",
        id=ids["sending"],
    )
    await execute(
        desk.worker,
        "INSERT INTO payout_attempts (payout_id, shop_id, attempt_no, action, rail, reference)"
        " SELECT id, shop_id, 1, 'submit', 'sandbox', 'po_sending' FROM payouts WHERE id = CAST(:id AS uuid)",
        id=ids["sending"],
    )
    ids["queued"] = await desk.create(merchant)
    expiring = await desk.create(merchant, expires_at=datetime.now(UTC) + timedelta(hours=1))
    for name, payout_id in ids.items():
        assert await desk.state(payout_id) == name
    payins = {
        name: await desk.create_payin(merchant, amount_minor=amount_minor)
        for name, amount_minor in {"paid_in": 1000, "failed_in": 1002, "pending_in": 1006}.items()
    }
    await desk.collect()
    await add_http_rail(
        desk.owner,
        desk.settings.keyring,
        name="a-bank",
        base_url="http://localhost",
        authoritative=False,
        actor="tests",
    )
    await execute(
        desk.worker,
        "INSERT INTO discrepancies (id, rail, reference, word, kind)"
        " VALUES (gen_random_uuid(), 'sandbox', 'x', 'paid', 'reference')",
    )
    await assert_sound(desk.owner)
    first = "SELECT audit_id AS id FROM entries WHERE account_id = :id AND seq = 1"
    topup = await desk.one(first, id=merchant.shop.account_id)
    foreign_audit = await desk.one("SELECT max(id) AS id FROM audit WHERE action = 'key.add'")
    unused_audit = (
        await fetch(
            desk.owner,
            "INSERT INTO audit (actor, action, subject, reason, detail) SELECT 'tests', 'balance.topup', 'a shop', 'a test',"
            " jsonb_build_object('account_id', CAST(:account AS bigint), 'amount_minor', 1000) RETURNING id",
            commit=True,
            account=merchant.shop.account_id,
        )
    )[0]
    event = await desk.one("SELECT id FROM events WHERE type = 'payout.success'")
    called = await desk.one("SELECT event_id, lane_id FROM callback_due WHERE shop_id = :id", id=merchant.shop.id)
    other_lane = await desk.one("SELECT id FROM callback_lanes WHERE shop_id = :id", id=other.shop.id)
    third = await desk.merchant()
    key = await desk.one("SELECT id FROM api_keys WHERE public_id = :id", id=merchant.api_key)
    return {
        **{name: str(any_id) for name, any_id in (ids | payins).items()},
        "expiring": str(expiring),
        "fresh": str(uuid4()),
        "shop": str(merchant.shop.id),
        "merchant": str(merchant.shop.merchant_id),
        "account": str(merchant.shop.account_id),
        "other_shop": str(other.shop.id),
        "other_account": str(other.shop.account_id),
        "key": str(key.id),
        "unused_audit": str(unused_audit.id),
        "foreign_audit": str(foreign_audit.id),
        "topup_audit": str(topup.id),
        "event": str(event.id),
        "called": str(called.event_id),
        "lane": str(called.lane_id),
        "other_lane": str(other_lane.id),
        "other_merchant": str(other.shop.merchant_id),
        "third_merchant": str(third.shop.merchant_id),
        "third_shop": str(third.shop.id),
    }


@pytest.fixture(scope="module")
def world(server: Server, template: str) -> Iterator[World]:
    cloning = cloned(server, template)

    async def build() -> World:
        url = await cloning.__aenter__()
        async with desk(url) as working:
            return World(url, await _tell_a_story(working))

    with asyncio.Runner() as runner:
        yield runner.run(build())
        runner.run(cloning.__aexit__(None, None, None))


@asynccontextmanager
async def _acting(world: World, role: str) -> Any:
    """A transaction under a role that is rolled back whatever comes of it."""
    pool = engine(world.url, role=role)
    try:
        async with pool.connect() as tx:
            yield tx
    finally:
        await pool.dispose()


async def _refusal(world: World, role: str, *statements: str) -> str | None:
    """Run statements under a role; the constraint that refused one, else its SQLSTATE; None when all passed."""
    async with _acting(world, role) as tx:
        try:
            for statement in statements:
                await tx.exec_driver_sql(statement.format_map(world.names))
        except DBAPIError as error:
            return constraint_name(error) or sqlstate(error)
    return None


def _entry(kind: str, payout: str | None = None, /, **values: str) -> str:
    """An entry for the account that continues it in every way but the `values` given; 1000 unless said otherwise."""
    amount = values.get("amount_minor", "1000")
    contra, posted, held = {
        "hold": ("holds", "0", amount),
        "capture": ("provider_clearing", f"-{amount}", f"-{amount}"),
        "release": ("holds", "0", f"-{amount}"),
        "payout_return": ("provider_clearing", amount, "0"),
        "adjustment": ("adjustments", amount, "0"),
    }[kind]
    columns = {
        "account_id": "a.id",
        "seq": "a.last_seq + 1",
        "shop_id": "a.shop_id",
        "kind": f"'{kind}'",
        "contra": f"'{contra}'",
        "amount_minor": amount,
        "posted_delta_minor": posted,
        "held_delta_minor": held,
        "posted_after_minor": f"a.posted_minor + ({posted})",
        "held_after_minor": f"a.held_minor + ({held})",
        "payout_id": "NULL" if payout is None else f"'{payout}'",
        "audit_id": "NULL",
    } | values
    return (
        f"INSERT INTO entries ({', '.join(columns)}) SELECT {', '.join(columns.values())}"
        " FROM accounts a WHERE a.id = {account}"
    )


def _end(payout: str, state: str, kind: str | None, /, *, failure: str = "NULL", **entry: str) -> str:
    """One statement that ends a payout, together with an entry unless `kind` is None."""
    entries = "" if kind is None else f"WITH e AS ({_entry(kind, payout, **entry)}) "
    return (
        f"{entries}UPDATE payouts p SET state = '{state}', version = p.version + 1, finalized_at = now(),"
        f" failure_code = {failure}, resolution_seq = a.last_seq + 1"
        f" FROM accounts a WHERE a.id = p.account_id AND p.id = '{payout}'"
    )


_DUE = "INSERT INTO payout_due (payout_id, shop_id, rail) VALUES ('{fresh}', '{shop}', 'sandbox')"


def _create(*, hold: str | None = _entry("hold", "{fresh}"), due: str | None = _DUE, **values: str) -> str:
    """One statement that creates a payout with its hold and its due row; None leaves one of them out."""
    columns = {
        "id": "'{fresh}'",
        "shop_id": "a.shop_id",
        "account_id": "a.id",
        "external_id": "'{fresh}'",
        "amount_minor": "1000",
        "currency": "'BDT'",
        "recipient_sealed": "''",
        "recipient_masked": "'****'",
        "recipient_digest": "sha256('x')",
        "hold_seq": "a.last_seq + 1",
    } | values
    steps = {"hold": hold, "due": due}
    written = ", ".join(f"{name} AS ({step})" for name, step in steps.items() if step)
    return (
        (f"WITH {written} " if written else "")
        + f"INSERT INTO payouts ({', '.join(columns)}) SELECT {', '.join(columns.values())}"
        + " FROM accounts a WHERE a.id = {account}"
    )


def _refund(payout: str, kind: str | None = "payout_return", /, **entry: str) -> str:
    """One statement that refunds a payout, together with the entry unless `kind` is None."""
    entries = "" if kind is None else f"WITH e AS ({_entry(kind, payout, **entry)}) "
    return (
        f"{entries}UPDATE payouts p SET state = 'refunded', version = p.version + 1, failure_code = 'returned_by_bank',"
        f" return_seq = a.last_seq + 1 FROM accounts a WHERE a.id = p.account_id AND p.id = '{payout}'"
    )


def _word(payout: str, outcome: str) -> str:
    """The rail says a word by itself."""
    return (
        "INSERT INTO payout_attempts (payout_id, shop_id, attempt_no, action, rail, reference, outcome, finished_at)"
        f" SELECT payout_id, shop_id, max(attempt_no) + 1, 'event', min(rail), min(reference), '{outcome}', now()"
        f" FROM payout_attempts WHERE payout_id = '{payout}' GROUP BY payout_id, shop_id"
    )


_RAIL_EVENT = "INSERT INTO rail_events (rail, event_id, reference, outcome) VALUES ('sandbox', 'e', 'r', 'paid')"


def _attempt(payout: str, attempt_no: int, action: str, *, reference: str = "t.reference", outcome: str | None) -> str:
    """The next attempt of a payout that has one; finished when there is an outcome."""
    ended = "NULL::timestamptz, NULL::text" if outcome is None else f"now(), '{outcome}'"
    return (
        "INSERT INTO payout_attempts (payout_id, shop_id, attempt_no, action, rail, reference, finished_at, outcome)"
        f" SELECT t.payout_id, t.shop_id, {attempt_no}, '{action}', t.rail, {reference}, {ended}"
        f" FROM payout_attempts t WHERE t.payout_id = '{payout}' AND t.attempt_no = 1"
    )


def _finish(payout: str, outcome: str) -> str:
    return (
        f"UPDATE payout_attempts SET outcome = '{outcome}', finished_at = now()"
        f" WHERE payout_id = '{payout}' AND finished_at IS NULL"
    )


def _moves(payout: str, *states: str) -> list[str]:
    return [f"UPDATE payouts SET state = '{state}', version = version + 1 WHERE id = '{payout}'" for state in states]


_SHOP = (
    "INSERT INTO shops (id, merchant_id, code, currency, currency_exponent, is_default, rail)"
    " VALUES ('{fresh}', '{merchant}', 'second', 'BDT', 2, %s, 'sandbox')"
)
_KEY = (
    "INSERT INTO api_keys (id, public_id, merchant_id, secret_sealed, scopes)"
    " VALUES ('{fresh}', 'pk_of_a_test', '{merchant}', '', %s)"
)
_WEBHOOK_SECRET = "INSERT INTO webhook_secrets (id, shop_id, sealed) VALUES (gen_random_uuid(), '{shop}', '')"
_END_SECRETS = (
    "UPDATE webhook_secrets SET not_after = now() + interval '168 hours' WHERE shop_id = '{shop}' AND not_after IS NULL"
)
_ADJUSTMENT = _entry("adjustment", audit_id="{unused_audit}")

# What it is, under which role, by what it is refused, and the statements; the last one is the one that is refused.
CASES: list[tuple[str, str, str, tuple[str, ...]]] = [
    # Balances move only through entries.
    *(
        (f"{role} moves an account", role, NOT_ALLOWED, ("UPDATE accounts SET posted_minor = posted_minor + 1",))
        for role in APPLICATION
    ),
    *(
        (f"{role} lends to an account", role, NOT_ALLOWED, ("UPDATE accounts SET credit_limit_minor = 1",))
        for role in APPLICATION
    ),
    ("triggers are switched off", WORKER, NOT_ALLOWED, ("SET session_replication_role = replica",)),
    ("a table's triggers are switched off", WORKER, NOT_ALLOWED, ("ALTER TABLE entries DISABLE TRIGGER USER",)),
    ("held below zero", OWNER, "accounts_held_not_negative", ("UPDATE accounts SET held_minor = -1",)),
    ("a negative credit limit", OWNER, "accounts_credit_limit_minor_check", (
        "UPDATE accounts SET credit_limit_minor = -1",)),
    ("available below the limit", OWNER, "accounts_not_overdrawn", ("UPDATE accounts SET posted_minor = -1",)),
    ("a second account of a shop", OPS, "accounts_shop_id_key", (
        "INSERT INTO accounts (shop_id, currency) VALUES ('{shop}', 'BDT')",)),
    ("an account in another currency than its shop", OPS, "accounts_shop_id_currency_fkey", (
        _SHOP % "false", "INSERT INTO accounts (shop_id, currency) VALUES ('{fresh}', 'USD')")),
    # Entries continue their account.
    ("a gap in seq", OPS, "entries_chain", (
        _entry("adjustment", seq="a.last_seq + 2", audit_id="{unused_audit}"),)),
    ("a seq for the second time", OPS, "entries_pkey", (
        _entry("adjustment", seq="a.last_seq", audit_id="{unused_audit}"),)),
    ("a wrong posted balance", OPS, "entries_chain", (
        _entry("adjustment", posted_after_minor="a.posted_minor", audit_id="{unused_audit}"),)),
    ("a wrong held balance", OPS, "entries_chain", (
        _entry("adjustment", held_after_minor="a.held_minor + 1", audit_id="{unused_audit}"),)),
    ("a negative held balance", OPS, "entries_held_after_minor_check", (
        _entry("adjustment", held_after_minor="-1", audit_id="{unused_audit}"),)),
    ("an entry under another shop's name", OPS, "entries_chain", (
        _entry("adjustment", shop_id="'{other_shop}'", audit_id="{unused_audit}"),)),
    ("an entry of an account that is not there", OPS, "entries_chain", (
        _entry("adjustment", account_id="999999", seq="1", audit_id="{unused_audit}"),)),
    ("a kind that nobody knows", OPS, NOT_ALLOWED, (
        _entry("hold", "{queued}", kind="'fee'"),)),
    ("a hold that moves what is posted", GATEWAY, "entries_arithmetic", (
        _entry("hold", "{queued}", posted_delta_minor="-1000"),)),
    ("a capture of more than it says", WORKER, "entries_arithmetic", (
        _entry("capture", "{sending}", posted_delta_minor="-2000"),)),
    ("a release that leaves part of the hold", WORKER, "entries_arithmetic", (
        _entry("release", "{sending}", held_delta_minor="-999"),)),
    ("an adjustment that moves what is held", OPS, "entries_arithmetic", (
        _entry("adjustment", held_delta_minor="1000", audit_id="{unused_audit}"),)),
    ("an entry of nothing", OPS, "entries_amount_minor_check", (
        _entry("adjustment", amount_minor="0", audit_id="{unused_audit}"),)),
    ("an entry beyond 10^15", OPS, "entries_amount_minor_check", (
        _entry("adjustment", amount_minor="1000000000000001", audit_id="{unused_audit}"),)),
    # Adjustments are audited, one by one.
    ("an adjustment without audit", OPS, "entries_subject", (_entry("adjustment"),)),
    ("an adjustment with an audit that is not there", OPS, "entries_audit_id_fkey", (
        _entry("adjustment", audit_id="999999"),)),
    ("two entries per adjustment", OPS, "entries_one_per_adjustment", (
        _entry("adjustment", audit_id="{topup_audit}"),)),
    ("an adjustment in the name of something else", OPS, "entries_match_audit", (
        _entry("adjustment", audit_id="{foreign_audit}"),)),
    ("an adjustment by another amount than was written down", OPS, "entries_match_audit", (
        _entry("adjustment", amount_minor="999", audit_id="{unused_audit}"),)),
    ("an adjustment the other way than was written down", OPS, "entries_match_audit", (
        _entry("adjustment", posted_delta_minor="-1000", posted_after_minor="a.posted_minor - 1000",
               audit_id="{unused_audit}"),)),
    ("an adjustment of another account than was written down", OPS, "entries_match_audit", (
        _entry("adjustment", audit_id="{unused_audit}").replace("{account}", "{other_account}"),)),
    ("an adjustment of a payout", OPS, "entries_subject", (
        _entry("adjustment", "{queued}", audit_id="{unused_audit}"),)),
    ("an adjustment that overdraws", OPS, "accounts_not_overdrawn", (
        _entry("adjustment", amount_minor="1000000000", posted_delta_minor="-1000000000",
               posted_after_minor="a.posted_minor - 1000000000", audit_id="{unused_audit}"),)),
    # One hold per payout, of its amount.
    ("a hold of another amount", GATEWAY, "entries_match_payout", (
        _create(hold=_entry("hold", "{fresh}", amount_minor="999")),)),
    ("a second hold", GATEWAY, "entries_one_hold_per_payout", (_entry("hold", "{queued}"),)),
    ("a hold of no payout", GATEWAY, "entries_subject", (_entry("hold"),)),
    ("a hold of a payout that is not there", GATEWAY, "entries_match_payout", (_entry("hold", "{fresh}"),)),
    ("an overdraft", GATEWAY, "accounts_not_overdrawn", (
        _create(amount_minor="1000000000", hold=_entry("hold", "{fresh}", amount_minor="1000000000")),)),
    # One resolution per hold, that says what the payout says.
    ("a capture without success", WORKER, "entries_match_payout", (_entry("capture", "{sending}"),)),
    ("a release without failure", WORKER, "entries_match_payout", (_entry("release", "{queued}"),)),
    ("a capture with failure", WORKER, "payouts_end_whole", (
        _finish("{sending}", "declined"), _end("{sending}", "failed", "capture", failure="'other'"))),
    ("a release with success", WORKER, "payouts_end_whole", (
        _finish("{sending}", "declined"), _end("{sending}", "success", "release"))),
    ("a resolution of another amount", WORKER, "entries_match_payout", (
        _finish("{sending}", "paid"), _end("{sending}", "success", "capture", amount_minor="999"))),
    ("a second capture", WORKER, "entries_one_resolution_per_hold", (_entry("capture", "{success}"),)),
    ("a release after the capture", WORKER, "entries_one_resolution_per_hold", (_entry("release", "{success}"),)),
    ("a capture after the release", WORKER, "entries_one_resolution_per_hold", (_entry("capture", "{failed}"),)),
    ("a release of another payout's hold", WORKER, "payouts_end_whole", (
        _finish("{sending}", "declined"),
        _end("{sending}", "failed", "release", failure="'other'", payout_id="'{queued}'"))),
    # Each role writes the entries that are its business.
    *(
        (f"{role} writes a {kind}", role, NOT_ALLOWED, (_entry(kind, payout),))
        for role, kind, payout in (
            (GATEWAY, "capture", "{sending}"), (GATEWAY, "adjustment", None),
            (WORKER, "hold", "{queued}"), (WORKER, "adjustment", None),
            (OPS, "hold", "{queued}"), (OPS, "capture", "{sending}"), (OPS, "release", "{sending}"),
        )
    ),
    # Money of an unknown fate stays held.
    ("a release while an attempt is open", WORKER, "entries_release_is_definite", (
        _end("{sending}", "failed", "release", failure="'other'"),)),
    ("a release after unknown", WORKER, "entries_release_is_definite", (
        _end("{verifying}", "failed", "release", failure="'other'"),)),
    ("a release after submitted", WORKER, "entries_release_is_definite", (
        _end("{submitted}", "failed", "release", failure="'other'"),)),
    ("a release after paid", WORKER, "entries_release_is_definite", (
        _finish("{sending}", "paid"), _end("{sending}", "failed", "release", failure="'other'"))),
    # A payout ends with its entry.
    ("an end without its entry", WORKER, "payouts_end_whole", (_end("{sending}", "success", None),)),
    ("an end with another payout's entry", WORKER, "payouts_end_whole", (
        "UPDATE payouts SET state = 'success', version = version + 1, finalized_at = now(), resolution_seq = ("
        "SELECT resolution_seq FROM payouts WHERE id = '{success}') WHERE id = '{sending}'",)),
    ("an end without a resolution", WORKER, "payouts_resolved_iff_final", (
        "UPDATE payouts SET state = 'success', version = version + 1, finalized_at = now() WHERE id = '{sending}'",)),
    ("a resolution before the end", WORKER, "payouts_resolved_iff_final", (
        "UPDATE payouts SET resolution_seq = 1 WHERE id = '{queued}'",)),
    ("an end without its time", WORKER, "payouts_finalized_iff_final", (
        _end("{sending}", "success", "capture").replace("finalized_at = now()", "finalized_at = NULL"),)),
    ("a failure without a code", WORKER, "payouts_failure_iff_failed", (_end("{sending}", "failed", "release"),)),
    ("a success with a failure code", WORKER, "payouts_failure_iff_failed", (
        _end("{sending}", "success", "capture", failure="'other'"),)),
    ("a move that skips a version", WORKER, "payouts_moves", (
        "UPDATE payouts SET state = 'sending', version = version + 2 WHERE id = '{queued}'",)),
    ("a state that nobody knows", OWNER, "payouts_moves", (
        "UPDATE payouts SET state = 'lost', version = version + 1 WHERE id = '{queued}'",)),
    # A payout starts whole.
    ("a payout without hold", GATEWAY, "payouts_start_whole", (_create(hold=None),)),
    ("a payout that points at another's hold", GATEWAY, "payouts_start_whole", (_create(hold=None, hold_seq="2"),)),
    ("a payout without due row", GATEWAY, "payouts_start_whole", (_create(due=None),)),
    ("a payout whose due row is another shop's", GATEWAY, "payouts_start_whole", (
        _create(due=_DUE.replace("{shop}", "{other_shop}")),)),
    ("a payout born sending", GATEWAY, "payouts_start_whole", (_create(state="'sending'"),)),
    ("a payout born final", GATEWAY, "payouts_start_whole", (
        _create(state="'success'", resolution_seq="1", finalized_at="now()"),)),
    ("a payout born with a later version", GATEWAY, "payouts_start_whole", (_create(version="2"),)),
    ("a payout in another currency", GATEWAY, "payouts_start_whole", (_create(currency="'USD'"),)),
    ("a payout of another shop's account", GATEWAY, "payouts_start_whole", (_create(shop_id="'{other_shop}'"),)),
    ("a payout of nothing", GATEWAY, "payouts_amount_minor_check", (_create(amount_minor="0"),)),
    ("a payout beyond 10^15", GATEWAY, "payouts_amount_minor_check", (_create(amount_minor="1000000000000001"),)),
    ("an external id for the second time", GATEWAY, "payouts_external_id_unique", (
        _create(external_id="'PAY-of-a-test'"), _create(external_id="'PAY-of-a-test'", id="gen_random_uuid()"))),
    ("an empty external id", GATEWAY, "payouts_external_id_check", (_create(external_id="''"),)),
    ("a digest that is none", GATEWAY, "payouts_recipient_digest_check", (_create(recipient_digest="'x'"),)),
    # One submit, then proof before the next.
    ("a second submit after unknown", WORKER, "payout_attempts_submit_once", (
        *_moves("{verifying}", "queued", "sending"), _attempt("{verifying}", 2, "submit", outcome=None))),
    ("a second submit after submitted", WORKER, "payout_attempts_submit_once", (
        *_moves("{submitted}", "verifying", "queued", "sending"), _attempt("{submitted}", 2, "submit", outcome=None))),
    ("a second submit while it is verified", WORKER, "payout_attempts_submit_once", (
        _attempt("{verifying}", 2, "look_up", outcome="not_found"), _attempt("{verifying}", 3, "submit", outcome=None))),
    ("a second submit after paid", WORKER, "payout_attempts_submit_once", (
        _attempt("{success}", 2, "submit", outcome=None),)),
    ("a second submit after declined", WORKER, "payout_attempts_submit_once", (
        _attempt("{failed}", 2, "submit", outcome=None),)),
    ("a second submit after a look-up that does not know", WORKER, "payout_attempts_submit_once", (
        _attempt("{verifying}", 2, "look_up", outcome="unknown"), *_moves("{verifying}", "queued", "sending"),
        _attempt("{verifying}", 3, "submit", outcome=None))),
    ("a second open attempt", WORKER, "payout_attempts_one_open_per_payout", (
        _attempt("{sending}", 2, "look_up", outcome=None),)),
    ("a second open attempt after one that ended", WORKER, "payout_attempts_one_open_per_payout", (
        _attempt("{verifying}", 2, "look_up", outcome=None), _attempt("{verifying}", 3, "look_up", outcome=None))),
    ("two open attempts in one statement", WORKER, "payout_attempts_one_open_per_payout", (
        _attempt("{verifying}", 2, "look_up", outcome=None) + " UNION ALL"
        + _attempt("{verifying}", 3, "look_up", outcome=None).partition(")")[2],)),
    *((f"an attempt is moved: {change}", OWNER, "payout_attempts_stay", (
        f"UPDATE payout_attempts SET {change} WHERE payout_id = '{{sending}}'",))
      for change in ("payout_id = '{verifying}'", "shop_id = '{other_shop}'", "attempt_no = 2")),
    ("the owner forgets attempts", OWNER, "payout_attempts_stay", ("DELETE FROM payout_attempts",)),
    ("an attempt under another reference", WORKER, "payout_attempts_submit_once", (
        _attempt("{verifying}", 2, "look_up", reference="'another'", outcome=None),)),
    ("an attempt that leaves out a number", WORKER, "payout_attempts_submit_once", (
        _attempt("{verifying}", 3, "look_up", outcome=None),)),
    ("an attempt's number for the second time", WORKER, "payout_attempts_pkey", (
        _attempt("{verifying}", 1, "look_up", outcome=None),)),
    ("an attempt that ended without outcome", WORKER, "payout_attempts_finished_iff_outcome", (
        "UPDATE payout_attempts SET finished_at = now() WHERE payout_id = '{sending}'",)),
    ("an outcome that nobody knows", WORKER, "payout_attempts_outcome_check", (
        "UPDATE payout_attempts SET finished_at = now(), outcome = 'failed' WHERE payout_id = '{sending}'",)),
    # What is told is told once, and stays as it was told.
    ("a sequence for the second time", WORKER, "events_payout_id_shop_id_sequence_key", (
        "INSERT INTO events (id, shop_id, payout_id, sequence, type, body)"
        " SELECT '{fresh}', shop_id, payout_id, sequence, type, body FROM events",)),
    ("a callback of an event for the second time", WORKER, "callbacks_pkey", (
        "INSERT INTO callbacks (event_id, shop_id, payout_id, url)"
        " SELECT id, shop_id, payout_id, 'http://localhost' FROM events WHERE payout_id = '{failed}'",)),
    ("a callback to whom it does not concern", GATEWAY, "callbacks_match_url", (
        "INSERT INTO callbacks (event_id, shop_id, payout_id, url)"
        " VALUES ('{event}', '{shop}', '{success}', 'http://elsewhere')",)),
    ("a callback of no event", GATEWAY, "callbacks_match_event", (
        "INSERT INTO callbacks (event_id, shop_id, payout_id, url)"
        " VALUES ('{fresh}', '{shop}', '{success}', 'http://localhost')",)),
    ("a callback of another payout's event", WORKER, "callbacks_match_event", (
        "INSERT INTO callbacks (event_id, shop_id, payout_id, url)"
        " SELECT id, shop_id, '{failed}', 'http://localhost' FROM events WHERE payout_id = '{success}'",)),
    ("what is due tells nothing", GATEWAY, "callback_due_has_callback", (
        "INSERT INTO callback_due (event_id, shop_id, lane_id) VALUES ('{fresh}', '{shop}', '{lane}')",)),
    ("a callback that ended and is pending", WORKER, "callbacks_finished_iff_not_pending", (
        "INSERT INTO callbacks (event_id, shop_id, payout_id, url, finished_at)"
        " VALUES ('{event}', '{shop}', '{success}', 'http://localhost', now())",)),
    ("an event of another transaction", WORKER, "events_of_their_transaction", (
        "INSERT INTO events (id, shop_id, payout_id, sequence, type, body, txid)"
        " SELECT '{fresh}', shop_id, payout_id, sequence + 1, type, body, '3' FROM events WHERE payout_id = '{failed}'",)),
    *(
        (f"{role} moves an event in the feed", role, NOT_ALLOWED, ("UPDATE events SET txid = pg_current_xact_id()",))
        for role in APPLICATION
    ),
    ("the gateway reads whom an attempt reached", GATEWAY, NOT_ALLOWED, ("SELECT address FROM callback_attempts",)),
    ("the gateway logs attempts", GATEWAY, NOT_ALLOWED, (
        "INSERT INTO callback_attempts (event_id, shop_id, attempt_no, started_at, duration_ms)"
        " VALUES ('{event}', '{shop}', 1, now(), 1)",)),
    *(
        (f"the gateway marks a callback {state}", GATEWAY, "callbacks_ended_by_worker", (
            f"UPDATE callbacks SET state = '{state}', finished_at = now()",))
        for state in ("delivered", "exhausted", "rejected")
    ),
    ("the gateway sends a callback elsewhere", GATEWAY, NOT_ALLOWED, ("UPDATE callbacks SET url = 'http://elsewhere'",)),
    ("the gateway forgets a callback", GATEWAY, NOT_ALLOWED, ("DELETE FROM callbacks",)),
    ("the gateway forgets what is to be called", GATEWAY, NOT_ALLOWED, ("DELETE FROM callback_due",)),
    ("the gateway takes a callback", GATEWAY, NOT_ALLOWED, ("UPDATE callback_due SET lease_token = '{fresh}'",)),
    ("the gateway counts attempts anew", GATEWAY, NOT_ALLOWED, ("UPDATE callback_due SET attempts_made = 0, step = 0",)),
    *(
        (f"{role} rewrites the log of attempts", role, NOT_ALLOWED, ("UPDATE callback_attempts SET http_status = 200",))
        for role in APPLICATION
    ),
    *(
        (f"{role} forgets attempts", role, NOT_ALLOWED, ("DELETE FROM callback_attempts",)) for role in APPLICATION
    ),
    ("a week of the log goes past its function", WORKER, NOT_ALLOWED, ("TRUNCATE callback_attempts_default",)),
    ("ops drop what is over", OPS, NOT_ALLOWED, ("SELECT drop_callback_attempts(90)",)),
    ("a week is made of one's own choice", WORKER, NOT_ALLOWED, ("SELECT add_callback_attempts_week(now())",)),
    # Parties.
    *(
        (f"the ports {ports}", OPS, "shops_callback_ports_check", (f"UPDATE shops SET callback_ports = ARRAY[{ports}]::int[]",))
        for ports in ("", "0", "65536", "443, NULL")
    ),
    ("two default shops", OPS, "shops_one_default_per_merchant", (_SHOP % "true",)),
    ("a shop's code for the second time", OPS, "shops_merchant_id_code_key", (
        (_SHOP % "false").replace("second", "shop-001"),)),
    ("ops change a shop's currency", OPS, NOT_ALLOWED, ("UPDATE shops SET currency = 'USD'",)),
    ("a shop's currency changes", OWNER, "shops_terms_fixed", ("UPDATE shops SET currency = 'USD'",)),
    ("a shop's scale changes", OWNER, "shops_terms_fixed", ("UPDATE shops SET currency_exponent = 0",)),
    ("a key for another merchant's shop", OPS, "api_key_shops_shop_id_merchant_id_fkey", (
        "INSERT INTO api_key_shops (api_key_id, merchant_id, shop_id) VALUES ('{key}', '{merchant}', '{other_shop}')",)),
    ("another merchant's key for a shop", OPS, "api_key_shops_api_key_id_merchant_id_fkey", (
        "INSERT INTO api_key_shops (api_key_id, merchant_id, shop_id)"
        " SELECT '{key}', merchant_id, id FROM shops WHERE id = '{other_shop}'",)),
    ("a key without scopes", OPS, "api_keys_scopes_check", (_KEY % "'{{}}'",)),
    ("a key with a scope that nobody knows", OPS, "api_keys_scopes_check", (_KEY % "'{{admin}}'",)),
    # Each role has its own rooms.
    ("the gateway reads a sealed recipient", GATEWAY, NOT_ALLOWED, ("SELECT recipient_sealed FROM payouts",)),
    ("the gateway reads all of a payout", GATEWAY, NOT_ALLOWED, ("SELECT p FROM payouts p",)),
    ("the gateway writes attempts", GATEWAY, NOT_ALLOWED, ("INSERT INTO payout_attempts DEFAULT VALUES",)),
    ("the gateway sends a payout", GATEWAY, "payouts_who_moves", tuple(_moves("{queued}", "sending"))),
    ("the gateway cancels what is being sent", GATEWAY, "payouts_moves", (_end("{sending}", "canceled", "release"),)),
    ("the gateway cancels without a release", GATEWAY, "payouts_end_whole", (_end("{queued}", "canceled", None),)),
    ("the gateway expires a payout", GATEWAY, "payouts_who_moves", (_end("{queued}", "expired", "release"),)),
    ("the gateway fails a payout", GATEWAY, "payouts_who_moves", (
        _end("{queued}", "failed", "release", failure="'other'"),)),
    ("the gateway releases what is being sent", GATEWAY, "entries_match_payout", (_entry("release", "{sending}"),)),
    ("the gateway releases what it does not cancel", GATEWAY, "entries_match_payout", (_entry("release", "{queued}"),)),
    ("the gateway forgets what is due", GATEWAY, "payout_due_follows_payout", ("DELETE FROM payout_due",)),
    ("the gateway tells what is not so", GATEWAY, "events_match_payout", (
        "INSERT INTO events (id, shop_id, payout_id, sequence, type, body)"
        " SELECT '{fresh}', shop_id, id, version, 'payout.canceled', 'xx' FROM payouts WHERE id = '{queued}'",)),
    ("a refund without its entry", WORKER, "payouts_end_whole", (_refund("{success}", None),)),
    ("a refund that the rail did not tell of", WORKER, "entries_return_was_said", (_refund("{success}"),)),
    ("a refund of what was never paid", WORKER, "payouts_moves", (_refund("{sending}"),)),
    ("a refund for the second time", WORKER, "entries_one_return_per_payout", (
        _word("{success}", "returned"), _refund("{success}"), _entry("payout_return", "{success}"))),
    ("a refund of another amount", WORKER, "entries_match_payout", (
        _word("{success}", "returned"), _refund("{success}", amount_minor="999"))),
    ("the gateway refunds a payout", GATEWAY, "payouts_who_moves", (_refund("{success}"),)),
    ("a refund that is taken back", WORKER, "payouts_end_stays", (
        _word("{success}", "returned"), _refund("{success}"),
        "UPDATE payouts SET state = 'success', version = version + 1, return_seq = NULL, failure_code = NULL"
        " WHERE id = '{success}'")),
    ("a word that is no word", WORKER, "payout_attempts_outcome_of_action", (_word("{verifying}", "unknown"),)),
    ("a word before anything was sent", WORKER, "payout_attempts_submit_once", (
        "INSERT INTO payout_attempts (payout_id, shop_id, attempt_no, action, rail, reference, outcome, finished_at)"
        " SELECT id, shop_id, 1, 'event', 'sandbox', 'x', 'paid', now() FROM payouts WHERE id = '{queued}'",)),
    ("a call that says it was returned", WORKER, "payout_attempts_outcome_of_action", (_finish("{sending}", "returned"),)),
    ("a release after a paid event", WORKER, "entries_release_is_definite", (
        _word("{verifying}", "paid"), _end("{verifying}", "failed", "release", failure="'other'"))),
    ("a rail's word changes", WORKER, NOT_ALLOWED, ("UPDATE rail_events SET outcome = 'paid'",)),
    ("a rail's word changes, whoever asks", OWNER, "rail_events_stay", (
        _RAIL_EVENT, "UPDATE rail_events SET outcome = 'declined'")),
    ("a rail's word is applied twice", WORKER, "rail_events_stay", (
        _RAIL_EVENT, *("UPDATE rail_events SET applied_at = now(), effect = 'known'",) * 2)),
    ("a rail's word is applied without an effect", WORKER, "rail_events_effect_iff_applied", (
        _RAIL_EVENT, "UPDATE rail_events SET applied_at = now()")),
    ("a rail's word is forgotten", OWNER, "rail_events_no_delete", (_RAIL_EVENT, "DELETE FROM rail_events")),
    ("the gateway says what came of a rail's word", GATEWAY, NOT_ALLOWED, (
        _RAIL_EVENT, "UPDATE rail_events SET applied_at = now(), effect = 'known'")),
    ("the gateway stores a word as applied", GATEWAY, NOT_ALLOWED, (
        "INSERT INTO rail_events (rail, event_id, reference, outcome, applied_at, effect)"
        " VALUES ('sandbox', 'e', 'r', 'paid', now(), 'known')",)),
    ("a bank without an address", OPS, "rails_http_has_address_and_secret", (
        "INSERT INTO rails (id, name, kind, secret_sealed) VALUES ('{fresh}', 'bank', 'http', 'x')",)),
    ("a bank without a secret", OPS, "rails_http_has_address_and_secret", (
        "INSERT INTO rails (id, name, kind, base_url) VALUES ('{fresh}', 'bank', 'http', 'http://b')",)),
    ("a rail of no known kind", OPS, "rails_kind_check", (
        "INSERT INTO rails (id, name, kind) VALUES ('{fresh}', 'bank', 'swift')",)),
    ("a rail's name for the second time", OPS, "rails_name_key", (
        "INSERT INTO rails (id, name, kind) VALUES ('{fresh}', 'sandbox', 'sandbox')",)),
    ("a rail becomes another", OWNER, "rails_terms_fixed", ("UPDATE rails SET name = 'other'",)),
    ("ops send a rail's payouts elsewhere", OPS, NOT_ALLOWED, ("UPDATE rails SET base_url = 'http://elsewhere'",)),
    ("a rail goes while shops name it", OPS, "rails_stay_while_named", ("DELETE FROM rails",)),
    ("the worker switches a rail off", WORKER, NOT_ALLOWED, ("UPDATE rails SET status = 'off'",)),
    ("the gateway switches a rail off", GATEWAY, NOT_ALLOWED, ("UPDATE rails SET status = 'off'",)),
    ("ops read a rail's secret", OPS, NOT_ALLOWED, ("SELECT secret_sealed FROM rails",)),
    ("readers read a rail's secret", READONLY, NOT_ALLOWED, ("SELECT secret_sealed FROM rails",)),
    ("a discrepancy is closed by nobody", OPS, "discrepancies_closed_by_somebody", (
        "UPDATE discrepancies SET closed_at = now()",)),
    ("a discrepancy is closed by an audit row about something else", OPS, "discrepancies_closed_by_audit", (
        "UPDATE discrepancies SET closed_at = now(), audit_id = {foreign_audit}",)),
    ("a discrepancy that is closed before it is open", WORKER, NOT_ALLOWED, (
        "INSERT INTO discrepancies (id, rail, reference, word, kind, closed_at, audit_id)"
        " VALUES ('{fresh}', 'sandbox', 'y', 'paid', 'reference', now(), {foreign_audit})",)),
    ("the worker closes a discrepancy", WORKER, NOT_ALLOWED, ("UPDATE discrepancies SET closed_at = now()",)),
    ("a discrepancy is forgotten", OWNER, "discrepancies_no_delete", ("DELETE FROM discrepancies",)),
    ("the worker cancels a payout", WORKER, "payouts_who_moves", (_end("{queued}", "canceled", "release"),)),
    ("a payout that never expires does", WORKER, "payouts_who_moves", (_end("{queued}", "expired", "release"),)),
    ("a payout expires before its time", WORKER, "payouts_who_moves", (_end("{expiring}", "expired", "release"),)),
    ("a due row that expires on its own", GATEWAY, "payout_due_expiry_matches", (
        _create(due=_DUE.replace("rail)", "rail, expires_at)").replace("'sandbox')", "'sandbox', now())")),)),
    ("a due row expires later", OWNER, "payout_due_expiry_fixed", ("UPDATE payout_due SET expires_at = now()",)),
    ("a payout expires later", OWNER, "payouts_expiry_fixed", ("UPDATE payouts SET expires_at = now()",)),
    ("a payout joins another trace", OWNER, "payouts_trace_fixed", ("UPDATE payouts SET traceparent = 'another'",)),
    *(
        (f"{role} writes history", role, NOT_ALLOWED, ("INSERT INTO payout_moves DEFAULT VALUES",))
        for role in APPLICATION
    ),
    ("history changes", OWNER, "payout_moves_append_only", ("UPDATE payout_moves SET state = 'failed'",)),
    ("history is forgotten", OWNER, "payout_moves_append_only", ("DELETE FROM payout_moves",)),
    ("all history is forgotten", OWNER, "payout_moves_no_truncate", ("TRUNCATE payout_moves",)),
    ("the gateway reads the audit", GATEWAY, NOT_ALLOWED, ("SELECT id FROM audit",)),
    ("the gateway writes the audit", GATEWAY, NOT_ALLOWED, ("INSERT INTO audit DEFAULT VALUES",)),
    ("the gateway asks the bank", GATEWAY, NOT_ALLOWED, ("SELECT reference FROM sandbox.payments",)),
    ("the worker creates payouts", WORKER, NOT_ALLOWED, (_create(),)),
    ("the worker writes the audit", WORKER, NOT_ALLOWED, ("INSERT INTO audit DEFAULT VALUES",)),
    ("the worker reads keys", WORKER, NOT_ALLOWED, ("SELECT secret_sealed FROM api_keys",)),
    ("the worker changes an amount", WORKER, NOT_ALLOWED, ("UPDATE payouts SET amount_minor = 1",)),
    ("the worker changes a recipient", WORKER, NOT_ALLOWED, ("UPDATE payouts SET recipient_sealed = ''",)),
    ("the worker changes when an attempt began", WORKER, NOT_ALLOWED, (
        "UPDATE payout_attempts SET started_at = now()",)),
    ("the worker forgets attempts", WORKER, NOT_ALLOWED, ("DELETE FROM payout_attempts",)),
    ("the worker forgets callbacks", WORKER, NOT_ALLOWED, ("DELETE FROM callbacks",)),
    ("ops move a payout", OPS, NOT_ALLOWED, ("UPDATE payouts SET state = 'failed'",)),
    ("ops create payouts", OPS, NOT_ALLOWED, (_create(),)),
    ("ops read a sealed recipient", OPS, NOT_ALLOWED, ("SELECT recipient_sealed FROM payouts",)),
    ("ops read a key's secret", OPS, NOT_ALLOWED, ("SELECT secret_sealed FROM api_keys",)),
    ("ops read a webhook's secret", OPS, NOT_ALLOWED, ("SELECT sealed FROM webhook_secrets",)),
    ("readers read a sealed recipient", READONLY, NOT_ALLOWED, ("SELECT recipient_sealed FROM payouts",)),
    ("readers read a key's secret", READONLY, NOT_ALLOWED, ("SELECT secret_sealed FROM api_keys",)),
    ("readers read a webhook's secret", READONLY, NOT_ALLOWED, ("SELECT sealed FROM webhook_secrets",)),
    *(
        (f"the sealer puts {what} in the place of a seal of {table}", SEALER, f"{table}_sealed_anew", (
            f"UPDATE {table} SET {column} = {other.format(column)}",))
        for table, column in _SEALED.items()
        for what, other in {
            "nothing": "''::bytea",
            "half of it": "substring({0} FROM 1 FOR 20)",
            "one of the same key": "set_byte({0}, 20, 255 - get_byte({0}, 20))",
            "one of an older key": "set_byte({0}, 2, 0)",
            "one of another format": "set_byte(set_byte({0}, 2, 9), 0, 2)",
            "one of another day": "set_byte(set_byte({0}, 2, 9), 6, 255 - get_byte({0}, 6))",
        }.items()
    ),
    *(
        (f"{role} exchanges a seal of {table}", role, NOT_ALLOWED, (f"UPDATE {table} SET {column} = {column}",))
        for table, column in _SEALED.items()
        for role in (GATEWAY, WORKER, OPS, READONLY)
    ),
    ("the sealer moves a payout", SEALER, NOT_ALLOWED, ("UPDATE payouts SET state = 'failed'",)),
    ("the sealer revives a key", SEALER, NOT_ALLOWED, ("UPDATE api_keys SET revoked_at = NULL",)),
    ("the sealer reads the audit", SEALER, NOT_ALLOWED, ("SELECT actor FROM audit",)),
    ("the sealer reads what a payout is about", SEALER, NOT_ALLOWED, ("SELECT amount_minor FROM payouts",)),
    ("readers lock accounts", READONLY, NOT_ALLOWED, ("SELECT lock_accounts(ARRAY[1::bigint], 1000)",)),
    *(
        (f"{role} makes tables", role, NOT_ALLOWED, ("CREATE TABLE public.mine (id int)",))
        for role in APPLICATION
    ),
    *(
        (f"{role} replaces a guard", role, NOT_ALLOWED, (
            "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",))
        for role in APPLICATION
    ),
]  # fmt: skip


async def test_the_cases_begin_where_the_right_thing_passes(world: World) -> None:
    """The statements that the cases bend are accepted unbent; else a case could be refused for a slip of its own."""
    assert await _refusal(world, GATEWAY, _create()) is None
    assert await _refusal(world, GATEWAY, _end("{queued}", "canceled", "release")) is None
    assert await _refusal(world, WORKER, _word("{success}", "returned"), _refund("{success}")) is None
    assert (
        await _refusal(world, WORKER, _word("{verifying}", "paid"), _end("{verifying}", "success", "capture")) is None
    )
    for table, column in _SEALED.items():
        newer = f"UPDATE {table} SET {column} = set_byte({column}, 2, 9)"
        assert await _refusal(world, SEALER, newer) is None
    rotated = (_END_SECRETS, _WEBHOOK_SECRET, _END_SECRETS, _WEBHOOK_SECRET)
    assert await _refusal(world, OPS, *rotated, "SET CONSTRAINTS ALL IMMEDIATE") is None
    assert await _refusal(world, OPS, _SHOP % "false", _KEY % "'{{payouts:read}}'", _ADJUSTMENT) is None
    assert await _refusal(world, WORKER, _finish("{sending}", "paid"), _end("{sending}", "success", "capture")) is None
    failed = _end("{sending}", "failed", "release", failure="'other'")
    assert await _refusal(world, WORKER, _finish("{sending}", "declined"), failed) is None
    looked_up = _attempt("{verifying}", 2, "look_up", outcome="not_found")
    again = "UPDATE payouts SET state = '%s', version = version + 1 WHERE id = '{verifying}'"
    sent_again = _attempt("{verifying}", 3, "submit", outcome=None)
    assert await _refusal(world, WORKER, looked_up, again % "queued", again % "sending", sent_again) is None


def _heard(payin: str, outcome: str, no: int = 1, /, **values: str) -> str:
    """What the rail said about a payin."""
    columns = {"amount_minor": "p.amount_minor", "currency": "p.currency", "rail": "p.rail"} | values
    return (
        f"INSERT INTO payin_words (payin_id, shop_id, word_no, source, outcome, {', '.join(columns)})"
        f" SELECT p.id, p.shop_id, {no}, 'event', '{outcome}', {', '.join(columns.values())} FROM payins p"
        f" WHERE p.id = '{payin}'"
    )


def _end_payin(payin: str, state: str, kind: str | None, /, *, failure: str = "NULL", **values: str) -> str:
    """One statement that ends a payin, together with an entry unless `kind` is None."""
    amount = values.get("amount_minor", "1000")
    sign = "-" if kind == "payin_refund" else ""
    columns = {
        "account_id": "a.id",
        "seq": "a.last_seq + 1",
        "shop_id": "a.shop_id",
        "kind": f"'{kind}'",
        "contra": "'provider_clearing'",
        "amount_minor": amount,
        "posted_delta_minor": f"{sign}{amount}",
        "held_delta_minor": "0",
        "posted_after_minor": f"a.posted_minor + ({sign}{amount})",
        "held_after_minor": "a.held_minor",
        "payin_id": f"'{payin}'",
    } | values
    entry = (
        f"e AS (INSERT INTO entries ({', '.join(columns)}) SELECT {', '.join(columns.values())}"
        " FROM accounts a WHERE a.id = {account}), "
    )
    place = {"payin": "credit_seq = a.last_seq + 1,", "payin_refund": "refund_seq = a.last_seq + 1,"}.get(
        kind or "", ""
    )
    return (
        f"WITH {entry if kind else ''}d AS (DELETE FROM payin_due WHERE payin_id = '{payin}')"
        f" UPDATE payins p SET state = '{state}', version = p.version + 1, finalized_at = coalesce(p.finalized_at, now()),"
        f" {place} failure_code = {failure} FROM accounts a WHERE a.id = p.account_id AND p.id = '{payin}'"
    )


_CREDIT = _end_payin("{pending_in}", "success", "payin", amount_minor="1006")
_NEW_PAYIN = (
    "INSERT INTO payins (id, shop_id, account_id, external_id, amount_minor, currency, rail, reference)"
    " SELECT '{fresh}', a.shop_id, a.id, '{fresh}', 1000, 'BDT', 'sandbox', '{fresh}' FROM accounts a WHERE a.id = {account}"
)
_PAYIN_DUE = "INSERT INTO payin_due (payin_id, shop_id, rail, due_at) VALUES ('{fresh}', '{shop}', 'sandbox', now())"


async def test_payins_are_created_credited_refunded_and_ended(world: World) -> None:
    """The unbent statements of the cases below."""
    assert await _refusal(world, GATEWAY, f"WITH d AS ({_PAYIN_DUE}) {_NEW_PAYIN}") is None
    assert await _refusal(world, WORKER, _heard("{pending_in}", "paid"), _CREDIT) is None
    refund = _heard("{paid_in}", "returned", 2), _end_payin("{paid_in}", "refunded", "payin_refund")
    assert await _refusal(world, WORKER, *refund) is None
    failed = _heard("{pending_in}", "declined"), _end_payin("{pending_in}", "failed", None, failure="'other'")
    assert await _refusal(world, WORKER, *failed) is None


CASES += [
    ("a payin without its due row", GATEWAY, "payins_start_whole", (_NEW_PAYIN,)),
    ("a payin that is due at another rail", GATEWAY, "payins_start_whole", (
        f"WITH d AS ({_PAYIN_DUE.replace('sandbox', 'other')}) {_NEW_PAYIN}",)),
    ("a payin of another shop's account", GATEWAY, "payins_start_whole", (
        f"WITH d AS ({_PAYIN_DUE}) {_NEW_PAYIN.replace('a.id,', '{other_account},')}",)),
    ("a payin in another currency", GATEWAY, "payins_start_whole", (
        f"WITH d AS ({_PAYIN_DUE}) {_NEW_PAYIN.replace('BDT', 'USD')}",)),
    ("a payin twice", GATEWAY, "payins_external_id_unique", (
        f"WITH d AS ({_PAYIN_DUE}) {_NEW_PAYIN}",
        _NEW_PAYIN.replace("SELECT '{fresh}'", "SELECT '{merchant}'").replace("'sandbox', '{fresh}'", "'sandbox', 'x'"))),
    ("a credit that no rail spoke of", WORKER, "entries_payin_was_said", (_CREDIT,)),
    ("a credit on a word about another sum", WORKER, "entries_payin_was_said", (
        _heard("{pending_in}", "paid", amount_minor="p.amount_minor + 1"), _CREDIT)),
    ("a credit on a word about another currency", WORKER, "entries_payin_was_said", (
        _heard("{pending_in}", "paid", currency="'USD'"), _CREDIT)),
    ("a credit on a word that names no sum", WORKER, "entries_payin_was_said", (
        _heard("{pending_in}", "paid", amount_minor="NULL"), _CREDIT)),
    ("a credit of the event's amount", WORKER, "entries_match_payin", (
        _heard("{pending_in}", "paid"), _CREDIT.replace("1006", "1007"))),
    ("a credit to another account", WORKER, "payins_end_whole", (
        _heard("{pending_in}", "paid"), _CREDIT.replace("a.id = {account}),", "a.id = {other_account}),"))),
    ("a second credit", WORKER, "entries_one_credit_per_payin", (
        _end_payin("{paid_in}", "success", "payin").partition("WITH e AS (")[2].partition("), d AS (")[0],)),
    ("a word of another rail", WORKER, "payin_words_of_its_rail", (_heard("{pending_in}", "paid", rail="'other'"),)),
    ("a payin is paid without its money", WORKER, "payins_credited_iff_paid", (
        _heard("{pending_in}", "paid"), _end_payin("{pending_in}", "success", None))),
    ("a payin points at an entry of another", WORKER, "payins_end_whole", (
        _heard("{pending_in}", "paid"),
        _end_payin("{pending_in}", "success", None).replace("failure_code", "credit_seq = 1, failure_code"))),
    ("a payin fails that no rail declined", WORKER, "payins_end_was_said", (
        _end_payin("{pending_in}", "failed", None, failure="'other'"),)),
    ("a payin fails after paid", WORKER, "payins_end_was_said", (
        _heard("{pending_in}", "paid"), _heard("{pending_in}", "declined", 2),
        _end_payin("{pending_in}", "failed", None, failure="'other'"))),
    ("a payin expires that has no end", WORKER, "payins_moves", (
        _heard("{pending_in}", "not_found"), _end_payin("{pending_in}", "expired", None))),
    ("a refund that no rail spoke of", WORKER, "entries_payin_was_said", (
        _end_payin("{paid_in}", "refunded", "payin_refund"),)),
    ("a refund of what was never paid", WORKER, "payins_moves", (
        _heard("{pending_in}", "returned"), _end_payin("{pending_in}", "refunded", "payin_refund"))),
    ("a failed payin is paid", WORKER, "payins_end_stays", (
        _heard("{failed_in}", "paid", 2), _end_payin("{failed_in}", "success", "payin", amount_minor="1002"))),
    ("a pending payin is forgotten", WORKER, "payin_due_follows_payin", (
        "DELETE FROM payin_due WHERE payin_id = '{pending_in}'",)),
    ("a paid payin is due", GATEWAY, "payin_due_follows_payin", (_PAYIN_DUE.replace("{fresh}", "{paid_in}"),)),
    ("an event of a pending payin", WORKER, "events_match_payin", (
        "INSERT INTO events (id, shop_id, payin_id, sequence, type, body)"
        " SELECT '{fresh}', shop_id, id, version, 'payin.success', 'xx' FROM payins WHERE id = '{pending_in}'",)),
    ("an event of a payout and a payin", WORKER, "events_subject", (
        "INSERT INTO events (id, shop_id, payin_id, payout_id, sequence, type, body)"
        " SELECT '{fresh}', shop_id, id, '{success}', version, 'payin.success', 'xx' FROM payins WHERE id = '{paid_in}'",)),
    ("an entry of a payout and a payin", WORKER, "entries_subject", (
        _heard("{pending_in}", "paid"),
        _CREDIT.replace(", payin_id)", ", payin_id, payout_id)").replace(
            "'{pending_in}' FROM accounts", "'{pending_in}', '{success}' FROM accounts"))),
    ("a word is rewritten", OWNER, "payin_words_append_only", ("UPDATE payin_words SET outcome = 'declined'",)),
    ("a word is forgotten", OWNER, "payin_words_append_only", ("DELETE FROM payin_words",)),
    ("the history of payins is rewritten", OWNER, "payin_moves_append_only", ("UPDATE payin_moves SET state = 'x'",)),
    ("a payin is deleted", OWNER, "payins_no_delete", ("DELETE FROM payins",)),
    ("how a payin ended is told anew", WORKER, "payins_end_stays", (
        "UPDATE payins SET provider_reference = 'another' WHERE id = '{paid_in}'",)),
    ("a payin's version without a move", WORKER, "payins_version_follows_state", (
        "UPDATE payins SET version = version + 1 WHERE id = '{pending_in}'",)),
    *(
        (f"{role} credits", role, NOT_ALLOWED, (_heard("{pending_in}", "paid"),)) for role in (GATEWAY, OPS, READONLY)
    ),
    *(
        (f"{role} moves a payin", role, NOT_ALLOWED, ("UPDATE payins SET state = 'success' WHERE id = '{pending_in}'",))
        for role in (GATEWAY, OPS, READONLY)
    ),
    ("the worker makes payins", WORKER, NOT_ALLOWED, (_NEW_PAYIN,)),
    ("a link for payers without the reference", OPS, "rails_payin_link_has_reference", (
        "INSERT INTO rails (id, name, kind, payin_link) VALUES ('{fresh}', 'x', 'sandbox', 'https://pay.example.com')",)),
]  # fmt: skip


_RESOLUTION = (
    "INSERT INTO audit (actor, action, subject, reason, detail) VALUES ('alice', 'payout.resolve', 'p', 'a letter',"
    ' \'{{"resolution_id": "{fresh}", "outcome": "declined"}}\')',
    "INSERT INTO resolutions (id, payout_id, shop_id, reference, outcome, opened_by)"
    " SELECT '{fresh}', t.payout_id, t.shop_id, t.reference, 'declined', (SELECT max(id) FROM audit)"
    " FROM payout_attempts t WHERE t.payout_id = '{verifying}' AND t.attempt_no = 1",
)


def _confirmed_by(actor: str, action: str = "payout.confirm") -> tuple[str, str]:
    return (
        f"INSERT INTO audit (actor, action, subject, reason, detail) VALUES ('{actor}', '{action}', 'p', 'a letter',"
        ' \'{{"resolution_id": "{fresh}", "outcome": "declined"}}\')',
        "UPDATE resolutions SET closed_at = now(), closed_by = (SELECT max(id) FROM audit), is_confirmed = true",
    )


def _said_by_operators(outcome: str = "declined") -> str:
    return (
        "INSERT INTO rail_events (rail, event_id, reference, outcome)"
        f" SELECT 'operators', '{{fresh}}', reference, '{outcome}' FROM payout_attempts WHERE payout_id = '{{verifying}}'"
    )


async def test_two_operators_may_say_how_a_payout_ended(world: World) -> None:
    """The unbent statements of the cases below."""
    assert await _refusal(world, OPS, *_RESOLUTION, *_confirmed_by("bob"), _said_by_operators()) is None
    told = _word("{verifying}", "declined"), _end("{verifying}", "failed", "release", failure="'provider_declined'")
    assert await _refusal(world, WORKER, *told) is None


CASES += [
    ("a resolution of a payout that is not in doubt", OPS, "resolutions_open_whole", (
        _RESOLUTION[0], _RESOLUTION[1].replace("{verifying}", "{submitted}"))),
    ("a resolution without an audit row of its own", OPS, "resolutions_open_whole", (
        _RESOLUTION[1].replace("(SELECT max(id) FROM audit)", "{foreign_audit}"),)),
    ("a resolution that says something else than its audit row", OPS, "resolutions_open_whole", (
        _RESOLUTION[0], _RESOLUTION[1].replace("'declined'", "'paid'"))),
    ("a second resolution beside an open one", OPS, "resolutions_one_open_per_payout", (
        *_RESOLUTION, *(part.replace("{fresh}", "{shop}") for part in _RESOLUTION))),
    ("one operator confirms alone", OPS, "resolutions_need_two", (*_RESOLUTION, *_confirmed_by("Alice"))),
    ("a resolution is confirmed by a withdrawal", OPS, "resolutions_need_two", (
        *_RESOLUTION, *_confirmed_by("bob", "payout.withdraw"))),
    ("a resolution is closed and not said how", OPS, "resolutions_closed_by_somebody", (
        *_RESOLUTION, _confirmed_by("bob", "payout.withdraw")[0],
        "UPDATE resolutions SET closed_at = now(), closed_by = (SELECT max(id) FROM audit), is_confirmed = NULL")),
    ("a confirmed resolution changes", OPS, "resolutions_stay", (
        *_RESOLUTION, *_confirmed_by("bob"), *_confirmed_by("carol"))),
    ("a resolution is forgotten", OWNER, "resolutions_no_delete", (
        *_RESOLUTION, "DELETE FROM resolutions")),
    ("operators say what nobody confirmed", OPS, "rail_events_of_operators", (*_RESOLUTION, _said_by_operators())),
    ("operators say something else than was confirmed", OPS, "rail_events_of_operators", (
        *_RESOLUTION, *_confirmed_by("bob"), _said_by_operators("paid"))),
    *(
        (f"{role} speaks for operators", role, "rail_events_of_operators", (
            "INSERT INTO rail_events (rail, event_id, reference, outcome) VALUES ('operators', '{fresh}', 'x', 'paid')",))
        for role in (GATEWAY, WORKER)
    ),
    *((f"{role} resolves", role, NOT_ALLOWED, (_RESOLUTION[1],)) for role in (GATEWAY, WORKER, READONLY)),
    ("a rail takes the operators' name", OPS, "rails_name_is_no_ones", (
        "INSERT INTO rails (id, name, kind) VALUES ('{fresh}', 'operators', 'sandbox')",)),
    ("a reference of another payout", WORKER, "payout_attempts_reference_of_one_payout", (
        "UPDATE payouts SET state = 'sending', version = 2 WHERE id = '{queued}'",
        "INSERT INTO payout_attempts (payout_id, shop_id, attempt_no, action, rail, reference)"
        " SELECT id, shop_id, 1, 'submit', 'sandbox', 'po_sending' FROM payouts WHERE id = '{queued}'")),
    ("a provider's reference is forgotten", WORKER, "payouts_end_stays", (
        "UPDATE payouts SET provider_reference = 'bank-1' WHERE id = '{verifying}'",
        "UPDATE payouts SET provider_reference = NULL WHERE id = '{verifying}'")),
    ("a look-up that was not accepted", WORKER, "payout_attempts_outcome_of_action", (
        _attempt("{verifying}", 2, "look_up", outcome="not_accepted"),)),
    ("a version without a move", WORKER, "payouts_version_follows_state", (
        "UPDATE payouts SET version = version + 1 WHERE id = '{queued}'",)),
    ("an event of an open payout", WORKER, "events_match_payout", (
        "INSERT INTO events (id, shop_id, payout_id, sequence, type, body)"
        " SELECT '{fresh}', shop_id, id, version, 'payout.success', 'xx' FROM payouts WHERE id = '{sending}'",)),
    ("a revoked key lives again", OPS, "api_keys_stay_revoked", (
        "UPDATE api_keys SET revoked_at = now() WHERE id = '{key}'",
        "UPDATE api_keys SET revoked_at = NULL WHERE id = '{key}'")),
    ("the gateway reads webhook secrets", GATEWAY, NOT_ALLOWED, ("SELECT id FROM webhook_secrets",)),
    ("the worker makes a webhook secret", WORKER, NOT_ALLOWED, (_WEBHOOK_SECRET,)),
    ("the worker ends a webhook secret", WORKER, NOT_ALLOWED, ("UPDATE webhook_secrets SET not_after = now()",)),
    ("ops exchange a secret's seal", OPS, NOT_ALLOWED, ("UPDATE webhook_secrets SET sealed = ''",)),
    ("ops forget a secret", OPS, NOT_ALLOWED, ("DELETE FROM webhook_secrets",)),
    ("two current secrets", OPS, "webhook_secrets_one_current", (_WEBHOOK_SECRET,)),
    ("a fourth live secret", OPS, "webhook_secrets_are_few", (
        _END_SECRETS, _WEBHOOK_SECRET, _END_SECRETS, _WEBHOOK_SECRET, _END_SECRETS, _WEBHOOK_SECRET)),
    ("a secret that begins with its end", OWNER, "webhook_secrets_are_few", (
        _WEBHOOK_SECRET.replace("sealed)", "sealed, not_after)").replace("''", "'', now()"),)),
    ("a secret lives again", OPS, "webhook_secrets_end_once", (
        _END_SECRETS, "UPDATE webhook_secrets SET not_after = NULL WHERE shop_id = '{shop}'")),
    ("a secret lives longer", OPS, "webhook_secrets_end_once", (
        _END_SECRETS, "UPDATE webhook_secrets SET not_after = not_after + interval '1 second' WHERE shop_id = '{shop}'")),
    ("a secret's end is more than a week away", OPS, "webhook_secrets_end_once", (
        "UPDATE webhook_secrets SET not_after = now() + interval '168 hours 1 second' WHERE shop_id = '{shop}'",)),
    ("a secret goes to another shop", OWNER, "webhook_secrets_end_once", (
        "UPDATE webhook_secrets SET shop_id = '{other_shop}' WHERE shop_id = '{shop}'",)),
    ("a secret ends before it begins", OWNER, "webhook_secrets_begin_before_end", (
        "UPDATE webhook_secrets SET not_after = created_at - interval '1 second' WHERE shop_id = '{shop}'",)),
    ("a shop without a secret", OPS, "shops_have_webhook_secret", (_SHOP % "false", "SET CONSTRAINTS ALL IMMEDIATE")),
    ("a shop's only secret ends", OPS, "shops_have_webhook_secret", (_END_SECRETS, "SET CONSTRAINTS ALL IMMEDIATE")),
    ("a shop's secret is forgotten", OWNER, "shops_have_webhook_secret", (
        "DELETE FROM webhook_secrets WHERE shop_id = '{shop}'", "SET CONSTRAINTS ALL IMMEDIATE")),
]  # fmt: skip


_SHARE = "INSERT INTO callback_shares (merchant_id) VALUES ('{third_merchant}')"
_LANE = (
    "INSERT INTO callback_lanes (id, shop_id, merchant_id, origin)"
    " SELECT callback_lane_id(shop, origin), shop, merchant, origin"
    " FROM (VALUES ('{shop}'::uuid, '{merchant}'::uuid, 'http://new')) AS l (shop, merchant, origin)"
)
_AGAIN = (
    "DELETE FROM callback_due WHERE event_id = '{called}'",
    "INSERT INTO callback_due (event_id, shop_id, lane_id) VALUES ('{called}', '{shop}', '{lane}')",
)


async def test_lanes_are_made_claimed_from_and_held(world: World) -> None:
    """The unbent statements of the cases below."""
    for role in (GATEWAY, WORKER, OPS):
        assert await _refusal(world, role, _SHARE, _LANE) is None
    assert await _refusal(world, WORKER, *_AGAIN) is None
    for role in (WORKER, OPS):
        locked = "SELECT FROM callback_shares FOR UPDATE"
        held = "UPDATE callback_lanes SET held_at = now(), held_reason = 'x', ready_at = 'infinity'"
        assert await _refusal(world, role, locked, held, "UPDATE callback_lanes SET in_flight = 1, cap = 256") is None


_LANE_COLUMNS = (
    "cap = 256", "in_flight = 0", "trouble = 0", "opened = 0", "blocked_until = now()", "failing_since = NULL",
    "held_at = NULL", "held_reason = NULL", "ready_at = now()", "taken_at = now()",
)  # fmt: skip

CASES += [
    *((f"the gateway changes a lane: {change}", GATEWAY, NOT_ALLOWED, (f"UPDATE callback_lanes SET {change}",))
      for change in _LANE_COLUMNS),
    ("the gateway holds a merchant's lanes", GATEWAY, NOT_ALLOWED, ("SELECT FROM callback_shares FOR UPDATE",)),
    ("the gateway begins a lane in its favour", GATEWAY, NOT_ALLOWED, (
        _LANE.replace("origin)", "origin, cap)", 1).replace("merchant, origin FROM", "merchant, origin, 256 FROM"),)),
    *((f"{role} changes a share", role, "callback_shares_stay", ("UPDATE callback_shares SET created_at = now()",))
      for role in (OWNER, WORKER, OPS)),
    ("the owner forgets a share", OWNER, "callback_shares_stay", ("DELETE FROM callback_shares",)),
    *((f"{role} moves a share to another merchant", role, NOT_ALLOWED, (
        "UPDATE callback_shares SET merchant_id = '{third_merchant}'",)) for role in APPLICATION),
    *((f"{role} forgets a share", role, NOT_ALLOWED, ("DELETE FROM callback_shares",)) for role in APPLICATION),
    *((f"{role} forgets a lane", role, NOT_ALLOWED, ("DELETE FROM callback_lanes",)) for role in APPLICATION),
    *((f"{role} moves a lane", role, NOT_ALLOWED, (f"UPDATE callback_lanes SET {change}",))
      for role in APPLICATION for change in (
          "id = gen_random_uuid()", "shop_id = '{other_shop}'", "merchant_id = '{other_merchant}'", "origin = 'http://x'")),
    ("a share of a merchant who is not there", GATEWAY, "callback_shares_merchant_id_fkey", (
        _SHARE.replace("{third_merchant}", "{fresh}"),)),
    ("a second share of a merchant", GATEWAY, "callback_shares_pkey", (
        _SHARE.replace("{third_merchant}", "{merchant}"),)),
    *((f"{role} makes a lane of a foreign shop", role, "callback_lanes_of_their_shop", (
        _LANE.replace("{shop}", "{other_shop}"),)) for role in (GATEWAY, WORKER, OPS)),
    ("a lane of a foreign merchant", GATEWAY, "callback_lanes_of_their_shop", (
        _LANE.replace("{merchant}", "{other_merchant}"),)),
    ("a lane of a shop that is not there", GATEWAY, "callback_lanes_of_their_shop", (
        _LANE.replace("{shop}", "{fresh}"),)),
    ("a lane of a merchant who has no share", GATEWAY, "callback_lanes_of_their_shop", (
        _LANE.replace("{shop}", "{third_shop}").replace("{merchant}", "{third_merchant}"),)),
    ("a lane whose id is of another origin", GATEWAY, "callback_lanes_id_of_origin", (
        _LANE.replace("callback_lane_id(shop, origin)", "callback_lane_id(shop, 'http://other')"),)),
    ("a lane whose id is of another shop", GATEWAY, "callback_lanes_id_of_origin", (
        _LANE.replace("callback_lane_id(shop, origin)", "callback_lane_id('{other_shop}', origin)"),)),
    ("a second lane to an origin", GATEWAY, "callback_lanes_pkey", (_LANE, _LANE)),
    ("a lane to nowhere", GATEWAY, "callback_lanes_origin_check", (_LANE.replace("http://new", ""),)),
    *((f"{role} gives a lane {what}", role, check, (f"UPDATE callback_lanes SET {change}",))
      for role in (WORKER, OPS) for what, change, check in (
          ("no room", "cap = 0", "callback_lanes_cap_check"), ("all room", "cap = 257", "callback_lanes_cap_check"),
          ("less than nothing in flight", "in_flight = -1", "callback_lanes_in_flight_check"),
          ("more trouble than there is", "trouble = 1.1", "callback_lanes_trouble_check"),
          ("a hold without a reason", "held_at = now(), ready_at = 'infinity'", "callback_lanes_say_why_held"),
          ("a reason without a hold", "held_reason = 'x'", "callback_lanes_say_why_held"),
          ("a turn while it is held", "held_at = now(), held_reason = 'x', ready_at = now()",
           "callback_lanes_held_are_never_ready"))),
    *((f"{role} has a callback wait in another shop's lane", role, "callback_due_has_lane", (
        *(_AGAIN[:1] if role == WORKER else ()), _AGAIN[1].replace("{lane}", "{other_lane}")))
      for role in (WORKER,)),
    ("a callback waits in no lane", WORKER, "callback_due_has_lane", (
        _AGAIN[0], _AGAIN[1].replace("{lane}", "{fresh}"))),
    ("a callback of another shop waits in a lane", WORKER, "callback_due_has_callback", (
        _AGAIN[0], _AGAIN[1].replace("{shop}", "{other_shop}"))),
    *((f"{role} moves a callback to another lane", role, NOT_ALLOWED, (
        "UPDATE callback_due SET lane_id = '{other_lane}'",)) for role in APPLICATION),
    ("the gateway takes a callback", GATEWAY, NOT_ALLOWED, ("UPDATE callback_due SET lease_token = '{fresh}'",)),
    *((f"{role} begins a replay", role, NOT_ALLOWED, (
        "INSERT INTO callback_replays (id, filter, per_second, actor, reason)"
        " VALUES ('{fresh}', '{{}}', 1, 'x', 'x')",)) for role in (GATEWAY, WORKER)),
    ("ops change what a replay sends", OPS, NOT_ALLOWED, ("UPDATE callback_replays SET filter = '{{}}'",)),
    ("ops forget a replay", OPS, NOT_ALLOWED, ("DELETE FROM callback_replays",)),
]  # fmt: skip


@pytest.mark.parametrize(("role", "refused_by", "statements"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
async def test_refused_by_what_is_meant_to(
    world: World, role: str, refused_by: str, statements: tuple[str, ...]
) -> None:
    assert len(statements) == 1 or await _refusal(world, role, *statements[:-1]) is None
    assert await _refusal(world, role, *statements) == refused_by


# Nobody's constraint is named here: what matters is that no role of the application gets there by any door.
HOLES: list[tuple[str, str, tuple[str, ...]]] = [
    *(
        (f"{role} moves an account by a trigger on a table of its own", role, (
            "CREATE TEMP TABLE forged (account_id bigint, seq bigint, shop_id uuid, kind text, contra text,"
            " amount_minor bigint, posted_delta_minor bigint, held_delta_minor bigint, posted_after_minor bigint,"
            " held_after_minor bigint, payout_id uuid, audit_id bigint)",
            "CREATE TRIGGER forged AFTER INSERT ON forged REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT"
            " EXECUTE FUNCTION public.entries_move_accounts()",
            _entry("adjustment").replace("INSERT INTO entries", "INSERT INTO forged")))
        for role in APPLICATION
    ),
    *(
        (f"{role} adjusts in the name of somebody else's audit", role, (_ADJUSTMENT,)) for role in (GATEWAY, WORKER)
    ),
    ("ops open an account with money in it", OPS, (
        _SHOP % "false", "INSERT INTO accounts (shop_id, currency, posted_minor) VALUES ('{fresh}', 'BDT', 1000)")),
    ("ops open an account with a past", OPS, (
        _SHOP % "false", "INSERT INTO accounts (shop_id, currency, last_seq) VALUES ('{fresh}', 'BDT', 7)")),
    ("the worker forgets an unfinished payout", WORKER, ("DELETE FROM payout_due WHERE payout_id = '{verifying}'",)),
    ("a due row of no payout", GATEWAY, (_DUE,)),
    ("a second due row of a payout", GATEWAY, (
        "INSERT INTO payout_due (payout_id, shop_id, rail) VALUES ('{queued}', '{other_shop}', 'sandbox')",)),
    ("a payout is paid that was never sent", WORKER, (
        "UPDATE payouts SET state = 'sending', version = version + 1 WHERE id = '{queued}'",
        _end("{queued}", "success", "capture"))),
    ("a capture after declined", WORKER, (
        _finish("{sending}", "declined"), _end("{sending}", "success", "capture"))),
    ("a release while an attempt before the last says paid", WORKER, (
        _finish("{sending}", "paid"), _attempt("{sending}", 2, "look_up", outcome="not_found"),
        _end("{sending}", "failed", "release", failure="'other'"))),
    ("a refund without its money", WORKER, (
        "UPDATE payouts SET state = 'refunded', version = version + 1, failure_code = 'returned_by_bank'"
        " WHERE id = '{success}'",)),
    ("a submit of a payout that is final", WORKER, (
        _attempt("{failed}", 2, "look_up", outcome="not_found"), _attempt("{failed}", 3, "submit", outcome=None))),
    ("a submit of a payout that is queued", WORKER, (
        _attempt("{sending}", 1, "submit", outcome=None).replace(
            "SELECT t.payout_id, t.shop_id", "SELECT '{queued}', t.shop_id"),)),
    ("a definite outcome is rewritten", WORKER, (
        "UPDATE payout_attempts SET outcome = 'not_accepted' WHERE payout_id = '{success}'",)),
    ("a definite outcome is taken back", WORKER, (
        "UPDATE payout_attempts SET outcome = NULL, finished_at = NULL WHERE payout_id = '{success}'",)),
    ("another reason for a failure", WORKER, (
        "UPDATE payouts SET failure_code = 'no_route' WHERE id = '{failed}'",)),
    ("another time of the end", WORKER, (
        "UPDATE payouts SET finalized_at = now() - interval '1 year' WHERE id = '{success}'",)),
]  # fmt: skip


@pytest.mark.parametrize(("role", "statements"), [hole[1:] for hole in HOLES], ids=[hole[0] for hole in HOLES])
async def test_no_role_reaches_a_forbidden_state(world: World, role: str, statements: tuple[str, ...]) -> None:
    refused_by = await _refusal(world, role, *statements)
    assert refused_by is not None, "nothing refused it"
    assert refused_by == NOT_ALLOWED or not refused_by.startswith("42"), f"a slip of the test: {refused_by}"


@pytest.mark.parametrize("role", [OWNER, *APPLICATION])
@pytest.mark.parametrize("table", ["payouts", "payins", "entries", "events", "audit", "payin_words"])
async def test_history_stays_whoever_asks(world: World, table: str, role: str) -> None:
    has_progress = table in ("payouts", "payins")
    trigger = f"{table}_no_delete" if has_progress else f"{table}_append_only"
    deleted, truncated = (trigger, f"{table}_no_truncate") if role == OWNER else (NOT_ALLOWED, NOT_ALLOWED)
    assert await _refusal(world, role, f"DELETE FROM {table}") == deleted
    assert await _refusal(world, role, f"TRUNCATE {table} CASCADE") == truncated
    if not has_progress:
        column = metadata.tables[table].columns.keys()[-1]
        assert await _refusal(world, role, f"UPDATE {table} SET {column} = {column}") == deleted


@pytest.mark.parametrize(
    "change",
    [
        "id = gen_random_uuid()",
        "shop_id = '{other_shop}'",
        "account_id = {other_account}",
        "external_id = 'another'",
        "amount_minor = amount_minor + 1",
        "currency = 'USD'",
        "recipient_masked = 'another'",
        "recipient_digest = sha256('another')",
        "payment_data_digest = sha256('another')",
        "callback_url = 'http://localhost/another'",
        "details = '{{}}'",
        "hold_seq = 1",
        "created_at = now()",
    ],
)
async def test_terms_stay_whoever_asks(world: World, change: str) -> None:
    update = f"UPDATE payouts SET {change} WHERE id = '{{queued}}'"
    assert await _refusal(world, OWNER, update) == "payouts_terms_fixed"
    for role in APPLICATION:
        assert await _refusal(world, role, update) == NOT_ALLOWED


async def test_terms_that_may_not_change_are_all_but_those_that_tell_a_payouts_progress(world: World) -> None:
    """A column that is added later is either progress or a term; `recipient_sealed` may be sealed anew."""
    progress = {
        "state",
        "version",
        "failure_code",
        "provider_reference",
        "resolution_seq",
        "return_seq",
        "updated_at",
        "finalized_at",
    }
    columns = set(metadata.tables["payouts"].columns.keys())
    async with _acting(world, OWNER) as tx:
        granted = await tx.scalars(
            text(
                "SELECT column_name FROM information_schema.column_privileges WHERE table_name = 'payouts'"
                " AND grantee = 'payouts_worker' AND privilege_type = 'UPDATE'"
            )
        )
        watched = await tx.scalars(
            text(
                "SELECT pg_get_triggerdef(oid) FROM pg_trigger"
                " WHERE tgname IN ('payouts_terms_fixed', 'payouts_expiry_fixed', 'payouts_trace_fixed')"
            )
        )
    assert set(granted) == progress
    names = {name for each in watched for name in each.partition("UPDATE OF ")[2].partition(" ON ")[0].split(", ")}
    assert names == columns - progress


@pytest.mark.parametrize("column", metadata.tables["payins"].columns.keys())
async def test_of_a_payin_only_its_progress_changes(world: World, column: str) -> None:
    progress = {
        *("state", "version", "failure_code", "provider_reference", "credit_seq", "refund_seq"),
        *("updated_at", "finalized_at"),
    }
    value = {
        "details": "'{{}}'",
        "account_id": "{other_account}",
        "amount_minor": "amount_minor + 1",
        "payment_data_digest": "sha256('another')",
        "id": "gen_random_uuid()",
        "shop_id": "gen_random_uuid()",
        "expires_at": "now()",
        "created_at": "now()",
    }.get(column, "'another'")
    update = f"UPDATE payins SET {column} = {value} WHERE id = '{{pending_in}}'"
    if column not in progress:
        assert await _refusal(world, OWNER, update) == "payins_terms_fixed"
        assert await _refusal(world, WORKER, update) == NOT_ALLOWED
    for role in (GATEWAY, OPS, READONLY):
        assert await _refusal(world, role, f"UPDATE payins SET {column} = {column}") == NOT_ALLOWED


PAYIN_PAIRS = list(permutations(PayinState, 2))


@pytest.mark.parametrize(("source", "target"), PAYIN_PAIRS, ids=[f"{a}-{b}" for a, b in PAYIN_PAIRS])
async def test_moves_of_payins_are_those_of_the_code(world: World, source: PayinState, target: PayinState) -> None:
    def put(state: PayinState) -> str:
        credited = state in (PayinState.SUCCESS, PayinState.REFUNDED)
        failure = "'other'" if state is PayinState.FAILED else "NULL"
        return (
            f"UPDATE payins SET state = '{state}', version = version + 1, failure_code = {failure},"
            f" credit_seq = {1 if credited else 'NULL'}, refund_seq = {1 if state is PayinState.REFUNDED else 'NULL'},"
            f" expires_at = now(), finalized_at = {'now()' if state.is_final else 'NULL'} WHERE id = '{{pending_in}}'"
        )

    refused_by = await _refusal(
        world,
        OWNER,
        "ALTER TABLE payins DISABLE TRIGGER USER",
        put(source),
        "ALTER TABLE payins ENABLE TRIGGER payins_moves",
        put(target),
    )
    assert refused_by == (None if (source, target) in PAYIN_MOVES else "payins_moves")


PAIRS = list(permutations(State, 2))


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{source}-{target}" for source, target in PAIRS])
async def test_moves_are_those_of_the_code(world: World, source: State, target: State) -> None:
    def put(state: State) -> str:
        end = "NULL, NULL" if state in STAGES else "1, now()"
        failure = "'other'" if state in (State.FAILED, State.REFUNDED) else "NULL"
        return (
            f"UPDATE payouts SET state = '{state}', version = version + 1, failure_code = {failure},"
            f" (resolution_seq, finalized_at) = ROW ({end}), return_seq = {1 if state is State.REFUNDED else 'NULL'}"
            " WHERE id = '{queued}'"
        )

    refused_by = await _refusal(
        world,
        OWNER,
        "ALTER TABLE payouts DISABLE TRIGGER USER",
        put(source),
        "ALTER TABLE payouts ENABLE TRIGGER payouts_moves",
        put(target),
    )
    assert refused_by == (None if (source, target) in MOVES else "payouts_moves")


@pytest.mark.parametrize("table", sorted(metadata.tables))
async def test_readers_write_nothing(world: World, table: str) -> None:
    column = metadata.tables[table].columns.keys()[-1]
    assert await _refusal(world, READONLY, f"INSERT INTO {table} DEFAULT VALUES") == NOT_ALLOWED
    assert await _refusal(world, READONLY, f"UPDATE {table} SET {column} = {column}") == NOT_ALLOWED
    assert await _refusal(world, READONLY, f"DELETE FROM {table}") == NOT_ALLOWED
    assert await _refusal(world, READONLY, f"TRUNCATE {table}") == NOT_ALLOWED
