"""The README tells the truth about what a program can check."""

from dataclasses import MISSING, fields
from pathlib import Path

from common.domain.payout import FAILURES
from common.settings import Settings

README = Path(__file__).parents[2] / "README.md"


def settings_table() -> str:
    """The table of settings, from the settings themselves."""
    rows = ["| variable | default | |", "|---|---|---|"]
    for item in fields(Settings):
        setting = item.metadata["setting"]
        default = "required" if setting.default is None else f"`{setting.default}`" if setting.default else ""
        assert (setting.default is None) == (item.default_factory is MISSING and item.default is MISSING)
        rows.append(f"| `{setting.variable}` | {default} | {setting.doc} |")
    return "\n".join(rows)


def test_the_readme_lists_every_setting_with_its_default() -> None:
    assert settings_table() in README.read_text(), f"the table should be:\n{settings_table()}"


def test_the_readme_tells_every_reason_for_which_a_payout_fails() -> None:
    text = README.read_text()
    for code, failure in FAILURES.items():
        if code == "returned_by_bank":
            assert f"`{code}`" in text
        else:
            retryable = "yes" if failure.retryable else "no"
            assert f"| `{code}` | {failure.source} | {retryable} | {failure.message} |" in text
