"""Fault tests: processes that are started before what they need is there become ready by themselves."""

import asyncio
from functools import partial
from uuid import uuid4

import asyncpg

from migrations.run import upgrade
from tests.conftest import Server
from tests.faults.proxy import proxy
from tests.stack import Process, eventually, http_status, stack

ROLES = [("gateway",), ("worker", "settle"), ("worker", "callbacks"), ("worker", "sweep")]


async def until_waiting(process: Process) -> None:
    """Return once the process lives and says that it is not ready."""

    async def waiting() -> bool:
        return await http_status(f"http://127.0.0.1:{process.admin_port}/readyz") == 503

    await eventually(waiting, f"{process.name} waits")
    assert await http_status(f"http://127.0.0.1:{process.admin_port}/livez") == 200


async def test_processes_started_before_the_database_become_ready(database_url: str) -> None:
    async with proxy(database_url) as network, stack(network.url) as running:
        network.refuse()
        processes = await asyncio.gather(*(running.launch(*role) for role in ROLES))
        for process in processes:
            await until_waiting(process)
        await network.listen()
        for process in processes:
            await process.wait_ready()


async def test_processes_started_before_the_migration_wait_for_it(server: Server) -> None:
    name = f"test_{uuid4().hex}"
    await server.create(name, "template0")
    try:
        async with stack(server.url(name)) as running:
            processes = await asyncio.gather(*(running.launch(*role) for role in ROLES))
            for process, role in zip(processes, ROLES, strict=True):
                await until_waiting(process)
                # Its first look at the schema is behind it, or under way, when it has a session.
                await eventually(partial(is_connected, server, name, f"payouts-{role[-1]}"), "it looks for the schema")
            await upgrade(server.url(name))
            for process in processes:
                await process.wait_ready()
                assert "UndefinedTable" not in process.output
    finally:
        await server.drop(name)


async def test_processes_whose_pools_do_not_fit_say_so_and_work(database_url: str) -> None:
    async with stack(database_url, PAYOUTS_DATABASE_PROCESSES="1000") as running:
        for role in ROLES[:2]:
            process = await running.start(*role)

            async def said(process: Process = process) -> bool:
                return "connections.short" in process.output

            await eventually(said, f"{process.name} says so")


async def is_connected(server: Server, database: str, application: str) -> bool:
    """Whether somebody whose name begins so is connected to a database."""
    connection = await asyncpg.connect(server.admin_url)
    try:
        found: bool = await connection.fetchval(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = $1 AND starts_with(application_name, $2))",
            database,
            application,
        )
        return found
    finally:
        await connection.close()
