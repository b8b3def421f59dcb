"""The migrations against what the code believes of the schema, and against the ways in which they are run."""

import asyncio
import re
from collections.abc import Iterable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import asyncpg
import pytest
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql

from common.db.engine import sqlstate
from common.db.tables import metadata
from migrations import run
from migrations.run import ADVISORY_LOCK, newest_revision, upgrade
from tests.conftest import MakeCluster, Server
from tests.flows import cloned
from tests.stack import ROOT

LOCK_NOT_AVAILABLE, QUERY_CANCELED = "55P03", "57014"

COLUMNS = """
    SELECT CASE n.nspname WHEN 'public' THEN '' ELSE n.nspname || '.' END || c.relname AS table, a.attname AS name,
           format_type(a.atttypid, a.atttypmod) AS type, NOT a.attnotnull AS nullable
      FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
       AND NOT c.relispartition AND a.attnum > 0 AND NOT a.attisdropped ORDER BY 1, a.attnum
"""

# Everything that a migration could leave behind. The oids say that nothing was made anew.
CATALOG = """
    SELECT 'relation' AS what, oid, relname::text AS name, relacl::text AS acl FROM pg_class WHERE relnamespace > 16384
     OR relnamespace = 'public'::regnamespace
    UNION ALL SELECT 'function', oid, proname, proacl::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL SELECT 'trigger', oid, tgname, tgenabled::text FROM pg_trigger
    UNION ALL SELECT 'constraint', oid, conname, NULL FROM pg_constraint
    UNION ALL SELECT 'schema', oid, nspname, nspacl::text FROM pg_namespace
    UNION ALL SELECT 'database', oid, datname, datacl::text FROM pg_database WHERE datname = current_database()
    UNION ALL SELECT 'role', oid, rolname, rolcreaterole::text FROM pg_roles WHERE rolname LIKE 'payouts%'
    UNION ALL SELECT 'member', oid, roleid::regrole::text, member::regrole::text FROM pg_auth_members
     ORDER BY 1, 2
"""


