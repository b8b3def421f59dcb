"""Another master key: everything is sealed anew while everybody works, and the old key is needed no more."""

import asyncio
import base64
import json
import os
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Final
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from common.db.engine import in_transaction
from common.db.merchants import find_api_keys
from common.db.sealed import COLUMNS, SealedColumn, count_sealed, find_sealed_otherwise, save_sealed_anew
from common.db.webhook_secrets import find_webhook_secrets
from common.sealing import API_KEY_PURPOSE, RAIL_SECRET_PURPOSE
from common.settings import Settings
from common.webhook_secrets import open_webhook_secrets
from ops.onboarding import add_http_rail, rotate_webhook_secret
from ops.rotation import Rotated, reseal
from tests.conftest import Server
from tests.factories import KEY, Merchant, create_body, engine, environment, execute, fetch, order
from tests.faults.locks import Superuser, locked, until_waiting
from tests.flows import Desk, assert_sound, desk
from tests.stack import ROOT, client, stack
from tests.terminal import Terminal

NEW: Final = base64.b64encode(bytes(range(32, 64))).decode()
BOTH: Final = {"PAYOUTS_MASTER_KEYS": f"1:{KEY},2:{NEW}"}
NEW_ALONE: Final = {"PAYOUTS_MASTER_KEYS": f"2:{NEW}"}
COMMAND: Final = ("keys", "rotate-master", "--reason", "a year is over", "--actor", "alice")
_SEALED_PAYOUTS: Final = next(column for column in COLUMNS if column.table == "payouts")


@pytest.fixture
async def sealer(database_url: str) -> AsyncIterator[AsyncEngine]:
    """Whoever exchanges seals."""
    pool = engine(database_url, role="payouts_sealer")
    yield pool
    await pool.dispose()


@pytest.fixture
async def superuser(server: Server, database_url: str) -> AsyncIterator[Superuser]:
    """Somebody who sees who waits for whom."""
    database = make_url(server.admin_url).set(database=make_url(database_url).database)
    connection = await asyncpg.connect(database.render_as_string(hide_password=False))
    yield connection
    await connection.close()


@pytest.fixture
def terminal(database_url: str) -> Terminal:
    """Somebody who has both keys in the environment."""
    return Terminal(environment(database_url, **BOTH))


async def keys_of(floor: Desk) -> dict[str, Counter[int]]:
    """Under which master keys the values of each table are sealed, read without the code that is tested."""
    counted: dict[str, Counter[int]] = {}
    for column in COLUMNS:
        query = f"SELECT {column.column} AS sealed FROM {column.table} WHERE {column.column} IS NOT NULL"
        rows = await fetch(floor.owner, query)
        counted[column.table] = Counter(struct.unpack_from(">BH", row.sealed)[1] for row in rows)
    return counted


async def furnish(floor: Desk, payouts: int = 3) -> Merchant:
    """A merchant with a key, two webhook secrets, a bank, and payouts that wait."""
    merchant = await floor.merchant()
    keyring = floor.settings.keyring
    bank = {"name": "a-bank", "base_url": "http://127.0.0.1:9", "authoritative": False, "secret": "rk_known"}
    await add_http_rail(floor.owner, keyring, actor="tests", **bank)  # type: ignore[arg-type]
    await rotate_webhook_secret(
        floor.owner,
        keyring,
        merchant=merchant.code,
        shop="shop-001",
        grace_seconds=3_600,
        reason="a test",
        actor="tests",
    )
    await floor.create_many(merchant, payouts)
    return merchant


def all_under(key_id: int, payouts: int = 3) -> dict[str, Counter[int]]:
    sizes = {"rails": 1, "api_keys": 1, "webhook_secrets": 2, "payouts": payouts}
    return {table: Counter({key_id: size}) for table, size in sizes.items()}


