"""What is exported of a merchant: all of it, of one moment, nothing of anybody else's, and no formula."""

import csv
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from common.db import exports
from common.db.engine import in_transaction
from common.db.exports import Wanted, find_exported_shops, stream_entries
from common.domain.ids import EVENT, PAYIN, PAYOUT, render_id
from tests.conftest import Server
from tests.factories import Merchant, execute
from tests.flows import Desk, forge
from tests.terminal import Ended, Terminal

EVER: Final = ("--since", "2001-01-01", "--until", "2999-01-01")
RECIPIENT: Final = "01798765432"
CARD: Final = "4111111111111111"
URL: Final = "http://127.0.0.1:9/hook?a=1,2"


async def export(terminal: Terminal, what: str, merchant: Merchant, out: Path, *options: object) -> Ended:
    period = () if "--since" in options else EVER
    return await terminal.run("export", what, "--merchant", merchant.code, *period, "--out", out, *options)


def names(folder: Path) -> list[str]:
    """The files that are there, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


async def rows_of(
    terminal: Terminal, what: str, merchant: Merchant, folder: Path, *options: object
) -> list[dict[str, Any]]:
    """What the file holds; it says itself how many rows."""
    out = folder / f"{what}.csv"
    ended = await export(terminal, what, merchant, out, "--force", "--json", *options)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert ended.document == {"rows": len(rows), "file": str(out)}
    return rows


async def test_payouts_are_written_with_amounts_as_strings_and_recipients_masked(
    terminal: Terminal, floor: Desk, tmp_path: Path
) -> None:
    merchant, other = await floor.merchant(), await floor.merchant()
    paid = await floor.create(merchant, recipient=RECIPIENT, amount_minor=123_456, external_id="-1+cmd")
    failed = await floor.create(merchant, recipient="017000000101")
    await floor.create(other)
    await floor.settle()
    waiting = await floor.create(merchant, recipient=CARD, external_id="PAY,1")

    rows = await rows_of(terminal, "payouts", merchant, tmp_path)

    assert [row["id"] for row in rows] == [render_id(PAYOUT, payout_id) for payout_id in (paid, failed, waiting)]
    assert [(row["status"], row["stage"], row["failure"]) for row in rows] == [
        ("success", "", ""),
        ("failed", "", "recipient_not_found"),
        ("pending", "queued", ""),
    ]
    assert (rows[0]["amount"], rows[0]["currency"], rows[0]["shop"]) == ("1234.56", "BDT", "shop-001")
    assert (rows[0]["external_id"], rows[2]["external_id"]) == ("'-1+cmd", "PAY,1")
    assert (rows[0]["recipient"], rows[2]["recipient"]) == ("*******5432", "411111******1111")
    assert rows[0]["created_at"].endswith("Z")
    text = (tmp_path / "payouts.csv").read_text()
    assert RECIPIENT not in text
    assert CARD not in text


async def test_entries_are_written_account_by_account_and_negative_amounts_stay_numbers(
    terminal: Terminal, floor: Desk, tmp_path: Path
) -> None:
    merchant = await floor.merchant()
    payout_id = await floor.create(merchant, amount_minor=5_000)
    payin_id = await floor.create_payin(merchant)
    await floor.settle()
    await floor.collect()

    rows = await rows_of(terminal, "entries", merchant, tmp_path)

    assert [(row["seq"], row["kind"], row["posted_delta"], row["held_delta"], row["posted_after"]) for row in rows] == [
        ("1", "adjustment", "1000000.00", "0.00", "1000000.00"),
        ("2", "hold", "0.00", "50.00", "1000000.00"),
        ("3", "capture", "-50.00", "-50.00", "999950.00"),
        ("4", "payin", "10.00", "0.00", "999960.00"),
    ]
    assert [row["payout"] for row in rows] == ["", render_id(PAYOUT, payout_id), render_id(PAYOUT, payout_id), ""]
    assert [row["payin"] for row in rows] == ["", "", "", render_id(PAYIN, payin_id)]
    assert {row["currency"] for row in rows} == {"BDT"}


async def test_callbacks_are_written_with_their_events(terminal: Terminal, floor: Desk, tmp_path: Path) -> None:
    merchant, other = await floor.merchant(), await floor.merchant()
    payout_id = await floor.create(merchant, callback_url=URL)
    await floor.create(other, callback_url=URL)
    await floor.settle()
    event = await floor.one("SELECT id FROM events WHERE payout_id = :id", id=payout_id)

    (row,) = await rows_of(terminal, "callbacks", merchant, tmp_path)

    assert (row["event"], row["payout"]) == (render_id(EVENT, event.id), render_id(PAYOUT, payout_id))
    assert (row["type"], row["state"], row["url"], row["finished_at"]) == ("payout.success", "pending", URL, "")


@pytest.mark.parametrize("what", ["payouts", "entries", "callbacks"])
async def test_a_period_and_a_shop_bound_what_is_written(
    terminal: Terminal, floor: Desk, tmp_path: Path, what: str
) -> None:
    merchant = await floor.merchant()
    await floor.create_many(merchant, 3, callback_url=URL)
    await floor.settle()
    now = datetime.now(UTC)
    tomorrow, yesterday = (now + timedelta(days=days) for days in (1, -1))

    async def count(*options: object) -> int:
        return len(await rows_of(terminal, what, merchant, tmp_path, *options))

    everything = await count()
    assert everything in (3, 7)
    assert await count("--since", yesterday.isoformat(), "--until", tomorrow.isoformat()) == everything
    assert await count("--since", tomorrow.isoformat(), "--until", "2999-01-01") == 0
    assert await count("--since", "2001-01-01", "--until", yesterday.isoformat()) == 0
    assert await count("--shop", "shop-001") == everything


async def test_of_a_long_history_only_the_period_is_read(floor: Desk, server: Server, database_url: str) -> None:
    """Found by halving, as entries have no gap."""
    merchant = await floor.merchant()
    await forge(
        server,
        database_url,
        "INSERT INTO entries (account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, held_delta_minor,"
        " posted_after_minor, held_after_minor, payout_id, created_at)"
        f" SELECT {merchant.shop.account_id}, 1 + n, '{merchant.shop.id}', 'hold', 'holds', 1, 0, 1, 0, n,"
        " gen_random_uuid(), now() - make_interval(days => 500 - n) FROM generate_series(1, 500) n;"
        " UPDATE entries SET created_at = now() - interval '600 days' WHERE seq = 1;"
        " UPDATE accounts SET last_seq = 501",
    )
    at = (await floor.one("SELECT created_at AS at FROM entries WHERE seq = 301")).at
    wanted = Wanted(merchant.code, None, at, at + timedelta(days=2))

    async def read(tx: Any) -> tuple[list[int], int]:
        shops = await find_exported_shops(tx, wanted)
        seqs = [row.seq async for row in stream_entries(tx, wanted, shops)]
        counted = "SELECT idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'entries'"
        return seqs, (await tx.exec_driver_sql(counted)).scalar_one()

    seqs, rows_read = await in_transaction(floor.owner, read)
    assert seqs == [301, 302]
    assert rows_read < 60


async def test_all_of_it_is_of_one_moment_and_read_a_few_at_a_time(
    floor: Desk, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is being written, what is not yet read changes; and the rows are fetched by the page."""
    merchant = await floor.merchant()
    await floor.create_many(merchant, 12)
    monkeypatch.setattr(exports, "_ROWS_PER_FETCH", 2)
    fetched = 0

    async def read(tx: Any) -> list[str]:
        nonlocal fetched
        wanted = Wanted(merchant.code, None, datetime(2001, 1, 1, tzinfo=UTC), datetime(2999, 1, 1, tzinfo=UTC))
        shops = await find_exported_shops(tx, wanted)
        states = []
        async for row in exports.stream_payouts(tx, wanted, shops):
            states.append(row.state)
            if fetched == 0:
                await floor.settle()
            fetched += 1
        return states

    assert await in_transaction(floor.owner, read) == ["queued"] * 12
    rows = await rows_of(terminal, "payouts", merchant, tmp_path)
    assert {row["status"] for row in rows} == {"success"}


