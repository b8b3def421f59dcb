"""`payouts doctor`: does this machine, with these settings, have what the product needs?"""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import click

from common.messaging.topology import Topology
from common.settings import Settings
from ops import broker
from ops.broker import name_error
from ops.cli.connect import read_settings
from ops.cli.errors import CheckFailed
from ops.cli.options import json_option
from ops.cli.output import print_json, print_table
from ops.doctor import Finding, Verdict
from ops.doctor.broker import BrokerQueue, check_broker, check_queues, read_queues_of_management, read_queues_of_node
from ops.doctor.database import check_database
from ops.doctor.settings import check_settings
from ops.servers import ServerFailed
from ops.state import FOLDER, find_demo


@click.command("doctor")
@click.option(
    "--management-url",
    metavar="URL",
    help="RabbitMQ's management API, such as http://host:15672: it shows arguments, bindings and limits of the queues.",
)
@json_option
def doctor_command(management_url: str | None, as_json: bool) -> None:
    """Look at settings, database and broker as a process started here would find them; change nothing.

    Exit code 1 when something is wrong; what deserves a look only is shown.
    """
    settings = read_settings()
    findings = asyncio.run(_look(settings, management_url))
    rows = [{"what": f.subject, "verdict": f.verdict.value, "how": f.detail, "advice": f.advice} for f in findings]
    if as_json:
        print_json({"findings": rows})
    else:
        print_table(rows)
    wrong = [finding.subject for finding in findings if finding.verdict is Verdict.WRONG]
    if wrong:
        raise CheckFailed(f"wrong: {', '.join(wrong)}")


async def _look(settings: Settings, management_url: str | None) -> list[Finding]:
    topology = Topology(settings.amqp_queue_prefix, settings.amqp_shards)
    findings = list(check_settings(settings))
    findings += [finding async for finding in check_database(settings)]
    broker_findings = [finding async for finding in check_broker(settings, topology)]
    findings += broker_findings
    if any(finding.subject.startswith("exchange") for finding in broker_findings):
        findings += [finding async for finding in _look_behind(settings, topology, management_url)]
    return findings


async def _look_behind(settings: Settings, topology: Topology, management_url: str | None) -> AsyncIterator[Finding]:
    """What AMQP does not show."""
    try:
        queues = await _read_queues(settings, topology, management_url)
    except (aiohttp.ClientError, TimeoutError, ValueError, ServerFailed) as error:
        yield Finding("limits", Verdict.LOOK, f"could not be read: {name_error(error)}", "--management-url")
        return
    if queues is None:
        yield Finding("limits", Verdict.LOOK, "not looked at: AMQP does not show them", "say --management-url")
        return
    for finding in check_queues(queues, topology):
        yield finding


async def _read_queues(settings: Settings, topology: Topology, management_url: str | None) -> list[BrokerQueue] | None:
    if management_url is not None:
        return await read_queues_of_management(management_url, settings.amqp_urls[0], topology)
    demo, node = find_demo(FOLDER), broker.find_own(FOLDER)
    if node is None or demo is None or settings.amqp_urls != (demo.amqp_url,):
        return None
    return await asyncio.to_thread(read_queues_of_node, node, topology)
