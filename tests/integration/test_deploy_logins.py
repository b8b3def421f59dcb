"""`deploy/postgresql`: each process does its work with its own login, and can do nothing of another's.

All of it with the `pg_hba.conf` and the archive of `compose.yaml`; the superuser comes through the socket, as it has to there.
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg
import pytest
import pytest_asyncio
from sqlalchemy.engine import make_url

from migrations.run import ROLES, newest_revision, upgrade
from ops.ports import LOOPBACK
from ops.postgres import Cluster, find_programs
from ops.servers import ServerFailed
from tests.conftest import Server, _cluster
from tests.deployment import DEPLOY, load
from tests.endpoint import endpoint
from tests.factories import environment
from tests.stack import eventually, stack
from tests.terminal import Terminal

DATABASE: Final = "payouts"
NAMES: Final = ("migrate", "gateway", "worker", "ops", "custodian")
BACKUP: Final = "backup"
PASSWORDS: Final = {name: f"as-long-as-it-must-be-{name}" for name in (*NAMES, BACKUP)}
MAY_TAKE: Final = {
    "migrate": set(ROLES),
    "gateway": {"payouts_gateway"},
    "worker": {"payouts_worker"},
    "ops": {"payouts_ops", "payouts_readonly"},
    "custodian": {"payouts_worker", "payouts_ops", "payouts_sealer"},
}
SECOND: Final = dict.fromkeys(PASSWORDS, "another-one-that-is-long-enough")
REFUSED: Final = asyncpg.InsufficientPrivilegeError


@dataclass(frozen=True, slots=True)
class Deployed:
    """A server that `logins.sql` has set up, and the product has migrated."""

    cluster: Cluster

    @property
    def socket(self) -> Path:
        """The folder of the server's socket."""
        return self.cluster.home / "socket"

    @property
    def archive(self) -> Path:
        """Where the write-ahead log goes."""
        return self.cluster.home / "archive"

    @property
    def admin_url(self) -> str:
        """The product's database, as the superuser, who is on the same machine."""
        url = make_url(self.cluster.url("postgres", DATABASE))
        return f"postgresql://{url.username}:{url.password}@/{DATABASE}?host={self.socket}&port={url.port}"

    def url(self, name: str) -> str:
        """The product's database, as one of its logins."""
        url = make_url(self.cluster.url(DATABASE)).set(username=f"payouts-{name}", password=PASSWORDS[name])
        return url.render_as_string(hide_password=False)

    def run_logins(self, passwords: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """As operations does: by the superuser, in the product's database."""
        url = make_url(self.admin_url)
        return subprocess.run(
            [find_programs() / "psql", "--no-psqlrc", "--quiet", "--file", DEPLOY / "postgresql/logins.sql"],
            env={
                "PATH": os.defpath,
                "PGHOST": str(self.socket),
                "PGPORT": str(url.query["port"]),
                "PGUSER": url.username or "",
                "PGPASSWORD": str(url.password),
                "PGDATABASE": DATABASE,
                **{f"{name.upper()}_PASSWORD": password for name, password in passwords.items()},
            },
            capture_output=True,
            text=True,
        )

    def run_script(self, name: str, host: str | Path = LOOPBACK, login: str = BACKUP, **variables: str) -> None:
        """A script of `deploy/postgresql`, as one of the logins. Raises: `ServerFailed`."""
        server = {
            # The wheel's pg_verifybackup crashes.
            "VERIFY": "true",
            "PGHOST": str(host),
            "PGPORT": str(make_url(self.url(login)).port),
            "PGUSER": f"payouts-{login}",
            "PGPASSWORD": PASSWORDS[login],
        }
        self.cluster.run_script(DEPLOY / "postgresql" / name, server | variables)


def make_deployed() -> Deployed:
    """A server with the files and the archive that `compose.yaml` gives it, not started; only paths are this test's."""
    plain = _cluster("logins", durable=False)
    options = dict(
        part.split("=", 1) for part in load("compose.yaml")["services"]["postgres"]["command"] if "=" in part
    )
    command = options["archive_command"].replace("=/archive ", f"={plain.home}/archive ")
    settings = {
        "hba_file": f"{plain.home}/pg_hba.conf",
        "unix_socket_directories": f"{plain.home}/socket",
        "archive_mode": options["archive_mode"],
        "archive_command": command.replace("/etc/postgresql", str(plain.home)),
    }
    cluster = Cluster(plain.home, plain.home / "postgresql.log", durable=False, settings=settings)
    for folder in ("socket", "archive"):
        cluster.make_folder(folder)
    shutil.copy(DEPLOY / "postgresql/archive.sh", cluster.home)
    # The wheel's server speaks no TLS, so that no line for TLS would ever match.
    rules = (DEPLOY / "postgresql/pg_hba.conf").read_text().replace("hostssl", "host")
    (cluster.home / "pg_hba.conf").write_text(rules)
    return Deployed(cluster)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployed() -> AsyncIterator[Deployed]:
    """The script twice, so that a second run changes passwords and nothing else; then `payouts migrate`."""
    made = make_deployed()
    try:
        await asyncio.to_thread(made.cluster.start)
        for passwords in (SECOND, PASSWORDS):
            done = await asyncio.to_thread(made.run_logins, passwords)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert await upgrade(made.url("migrate")) == newest_revision()
        yield made
    finally:
        await asyncio.to_thread(made.cluster.stop)
        shutil.rmtree(made.cluster.home)


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
async def test_the_master_key_is_rotated_by_the_custodian_and_by_no_process(deployed: Deployed) -> None:
    command = ("keys", "rotate-master", "--reason", "a year is over", "--actor", "alice")
    rotated = await Terminal(environment(deployed.url("custodian"))).run(*command)
    assert (rotated.code, rotated.err) == (0, "")
    for name in ("gateway", "worker", "ops"):
        (await Terminal(environment(deployed.url(name))).run(*command)).assert_refused("permission denied")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_test_event_is_sent_by_the_custodian_and_by_no_process(deployed: Deployed) -> None:
    """It reads sealed secrets and is audited, and no process may do both."""
    operator = Terminal(environment(deployed.url("ops")))
    for words in (
        ("merchant", "add", "tried", "--name", "Tried"),
        ("shop", "add", "tried", "main", "--currency", "EUR", "--rail", "sandbox"),
    ):
        added = await operator.run(*words, "--actor", "alice", "--json")
        assert (added.code, added.err) == (0, "")
    async with endpoint() as theirs:
        command = ("callbacks", "test", "tried/main", "--url", theirs.url, "--actor", "alice", "--json")
        for name in ("gateway", "worker", "ops"):
            (await Terminal(environment(deployed.url(name))).run(*command)).assert_refused("permission denied")
        assert theirs.received == []
        assert (await Terminal(environment(deployed.url("custodian"))).run(*command)).document["status"] == 200
        assert len(theirs.received) == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_the_runbook_sees_and_ends_the_sessions_of_others_but_not_a_superusers(deployed: Deployed) -> None:
    looked = "SELECT state, xact_start IS NOT NULL FROM pg_stat_activity WHERE pid = $1"
    lunch, admin = await asyncpg.connect(deployed.url("gateway")), await asyncpg.connect(deployed.admin_url)
    try:
        await lunch.execute("BEGIN")
        pid = lunch.get_server_pid()
        for name in ("worker", "ops", "custodian"):
            other = await asyncpg.connect(deployed.url(name))
            assert tuple(await other.fetchrow(looked, pid) or ()) == (None, False)
            with pytest.raises(REFUSED):
                await other.execute(f"SELECT pg_terminate_backend({pid})")
            await other.close()
        operator = await asyncpg.connect(deployed.url("migrate"))
        assert tuple(await operator.fetchrow(looked, pid) or ()) == ("idle in transaction", True)
        with pytest.raises(REFUSED, match="SUPERUSER"):
            await operator.execute(f"SELECT pg_terminate_backend({admin.get_server_pid()})")
        assert await operator.fetchval("SELECT pg_terminate_backend($1, 10000)", pid)
        assert await operator.fetchrow(looked, pid) is None
        await operator.close()
    finally:
        lunch.terminate()
        await admin.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_backup_is_taken_by_the_login_made_for_it_and_by_no_other(deployed: Deployed) -> None:
    for place, host in (("same-machine", deployed.socket), ("another-machine", LOOPBACK)):
        backups = deployed.cluster.make_folder(place)
        for name in NAMES:
            refused = f'no pg_hba.conf entry for replication connection from host "[^"]+", user "payouts-{name}"'
            with pytest.raises(ServerFailed, match=refused):
                await asyncio.to_thread(deployed.run_script, "backup.sh", host, name, BACKUPS=str(backups))
        await asyncio.to_thread(deployed.run_script, "backup.sh", host, BACKUPS=str(backups))
        (backup,) = backups.glob("*Z")
        assert (backup / "backup_manifest").exists()
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await asyncpg.connect(deployed.url(BACKUP))


@pytest.mark.asyncio(loop_scope="module")
async def test_the_last_backups_are_kept_and_the_archive_since_the_older_of_them(deployed: Deployed) -> None:
    backups, fresh = (deployed.cluster.make_folder(name) for name in ("backups", "fresh"))
    admin = await asyncpg.connect(deployed.admin_url)
    firsts = []
    for day in (1, 2, 3):
        await asyncio.to_thread(deployed.run_script, "backup.sh", BACKUPS=str(fresh))
        (made,) = fresh.glob("*Z")
        kept = made.rename(backups / f"2026010{day}T000000Z")
        firsts += re.findall(
            r"^START WAL LOCATION: .* \(file ([0-9A-F]{24})\)$", (kept / "backup_label").read_text(), re.MULTILINE
        )
    last = await admin.fetchval("SELECT pg_walfile_name(pg_switch_wal())")

    async def archived() -> bool:
        return bool(await admin.fetchval("SELECT last_archived_wal >= $1 FROM pg_stat_archiver", last))

    await eventually(archived, "the write-ahead log is archived")
    await admin.close()
    assert {*firsts, last} <= {file.name for file in deployed.archive.iterdir()}

    folders = {"BACKUPS": str(backups), "ARCHIVE": str(deployed.archive)}
    await asyncio.to_thread(deployed.run_script, "prune.sh", **folders, KEEP="2")

    assert sorted(backup.name for backup in backups.iterdir()) == ["20260102T000000Z", "20260103T000000Z"]
    logs = sorted(file.name for file in deployed.archive.iterdir() if re.fullmatch("[0-9A-F]{24}", file.name))
    assert logs[0] == firsts[1], "the older one's first, and nothing from before"
    assert {firsts[2], last} <= set(logs)


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
@pytest.mark.parametrize("name", ["gateway", "worker", "ops", "custodian"])
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
    password = "as-long-as-it-must-be-stranger"
    await Server(deployed.admin_url, "").run(f"CREATE ROLE stranger LOGIN PASSWORD '{password}'")
    with pytest.raises(REFUSED):
        await asyncpg.connect(deployed.admin_url, user="stranger", password=password)
    for login in ("stranger", "postgres"):
        outside = make_url(deployed.cluster.url("postgres", DATABASE)).set(username=login)
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
            await asyncpg.connect(outside.render_as_string(hide_password=False))
    old = make_url(deployed.url("gateway")).set(password=SECOND["gateway"]).render_as_string(hide_password=False)
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(old)


@pytest.mark.asyncio(loop_scope="module")
async def test_without_a_password_no_login_is_made(deployed: Deployed) -> None:
    done = await asyncio.to_thread(deployed.run_logins, {"gateway": PASSWORDS["gateway"]})
    assert done.returncode != 0
    assert not [password for password in PASSWORDS.values() if password in done.stdout + done.stderr]
