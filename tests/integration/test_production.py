"""Production mode: what is only right on a developer's machine starts nowhere, and what is right starts."""

import asyncio
import base64
import secrets
import sys
from typing import Final

import pytest

from tests.conftest import MakeCluster
from tests.factories import environment
from tests.stack import ROOT, eventually, http_status, stack
from tests.terminal import Terminal

# As a developer has them: keys of an example, a broker across the network in the clear, callbacks to loopback.
AS_IN_DEVELOPMENT: Final = environment(
    "postgresql://payouts:hunter2@127.0.0.1:1/payouts",
    PAYOUTS_ENV="production",
    AMQP_URL="amqp://payouts:hunter2@10.0.0.7/payouts",
    PAYOUTS_LOG_FORMAT="console",
)
REFUSED: Final = (
    "DATABASE_URL: must have a password",
    "AMQP_URL: must have a password",
    "AMQP_URL: must be amqps://",
    "PAYOUTS_LOG_FORMAT: ",
    "PAYOUTS_CALLBACK_PRIVATE_ADDRESSES: ",
    "PAYOUTS_CALLBACK_HTTPS_ONLY: ",
)
OF_KEYS: Final = ("PAYOUTS_MASTER_KEYS: ", "PAYOUTS_CONTENT_KEY: ")


@pytest.mark.parametrize("arguments", [("gateway",), *(("worker", role) for role in ("settle", "callbacks", "sweep"))])
async def test_no_process_starts_as_on_a_developers_machine(arguments: tuple[str, ...]) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *arguments),
        cwd=ROOT,
        env=AS_IN_DEVELOPMENT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = (text.decode() for text in await process.communicate())

    assert (process.returncode, out) == (2, "")
    assert [words for words in (*REFUSED, *OF_KEYS) if words not in err] == []
    assert not [secret for secret in ("hunter2", AS_IN_DEVELOPMENT["PAYOUTS_CONTENT_KEY"]) if secret in err]


@pytest.mark.parametrize("command", ["doctor", "migrate", "verify"])
async def test_no_command_runs_as_on_a_developers_machine(command: str) -> None:
    """Also without the keys, which these do not need."""
    keyless = {name: value for name, value in AS_IN_DEVELOPMENT.items() if not name.endswith(("_KEY", "_KEYS"))}
    for variables, refused in ((AS_IN_DEVELOPMENT, (*REFUSED, *OF_KEYS)), (keyless, REFUSED)):
        ended = await Terminal(variables).run(command)

        assert (ended.code, ended.out) == (2, "")
        assert [words for words in refused if words not in ended.err] == []
        assert ("_KEY" in ended.err) == (variables is AS_IN_DEVELOPMENT)
        assert "hunter2" not in ended.err


async def test_what_production_asks_for_starts_and_is_well(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(durable=True)
    master, content = (base64.b64encode(secrets.token_bytes(32)).decode() for _ in range(2))
    variables = {
        "PAYOUTS_ENV": "production",
        "PAYOUTS_MASTER_KEYS": f"1:{master}",
        "PAYOUTS_CONTENT_KEY": content,
        "PAYOUTS_CALLBACK_PRIVATE_ADDRESSES": "0",
        "PAYOUTS_CALLBACK_HTTPS_ONLY": "1",
    }
    async with stack(cluster.url("payouts"), **variables) as running:
        for arguments in (("gateway",), ("worker", "all")):
            process = await running.start(*arguments)
            assert '"event":"process.started"' in process.output
        ended = await Terminal(environment(cluster.url("payouts"), **variables)).run("doctor")

    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize("address", ["127.0.0.2", "::1"])
async def test_the_admin_port_is_where_it_is_told_to_be(database_url: str, address: str) -> None:
    async with stack(database_url, PAYOUTS_ADMIN_HOST=address) as running:
        process = await running.launch("worker", "sweep")
        host = f"[{address}]" if ":" in address else address
        url = f"http://{host}:{process.admin_port}/livez"

        async def answers() -> bool:
            return await http_status(url) == 200

        await eventually(answers, "the admin port answers there")
        assert await http_status(f"http://127.0.0.1:{process.admin_port}/livez") is None
