"""Real RabbitMQ for the tests: one node per session with queues of each test's own, and nodes to be killed.

`TEST_AMQP_URL` names a broker to use instead; else a private node runs from what the machine has, or may install, else one in
Docker. Without any of these what needs a broker is skipped, and said; with `REQUIRE_BROKER=1` it fails.
"""

import asyncio
import gc
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol
from uuid import uuid4

import aio_pika
import psutil
import pytest

from common.messaging.topology import Topology
from ops.broker import check_given, find_or_install
from ops.processes import Say
from ops.rabbitmq import Node, choose_home, end_processes
from ops.servers import ServerFailed

_FOLDER: Final = "payouts-rabbitmq-"
_IMAGE: Final = "rabbitmq:4.1"
_PORT: Final = 5672
_SHARDS_MAX: Final = 64
_WHY_SKIPPED: Final = pytest.StashKey[str]()


class Broker(Protocol):
    """The session's broker, shared by its tests: leave it running, and keep to names with your prefix."""

    @property
    def url(self) -> str:
        """Where it is; the login may do anything."""

    def ctl(self, *arguments: str) -> str:
        """What rabbitmqctl prints. Blocks. Skips the test when the broker is not ours."""


MakeBroker = Callable[[], Awaitable[Node]]


@dataclass(frozen=True, slots=True)
class ForeignBroker:
    """A broker that somebody else runs."""

    url: str

    def ctl(self, *arguments: str) -> str:
        pytest.skip(f"rabbitmqctl {arguments[0]} needs a node of our own")


@dataclass(frozen=True, slots=True)
class ContainerBroker:
    """A broker of this session's in Docker. `container`: of testcontainers."""

    url: str
    container: Any

    def ctl(self, *arguments: str) -> str:
        code, output = self.container.exec(["rabbitmqctl", "--quiet", *arguments])
        if code:
            raise ServerFailed(f"rabbitmqctl {arguments[0]} failed: {output.decode(errors='replace')}")
        return str(output.decode())


@pytest.fixture(scope="session")
def broker(pytestconfig: pytest.Config) -> Iterator[Broker]:
    """The session's broker: the one of `TEST_AMQP_URL`, or a node of ours, or one in Docker."""
    with ExitStack() as stack:
        given = os.environ.get("TEST_AMQP_URL")
        if given:
            asyncio.run(check_given([given], "TEST_AMQP_URL"))
            yield ForeignBroker(given)
        else:
            yield _start_broker(pytestconfig, stack)


@pytest.fixture
async def amqp_prefix(broker: Broker) -> AsyncIterator[str]:
    """A queue prefix of this test's own; what the product made under it is deleted afterwards."""
    prefix = f"t{uuid4().hex[:10]}."
    yield prefix
    await delete_all(broker, Topology(prefix, _SHARDS_MAX))


async def delete_all(broker: Broker, topology: Topology) -> None:
    """Delete exchange and queues, as far as they are there."""
    connection = await aio_pika.connect(broker.url)
    async with connection:
        channel = await connection.channel()
        for queue in topology.all_queues():
            await channel.queue_delete(queue)
        await channel.exchange_delete(topology.exchange)


@pytest.fixture
async def make_broker(pytestconfig: pytest.Config) -> AsyncIterator[MakeBroker]:
    """Makes nodes of this test's own, started, to be hurt at will: `node = await make_broker()`.

    Its calls block: use `asyncio.to_thread`. A start takes some seconds, so a test had better share one for several faults.
    """
    with ExitStack() as stack:

        async def make() -> Node:
            try:
                node = _node(uuid4().hex, await asyncio.to_thread(_find_server, pytestconfig), stack)
                await asyncio.to_thread(node.start)
            except ServerFailed as failure:
                why = str(failure)
            else:
                return node
            _do_without(pytestconfig, why)

        yield make


def _start_broker(config: pytest.Config, stack: ExitStack) -> Broker:
    try:
        node = _node("session", _find_server(config), stack)
        node.start()
    except ServerFailed as failure:
        why = str(failure)
    else:
        return node
    return _start_container(stack) or _do_without(config, why)


def _find_server(config: pytest.Config) -> Path:
    return find_or_install(os.environ, _say_aloud(config))


def _node(name: str, server: Path, stack: ExitStack) -> Node:
    """A node in a temporary folder that carries the number of this process; both go with the stack."""
    home = choose_home(Path(tempfile.gettempdir()) / f"{_FOLDER}{os.getpid()}-{name}")
    node = Node(home, home / "node.log", server)
    stack.callback(shutil.rmtree, home, ignore_errors=True)
    stack.callback(node.stop)
    return node


def _start_container(stack: ExitStack) -> Broker | None:
    """A broker in Docker, if an engine answers."""
    if find_spec("testcontainers") is None or not _engine_answers():
        return None
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    password = secrets.token_urlsafe(24)
    container = DockerContainer(_IMAGE).with_exposed_ports(_PORT)
    container.with_envs(RABBITMQ_DEFAULT_USER="payouts", RABBITMQ_DEFAULT_PASS=password)
    container.waiting_for(LogMessageWaitStrategy("Server startup complete"))
    stack.enter_context(container)
    host, port = container.get_container_host_ip(), container.get_exposed_port(_PORT)
    return ContainerBroker(f"amqp://payouts:{password}@{host}:{port}/", container)


def _engine_answers() -> bool:
    """Whether Docker does. Its client leaves open what it opened in vain, which is none of the tests' faults."""
    from docker.errors import DockerException
    from testcontainers.core.docker_client import DockerClient

    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        try:
            DockerClient().client.ping()
            answers = True
        except DockerException:
            answers = False
        gc.collect()
    return answers


def _do_without(config: pytest.Config, why: str) -> NoReturn:
    """Skip, aloud, or fail where a broker is required."""
    if os.environ.get("REQUIRE_BROKER") == "1":
        pytest.fail(f"REQUIRE_BROKER=1, and there is no RabbitMQ: {why}", pytrace=False)
    config.stash[_WHY_SKIPPED] = why
    pytest.skip(f"no RabbitMQ: {why}")


def _say_aloud(config: pytest.Config) -> Say:
    """Past the capturing of what tests print."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")

    def say(subject: str, text: str) -> None:
        if reporter is not None and capture is not None:
            with capture.global_and_fixture_disabled():
                reporter.ensure_newline()
                reporter.write_line(f"{subject} {text}")

    return say


def pytest_sessionstart() -> None:
    """Stop nodes of sessions that were killed, and remove their folders."""
    for home in Path(tempfile.gettempdir()).glob(f"{_FOLDER}[0-9]*-*"):
        owner = home.name.removeprefix(_FOLDER).partition("-")[0]
        if not psutil.pid_exists(int(owner)):
            end_processes(home)
            shutil.rmtree(home, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it once more where everybody looks."""
    why = terminalreporter.config.stash.get(_WHY_SKIPPED, None)
    if why is not None:
        terminalreporter.section("the tests that need RabbitMQ were skipped", yellow=True, bold=True)
        terminalreporter.write_line(why)
