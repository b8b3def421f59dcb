"""Every alarm can be provoked by the command of its page, fires by its own rule in a real Prometheus, and ends when mended."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Final

import pytest
import pytest_asyncio

from ops.servers import ServerFailed
from tests.broker import _do_without, _find_server, _say_aloud
from tests.prometheus import find_or_fetch
from tests.runbook import Drilled, drill_all, list_alarms, practice_range, read_rules

ALARMS: Final = [rule["alert"] for rule in list_alarms(read_rules())]

# The first to wait also waits for the stack, and each for those that come before it.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

Drills = dict[str, "asyncio.Task[Drilled]"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def drills(request: pytest.FixtureRequest) -> AsyncIterator[Drills]:
    """The drills of the alarms that are tested, under way on one stack."""
    try:
        await asyncio.to_thread(_find_server, request.config)
    except ServerFailed as failure:
        _do_without(request.config, str(failure))
    try:
        await asyncio.to_thread(find_or_fetch, os.environ, _say_aloud(request.config))
    except ServerFailed as failure:
        pytest.skip(f"no Prometheus: {failure}")
    tested = {item.callspec.params.get("alarm") for item in request.session.items if hasattr(item, "callspec")}
    async with practice_range(print) as on:
        tasks = drill_all(on, [alarm for alarm in ALARMS if alarm in tested])
        yield tasks
        for task in tasks.values():
            task.cancel()
        await asyncio.wait(tasks.values())


@pytest.mark.parametrize("alarm", ALARMS)
async def test_an_alarm_fires_and_ends_by_the_commands_of_its_page(drills: Drills, alarm: str) -> None:
    drilled = await drills[alarm]

    assert drilled.states == ["inactive", "firing", "inactive"]