async def test_a_dry_run_counts_by_key_and_changes_nothing(terminal: Terminal, floor: Desk) -> None:
    await furnish(floor)

    ended = await terminal.run(*COMMAND, "--dry-run", "--json")
    (await terminal.run(*COMMAND, "--dry-run")).assert_shown("payouts", "webhook_secrets", "api_keys", "rails")

    assert ended.document == {"newest": 2, "sealed_anew": 0, "left": {"1": 7}, "unreadable": [], "removable": []}
    assert await keys_of(floor) == all_under(1)
    assert await floor.count("audit", "action = 'keys.rotate_master'") == 0


async def test_afterwards_the_new_key_alone_opens_everything(
    terminal: Terminal, floor: Desk, database_url: str
) -> None:
    merchant = await furnish(floor)

    told = (await terminal.run(*COMMAND, "--json")).document

    assert told == {"newest": 2, "sealed_anew": 7, "left": {}, "unreadable": [], "removable": [1]}
    assert await keys_of(floor) == all_under(2)
    async with desk(database_url, **NEW_ALONE) as later:
        keyring = later.settings.keyring
        keys = await in_transaction(later.gateway, lambda tx: find_api_keys(tx, [merchant.api_key]))
        key = keys[merchant.api_key]
        secret = keyring.open(key.secret_sealed, owner=key.merchant_id, row=key.id, purpose=API_KEY_PURPOSE)
        assert secret.decode() == merchant.api_secret
        found = await in_transaction(later.worker, lambda tx: find_webhook_secrets(tx, [merchant.shop.id]))
        assert open_webhook_secrets(keyring, found[merchant.shop.id])[1] == merchant.webhook_secret
        rail = await later.one("SELECT id, secret_sealed FROM rails WHERE name = 'a-bank'")
        opened = keyring.open(rail.secret_sealed, owner=rail.id, row=rail.id, purpose=RAIL_SECRET_PURPOSE)
        assert opened == b"rk_known"
        await later.settle()
        assert await later.count("payouts", "state = 'success'") == 3
        await assert_sound(later.owner)
    audited = await floor.one("SELECT actor, subject, reason FROM audit WHERE action = 'keys.rotate_master'")
    assert tuple(audited) == ("alice", "master key 2", "a year is over")
    again = await terminal.run(*COMMAND)
    again.assert_shown("sealed anew under master key 2: 0", "take it out of PAYOUTS_MASTER_KEYS")


async def test_a_create_that_is_repeated_is_known_when_the_old_key_is_gone(
    terminal: Terminal, floor: Desk, database_url: str
) -> None:
    merchant = await floor.merchant()
    body = create_body(card_number="01798765432")
    async with stack(database_url) as before:
        await before.start("gateway")
        async with client(before.base_url, merchant) as shop:
            created, payout = await shop.create(body)
    assert (await terminal.run(*COMMAND, "--json")).document["removable"] == [1]

    async with stack(database_url, **NEW_ALONE) as after:
        await after.start("gateway")
        async with client(after.base_url, merchant) as shop:
            repeated, same = await shop.create(body)
            other, refused = await shop.create(json.dumps(json.loads(body) | {"card_number": "01798765433"}).encode())

    assert (created, repeated, other) == (201, 200, 422)
    assert same["id"] == payout["id"]
    assert refused["error"]["reason"] == "external_id_reused"
    assert await floor.count("payouts") == 1


async def test_seals_keep_their_day_and_are_bound_to_their_row(
    terminal: Terminal, floor: Desk, database_url: str
) -> None:
    await furnish(floor, payouts=2)
    query = "SELECT id, recipient_sealed AS sealed FROM payouts ORDER BY id"
    before = await fetch(floor.owner, query)

    (await terminal.run(*COMMAND)).assert_shown()

    after = await fetch(floor.owner, query)
    headers = [[struct.unpack_from(">BHI", row.sealed) for row in rows] for rows in (before, after)]
    assert [(form, 2, day) for form, _, day in headers[0]] == headers[1]
    assert {row.sealed[7:] for row in before} & {row.sealed[7:] for row in after} == set()
    await execute(
        floor.owner,
        "UPDATE payouts SET recipient_sealed = :sealed WHERE id = :id",
        id=after[0].id,
        sealed=after[1].sealed,
    )
    third = {"PAYOUTS_MASTER_KEYS": f"2:{NEW},3:{KEY}"}
    moved = await Terminal(environment(database_url, **third)).run(*COMMAND, "--json")
    assert (moved.code, json.loads(moved.out)["unreadable"]) == (1, [f"payouts/{after[0].id}"])


