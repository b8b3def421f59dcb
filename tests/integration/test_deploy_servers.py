"""`deploy/`: servers with the certificates and the configuration that `compose.yaml` gives them, and our clients."""

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Final

import aio_pika
import aiohttp
import pytest
from aiormq.exceptions import AMQPConnectionError
from cryptography import x509
from sqlalchemy import text
from sqlalchemy.engine import make_url

from common.db.engine import create_engine, in_transaction
from common.errors import DatabaseUnavailable
from common.messaging.topology import Topology, Work, find_or_declare
from ops.ports import choose_port
from ops.rabbitmq import Node
from ops.servers import ServerFailed
from tests.broker import _do_without, _find_server, _node
from tests.deployment import DEPLOY, load
from tests.factories import settings
from tests.stack import eventually, stack

PASSWORDS: Final = {name: f"a-long-enough-password-of-{name}" for name in ("gateway", "worker", "ops")}
TOPOLOGY: Final = Topology("", 1)
# A node boots that long on a busy machine.
START_SECONDS_MAX: Final = 90.0


def make_certificates(folder: Path, *names: str) -> str:
    """Run the script as `prepare` does; what it says."""
    done = subprocess.run(
        [sys.executable, DEPLOY / "certificates.py", folder, *names], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_certificates_are_made_once_and_anew_when_one_is_missing_or_ends(tmp_path: Path) -> None:
    assert make_certificates(tmp_path, "postgres", "rabbitmq") == "made"
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.pem")}
    assert {str(file.relative_to(tmp_path)): oct(file.stat().st_mode & 0o777) for file in before} == {
        "authority/ca.pem": "0o644",
        **{f"{name}/certificate.pem": "0o644" for name in ("postgres", "rabbitmq")},
        **{f"{name}/key.pem": "0o600" for name in ("postgres", "rabbitmq")},
    }
    assert make_certificates(tmp_path, "postgres", "rabbitmq") == "still good"
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.pem")} == before

    (tmp_path / "postgres" / "key.pem").unlink()
    assert make_certificates(tmp_path, "postgres", "rabbitmq") == "made"
    assert not [file for file, content in before.items() if file.read_bytes() == content]
    certificate = x509.load_pem_x509_certificate((tmp_path / "rabbitmq" / "certificate.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["rabbitmq"]


@asynccontextmanager
async def tls_before(database_url: str, folder: Path) -> AsyncIterator[int]:
    """A port that speaks PostgreSQL over TLS alone, for a server whose build may know no TLS: it asks, and passes on the rest.

    Source: PostgreSQL, "Message Formats", SSLRequest.
    """
    url = make_url(database_url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, ssl.SSLError, asyncio.IncompleteReadError):
            if await reader.readexactly(8) != bytes([0, 0, 0, 8, 4, 210, 22, 47]):
                return writer.close()
            writer.write(b"S")
            await writer.start_tls(context)
            behind_reader, behind_writer = await asyncio.open_connection(url.host, url.port)
            await asyncio.gather(copy(reader, behind_writer), copy(behind_reader, writer))
        return writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_the_database_is_believed_only_when_it_proves_who_it_is(database_url: str, tmp_path: Path) -> None:
    """`sslmode` and `sslrootcert` of `DATABASE_URL`, as every process and command of ours reads them."""
    make_certificates(tmp_path / "ours", "localhost", "other")
    make_certificates(tmp_path / "theirs", "localhost")
    ours, theirs = (tmp_path / name / "authority" / "ca.pem" for name in ("ours", "theirs"))

    async def ask(port: int, query: str) -> int:
        url = make_url(database_url).set(host="localhost", port=port).render_as_string(hide_password=False)
        engine = create_engine(settings(f"{url}?{query}"), role="payouts_readonly", application="tests")
        try:
            return int(await in_transaction(engine, lambda tx: tx.scalar(text("SELECT count(*) FROM payouts"))))
        finally:
            await engine.dispose()

    async with tls_before(database_url, tmp_path / "ours" / "localhost") as port:
        assert await ask(port, f"sslmode=verify-full&sslrootcert={ours}") == 0
        assert await ask(port, f"sslmode=verify-ca&sslrootcert={ours}") == 0
        for refused in (f"sslmode=verify-full&sslrootcert={theirs}", "sslmode=disable"):
            with pytest.raises(DatabaseUnavailable):
                await ask(port, refused)
    async with tls_before(database_url, tmp_path / "ours" / "other") as port:
        assert await ask(port, f"sslmode=verify-ca&sslrootcert={ours}") == 0
        with pytest.raises(DatabaseUnavailable):
            await ask(port, f"sslmode=verify-full&sslrootcert={ours}")


class DeployedNode(Node):
    """A node with the files of `deploy/rabbitmq` in the place of its own settings; only paths and ports are this test's."""

    tls_port = metrics_port = 0

    def _write_configuration(self) -> None:
        super()._write_configuration()
        self.tls_port, self.metrics_port = choose_port(), choose_port()
        folder = self._configuration / "none"
        for name, file in (("50-rabbitmq.conf", "rabbitmq.conf"), ("90-tls.conf", "tls.conf")):
            configuration = (DEPLOY / "rabbitmq" / file).read_text()
            for there, here in (("/run/tls", f"{self.home}/tls/localhost"), ("= 5671", f"= {self.tls_port}")):
                configuration = configuration.replace(there, here)
            self._give(folder / name, configuration)
        self._give(
            folder / "95-test.conf", f"prometheus.tcp.port = {self.metrics_port}\nprometheus.tcp.ip = 127.0.0.1\n"
        )
        (self._configuration / "plugins").write_text((DEPLOY / "rabbitmq" / "enabled_plugins").read_text())
        make_certificates(self.home / "tls", "localhost")
        rendered = subprocess.run(
            [sys.executable, DEPLOY / "rabbitmq" / "users.py", DEPLOY / "rabbitmq" / "definitions.json"],
            env={"PATH": os.environ["PATH"], **{f"{name.upper()}_PASSWORD": word for name, word in PASSWORDS.items()}},
            capture_output=True,
            text=True,
            check=True,
        )
        self._give(self.home / "tls" / "localhost" / "definitions.json", rendered.stdout)
        for made in (self.home / "tls" / "localhost").iterdir():
            self._account.give(made)

    def _give(self, path: Path, content: str) -> None:
        path.write_text(content)
        self._account.give(path)

    def _wait_until_ready(self, process: "subprocess.Popen[bytes]") -> None:
        ends_at = monotonic() + START_SECONDS_MAX
        while True:
            # Listeners are the last thing that starts.
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.tls_port), timeout=1):
                return
            assert process.poll() is None, self._log.read_text()
            assert monotonic() < ends_at, self._log.read_text()
            time.sleep(0.05)


@pytest.fixture
async def node(pytestconfig: pytest.Config) -> AsyncIterator[DeployedNode]:
    """Started; it ends with the test."""
    try:
        server = await asyncio.to_thread(_find_server, pytestconfig)
    except ServerFailed as failure:
        _do_without(pytestconfig, str(failure))
    with ExitStack() as ending:
        plain = _node("deployed", server, ending)
        made = DeployedNode(plain.home, plain._log, plain._server)
        ending.callback(made.stop)
        await asyncio.to_thread(made.start)
        yield made


async def test_rabbitmq_speaks_tls_alone_with_the_definitions_and_users_in_it(node: DeployedNode) -> None:
    authority, other = node.home / "tls" / "authority" / "ca.pem", node.home / "other.pem"
    make_certificates(node.home / "elsewhere", "localhost")
    other.write_bytes((node.home / "elsewhere" / "authority" / "ca.pem").read_bytes())

    def url(login: str, password: str, *, ca: Path = authority) -> str:
        return f"amqps://{login}:{password}@localhost:{node.tls_port}/payouts?cafile={ca}"

    connection = await aio_pika.connect(url("payouts-worker", PASSWORDS["worker"]))
    async with connection:
        await find_or_declare(connection, TOPOLOGY, [*TOPOLOGY.queues(Work.SETTLE), *TOPOLOGY.queues(Work.CALLBACK)])
    for refused in (
        url("guest", "guest"),
        url("payouts-worker", PASSWORDS["gateway"]),
        url("payouts-worker", PASSWORDS["worker"], ca=other),
    ):
        with pytest.raises((AMQPConnectionError, ssl.SSLError)):
            await aio_pika.connect(refused, timeout=10)
    listeners = json.loads(await asyncio.to_thread(node.ctl, "status", "--formatter", "json"))["listeners"]
    assert {listener["port"] for listener in listeners if listener["protocol"] in ("amqp", "amqp/ssl")} == {
        node.tls_port
    }

    scrape = load("prometheus/prometheus.yaml")["scrape_configs"][1]
    pairs = [(name, value) for name, values in scrape["params"].items() for value in values]

    async def told() -> str:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{node.metrics_port}{scrape['metrics_path']}", params=pairs) as response,
        ):
            assert response.status == 200
            return found if 'queue="payouts.parked"' in (found := await response.text()) else ""

    shown = await eventually(told, "RabbitMQ tells of its queues")
    assert [line for line in shown.splitlines() if line.startswith("rabbitmq_detailed_queue_messages{")]


async def test_compose_sees_whether_a_process_is_ready(database_url: str) -> None:
    """The very command of the health check, beside a process that is ready, and where nobody listens."""
    program, *arguments = load("compose.yaml")["services"]["sweep"]["healthcheck"]["test"][1:]
    assert program == "python"

    async def exit_code(port: int) -> int:
        looking = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            env={"PAYOUTS_ADMIN_PORT": str(port)},
            stderr=asyncio.subprocess.DEVNULL,
        )
        return await looking.wait()

    async with stack(database_url) as running:
        process = await running.start("worker", "sweep")
        assert await exit_code(process.admin_port) == 0
        assert await exit_code(choose_port()) == 1
