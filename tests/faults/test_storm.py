"""A short storm: whoever is killed, servers too, nothing that was answered is lost, doubled or stuck."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ops.rabbitmq import find_server
from ops.torment.storm import run


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for the storm; what is kept of it tells why a test failed."""
    with tempfile.TemporaryDirectory(prefix="payouts-storm-") as path:
        yield Path(path)


@pytest.mark.timeout(300)
async def test_in_a_storm_of_kill_9_every_answer_stays_true(folder: Path) -> None:
    report = await run(
        folder, seconds=30, rate=40, kill_seconds=2.5, seed=1, deadline_seconds=150, console=Console(quiet=True)
    )

    assert report.differences == []
    assert [finding.rule.name for finding in report.verdict.broken] == []
    tally = report.tally
    assert (tally.offered, tally.turned_away, tally.accepted + tally.refused) == (1200, 0, 1200)
    assert report.kills["PostgreSQL"] >= 1, report.kills
    assert report.kills["RabbitMQ"] >= (1 if find_server() else 0), report.kills
    assert report.kills["gateway"] >= 1, report.kills
    # The storm was felt: somebody had to ask again.
    assert tally.answers["no answer"] + tally.answers["503"] > 0, tally.answers
