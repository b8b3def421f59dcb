"""The runbook: a page for each alarm, and each page whole."""

import re
from typing import Any, Final

import pytest

from tests.runbook import AFTER, FIRST, LAST, ROOT, RUNBOOK, hasten, list_alarms, main, read_page, read_rules

ALARMS: Final = {rule["alert"]: rule for rule in list_alarms(read_rules())}
PAGES: Final = {page.stem: page.read_text() for page in RUNBOOK.glob("*.md") if page.stem != "README"}
LINES_MAX: Final = 50


def test_every_alarm_has_a_page_and_every_page_an_alarm() -> None:
    assert PAGES.keys() == ALARMS.keys()
    assert [rule["annotations"]["runbook"] for rule in ALARMS.values()] == [
        f"{RUNBOOK.relative_to(ROOT)}/{alarm}.md" for alarm in ALARMS
    ]
    assert set(re.findall(r"\[(\w+)\]\(\1\.md\)", (RUNBOOK / "README.md").read_text())) == PAGES.keys()


@pytest.mark.parametrize("alarm", PAGES)
def test_a_page_says_what_it_means_and_what_to_do(alarm: str) -> None:
    page = PAGES[alarm]
    assert page.startswith(f"# {alarm}\n\n**What it means.** ")
    assert "\n\n**What merchants notice.** " in page
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == ["Look", "Mend", "Provoke, in a test stack"]
    assert page.count("\n") <= LINES_MAX
    read_page(alarm)


def test_a_drill_waits_for_alarms_that_there_are() -> None:
    assert AFTER.keys() | {FIRST, LAST} | {alarm for before in AFTER.values() for alarm in before} <= ALARMS.keys()


async def test_a_name_that_is_no_alarm_is_refused_before_anything_is_brought_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert await main(["LanesHeld", "Misspelt"]) == 2

    told = capsys.readouterr()
    assert told.out == ""
    assert "there is no alarm Misspelt" in told.err


@pytest.mark.parametrize(
    ("rule", "hasty"),
    [
        ({"expr": "max(age_seconds) > 86400", "for": "5m"}, {"expr": "max(age_seconds) > 86400", "for": "5000ms"}),
        ({"expr": "rate(c[15m]) > 1", "for": "1d"}, {"expr": "rate(c[10000ms]) > 1", "for": "10000ms"}),
        ({"expr": 'up{job="1m"} == 0'}, {"expr": 'up{job="1m"} == 0', "for": "0ms"}),
    ],
)
def test_a_drill_shortens_waiting_and_nothing_else(rule: dict[str, Any], hasty: dict[str, Any]) -> None:
    rest = {"alert": "A", "labels": {"severity": "page"}, "annotations": {"summary": "5m"}}
    rules = {"groups": [{"name": "g", "rules": [rest | rule]}]}
    assert hasten(rules) == {"groups": [{"name": "g", "rules": [rest | hasty]}]}
