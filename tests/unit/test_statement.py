"""A provider's statement is read to its end without a fault, or not at all, in little memory and without repeating it."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.domain.ids import PAYOUT, new_id, render_id
from ops.statement import Statement, StatementInvalid, show_reference

HEADER = "reference,amount,currency,status,date"
CARD = "4111111111111111"


def file_of(tmp_path: Path, *lines: str, header: str = HEADER) -> Path:
    path = tmp_path / "statement.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def read(path: Path) -> list[tuple[str, int, int, str, str, int, bool]]:
    with Statement() as statement:
        statement.read(path)
        return [
            (s.reference, s.line, s.amount_minor, s.currency, s.status, s.times, s.is_one)
            for page in statement.pages(2)
            for s in page
        ]


def test_lines_are_kept_by_reference_in_minor_units(tmp_path: Path) -> None:
    lines = [
        "b,5000.00,BDT,paid,2026-01-02",
        "a,7,JPY,Declined,2026-01-02T10:00:00Z",
        "",
        'c,"1.234",KWD,submitted,2026-01-02',
        "d,1,USD,paid,2026-01-02",
    ]
    assert read(file_of(tmp_path, *lines)) == [
        ("a", 3, 7, "JPY", "declined", 0, True),
        ("b", 2, 500_000, "BDT", "paid", 1, True),
        ("c", 5, 1234, "KWD", "submitted", 0, True),
        ("d", 6, 100, "USD", "paid", 1, True),
    ]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a,1,USD,paid,2026-01-02", "a,1,USD,returned,2026-01-05"], ("returned", 1, True)),
        (["a,1,USD,returned,2026-01-05", "a,1.00,USD,paid,2026-01-02"], ("returned", 1, True)),
        (["a,1,USD,paid,2026-01-02", "a,1,USD,paid,2026-01-02"], ("paid", 2, True)),
        (["a,1,USD,paid,2026-01-02", "a,2,USD,paid,2026-01-02", "a,2,USD,paid,2026-01-02"], ("paid", 3, False)),
        (["a,1,USD,submitted,2026-01-02", "a,1,BDT,paid,2026-01-02"], ("paid", 1, False)),
        (["a,1,USD,declined,2026-01-02", "a,1,USD,declined,2026-01-02"], ("declined", 0, True)),
    ],
)
def test_of_several_lines_of_one_reference_the_last_word_counts(
    tmp_path: Path, lines: Sequence[str], said: tuple[str, int, bool]
) -> None:
    ((_, line, _, _, *told),) = read(file_of(tmp_path, *lines))
    assert (line, tuple(told)) == (2, said)


def test_columns_come_in_any_order_beside_others(tmp_path: Path) -> None:
    header = "\ufeffStatus, Card ,date,Currency,reference,amount"
    assert read(file_of(tmp_path, f"paid,{CARD},2026-01-02,USD,a,5", header=header)) == [
        ("a", 2, 500, "USD", "paid", 1, True)
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{CARD},{CARD},USD,paid,2026-01-02", "amount must be"),
        (f"a,1.234,USD,paid,{CARD}", "amount must be a positive decimal with at most 2"),
        (f"a,-1,USD,paid,{CARD}", "amount"),
        (f"a,0,USD,paid,{CARD}", "amount"),
        (f"a,1,XXX,paid,{CARD}", "currency"),
        (f"a,1,USD,{CARD},2026-01-02", "status must be one of submitted, declined, paid, returned"),
        (f"a,1,USD,paid,{CARD}", "date must be ISO 8601"),
        (f",1,USD,paid,{CARD}", "reference"),
        (f"{CARD * 5},1,USD,paid,2026-01-02", "reference"),
        ("a,1,USD,paid", "too few cells"),
        (f"a,1,USD,paid,2026-01-02,{'x' * 5_000}", "too long"),
        (f'a,1,USD,paid,"{CARD}" x', "not CSV"),
        ("a\x1b[2J,1,USD,paid,2026-01-02", "printable"),
    ],
)
def test_a_fault_is_told_by_its_line_and_nothing_of_it_is_repeated(tmp_path: Path, line: str, words: str) -> None:
    path = file_of(tmp_path, "a,1,USD,paid,2026-01-02", line)
    with pytest.raises(StatementInvalid) as refused:
        read(path)
    assert str(refused.value).startswith("line 3: ")
    assert words in str(refused.value)
    assert CARD not in str(refused.value)


@pytest.mark.parametrize("header", ["", "reference,amount,currency,status", f"{HEADER},amount", HEADER.upper() + "X"])
def test_a_header_that_is_none_names_the_columns_that_are_missing(tmp_path: Path, header: str) -> None:
    with pytest.raises(StatementInvalid, match=r"line 1: .*(date|amount)"):
        read(file_of(tmp_path, header=header))


def test_bytes_that_are_not_utf_8_are_no_statement(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    path.write_bytes(path.read_bytes() + b"a,1,USD,paid,\xff\n")
    with pytest.raises(StatementInvalid, match="not UTF-8"):
        read(path)


def test_ten_times_as_long_a_statement_takes_no_more_memory(tmp_path: Path) -> None:
    def peak(lines: int) -> int:
        path = tmp_path / f"{lines}.csv"
        with path.open("w") as file:
            file.write(f"{HEADER}\n")
            file.writelines(f"reference-{number},1.00,USD,paid,2026-01-02\n" for number in range(lines))
        tracemalloc.start()
        try:
            with Statement() as statement:
                statement.read(path)
                assert sum(map(len, statement.pages(500))) == statement.lines == lines
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    assert peak(30_000) < 2 * peak(3_000)


def test_a_reference_that_might_be_anything_is_masked() -> None:
    ours = render_id(PAYOUT, new_id())
    assert show_reference(ours) == ours
    assert show_reference(CARD) == "411111******1111"
    assert show_reference("po_01712345678") == "**********5678"
    assert show_reference("short") == "*****"