async def _ask(url: str, query: str) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(url)
    try:
        return [dict(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


@asynccontextmanager
async def _holding(url: str, *statements: str) -> Any:
    """Somebody else's transaction that is open and has run those statements."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            for statement in statements:
                await connection.execute(statement)
            yield
    finally:
        await connection.close()


def _declared() -> Iterable[dict[str, Any]]:
    for name, table in sorted(metadata.tables.items()):
        for column in table.columns:
            kind = column.type.compile(dialect=postgresql.dialect()).lower()  # type: ignore[no-untyped-call]
            yield {"table": name, "name": column.name, "type": kind, "nullable": column.nullable}


async def test_tables_are_those_of_the_migrated_database_column_by_column(database_url: str) -> None:
    migrated = [row for row in await _ask(database_url, COLUMNS) if row["table"] != "alembic_version"]
    assert list(_declared()) == sorted(migrated, key=lambda row: row["table"])


async def test_a_second_upgrade_changes_nothing(server: Server) -> None:
    async with cloned(server, "template0") as url:
        assert await upgrade(url) == newest_revision()
        before = await _ask(url, CATALOG)
        assert await upgrade(url) == newest_revision()
        assert await _ask(url, CATALOG) == before


async def test_two_upgrades_at_the_same_time_make_one_schema(server: Server) -> None:
    async with cloned(server, "template0") as url:
        assert set(await asyncio.gather(upgrade(url), upgrade(url))) == {newest_revision()}
        assert await _ask(url, "SELECT version_num FROM alembic_version") == [{"version_num": newest_revision()}]


async def test_upgrades_of_two_databases_of_a_new_server_do_not_disturb_each_other(make_cluster: MakeCluster) -> None:
    """The advisory lock is the database's, and the roles are the server's."""
    cluster = await make_cluster(durable=False)
    admin = Server(cluster.url("postgres", "postgres"), cluster.url("payouts"))
    for role in run.ROLES:
        await _run_everywhere(admin, f"DROP OWNED BY {role} CASCADE")
        await admin.run(f"DROP ROLE {role}")
    async with cloned(admin, "template0") as one, cloned(admin, "template0") as two:
        assert set(await asyncio.gather(upgrade(one), upgrade(two))) == {newest_revision()}


async def _run_everywhere(admin: Server, statement: str) -> None:
    for url in (admin.admin_url, admin.admin_url.rpartition("/")[0] + "/payouts"):
        await Server(url, url).run(statement)


async def test_a_login_that_is_no_superuser_migrates_the_database_it_owns(make_cluster: MakeCluster) -> None:
    url = (await make_cluster(durable=False)).url("payouts")
    login = "SELECT rolsuper, rolcreaterole, rolcreatedb, rolbypassrls FROM pg_roles WHERE rolname = current_user"
    (rights,) = await _ask(url, login)
    assert rights == {"rolsuper": False, "rolcreaterole": True, "rolcreatedb": False, "rolbypassrls": False}
    (owner,) = await _ask(url, "SELECT pg_get_userbyid(datdba) = current_user AS ours FROM pg_database"
                               " WHERE datname = current_database()")  # fmt: skip
    assert owner["ours"]
    assert await _ask(url, "SELECT version_num FROM alembic_version") == [{"version_num": newest_revision()}]


async def test_a_login_that_was_made_a_member_needs_no_right_to_make_roles(server: Server, template: str) -> None:
    """As in production: somebody with more rights made the roles, and the login that migrates is only their member."""
    async with cloned(server, template) as url:
        database = url.rpartition("/")[2]
        login = f"login_of_{database}"
        given = url.partition("://")[2].partition("@")[2]
        await server.run(f"CREATE ROLE {login} LOGIN PASSWORD 'x'")
        try:
            await server.run(f"ALTER DATABASE {database} OWNER TO {login}")
            await server.run(f"GRANT {', '.join(run.ROLES)} TO {login}")
            assert await upgrade(f"postgresql://{login}:x@{given}") == newest_revision()
        finally:
            await server.run(f"ALTER DATABASE {database} OWNER TO CURRENT_USER")
            await server.run(f"DROP ROLE {login}")


async def test_everything_belongs_to_the_owner(database_url: str) -> None:
    owners = await _ask(
        database_url,
        """
        SELECT DISTINCT relowner::regrole::text AS owner FROM pg_class
         WHERE relnamespace IN ('public'::regnamespace, 'sandbox'::regnamespace)
        UNION SELECT proowner::regrole::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'sandbox'
        """,
    )
    assert owners == [{"owner": "payouts_owner"}]


async def test_functions_that_act_as_the_owner_look_nowhere_else_and_are_for_those_named(database_url: str) -> None:
    """Whoever may execute a trigger's function may put it on a table of his own and feed it what he likes."""
    functions = await _ask(
        database_url,
        """
        SELECT proname AS name, proconfig::text AS config, proacl::text AS acl FROM pg_proc
         WHERE pronamespace = 'public'::regnamespace AND prosecdef
        """,
    )
    assert functions
    for function in functions:
        assert "search_path=public, pg_temp" in (function["config"] or ""), function
        assert function["acl"] is not None, f"everybody may execute {function['name']}"
        assert not re.search(r"[{,]=", function["acl"]), f"everybody may execute {function['name']}"


async def test_guards_of_what_grows_join_no_table_but_row_by_row(database_url: str) -> None:
    guards = await _ask(
        database_url,
        "SELECT proname AS name, prosrc AS source FROM pg_proc WHERE prorettype = 'trigger'::regtype"
        " AND 'enable_seqscan=off' = ANY (proconfig)",
    )
    assert len(guards) >= 15
    assert [guard["name"] for guard in guards if re.search(r"\bJOIN\s+(?!LATERAL\b)", guard["source"])] == []


async def test_tables_whose_rows_are_changed_where_they_stand_are_one_table_each(database_url: str) -> None:
    """A place (`ctid`) is one in a table: of a partitioned table each partition has it."""
    tables = (
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname IN ('payouts', 'payout_due', 'payout_attempts')"
    )
    assert len(await _ask(database_url, tables)) == 3


async def test_a_lock_that_is_not_to_be_had_stops_the_migration_and_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await _upgrade_against_a_lock(server, monkeypatch, LOCK_TIMEOUT="100ms") == LOCK_NOT_AVAILABLE


async def test_a_statement_that_takes_too_long_stops_the_migration_and_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"LOCK_TIMEOUT": "0", "STATEMENT_TIMEOUT": "100ms"}
    assert await _upgrade_against_a_lock(server, monkeypatch, **limits) == QUERY_CANCELED


async def _upgrade_against_a_lock(server: Server, monkeypatch: pytest.MonkeyPatch, **limits: str) -> str | None:
    """Upgrade within these limits while somebody else holds the table of versions; the SQLSTATE that ended it."""
    async with cloned(server, "template0") as url:
        await upgrade(url)
        await _unmigrate(url)
        before = await _ask(url, CATALOG)
        async with _holding(url, "LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE"):
            with monkeypatch.context() as patch, pytest.raises(Exception, match="timeout") as refused:
                for name, limit in limits.items():
                    patch.setattr(run, name, limit)
                await upgrade(url)
        assert await _ask(url, CATALOG) == before
        assert await upgrade(url) == newest_revision()
    return sqlstate(refused.value)


async def _unmigrate(url: str) -> None:
    """A database whose version is none and which holds nothing of ours but the table that says so."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("SET ROLE payouts_owner")
        tables = ", ".join(sorted(metadata.tables))
        await connection.execute(f"DROP TABLE {tables} CASCADE")
        await connection.execute("DROP SCHEMA sandbox")
        for row in await connection.fetch("SELECT oid::regprocedure::text AS name FROM pg_proc"
                                          " WHERE pronamespace = 'public'::regnamespace"):  # fmt: skip
            await connection.execute(f"DROP FUNCTION {row['name']}")
        await connection.execute("DELETE FROM alembic_version")
    finally:
        await connection.close()


async def test_a_migration_waits_for_the_one_before_it_and_gives_up_in_the_end(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ADVISORY_LOCK_WAIT_SECONDS", 0.5)
    async with cloned(server, "template0") as url:
        async with _holding(url, f"SELECT pg_advisory_lock({ADVISORY_LOCK})"):
            with pytest.raises(TimeoutError):
                await upgrade(url)
        assert await _ask(url, COLUMNS) == []
        assert await upgrade(url) == newest_revision()


def test_there_is_one_head_and_revisions_are_numbered_without_a_gap() -> None:
    scripts = ScriptDirectory(str(ROOT / "migrations"))
    assert scripts.get_heads() == [newest_revision()]
    revisions = [script.revision for script in scripts.walk_revisions()][::-1]
    assert revisions == [f"{number:04}" for number in range(1, len(revisions) + 1)]
    assert all(scripts.get_revision(later).down_revision == earlier for earlier, later in pairwise(revisions))
    files = sorted(path.name for path in (ROOT / "migrations" / "versions").glob("*.py"))
    assert [name[:5] for name in files] == [f"{revision}_" for revision in revisions]
