import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from shutil import which
from typing import Final

import psutil
import pytest

from ops.broker import check_given
from ops.demo import check_ledger, run
from ops.local import reset_folder
from ops.ports import choose_port
from ops.rabbitmq import find_server
from ops.welcome import render_curl
from tests.local_stack import Terminal

PARTS: Final = {"receiver", "bank", "settle", "callbacks", "sweep", "gateway-1", "gateway-2"}


@pytest.fixture
def folder() -> Path:
    """A folder that any account may pass through."""
    folder = Path(tempfile.mkdtemp(prefix="payouts-local-"))
    folder.chmod(0o755)
    return folder


@pytest.fixture
async def terminal(folder: Path) -> AsyncIterator[Terminal]:
    """A terminal with a folder of its own, and nothing left of it afterwards."""
    terminal = Terminal(folder, choose_port())
    yield terminal
    await terminal.end(signal.SIGKILL)
    await asyncio.to_thread(reset_folder, folder)


async def run_shell(command: str) -> str:
    process = await asyncio.create_subprocess_exec("/bin/sh", "-c", command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return output.decode()


@pytest.mark.parametrize("servers", [["RabbitMQ", "PostgreSQL"], ["PostgreSQL"]], ids=" and ".join)
async def test_payouts_go_all_the_way_and_the_end_is_in_order(terminal: Terminal, servers: list[str]) -> None:
    if "RabbitMQ" not in servers:
        terminal.environment["AMQP_URL"] = ""
    elif find_server() is None:
        pytest.skip("no RabbitMQ on this machine")
    await terminal.bring_up()
    await terminal.read_until("ready")
    processes = terminal.processes()

    outcome = await run(terminal.demo, 20, 60, lambda _: None)

    assert outcome.surprises == []
    assert outcome.is_complete(20)
    assert await check_ledger(terminal.demo.database_url) == []
    assert processes.keys() == PARTS
    alone = {
        name for name, process in processes.items() if process.is_running() and os.getsid(process.pid) == process.pid
    }
    assert (terminal.folder / "demo.json").stat().st_mode & 0o777 == 0o600
    assert await terminal.end(signal.SIGINT) == 0
    assert alone == PARTS, terminal.lines
    stopped = [line.split()[0] for line in terminal.lines if line.endswith("stopped")]
    assert stopped == ["gateway-1", "gateway-2", "settle", "callbacks", "sweep", "bank", "receiver", *servers]
    assert not any(process.is_running() for process in processes.values())


@pytest.mark.skipif(
    not (which("curl") and which("openssl")), reason="the command is for machines with curl and openssl"
)
async def test_the_printed_command_answers_201_and_then_200(terminal: Terminal) -> None:
    await terminal.bring_up()
    await terminal.read_until("ready")
    command = render_curl(terminal.demo, "PAY-1")

    first, second = await run_shell(command), await run_shell(command)

    assert first.startswith("HTTP/1.1 201 ")
    assert second.startswith("HTTP/1.1 200 ")


async def test_a_start_after_kill_9_cleans_up_and_keeps_the_key(terminal: Terminal) -> None:
    await terminal.bring_up()
    await terminal.read_until("ready")
    before, left_behind = terminal.demo, terminal.processes()
    await terminal.end(signal.SIGKILL)
    assert all(process.is_running() for process in left_behind.values())

    await terminal.bring_up()
    await terminal.read_until("ready")

    assert terminal.demo == before
    assert not any(process.is_running() for process in left_behind.values())
    assert terminal.processes().keys() == PARTS


async def test_a_part_that_dies_is_named_and_started_again(terminal: Terminal) -> None:
    await terminal.bring_up()
    await terminal.read_until("ready")

    terminal.processes()["settle"].kill()

    assert "died (SIGKILL)" in await terminal.read_until("settle")
    assert "ready again" in await terminal.read_until("settle        ready")


async def test_a_broker_that_dies_comes_back_where_it_was(terminal: Terminal) -> None:
    if find_server() is None:
        pytest.skip("no RabbitMQ on this machine")
    await terminal.bring_up()
    await terminal.read_until("ready")
    amqp_url = terminal.demo.amqp_url
    assert amqp_url is not None

    for process in psutil.process_iter(["name", "environ"]):
        if "beam" in process.info["name"] and (process.info["environ"] or {}).get("HOME", "").startswith(
            str(terminal.folder)
        ):
            process.kill()

    await terminal.read_until("RabbitMQ      died")
    await terminal.read_until("RabbitMQ      ready again")
    await check_given([amqp_url])


async def test_a_broker_that_is_set_and_does_not_answer_is_named(terminal: Terminal) -> None:
    terminal.environment["AMQP_URL"] = f"amqp://127.0.0.1:{choose_port()}"

    await terminal.bring_up()

    assert "AMQP_URL is set, and cannot be used: AMQPConnectionError" in await terminal.read_until("error")


async def test_a_taken_port_is_named(terminal: Terminal) -> None:
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", terminal.port))
        somebody.listen()
        await terminal.bring_up()

        line = await terminal.read_until("error")

    assert f"port {terminal.port} of 127.0.0.1: taken by another program; PORT=… chooses another" in line


async def test_a_second_stack_of_the_same_folder_is_refused(terminal: Terminal) -> None:
    await terminal.bring_up()
    await terminal.read_until("ready")
    second = Terminal(terminal.folder, choose_port())

    await second.bring_up()

    assert "already runs, as process" in await second.read_until("error")
    await second.end(signal.SIGKILL)
