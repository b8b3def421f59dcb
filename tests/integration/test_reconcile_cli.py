"""A provider's statement beside ours: what matches, what does not, and what of it is handed to people."""

import csv
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest

from common.db.engine import in_transaction
from common.db.reconciling import find_moved
from common.domain.ids import PAYIN, PAYOUT, new_id, render_id
from tests.factories import Merchant, environment, execute, fetch
from tests.faults.proxy import CommitFault, proxy
from tests.flows import Desk, assert_sound
from tests.terminal import Ended, Terminal
from worker.hearing import hear

SINCE, UNTIL = ("2001-01-01", "2999-01-01")
RECIPIENT: Final = "01798765432"
CARD: Final = "4111111111111111"
OPEN: Final = ("--open-discrepancies", "--no-dry-run", "--reason", "the statement of May", "--actor", "alice")


class Bank:
    """A provider that writes statements of what it has done."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "statement.csv"
        self.lines = ["date,reference,status,amount,currency,card_number"]

    def says(self, subject: UUID | str, status: str, amount: str = "10.00", currency: str = "BDT") -> None:
        """One more line."""
        reference = subject if isinstance(subject, str) else render_id(PAYOUT, subject)
        self.lines.append(f"2026-05-01,{reference},{status},{amount},{currency},{CARD}")
        self.path.write_text("\n".join(self.lines) + "\n")

    def __str__(self) -> str:
        return str(self.path)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """One without a line yet."""
    return Bank(tmp_path)


async def reconcile(terminal: Terminal, bank: Bank, *options: object, rail: str = "sandbox") -> tuple[int, Any]:
    """The exit code, and what programs are told."""
    ended = await lay_beside(terminal, bank, *options, "--json", rail=rail)
    assert ended.out, ended
    return ended.code, json.loads(ended.out)


async def lay_beside(terminal: Terminal, bank: Bank, *options: object, rail: str = "sandbox") -> Ended:
    period = () if "--since" in options else ("--since", SINCE, "--until", UNTIL)
    return await terminal.run("reconcile", "--rail", rail, "--statement", bank, *period, *options)


async def payouts(floor: Desk, merchant: Merchant) -> dict[str, UUID]:
    """One payout of each end, and some without."""
    recipients = {
        "success": RECIPIENT,
        "failed": "017000000101",
        "refunded": "017000000300",
        "submitted": "017000000001",
    }
    ids = {name: await floor.create(merchant, recipient=number) for name, number in recipients.items()}
    rails = {"sandbox": floor.sandbox(settle_seconds=3_600)}
    await floor.settle(floor.settler(rails))
    # One that never answers, alone: others would be too slow for it on a slow machine.
    ids["verifying"] = await floor.create(merchant, recipient="017000000200")
    await floor.settle(floor.settler(rails, rail_timeout_seconds=1.0))
    await execute(floor.owner, "UPDATE rail_events SET due_at = now() WHERE applied_at IS NULL")
    await hear(floor.worker)
    ids["queued"] = await floor.create(merchant)
    assert {name: await floor.state(payout_id) for name, payout_id in ids.items()} == {name: name for name in ids}
    return ids


async def test_a_statement_that_says_what_we_say_is_exit_code_0(terminal: Terminal, floor: Desk, bank: Bank) -> None:
    ids = await payouts(floor, await floor.merchant())
    bank.says(ids["success"], "paid")
    bank.says(ids["failed"], "declined")
    bank.says(ids["refunded"], "paid")
    bank.says(ids["refunded"], "returned")
    bank.says(ids["submitted"], "submitted")

    code, told = await reconcile(terminal, bank)

    assert (code, told["matched"], told["unmatched"]) == (0, 4, [])
    assert told["sums"] == [{"verdict": "matched", "currency": "BDT", "sum": "40.00"}]
    assert told["lines"] == 5
    assert await floor.count("discrepancies") == 0
    (await lay_beside(terminal, bank)).assert_shown("matched", "40.00")


async def test_each_way_not_to_match_has_its_name_its_count_and_its_sum(
    terminal: Terminal, floor: Desk, bank: Bank, tmp_path: Path
) -> None:
    merchant = await floor.merchant()
    ids = await payouts(floor, merchant)
    paid, twice, declined, more = await floor.create_many(merchant, 4)
    await floor.settle()
    yen = await floor.merchant(currency="JPY", funds="1000000")
    other = await floor.create(yen, amount_minor=700)
    await floor.settle()
    bank.says(paid, "paid")
    bank.says(twice, "paid")
    bank.says(twice, "paid")
    bank.says(declined, "declined")
    bank.says(more, "paid", "10.01")
    bank.says(ids["failed"], "paid")
    bank.says(ids["verifying"], "paid")
    bank.says(ids["submitted"], "paid")
    bank.says(ids["refunded"], "paid")
    bank.says(CARD, "paid", "3.00", "USD")
    bank.says(new_id(), "declined", "4.00", "USD")
    out = tmp_path / "out.csv"

    code, told = await reconcile(terminal, bank, "--out", out)

    assert code == 1
    counts = {name: told[name] for name in ("matched", "unfinished", "missing", "extra", "different")}
    assert counts == {"matched": 2, "unfinished": 2, "missing": 4, "extra": 2, "different": 4}
    assert [tuple(row.values()) for row in told["sums"]] == [
        ("different", "BDT", "40.01"),
        ("extra", "USD", "7.00"),
        ("matched", "BDT", "20.00"),
        ("missing", "BDT", "30.00"),
        ("missing", "JPY", "700"),
        ("unfinished", "BDT", "20.00"),
    ]
    found = {(row["verdict"], row["id"]): row for row in told["unmatched"]}
    details = {key[1]: row["detail"] for key, row in found.items() if key[0] == "different"}
    assert details == {
        render_id(PAYOUT, twice): "the statement says so 2 times",
        render_id(PAYOUT, declined): "the statement says so",
        render_id(PAYOUT, more): "the statement says 10.01 BDT, we 10.00 BDT",
        render_id(PAYOUT, ids["failed"]): "the statement says so",
    }
    assert {key[1] for key in found if key[0] == "missing"} == {
        render_id(PAYOUT, payout_id) for payout_id in (ids["success"], ids["refunded"], ids["queued"], other)
    }
    assert found["missing", render_id(PAYOUT, ids["refunded"])]["detail"] == "its return"
    assert found["different", render_id(PAYOUT, more)] | {"detail": None, "id": None} == {
        "verdict": "different",
        "reference": render_id(PAYOUT, more),
        "line": 6,
        "shop": f"{merchant.code}/shop-001",
        "id": None,
        "currency": "BDT",
        "our_amount": "10.00",
        "our_status": "success",
        "their_amount": "10.01",
        "their_status": "paid",
        "detail": None,
    }
    assert "411111******1111" in {row["reference"] for row in told["unmatched"]}
    with out.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["reference"] for row in written] == [row["reference"] for row in told["unmatched"]]
    for shown in (json.dumps(told), out.read_text(), (await lay_beside(terminal, bank)).out):
        assert CARD not in shown
        assert RECIPIENT not in shown
    assert (await lay_beside(terminal, bank)).err == "payouts: 4 missing, 2 extra, 4 different\n"


async def test_payins_are_reconciled_like_payouts(terminal: Terminal, floor: Desk, bank: Bank) -> None:
    merchant = await floor.merchant()
    paid, missing, failed = [
        await floor.create_payin(merchant, amount_minor=amount_minor) for amount_minor in (1000, 2000, 1002)
    ]
    pending = await floor.create_payin(merchant, amount_minor=1006)
    await floor.collect()
    bank.says(render_id(PAYIN, paid), "paid")
    bank.says(render_id(PAYIN, failed), "declined", "10.02")
    bank.says(render_id(PAYIN, pending), "paid", "10.06")

    code, told = await reconcile(terminal, bank)

    assert (code, told["matched"], told["unfinished"], told["missing"]) == (1, 2, 1, 1)
    assert {row["id"] for row in told["unmatched"]} == {render_id(PAYIN, pending), render_id(PAYIN, missing)}


async def test_a_period_says_what_must_be_in_the_statement(terminal: Terminal, floor: Desk, bank: Bank) -> None:
    merchant = await floor.merchant()
    payout_id = await floor.create(merchant)
    await floor.settle()
    bank.says(payout_id, "paid")
    await floor.create_many(merchant, 2)
    await floor.settle()
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    yesterday = tomorrow - timedelta(days=2)

    async def missing(since: object, until: object) -> int:
        return int((await reconcile(terminal, bank, "--since", since, "--until", until))[1]["missing"])

    assert await missing(yesterday.isoformat(), tomorrow.isoformat()) == 2
    assert await missing(SINCE, yesterday.isoformat()) == 0
    assert await missing(tomorrow.isoformat(), UNTIL) == 0


async def test_what_moved_is_looked_for_page_by_page(floor: Desk) -> None:
    merchant = await floor.merchant()
    expected = {render_id(PAYOUT, payout_id) for payout_id in await floor.create_many(merchant, 7)}
    await floor.create_many(merchant, 5, recipient="017000000101")
    await floor.settle()
    since, until = datetime(2001, 1, 1, tzinfo=UTC), datetime(2999, 1, 1, tzinfo=UTC)
    found: list[str] = []
    behind, pages = None, 0
    while pages == 0 or behind is not None:

        async def page(tx: Any, behind: UUID | None = behind) -> Any:
            return await find_moved(tx, "sandbox", since=since, until=until, behind=behind, looks_max=3)

        moved = await in_transaction(floor.owner, page)
        found += [side.reference for side in moved.found]
        behind, pages = moved.behind, pages + 1
    assert (set(found), len(found), pages) == (expected, 7, 5)


async def test_a_reference_of_another_rail_is_extra_and_says_whose_it_is(
    terminal: Terminal, floor: Desk, bank: Bank
) -> None:
    payout_id = await floor.create(await floor.merchant())
    await floor.settle()
    rail = "INSERT INTO rails (id, name, kind) VALUES (gen_random_uuid(), 'a-bank', 'sandbox')"
    await execute(floor.owner, rail)
    bank.says(payout_id, "paid")

    code, told = await reconcile(terminal, bank, rail="a-bank")

    assert (code, told["extra"], told["missing"]) == (1, 1, 0)
    assert told["unmatched"][0]["detail"] == "it is of the rail sandbox"


async def test_what_differs_is_opened_once_audited_and_moves_no_money(
    terminal: Terminal, floor: Desk, bank: Bank
) -> None:
    merchant = await floor.merchant()
    ids = await payouts(floor, merchant)
    bank.says(ids["success"], "declined")
    bank.says(ids["failed"], "paid", "11.00")
    bank.says(ids["verifying"], "paid")
    bank.says(ids["refunded"], "returned")
    before = await floor.balance(merchant), await floor.count("entries")

    _, dry = await reconcile(terminal, bank, "--open-discrepancies")
    assert dry["would_be_opened"] == 2
    assert await floor.count("discrepancies") == await floor.count("audit", "action = 'rail.reconcile'") == 0

    code, told = await reconcile(terminal, bank, *OPEN)
    again = await reconcile(terminal, bank, *OPEN)

    assert (code, told["opened"], again[1]["opened"]) == (1, 2, 0)
    listed = (await terminal.run("discrepancies", "list", "--json")).document["discrepancies"]
    opened = {row["payout"]: (row["kind"], row["state"], row["word"], row["rail"], row["detail"]) for row in listed}
    assert opened == {
        render_id(PAYOUT, ids["success"]): ("status", "success", "declined", "sandbox", "the statement says so"),
        render_id(PAYOUT, ids["failed"]): (
            "amount",
            "failed",
            "paid",
            "sandbox",
            "the statement says 11.00 BDT, we 10.00 BDT",
        ),
    }
    (audited, _) = await fetch(
        floor.owner, "SELECT actor, subject, reason, detail FROM audit WHERE action = 'rail.reconcile' ORDER BY id"
    )
    assert tuple(audited)[:3] == ("alice", "sandbox", "the statement of May")
    assert audited.detail["opened"] == audited.detail["different"] == 2
    assert before == (await floor.balance(merchant), await floor.count("entries"))
    await assert_sound(floor.owner)


@pytest.mark.parametrize("fault", [CommitFault.LOSE_ANSWER, CommitFault.LOSE_COMMIT])
async def test_opening_whose_answer_is_lost_is_done_whole_or_not_at_all_and_says_so(
    floor: Desk, database_url: str, bank: Bank, fault: CommitFault
) -> None:
    for payout_id in await floor.create_many(await floor.merchant(), 3):
        bank.says(payout_id, "declined")
    await floor.settle()
    async with proxy(database_url) as network:
        network.fail_commits(fault)
        ended = await lay_beside(Terminal(environment(network.url)), bank, *OPEN)
    ended.assert_refused("look before you repeat it", code=3)
    opened = await floor.count("discrepancies"), await floor.count("audit", "action = 'rail.reconcile'")
    assert opened == ((3, 1) if fault is CommitFault.LOSE_ANSWER else (0, 0))


async def test_a_fault_in_the_last_line_leaves_everything_undone(
    terminal: Terminal, floor: Desk, bank: Bank, tmp_path: Path
) -> None:
    for payout_id in await floor.create_many(await floor.merchant(), 3):
        bank.says(payout_id, "declined")
    await floor.settle()
    bank.says(CARD, "gone")
    out = tmp_path / "out.csv"

    ended = await lay_beside(terminal, bank, *OPEN, "--out", out)

    ended.assert_refused("line 5: status must be one of")
    assert CARD not in ended.err
    assert not out.exists()
    assert await floor.count("discrepancies") == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--since", "2026-02-01", "--until", "2026-02-01"), ["--since must be before --until"]),
        (("--since", "soon", "--until", UNTIL), ["ISO 8601"]),
        (("--no-dry-run",), ["--open-discrepancies"]),
        (("--open-discrepancies", "--no-dry-run"), ["--reason"]),
        (("--out", "/nowhere/out.csv"), ["/nowhere/out.csv: No such file"]),
    ],
)
async def test_what_makes_no_sense_is_refused(
    terminal: Terminal, floor: Desk, bank: Bank, options: tuple[str, ...], words: list[str]
) -> None:
    bank.says("x", "paid")
    (await lay_beside(terminal, bank, *options)).assert_refused(*words)
    assert await floor.count("discrepancies") == 0


async def test_a_rail_or_file_that_is_not_there_is_refused_and_a_file_that_is_there_is_kept(
    terminal: Terminal, floor: Desk, bank: Bank, tmp_path: Path
) -> None:
    (await lay_beside(terminal, bank)).assert_refused("statement.csv: No such file")
    bank.says("x", "paid")
    (await lay_beside(terminal, bank, rail="nobody")).assert_refused("there is no rail nobody")
    out = tmp_path / "out.csv"
    out.write_text("theirs")
    (await lay_beside(terminal, bank, "--out", out)).assert_refused("exists already", "--force")
    assert out.read_text() == "theirs"
    assert (await reconcile(terminal, bank, "--out", out, "--force"))[0] == 1
    assert out.read_text().startswith("verdict,reference")
    assert await floor.count("merchants") == 0


async def test_of_many_some_are_listed_and_it_is_said_how_many_are_not(
    terminal: Terminal, floor: Desk, bank: Bank
) -> None:
    for number in range(5):
        bank.says(f"line-{number}", "paid")

    _, told = await reconcile(terminal, bank, "--limit", 2)
    shown = await lay_beside(terminal, bank, "--limit", 2)

    assert (len(told["unmatched"]), told["not_listed"], told["extra"]) == (2, 3, 5)
    assert "and 3 more" in shown.out
    assert await floor.count("merchants") == 0
