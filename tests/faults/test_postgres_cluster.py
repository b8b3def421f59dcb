import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import asyncpg
import psutil
import pytest

from ops.postgres import DATABASE, Cluster
from tests.conftest import MakeCluster


async def ask(url: str, question: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(question)
    finally:
        await connection.close()


def successor(cluster: Cluster) -> Cluster:
    """What the next process makes of the same folder."""
    return Cluster(cluster.home, cluster.home / "postgresql.log")


async def test_a_killed_server_comes_back_at_the_same_url_with_what_was_committed(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(durable=False)
    url = cluster.url(DATABASE)
    await ask(url, "CREATE TABLE kept AS SELECT 1 AS n")

    await asyncio.to_thread(cluster.kill)

    assert await asyncio.to_thread(cluster.start) == url
    assert await ask(url, "SELECT n FROM kept") == 1


async def test_a_server_left_running_is_replaced_not_joined(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(durable=False)
    orphan = cluster.process_id
    heir = successor(cluster)

    url = await asyncio.to_thread(heir.start)

    assert url == cluster.url(DATABASE)
    assert cluster.process_id is None
    assert heir.process_id not in {None, orphan}
    await asyncio.to_thread(heir.stop)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with us."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


async def test_a_stranger_with_the_dead_server_s_number_is_left_alone(
    make_cluster: MakeCluster, stranger: subprocess.Popen[bytes]
) -> None:
    cluster = await make_cluster(durable=False)
    pid_file = cluster.home / "data" / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    await asyncio.to_thread(cluster.kill)
    pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]))

    url = await asyncio.to_thread(cluster.start)

    assert stranger.poll() is None
    assert await ask(url, "SELECT 1") == 1


async def test_half_a_cluster_is_made_again(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(durable=False)
    await asyncio.to_thread(cluster.stop)
    (cluster.home / "data").rename(cluster.home / "data.new")

    url = await asyncio.to_thread(cluster.start)

    assert await ask(url, "SELECT to_regclass('payouts') IS NULL")


async def test_the_server_is_no_child_of_the_terminal_and_never_root(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(durable=False)

    assert cluster.process_id is not None
    assert os.getsid(cluster.process_id) == cluster.process_id
    assert psutil.Process(cluster.process_id).uids().real != 0


async def test_fsync_is_on_unless_a_test_says_otherwise(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(durable=True)

    assert await ask(cluster.url(DATABASE), "SELECT current_setting('fsync')") == "on"


async def test_passwords_are_asked_for(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(durable=False)
    password = (cluster.home / "password").read_text()

    assert (cluster.home / "password").stat().st_mode & 0o777 == 0o600
    try:
        await ask(cluster.url(DATABASE).replace(password, "guess"), "SELECT 1")
    except asyncpg.InvalidPasswordError:
        return
    raise AssertionError("a wrong password was accepted")
