"""No cell of ours is a formula to a spreadsheet, and a file is whole or not there."""

import csv
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ops.spreadsheets import FileExists, new_csv_file, render_csv_cell

COLUMNS = ("id", "note")


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_what_would_be_a_formula_has_an_apostrophe_before_it(first: str) -> None:
    cell = f"{first}HYPERLINK(1)"
    assert render_csv_cell(cell) == f"'{cell}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (5, "5"),
        (-5, "-5"),
        ("-50.25", "-50.25"),
        ("-50.25-1", "'-50.25-1"),
        ("-1\n", "'-1\n"),
        ("+5", "'+5"),
        ("-\u0661", "'-\u0661"),
        ("a=b", "a=b"),
        ("'=1", "'=1"),
        (True, "True"),
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05.000000Z"),
    ],
)
def test_a_value_as_a_cell(value: object, text: str) -> None:
    assert render_csv_cell(value) == text


def test_a_file_appears_whole_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with new_csv_file(path, COLUMNS, overwrite=False) as write:
        write(("=1+1", 'a "quoted", cell'))
        assert not path.exists()
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [list(COLUMNS), ["'=1+1", 'a "quoted", cell']]
    assert path.read_bytes().count(b"\r\n") == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["out.csv"]


def test_a_file_that_is_there_is_left_alone_unless_it_may_go(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("theirs")
    with pytest.raises(FileExists), new_csv_file(path, COLUMNS, overwrite=False):
        pytest.fail("it began to write")
    assert path.read_text() == "theirs"
    with new_csv_file(path, COLUMNS, overwrite=True):
        assert path.read_text() == "theirs", "until the new one is whole"
    assert path.read_text().startswith("id,note")


def test_a_file_that_came_meanwhile_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with pytest.raises(FileExists), new_csv_file(path, COLUMNS, overwrite=False):
        path.write_text("theirs")
    assert path.read_text() == "theirs"
    assert [each.name for each in tmp_path.iterdir()] == ["out.csv"]


def test_whatever_ends_it_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt), new_csv_file(path, COLUMNS, overwrite=False) as write:
        write((1, 2))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