async def test_a_file_that_is_there_is_kept_and_what_cannot_be_written_is_told(
    terminal: Terminal, floor: Desk, tmp_path: Path
) -> None:
    merchant = await floor.merchant()
    out = tmp_path / "out.csv"
    out.write_text("theirs")

    (await export(terminal, "payouts", merchant, out)).assert_refused("exists already", "--force")
    assert out.read_text() == "theirs"
    (await export(terminal, "payouts", merchant, out, "--force")).assert_shown("rows")
    assert out.read_text().startswith("id,external_id")
    (await export(terminal, "payouts", merchant, tmp_path / "no" / "out.csv")).assert_refused("No such file")
    device = tmp_path / "device"
    os.mkfifo(device)
    (await export(terminal, "payouts", merchant, device, "--force")).assert_refused("no file")
    assert device.is_fifo()
    device.unlink()
    (await export(terminal, "payouts", merchant, out, "--shop", "nope", "--force")).assert_refused("with a shop nope")
    nobody = ("--merchant", "nobody", *EVER, "--out", tmp_path / "new.csv")
    (await terminal.run("export", "entries", *nobody)).assert_refused("no merchant nobody")
    backwards = ("--since", "2026-01-02", "--until", "2026-01-01", "--force")
    (await export(terminal, "payouts", merchant, out, *backwards)).assert_refused("before")
    for distant in (("--since", "0001-01-01", *EVER[2:]), (*EVER[:2], "--until", "9999-12-31T23:59:59-14:00")):
        nowhere = ("export", "payouts", "--merchant", merchant.code, *distant, "--out", tmp_path / "new.csv")
        (await terminal.run(*nowhere)).assert_refused("the year must be")
    (await export(terminal, "secrets", merchant, out)).assert_refused("secrets")
    assert names(tmp_path) == ["out.csv"]


async def test_whoever_may_only_read_may_export_and_a_database_that_goes_leaves_no_file(
    database_url: str, floor: Desk, tmp_path: Path
) -> None:
    merchant = await floor.merchant()
    keyless = Terminal({"DATABASE_URL": database_url})
    (await export(keyless, "entries", merchant, tmp_path / "out.csv")).assert_shown("rows")
    await execute(floor.owner, "REVOKE SELECT ON entries FROM payouts_readonly")

    (await export(keyless, "entries", merchant, tmp_path / "other.csv")).assert_refused("refused it")

    assert names(tmp_path) == ["out.csv"]
