"""The drill of deploy/restore.md, in short: the database is lost and restored to an earlier moment; nothing is paid twice."""

from pathlib import Path
from typing import Final

import pytest

from ops.drill import run

PAYOUTS: Final = 60
DEADLINE_SECONDS: Final = 150.0


@pytest.mark.timeout(DEADLINE_SECONDS + 30)
@pytest.mark.parametrize("carrier", ["postgresql alone", "rabbitmq"])
async def test_after_a_restore_to_an_earlier_moment_both_ledgers_become_equal(
    tmp_path: Path, carrier: str, request: pytest.FixtureRequest
) -> None:
    """Payouts that were open then were paid since, others were accepted since: the restored database knows of neither."""
    with_broker = carrier == "rabbitmq"
    if with_broker:
        request.getfixturevalue("broker")
    said: list[str] = []

    report = await run(
        tmp_path,
        count=PAYOUTS,
        unsent=0,
        seed=1,
        mood="gloomy",
        deadline_seconds=DEADLINE_SECONDS,
        with_broker=with_broker,
        say=said.append,
        copies=1,
    )

    assert report.restored == report.open_then, said
    assert sum(report.restored.values()) == PAYOUTS
    assert sum(report.lost.values()) > PAYOUTS
    assert (report.create_answered, report.workers_wait, report.asked_meanwhile) == (503, True, 0)
    assert report.in_doubt >= PAYOUTS // 2
    assert report.targets_left == 0
    assert report.sent_again == 0
    assert (report.comparison.differences, report.comparison.broken) == ([], [])
    assert sum(report.comparison.states.values()) == sum(report.lost.values())
    assert report.is_sound