async def test_who_is_killed_goes_on_where_it_ended(
    terminal: Terminal, floor: Desk, database_url: str, superuser: Superuser
) -> None:
    """Kill -9 while it waits for a table, with half of the others behind it."""
    await furnish(floor, payouts=5)
    script = [sys.executable, "-c", "from ops.cli import main; main()", *COMMAND]
    environ = {
        **os.environ,
        **environment(database_url, **BOTH),
        "PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS": "60",
        "PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS": "60",
    }
    async with locked(floor.owner, "LOCK TABLE payouts IN SHARE ROW EXCLUSIVE MODE"):
        killed = await asyncio.create_subprocess_exec(
            *script, env=environ, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            await until_waiting(superuser, "cli", "payouts")
        finally:
            killed.kill()
            await killed.wait()
    expected = all_under(2, payouts=5) | {"payouts": Counter({1: 5})}
    assert await keys_of(floor) == expected

    told = (await terminal.run(*COMMAND, "--json")).document

    assert (told["sealed_anew"], told["left"], told["removable"]) == (5, {}, [1])
    assert await keys_of(floor) == all_under(2, payouts=5)


async def test_what_somebody_holds_is_left_and_told_and_done_the_next_time(terminal: Terminal, floor: Desk) -> None:
    merchant = await furnish(floor, payouts=2)
    held = await floor.create(merchant)
    async with locked(floor.owner, "SELECT 1 FROM payouts WHERE id = $1 FOR UPDATE", held):
        ended = await terminal.run(*COMMAND, "--json")

    assert ended.code == 1
    assert json.loads(ended.out)["left"] == {"1": 1}
    assert json.loads(ended.out)["removable"] == []
    assert "1 under master key 1" in ended.err
    assert (await terminal.run(*COMMAND, "--json")).document["sealed_anew"] == 1
    assert await keys_of(floor) == all_under(2)


async def test_a_gateway_that_still_seals_under_the_old_key_is_noticed(terminal: Terminal, floor: Desk) -> None:
    merchant = await furnish(floor)
    (await terminal.run(*COMMAND)).assert_shown()
    await floor.create(merchant)

    dry = (await terminal.run(*COMMAND, "--dry-run", "--json")).document
    told = (await terminal.run(*COMMAND, "--json")).document

    assert (dry["left"], dry["removable"]) == ({"1": 1}, [])
    assert (told["sealed_anew"], told["removable"]) == (1, [1])


async def test_payouts_go_on_being_accepted_and_settled_while_it_runs(
    terminal: Terminal, floor: Desk, database_url: str
) -> None:
    merchant = await furnish(floor, payouts=200)
    async with desk(database_url, **BOTH) as working:
        rotating = asyncio.create_task(terminal.run(*COMMAND, "--json"))
        accepted = await working.create_many(merchant, 200)
        await working.settle()
        ended = await rotating
        assert ended.code in (0, 1), ended
        (await terminal.run(*COMMAND, "--json")).assert_shown()
        assert await working.count("payouts", "state = 'success'") == 200 + len(accepted)
        await assert_sound(working.owner)
    assert await keys_of(floor) == all_under(2, payouts=400)


async def test_what_no_key_opens_is_named_and_left_and_no_key_is_given_up(terminal: Terminal, floor: Desk) -> None:
    merchant = await furnish(floor)
    damaged = await floor.create(merchant)
    await execute(
        floor.owner,
        "UPDATE payouts SET recipient_sealed = set_byte(recipient_sealed, 30, 255 - get_byte(recipient_sealed, 30))"
        " WHERE id = :id",
        id=damaged,
    )

    ended = await terminal.run(*COMMAND, "--json")

    told = json.loads(ended.out)
    assert (ended.code, told["unreadable"], told["left"]) == (1, [f"payouts/{damaged}"], {"1": 1})
    assert (told["sealed_anew"], told["removable"]) == (7, [])
    assert await keys_of(floor) == all_under(2) | {"payouts": Counter({2: 3, 1: 1})}


async def test_without_the_key_of_what_is_sealed_nothing_is_changed(floor: Desk, database_url: str) -> None:
    await furnish(floor)
    ended = await Terminal(environment(database_url, **NEW_ALONE)).run(*COMMAND, "--json")
    assert ended.code == 1
    assert json.loads(ended.out)["left"] == {"1": 7}
    assert await keys_of(floor) == all_under(1)


async def test_without_keys_it_is_refused(database_url: str, floor: Desk) -> None:
    assert await floor.count("payouts") == 0
    (await Terminal({"DATABASE_URL": database_url}).run(*COMMAND)).assert_refused("PAYOUTS_MASTER_KEYS")


# Page by page.


async def _find(sealer: AsyncEngine, column: SealedColumn, behind: UUID | None = None, **sizes: Any) -> Any:
    return await in_transaction(
        sealer, lambda tx: find_sealed_otherwise(tx, column, key_id=2, behind=behind, **({"rows_max": 2} | sizes))
    )


async def test_pages_pass_over_what_is_done_and_look_at_each_row_once(floor: Desk, sealer: AsyncEngine) -> None:
    merchant = await floor.merchant()
    ids = sorted(await floor.create_many(merchant, 7))
    keyring = Settings.from_environ(environment(floor.url, **BOTH)).keyring

    first = await _find(sealer, _SEALED_PAYOUTS)
    assert ([value.id for value in first.values], first.behind) == (ids[:2], ids[1])
    anew = reseal(keyring, _SEALED_PAYOUTS, first.values, Rotated(2))
    assert await in_transaction(sealer, lambda tx: save_sealed_anew(tx, _SEALED_PAYOUTS, anew)) == 2
    again = await _find(sealer, _SEALED_PAYOUTS, looks_max=3)
    assert ([value.id for value in again.values], again.behind) == ([ids[2]], ids[2])
    last = await _find(sealer, _SEALED_PAYOUTS, ids[5], rows_max=5)
    assert ([value.id for value in last.values], last.behind) == ([ids[6]], None)
    counted = await in_transaction(sealer, lambda tx: count_sealed(tx, _SEALED_PAYOUTS, behind=None, looks_max=3))
    assert counted == (Counter({2: 2, 1: 1}), ids[2])


async def test_a_seal_that_was_exchanged_meanwhile_is_not_lost(floor: Desk, sealer: AsyncEngine) -> None:
    """Two rotate at the same time: the second finds another seal than the one it read, and leaves it."""
    await floor.create(await floor.merchant())
    keyring = Settings.from_environ(environment(floor.url, **BOTH)).keyring
    page = await _find(sealer, _SEALED_PAYOUTS)
    one, other = [reseal(keyring, _SEALED_PAYOUTS, page.values, Rotated(2)) for _ in range(2)]

    saved = [await in_transaction(sealer, lambda tx, n=new: save_sealed_anew(tx, _SEALED_PAYOUTS, n)) for new in (one, other)]  # type: ignore[misc]  # fmt: skip

    assert saved == [1, 0]
    assert (await floor.one("SELECT recipient_sealed AS sealed FROM payouts")).sealed == one[0][1]


async def test_every_sealed_column_of_the_schema_is_known(floor: Desk) -> None:
    columns = await fetch(
        floor.owner,
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public'"
        " AND data_type = 'bytea' AND column_name LIKE '%sealed%'",
    )
    assert {(row.table_name, row.column_name) for row in columns} == {(each.table, each.column) for each in COLUMNS}


async def test_nothing_of_a_secret_is_shown(terminal: Terminal, floor: Desk) -> None:
    merchant = await furnish(floor)
    await floor.accept(order(floor.settings, merchant.shop, recipient="01798765432"))
    shown = [await terminal.run(*COMMAND, *options) for options in ((), ("--json",), ("--dry-run",))]
    for ended in shown:
        for secret in (merchant.api_secret, merchant.webhook_secret, "01798765432", "rk_known", KEY, NEW):
            assert secret not in ended.out + ended.err
