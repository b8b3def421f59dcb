"""What operators type, what they are shown, and what is written down about it."""

import asyncio
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final
from uuid import UUID, uuid4

import asyncpg
import click
import pytest
from sqlalchemy.engine import make_url

from common.db.engine import in_transaction
from common.db.invariants import RULES
from common.db.merchants import find_api_keys
from common.db.rail_events import NewRailEvent, append_rail_events
from common.domain.ids import EVENT, PAYIN, PAYOUT, new_id, render_id
from common.domain.signing import sign_v1
from common.sealing import API_KEY_PURPOSE
from migrations.run import newest_revision
from ops.cli import cli
from ops.state import Demo, find_or_make_keys, save_demo
from tests.conftest import Server
from tests.factories import environment, execute, fetch
from tests.faults.proxy import CommitFault, proxy
from tests.flows import Desk, pass_callback_time, take_callbacks
from tests.terminal import Terminal
from worker.callbacks.recording import Ended as EndedCallback
from worker.callbacks.recording import record_attempts
from worker.callbacks.send import Attempt
from worker.hearing import hear

RECIPIENT: Final = "01798765432"
URL: Final = "http://127.0.0.1:9/hook"
AS_ALICE: Final = ("--actor", "alice")


@pytest.fixture
async def acme(terminal: Terminal) -> str:
    """The code of a merchant without shops."""
    (await terminal.run("merchant", "add", "acme", "--name", "Acme")).assert_shown("acme")
    return "acme"


@pytest.fixture
async def shop(terminal: Terminal, acme: str) -> str:
    """The code of its default shop, in BDT."""
    options = ("--currency", "BDT", "--rail", "sandbox", "--default", "--webhook-url", URL)
    (await terminal.run("shop", "add", acme, "dhaka", *options)).assert_shown("dhaka")
    return "dhaka"


async def audited(floor: Desk, action: str) -> tuple[str, str, str | None]:
    """Actor, subject and reason of the only action of that kind."""
    row = await floor.one("SELECT actor, subject, reason FROM audit WHERE action = :action", action=action)
    return row.actor, row.subject, row.reason


async def assert_nowhere_in_the_clear(floor: Desk, secret: str) -> None:
    """No row of any table contains the secret, as text or as bytes."""
    tables = await fetch(
        floor.owner,
        "SELECT table_schema || '.' || table_name AS name FROM information_schema.tables"
        " WHERE table_schema IN ('public', 'sandbox') AND table_type = 'BASE TABLE'",
    )
    assert len(tables) > 10
    for needle in (secret, secret.encode().hex()):
        for table in tables:
            query = f"SELECT t::text AS row FROM {table.name} t WHERE position(:needle IN t::text) > 0"
            assert await fetch(floor.owner, query, needle=needle) == []


# It shows nothing but that it runs.
SERVER = "rail-simulator"


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command with its words, but for the server."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        elif name != SERVER:
            yield " ".join((*path, name)), command


# The tree as a whole


def test_every_command_serves_programs_and_every_change_names_its_actor() -> None:
    options = {words: {param.opts[0]: param for param in command.params} for words, command in commands()}
    asks_reason = {words for words, named in options.items() if "--reason" in named and named["--reason"].required}

    assert all("--json" in named for named in options.values())
    assert {words for words, named in options.items() if "--actor" in named} == {
        "merchant add",
        "shop add",
        "key add",
        "key revoke",
        "balance topup",
        "payout resolve",
        "callbacks resend",
        "discrepancies close",
        "parked replay",
        "parked drop",
        "rail add",
        "rail off",
        "rail on",
        "rail remove",
        "shop rail",
        "shop webhook",
        "shop secret rotate",
        "shop secret revoke",
        "callbacks test",
        "shop callbacks",
        "shop freeze",
        "shop unfreeze",
        "reconcile",
        "keys rotate-master",
        "callbacks replay",
        "callbacks resume",
        "lane hold",
        "lane release",
        "recover",
        "queues retire",
    }
    assert asks_reason == {
        "keys rotate-master",
        "shop rail",
        "shop webhook",
        "shop callbacks",
        "shop freeze",
        "shop unfreeze",
        "balance topup",
        "callbacks resend",
        "discrepancies close",
        "parked replay",
        "parked drop",
        "rail off",
        "rail on",
        "rail remove",
        "shop secret rotate",
        "shop secret revoke",
        "callbacks replay",
        "callbacks resume",
        "lane hold",
        "lane release",
        "recover",
        "queues retire",
    }


@pytest.mark.parametrize("words", [words for words, _ in commands()])
async def test_every_command_explains_itself(words: str) -> None:
    (await Terminal({}).run(*words.split(), "--help")).assert_shown("Usage:", "--json")


async def test_no_command_at_all_shows_what_there_is() -> None:
    ended = await Terminal({}).run()

    assert (ended.code, ended.out) == (2, "")
    assert "callbacks" in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], ["nonsense"]),
        (["shop", "add", "acme"], ["payouts shop add", "CODE"]),
        (["shop", "add", "acme", "dhaka", "--currency", "BDT"], ["--rail"]),
        (["balance", "topup", "acme", "dhaka", "5"], ["--reason"]),
        (["balance", "topup", "acme", "dhaka", "5", "--reason", " "], ["--reason", "one line"]),
        (["merchant", "add", "acme", "--name", "A\x1b[2J"], ["--name", "printable"]),
        (["merchant", "add", "acme", "--name", "\udcff"], ["UTF-8"]),
        (["key", "add", "acme", "--scope", "everything"], ["everything"]),
        (["key", "add", "acme", "--network", "10.0.0.1/8"], ["10.0.0.1/8"]),
        (["key", "add", "acme", "--expires", "2020-01-01"], ["over"]),
        (["key", "add", "acme", "--expires", "soon"], ["ISO 8601"]),
        (["payout", "show", "PAY-1", "--shop", "dhaka"], ["MERCHANT/SHOP"]),
        (["callbacks", "resend", "PAY-1", "--reason", "x"], ["not the id of an event"]),
        (["callbacks", "list", "--shop", "acme/dhaka"], ["--payout"]),
        (["callbacks", "preview", "PAY-1"], ["not the id of an event"]),
        (["callbacks", "test", "acme/dhaka", "--url", "ftp://a.example/"], ["http(s)"]),
        (["shop", "rail", "acme/dhaka", "bank"], ["--reason"]),
        (["shop", "webhook", "acme/dhaka", "--none"], ["--reason"]),
        (["shop", "webhook", "acme/dhaka", "--reason", "x"], ["--none"]),
        (["shop", "webhook", "acme/dhaka", URL, "--none", "--reason", "x"], ["--none"]),
        (["shop", "secret", "rotate", "acme/dhaka"], ["--reason"]),
        *(
            (["shop", "secret", "rotate", "acme/dhaka", "--reason", "x", "--grace", grace], ["24h", "at most 7d"])
            for grace in ("8d", "169h", "1", "-1h", "1.5h", "h", "24H", "", "\u0661h", "999999999d")
        ),
        (["shop", "secret", "revoke", "acme/dhaka", "evt_1", "--reason", "x"], ["not the id of a webhook secret"]),
        (["parked", "drop", "--reason", "x"], ["--all"]),
        (["parked", "drop", "some-id", "--all", "--reason", "x"], ["--all"]),
        (["parked", "replay", "--all"], ["--reason"]),
        (["parked", "list"], ["AMQP_URL is not set"]),
        (["sign", "GET", "api"], ["/"]),
        (["sign", "GET", "/a b"], ["percent-encoded"]),
        (["sign", "DELETE", "/a"], ["DELETE"]),
    ],
)
async def test_a_command_that_makes_no_sense_is_refused_in_one_line(
    terminal: Terminal, arguments: list[str], words: list[str]
) -> None:
    (await terminal.run(*arguments)).assert_refused(*words)


# The way to the database


@pytest.mark.parametrize("what", ["shop", "key", "lane"])
async def test_who_does_not_exist_has_no_list(terminal: Terminal, what: str) -> None:
    (await terminal.run(what, "list", "--merchant", "nobody")).assert_refused("there is no merchant nobody")


@pytest.mark.parametrize("arguments", [["verify"], ["migrate"], ["shop", "list"], ["balance", "show", "a", "b"]])
async def test_a_database_out_of_reach_is_exit_code_3(arguments: list[str]) -> None:
    nobody = Terminal(environment("postgresql://payouts:hunter2@127.0.0.1:1/payouts"))

    ended = await nobody.run(*arguments)

    ended.assert_refused("cannot be reached", code=3)
    assert "hunter2" not in ended.err


async def test_a_login_that_is_not_let_in_is_exit_code_3(database_url: str) -> None:
    wrong = make_url(database_url).set(password="wrong").render_as_string(hide_password=False)

    (await Terminal(environment(wrong)).run("shop", "list")).assert_refused("password", code=3)


@pytest.mark.parametrize("url", ["nonsense", "postgresql://host:port/payouts"])
async def test_a_url_that_is_none_is_refused_and_not_repeated(url: str) -> None:
    ended = await Terminal({"DATABASE_URL": url}).run("shop", "list")

    ended.assert_refused("DATABASE_URL is not the URL of a database")
    assert url not in ended.err


async def test_settings_that_make_no_sense_are_refused_by_name(database_url: str) -> None:
    ended = await Terminal(environment(database_url, PAYOUTS_TYPO="1")).run("shop", "list")

    ended.assert_refused("PAYOUTS_TYPO")


async def test_only_what_seals_needs_the_keys(database_url: str, floor: Desk) -> None:
    merchant = await floor.merchant()
    keyless = Terminal({"DATABASE_URL": database_url})

    (await keyless.run("balance", "show", merchant.code, "shop-001")).assert_shown("1000000.00")
    (await keyless.run("key", "add", merchant.code)).assert_refused("PAYOUTS_MASTER_KEYS", "PAYOUTS_CONTENT_KEY")


async def test_without_a_database_url_it_is_the_stack_on_this_machine(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.cli.connect.FOLDER", tmp_path)
    bare = Terminal({})
    (await bare.run("shop", "list")).assert_refused("DATABASE_URL is not set", "make run")
    remember_demo(tmp_path, database_url)

    (await bare.run("merchant", "add", "acme", "--name", "Acme")).assert_shown("acme")
    (await bare.run("key", "add", "acme")).assert_shown("sk_")
    (await bare.run("verify")).assert_shown("holds")


async def test_an_empty_database_is_told_to_migrate_and_migrating_twice_changes_nothing(server: Server) -> None:
    name = f"test_{uuid4().hex}"
    owner = make_url(server.login_url).username
    await server.run(f'CREATE DATABASE {name} OWNER "{owner}"')
    terminal = Terminal(environment(server.url(name)))
    try:
        (await terminal.run("shop", "list")).assert_refused("payouts migrate")
        (await terminal.run("migrate")).assert_shown(newest_revision())
        assert (await terminal.run("migrate", "--json")).document == {"revision": newest_revision()}
        assert (await terminal.run("shop", "list", "--json")).document == {"shops": []}
    finally:
        await server.run(f"DROP DATABASE {name} WITH (FORCE)")


def test_the_console_script_ends_with_the_exit_code(database_url: str) -> None:
    script = [sys.executable, "-c", "from ops.cli import main; main()"]
    start = partial(subprocess.run, capture_output=True, text=True, env=os.environ | environment(database_url))

    listed = start([*script, "shop", "list", "--json"])
    refused = start([*script, "key", "revoke", "pk_of_nobody"])

    assert (listed.returncode, json.loads(listed.stdout), listed.stderr) == (0, {"shops": []}, "")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "payouts: there is no key pk_of_nobody\n"


async def test_what_was_done_though_nobody_could_read_it_is_not_denied(database_url: str, floor: Desk) -> None:
    merchant = await floor.merchant(funds=None)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as nobody_reads:
        ended = await asyncio.to_thread(
            subprocess.run,
            [
                *(sys.executable, "-c", "from ops.cli import main; main()"),
                *("balance", "topup", merchant.code, "shop-001", "1", "--reason", "x", *AS_ALICE),
            ],
            stdout=nobody_reads,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment(database_url),
        )

    assert (ended.returncode, ended.stderr.count("\n")) == (3, 1), ended.stderr
    assert "look before you repeat it" in ended.stderr
    assert len(await fetch(floor.owner, "SELECT seq FROM entries")) == 1


async def test_nothing_is_done_where_nobody_can_be_told(database_url: str, floor: Desk) -> None:
    merchant = await floor.merchant(funds=None)
    arguments = f"balance topup {merchant.code} shop-001 1 --reason x --actor alice"
    ended = await asyncio.to_thread(
        subprocess.run,
        ["sh", "-c", f'exec "{sys.executable}" -c "from ops.cli import main; main()" {arguments} >&-'],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment(database_url),
    )
    assert (ended.returncode, ended.stderr) == (2, "payouts: the output is closed; nothing was done\n")
    assert await fetch(floor.owner, "SELECT seq FROM entries") == []


# Merchants, shops, keys


async def test_a_merchant_is_brought_in_once(terminal: Terminal, floor: Desk) -> None:
    (await terminal.run("merchant", "add", "acme", "--name", "Acme Ltd", *AS_ALICE)).assert_shown("acme", "Acme Ltd")

    assert await audited(floor, "merchant.add") == ("alice", "acme", None)
    (await terminal.run("merchant", "add", "acme", "--name", "Another")).assert_refused("exists already")
    (await terminal.run("merchant", "add", "Not a code", "--name", "x")).assert_refused()
    second = await terminal.run("merchant", "add", "globex", "--name", "Globex", "--json")
    assert second.document == {"code": "globex", "name": "Globex"}


async def test_whoever_became_root_by_sudo_is_the_actor(database_url: str, floor: Desk) -> None:
    carol = Terminal({**environment(database_url), "SUDO_USER": "carol"})

    (await carol.run("merchant", "add", "acme", "--name", "Acme")).assert_shown()

    assert await audited(floor, "merchant.add") == ("carol", "acme", None)


async def test_a_shop_shows_its_webhook_secret_once(terminal: Terminal, floor: Desk, acme: str) -> None:
    options = ("--currency", "BDT", "--rail", "sandbox", "--default", "--webhook-url", URL, *AS_ALICE)
    shown = await terminal.run("shop", "add", acme, "dhaka", *options)
    told = (
        await terminal.run("shop", "add", acme, "tokyo", "--currency", "JPY", "--rail", "sandbox", "--json")
    ).document

    shown.assert_shown("dhaka", "BDT", "not shown again")
    secret = next(line.split()[1] for line in shown.out.splitlines() if line.startswith("webhook_secret"))
    assert secret.startswith("whsec_")
    assert told.pop("webhook_secret").startswith("whsec_")
    assert told == {
        "merchant": "acme",
        "code": "tokyo",
        "currency": "JPY",
        "rail": "sandbox",
        "is_default": False,
        "webhook_url": None,
    }
    assert shown.out.count(secret) == 1
    assert secret not in (await terminal.run("shop", "list", "--json")).out
    await assert_nowhere_in_the_clear(floor, secret)
    actions = await fetch(floor.owner, "SELECT actor, subject FROM audit WHERE action = 'shop.add' ORDER BY id")
    assert tuple(actions[0]) == ("alice", "acme/dhaka")


async def test_shops_are_listed_of_all_merchants_or_of_one(terminal: Terminal, floor: Desk, shop: str) -> None:
    other = await floor.merchant()

    (await terminal.run("shop", "list")).assert_shown("acme", shop, "sandbox", other.code)
    listed = (await terminal.run("shop", "list", "--merchant", "acme", "--json")).document["shops"]
    assert [(row["merchant"], row["code"], row["currency"], row["is_default"]) for row in listed] == [
        ("acme", "dhaka", "BDT", True)
    ]


async def test_a_shop_becomes_an_exception_from_where_callbacks_may_go_and_stops_being_one(
    terminal: Terminal, floor: Desk, shop: str
) -> None:
    async def exceptions() -> tuple[bool, list[int] | None]:
        row = await floor.one("SELECT callback_http, callback_ports FROM shops WHERE code = :code", code=shop)
        return row.callback_http, row.callback_ports

    command = ("shop", "callbacks", f"acme/{shop}", "--reason", "a till of 2009", *AS_ALICE)
    assert await exceptions() == (False, None)
    shown = await terminal.run(*command, "--http", "--ports", "9000,8080,9000", "--json")
    assert shown.document == {"shop": f"acme/{shop}", "http": True, "ports": [8080, 9000]}
    assert await exceptions() == (True, [8080, 9000])
    assert await audited(floor, "shop.callbacks") == ("alice", f"acme/{shop}", "a till of 2009")
    (listed,) = (await terminal.run("shop", "list", "--merchant", "acme", "--json")).document["shops"]
    assert (listed["callback_http"], listed["callback_ports"]) == (True, [8080, 9000])

    (await terminal.run(*command, "--no-http")).assert_shown("http", "no")
    assert await exceptions() == (False, [8080, 9000])
    (await terminal.run(*command, "--ports", "default")).assert_shown("default")
    assert await exceptions() == (False, None)
    details = await fetch(floor.owner, "SELECT detail FROM audit WHERE action = 'shop.callbacks' ORDER BY id")
    assert [row.detail for row in details] == [
        {"http": True, "ports": [8080, 9000]},
        {"http": False},
        {"ports": "default"},
    ]

    (await terminal.run(*command)).assert_refused("nothing was said")
    for ports in ("0", "65536", "x", "", "80;443", "1_0", "\u0664\u0664\u0663"):
        assert (await terminal.run(*command, "--ports", ports)).code == 2
    other = ("shop", "callbacks", "acme/other", "--http", "--reason", "none")
    (await terminal.run(*other)).assert_refused("no shop other")
    assert await exceptions() == (False, None)


async def test_a_shop_carries_the_schema_of_a_file(terminal: Terminal, floor: Desk, acme: str, tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["bank"], "properties": {"bank": {"type": "string"}}}
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))

    added = await terminal.run(
        *("shop", "add", acme, "dhaka", "--currency", "BDT", "--rail", "sandbox", "--payment-data-schema", file)
    )

    added.assert_shown("dhaka")
    assert (await floor.one("SELECT payment_data_schema FROM shops")).payment_data_schema == schema


@pytest.mark.parametrize(
    ("content", "word"),
    [("{", "JSON"), ("[]", "object"), ('{"type": "nonsense"}', "not a JSON Schema"), (None, "No such file")],
)
async def test_a_schema_that_is_none_is_refused(
    terminal: Terminal, acme: str, tmp_path: Path, content: str | None, word: str
) -> None:
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_text(content)

    added = await terminal.run(
        *("shop", "add", acme, "dhaka", "--currency", "BDT", "--rail", "sandbox", "--payment-data-schema", file)
    )

    added.assert_refused("--payment-data-schema", word)


@pytest.mark.parametrize(
    ("merchant", "code", "options", "words"),
    [
        ("nobody", "b", ("--currency", "BDT"), ["no merchant nobody"]),
        ("acme", "dhaka", ("--currency", "BDT"), ["of that code already"]),
        ("acme", "b", ("--currency", "BDT", "--default"), ["default shop already"]),
        ("acme", "b", ("--currency", "XXX"), ["XXX"]),
        ("acme", "b c", ("--currency", "BDT"), []),
        ("acme", "b", ("--currency", "BDT", "--webhook-url", "ftp://example.com"), ["--webhook-url"]),
        ("acme", "b", ("--currency", "BDT", "--webhook-url", "https://user:pw@example.com"), ["--webhook-url"]),
    ],
)
async def test_a_shop_that_cannot_be_is_refused(
    terminal: Terminal, shop: str, merchant: str, code: str, options: tuple[str, ...], words: list[str]
) -> None:
    (await terminal.run("shop", "add", merchant, code, "--rail", "sandbox", *options)).assert_refused(*words)


async def test_a_key_shows_its_secret_once_and_is_limited_as_asked(terminal: Terminal, floor: Desk, shop: str) -> None:
    limits = ("--shop", shop, "--scope", "payouts:read", "--scope", "balance:read", "--v1-only")
    origin = ("--network", "10.0.0.0/8", "--network", "2001:db8::1", "--expires", "2999-01-01")
    shown = await terminal.run("key", "add", "acme", *limits, *origin, *AS_ALICE)

    shown.assert_shown("payouts:read, balance:read", "10.0.0.0/8", "not shown again")
    words = dict(line.split(maxsplit=1) for line in shown.out.splitlines())
    public_id, secret = words["public_id"], words["secret"]
    assert shown.out.count(secret) == 1
    key = (await in_transaction(floor.owner, partial(find_api_keys, public_ids=[public_id])))[public_id]
    assert key.scopes == {"payouts:read", "balance:read"}
    assert key.allowed_networks == ("10.0.0.0/8", "2001:db8::1/128")
    assert key.expires_at == datetime(2999, 1, 1, tzinfo=UTC)
    assert (key.v1_only, len(key.shop_ids)) == (True, 1)
    sealed = partial(floor.settings.keyring.open, owner=key.merchant_id, row=key.id, purpose=API_KEY_PURPOSE)
    assert sealed(key.secret_sealed).decode() == secret
    await assert_nowhere_in_the_clear(floor, secret)
    assert await audited(floor, "key.add") == ("alice", public_id, None)


async def test_a_key_without_limits_may_everything_everywhere(terminal: Terminal, shop: str) -> None:
    issued = (await terminal.run("key", "add", "acme", "--json")).document

    assert issued.pop("public_id").startswith("pk_")
    assert issued.pop("secret").startswith("sk_")
    assert issued == {
        "merchant": "acme",
        "shops": [],
        "scopes": ["payouts:write", "payouts:read", "payins:write", "payins:read", "balance:read"],
        "networks": [],
        "expires_at": None,
        "v1_only": False,
    }
    (await terminal.run("key", "add", "nobody")).assert_refused("no merchant nobody")
    (await terminal.run("key", "add", "acme", "--shop", "other")).assert_refused("no shop other")


async def test_keys_are_listed_without_secrets_and_revoked_for_good(terminal: Terminal, floor: Desk, acme: str) -> None:
    first, second = [(await terminal.run("key", "add", acme, "--json")).document for _ in range(2)]

    shown = await terminal.run("key", "revoke", first["public_id"], *AS_ALICE)
    told = await terminal.run("key", "revoke", second["public_id"], "--json")

    shown.assert_shown(first["public_id"], "yes")
    assert told.document == {"public_id": second["public_id"], "revoked": True}
    listed = await terminal.run("key", "list", "--json")
    assert [(row["public_id"], row["revoked_at"] is None) for row in listed.document["keys"]] == [
        (first["public_id"], False),
        (second["public_id"], False),
    ]
    assert first["secret"] not in listed.out
    (await terminal.run("key", "list", "--merchant", acme)).assert_shown(first["public_id"], second["public_id"])
    actions = await fetch(floor.owner, "SELECT actor, subject FROM audit WHERE action = 'key.revoke' ORDER BY id")
    assert tuple(actions[0]) == ("alice", first["public_id"])
    (await terminal.run("key", "revoke", "pk_of_nobody")).assert_refused("no key pk_of_nobody")


# Money


async def test_a_top_up_is_an_entry_with_a_reason_and_an_actor(terminal: Terminal, floor: Desk, shop: str) -> None:
    shown = await terminal.run("balance", "topup", "acme", shop, "1000.50", "--reason", "wire 77", *AS_ALICE)
    told = await terminal.run("balance", "topup", "acme", shop, "0.5", "--reason", "wire 78", *AS_ALICE, "--json")

    shown.assert_shown("1000.50", "wire 77")
    assert told.document == {"merchant": "acme", "shop": shop, "credited": "0.5", "reason": "wire 78"}
    entries = await fetch(
        floor.owner,
        "SELECT e.kind, e.amount_minor, a.actor, a.reason, a.subject FROM entries e JOIN audit a ON a.id = e.audit_id"
        " ORDER BY e.seq",
    )
    assert [tuple(entry) for entry in entries] == [
        ("adjustment", 100_050, "alice", "wire 77", "acme/dhaka"),
        ("adjustment", 50, "alice", "wire 78", "acme/dhaka"),
    ]


@pytest.mark.parametrize("amount", ["0", "1.234", "1e2", "abc", "1000000000000000.00"])
async def test_an_amount_that_is_none_moves_nothing(terminal: Terminal, floor: Desk, shop: str, amount: str) -> None:
    (await terminal.run("balance", "topup", "acme", shop, amount, "--reason", "x")).assert_refused("amount")

    assert await fetch(floor.owner, "SELECT seq FROM entries") == []


async def test_a_balance_shows_what_is_held(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant(funds="100.00")
    await floor.create(merchant, amount_minor=1500)

    (await terminal.run("balance", "show", merchant.code, "shop-001")).assert_shown("85.00", "15.00", "BDT")
    balance = (await terminal.run("balance", "show", merchant.code, "shop-001", "--json")).document
    assert balance.pop("as_of").endswith("Z")
    assert balance == {
        "merchant": merchant.code,
        "shop": "shop-001",
        "currency": "BDT",
        "available": "85.00",
        "pending": "15.00",
        "credit": "0.00",
        "total": "100.00",
    }
    (await terminal.run("balance", "show", merchant.code, "other")).assert_refused("no shop other")


async def test_an_account_that_somebody_holds_is_left_alone(database_url: str, floor: Desk) -> None:
    merchant = await floor.merchant()
    hasty = Terminal(
        environment(
            database_url,
            PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS="0.05",
            PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS="1",
        )
    )

    async with floor.owner.begin() as holder:
        await holder.exec_driver_sql("SELECT id FROM accounts FOR UPDATE")
        ended = await hasty.run("balance", "topup", merchant.code, "shop-001", "1", "--reason", "x")

    ended.assert_refused("locked by somebody else")


async def test_a_command_outwaits_a_process_that_stands_still_in_a_transaction(database_url: str, floor: Desk) -> None:
    merchant = await floor.merchant()
    hasty = Terminal(
        environment(
            database_url, PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS="0.5", PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS="5"
        )
    )
    still = await asyncpg.connect(database_url)
    try:
        # As sessions of ours are set up, whose process may be stopped.
        await still.execute("SET idle_in_transaction_session_timeout = '3s'")
        await still.execute("BEGIN")
        await still.execute("SELECT id FROM accounts FOR UPDATE")
        ended = await hasty.run("balance", "topup", merchant.code, "shop-001", "1", "--reason", "x")
    finally:
        still.terminate()

    ended.assert_shown()


async def test_a_top_up_whose_answer_is_lost_is_done_at_most_once(database_url: str, floor: Desk) -> None:
    merchant = await floor.merchant(funds=None)
    async with proxy(database_url) as network:
        network.fail_commits(CommitFault.LOSE_ANSWER)

        ended = await Terminal(environment(network.url)).run(
            *("balance", "topup", merchant.code, "shop-001", "100", "--reason", "wire 77")
        )

    ended.assert_refused("look before you repeat", code=3)
    assert len(await fetch(floor.owner, "SELECT seq FROM entries")) == 1


# Payouts and callbacks


async def deliver(floor: Desk, *, http_status: int, response: bytes = b"") -> None:
    """One attempt at every callback, with the same answer from every merchant; what waits is due at once."""
    await pass_callback_time(floor.owner)
    token = uuid4()
    claimed = await in_transaction(floor.worker, lambda tx: take_callbacks(tx, token, 100))
    assert claimed
    attempt = Attempt(
        http_status=http_status,
        error=None if http_status < 300 else "http_5xx",
        duration_ms=0,
        response_excerpt=response,
        address="127.0.0.1",
        retry_after_seconds=0.0,
    )
    ended = [EndedCallback(callback, token, attempt, monotonic(), 0.0) for callback in claimed]
    await in_transaction(floor.worker, lambda tx: record_attempts(tx, ended, now=monotonic()))


async def event_of(floor: Desk, payout_id: UUID) -> str:
    """The id of a payout's only event, as callbacks carry it."""
    return render_id(EVENT, (await floor.one("SELECT id FROM events WHERE payout_id = :id", id=payout_id)).id)


async def test_the_story_of_a_payout_is_told_in_order_of_time(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant(funds="100.00")
    payout_id = await floor.create(merchant, external_id="PAY-7", callback_url=URL, recipient=RECIPIENT)
    await floor.settle()
    await deliver(floor, http_status=503, response=b"down\x1b[2J for repairs")
    event = await event_of(floor, payout_id)
    (await terminal.run("callbacks", "resend", event, "--reason", "they are back", *AS_ALICE)).assert_shown(event)
    await deliver(floor, http_status=204)

    shown = await terminal.run("payout", "show", "PAY-7")
    told = await terminal.run("payout", "show", render_id(PAYOUT, payout_id), "--json")

    payout, story = told.document["payout"], told.document["story"]
    assert (payout["external_id"], payout["status"], payout["amount"]) == ("PAY-7", "success", "10.00")
    assert payout["recipient"] == "*******5432"
    assert [moment["what"] for moment in story] == [
        *("payout", "entry"),
        *("attempt", "attempt", "payout", "entry", "event", "callback"),
        *("delivery", "operator", "delivery", "callback"),
    ]
    assert [moment["at"] for moment in story] == sorted(moment["at"] for moment in story)
    assert [m["kind"] for m in story if m["what"] == "entry"] == ["hold", "capture"]
    assert [m.get("outcome") for m in story if m["what"] == "attempt"] == [None, "paid"]
    assert [m["http_status"] for m in story if m["what"] == "delivery"] == [503, 204]
    assert [(m["actor"], m["reason"]) for m in story if m["what"] == "operator"] == [("alice", "they are back")]
    assert story[-1]["state"] == "delivered"
    shown.assert_shown(
        "PAY-7", "success", "*******5432", "kind hold", "outcome paid", "http_status 503", "they are back"
    )
    assert "\x1b" not in shown.out
    assert RECIPIENT not in shown.out + told.out


async def test_the_story_tells_what_the_rail_said_and_what_spoke_against_it(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant()
    payout_id = await floor.create(merchant, recipient="01700000301")
    await floor.settle()
    await execute(floor.owner, "UPDATE rail_events SET due_at = now() WHERE applied_at IS NULL")
    await hear(floor.worker)

    story = (await terminal.run("payout", "show", render_id(PAYOUT, payout_id), "--json")).document["story"]

    (word,) = [moment for moment in story if moment["what"] == "word"]
    (discrepancy,) = [moment for moment in story if moment["what"] == "discrepancy"]
    assert (word["outcome"], word["amount"], word["effect"]) == ("paid", "10.00", "discrepancy")
    assert (discrepancy["kind"], discrepancy["word"], discrepancy["against"]) == ("status", "paid", "failed")


async def test_the_story_of_an_unfinished_payout_says_what_is_next(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant()
    payout_id = await floor.create(merchant, recipient="0171230200")
    await floor.settle(floor.settler(rail_timeout_seconds=1.0))

    payout = (await terminal.run("payout", "show", payout_id, "--json")).document["payout"]

    assert (payout["status"], payout["stage"], payout["rail"], payout["leased"]) == (
        *("pending", "verifying", "sandbox", False),
    )
    assert payout["due_at"] > payout["created_at"]


async def test_the_story_of_a_payin_tells_its_money_and_what_its_rail_said(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant()
    payin_id = await floor.create_payin(merchant, amount_minor=1004, external_id="IN-1", callback_url=URL)
    waiting = (await terminal.run("payin", "show", "IN-1", "--json")).document
    assert (waiting["payin"]["status"], waiting["payin"]["look_ups"]) == ("pending", 0)
    await floor.collect()
    await execute(floor.owner, "UPDATE rail_events SET due_at = now()")
    await hear(floor.worker)

    document = (await terminal.run("payin", "show", render_id(PAYIN, payin_id), "--json")).document
    assert (document["payin"]["status"], document["payin"]["due_at"]) == ("refunded", None)
    told = [(item["what"], item.get("state") or item.get("kind") or item.get("type")) for item in document["story"]]
    for expected in (
        *(("payin", "pending"), ("payin", "success"), ("payin", "refunded"), ("entry", "payin")),
        *(("entry", "payin_refund"), ("event", "payin.success"), ("event", "payin.refunded")),
    ):
        assert expected in told
    (await terminal.run("payin", "show", "IN-1")).assert_shown("10.04", "refunded", "payin_refund", URL)
    (await terminal.run("payin", "show", "IN-9")).assert_refused("no payin IN-9")
    (await terminal.run("callbacks", "list")).assert_shown(render_id(PAYIN, payin_id))


async def test_an_external_id_of_several_shops_asks_which(terminal: Terminal, floor: Desk) -> None:
    first, second = [await floor.merchant() for _ in range(2)]
    for merchant in (first, second):
        await floor.create(merchant, external_id="PAY-1")

    asked = await terminal.run("payout", "show", "PAY-1")
    shown = await terminal.run("payout", "show", "PAY-1", "--shop", f"{second.code}/shop-001")

    asked.assert_refused("--shop", f"{first.code}/shop-001", f"{second.code}/shop-001")
    shown.assert_shown("PAY-1", second.code)
    (await terminal.run("payout", "show", "PAY-2")).assert_refused("no payout PAY-2")
    (await terminal.run("payout", "show", "PAY-1", "--shop", "a/b")).assert_refused("no payout PAY-1 in a/b")
    (await terminal.run("payout", "show", render_id(PAYOUT, new_id()))).assert_refused("no payout po_")


async def test_an_external_id_may_look_like_our_own(terminal: Terminal, floor: Desk) -> None:
    external_id = render_id(PAYOUT, new_id())
    await floor.create(await floor.merchant(), external_id=external_id)

    (await terminal.run("payout", "show", external_id)).assert_shown(external_id)


async def test_callbacks_are_listed_by_payout_and_by_state(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant()
    for external_id in ("PAY-1", "PAY-2"):
        await floor.create(merchant, external_id=external_id, callback_url=URL)
        await floor.settle()
        if external_id == "PAY-1":
            await deliver(floor, http_status=200)

    listed = (await terminal.run("callbacks", "list", "--json")).document["callbacks"]
    delivered = (await terminal.run("callbacks", "list", "--state", "delivered", "--json")).document["callbacks"]
    of_second = (await terminal.run("callbacks", "list", "--payout", "PAY-2", "--json")).document["callbacks"]
    newest = (await terminal.run("callbacks", "list", "--limit", 1, "--json")).document["callbacks"]

    assert [(row["type"], row["state"], row["attempts"]) for row in listed] == [
        ("payout.success", "pending", 0),
        ("payout.success", "delivered", 1),
    ]
    assert delivered == listed[1:]
    assert of_second == newest == listed[:1]
    (await terminal.run("callbacks", "list")).assert_shown(listed[0]["event"], "delivered", URL)
    (await terminal.run("callbacks", "list", "--payout", "PAY-3")).assert_refused("no payout PAY-3")


async def test_a_callback_is_sent_again_with_a_reason_and_an_actor(terminal: Terminal, floor: Desk) -> None:
    payout_id = await floor.create(await floor.merchant(), callback_url=URL)
    await floor.settle()
    await deliver(floor, http_status=200)
    event = await event_of(floor, payout_id)

    told = await terminal.run("callbacks", "resend", event, "--reason", "asked by phone", *AS_ALICE, "--json")

    assert told.document == {"event": event, "state": "pending"}
    assert await audited(floor, "callback.resend") == ("alice", event, "asked by phone")
    await deliver(floor, http_status=200)
    numbers = await fetch(floor.owner, "SELECT attempt_no FROM callback_attempts ORDER BY attempt_no")
    assert [row.attempt_no for row in numbers] == [1, 2]
    (await terminal.run("verify")).assert_shown("holds")


async def test_a_callback_that_cannot_be_sent_again_says_why(terminal: Terminal, floor: Desk) -> None:
    merchant = await floor.merchant()
    uncalled, called = [await floor.create(merchant, callback_url=url) for url in (None, URL)]
    await floor.settle()
    again = ("--reason", "x")
    await in_transaction(floor.worker, lambda tx: take_callbacks(tx, uuid4(), 1))

    for event, words in (
        (await event_of(floor, called), "under way"),
        (await event_of(floor, uncalled), "nobody asked"),
        (render_id(EVENT, new_id()), "no event"),
    ):
        (await terminal.run("callbacks", "resend", event, *again)).assert_refused(words)

    assert await fetch(floor.owner, "SELECT id FROM audit WHERE action = 'callback.resend'") == []


# The ledger as a whole


async def test_verify_names_every_rule_and_is_silent_when_all_hold(terminal: Terminal, floor: Desk) -> None:
    await floor.create(await floor.merchant())
    await floor.settle()

    (await terminal.run("verify")).assert_shown(*(rule.guards for rule in RULES))
    report = (await terminal.run("verify", "--json")).document
    assert report["holds"] is True
    assert [(rule["name"], rule["count"]) for rule in report["rules"]] == [(rule.name, 0) for rule in RULES]


async def test_verify_names_the_offender_when_a_row_was_tampered_with(terminal: Terminal, floor: Desk) -> None:
    payout_id = await floor.create(await floor.merchant())
    async with floor.owner.begin() as tx:
        for statement in ("DISABLE TRIGGER USER", "ENABLE TRIGGER USER"):
            await tx.exec_driver_sql(f"ALTER TABLE payouts {statement}")
            if statement.startswith("DISABLE"):
                await tx.exec_driver_sql("UPDATE payouts SET amount_minor = amount_minor + 1")

    shown = await terminal.run("verify")
    told = await terminal.run("verify", "--json")

    assert (shown.code, told.code) == (1, 1)
    assert str(payout_id) in shown.out
    assert shown.err.count("\n") == 1
    assert "payout_has_its_hold" in shown.err
    report = json.loads(told.out)
    assert report["holds"] is False
    (broken,) = [rule for rule in report["rules"] if rule["name"] == "payout_has_its_hold"]
    assert (broken["count"], broken["offenders"]) == (1, [str(payout_id)])
    (await terminal.run("payout", "show", broken["offenders"][0])).assert_shown("10.01")


async def test_verify_needs_no_more_than_to_read(database_url: str, server: Server) -> None:
    login = f"reader_{uuid4().hex}"
    await server.run(f"CREATE ROLE {login} LOGIN PASSWORD 'reader' IN ROLE payouts_readonly")
    reader = Terminal(
        {"DATABASE_URL": make_url(database_url).set(username=login, password="reader").render_as_string(False)}
    )
    try:
        (await reader.run("verify")).assert_shown("holds")
        (await reader.run("merchant", "add", "acme", "--name", "x")).assert_refused("payouts_ops")
    finally:
        await server.run(f"DROP ROLE {login}")


# Signing


def remember_demo(folder: Path, database_url: str) -> Demo:
    """What the stack on this machine leaves in its folder."""
    find_or_make_keys(folder)
    demo = Demo(
        base_url="http://127.0.0.1:8080",
        api_key="pk_demo",
        api_secret="sk_demo",
        webhook_secret="whsec_demo",
        shop_code="demo-shop",
        currency="BDT",
        receiver_url="http://127.0.0.1:9",
        database_url=database_url,
        amqp_url=None,
    )
    save_demo(folder, demo)
    return demo


def words_after(curl: str, option: str) -> list[str]:
    """The words that follow an option in a command."""
    words = shlex.split(curl)
    return [words[place + 1] for place, word in enumerate(words) if word == option]


async def test_a_signed_request_can_be_pasted() -> None:
    body = '{"external_id":"PAY-1","note":"it\'s\té"}'
    signer = Terminal({"API_SECRET": "sk_1"})

    base_url = "http://127.0.0.1:8080"
    asked = ("sign", "post", "/api/v1/payouts", "--body", body, "--key", "pk_1", "--base-url", base_url, "--json")
    signed = (await signer.run(*asked)).document

    headers = signed["headers"]
    expected = sign_v1("sk_1", headers["X-Timestamp"], "POST", "/api/v1/payouts", "", body.encode())
    assert (headers["X-API-Key"], headers["X-Signature"]) == ("pk_1", expected)
    assert headers["Content-Type"] == "application/json"
    assert signed["url"] == "http://127.0.0.1:8080/api/v1/payouts"
    assert words_after(signed["curl"], "-H") == [f"{name}: {value}" for name, value in headers.items()]
    assert words_after(signed["curl"], "--data-raw") == [body]
    assert words_after(signed["curl"], "-X") == ["POST"]


async def test_a_signature_covers_the_query_and_the_bytes_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "body file.json"
    file.write_bytes(b'{\n "a": 1\r\n}\n')
    signer = Terminal({"API_SECRET": "sk_1"})
    target = "/api/v1/payouts?b=2&a=%2F"

    shown = await signer.run(
        *("sign", "POST", target, "--body-file", file, "--key", "pk_1", "--base-url", "https://pay.example/")
    )

    shown.assert_shown("X-API-Key", "pk_1")
    headers = dict(line.split(": ") for line in shown.out.splitlines()[:4])
    expected = sign_v1("sk_1", headers["X-Timestamp"], "POST", "/api/v1/payouts", "b=2&a=%2F", file.read_bytes())
    assert headers["X-Signature"] == expected
    curl = shown.out.splitlines()[-1]
    assert words_after(curl, "--data-binary") == [f"@{file}"]
    assert words_after(curl, "POST") == [f"https://pay.example{target}"]


async def test_a_secret_is_asked_for_and_never_repeated() -> None:
    ended = await Terminal({}).run("sign", "GET", "/api/v1/balance", "--key", "pk_1", typed="sk_typed\n")

    headers = dict(line.split(": ") for line in ended.out.splitlines()[:3])
    expected = sign_v1("sk_typed", headers["X-Timestamp"], "GET", "/api/v1/balance", "", b"")
    assert (ended.code, headers["X-Signature"]) == (0, expected)
    assert "sk_typed" not in ended.out + ended.err
    gone = await Terminal({}).run("sign", "GET", "/api/v1/balance", "--key", "pk_1")
    assert (gone.code, gone.out) == (2, "")


async def test_without_a_key_the_demo_merchant_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.cli.sign.FOLDER", tmp_path)
    signer = Terminal({})
    (await signer.run("sign", "GET", "/api/v1/balance")).assert_refused("--key")
    demo = replace(remember_demo(tmp_path, "postgresql://unused"), base_url="http://127.0.0.1:9000")
    save_demo(tmp_path, demo)

    signed = (await signer.run("sign", "GET", "/api/v1/balance", "--json")).document

    headers = signed["headers"]
    assert headers["X-API-Key"] == demo.api_key
    assert headers["X-Signature"] == sign_v1(demo.api_secret, headers["X-Timestamp"], "GET", "/api/v1/balance", "", b"")
    assert signed["url"] == "http://127.0.0.1:9000/api/v1/balance"
    assert demo.api_secret not in json.dumps(signed)


async def test_a_body_comes_from_one_place(tmp_path: Path) -> None:
    file = tmp_path / "body"
    file.touch()

    ended = await Terminal({"API_SECRET": "s"}).run(
        "sign", "POST", "/a", "--key", "k", "--body", "{}", "--body-file", file
    )

    ended.assert_refused("not both")


# Discrepancies


async def test_a_discrepancy_is_listed_and_closed_by_somebody_who_says_why(terminal: Terminal, floor: Desk) -> None:
    event = NewRailEvent("sandbox", "e-1", "nobody", "paid", amount_minor=1000, currency="BDT")
    await in_transaction(floor.worker, lambda tx: append_rail_events(tx, [event]))
    await hear(floor.worker)

    (listed,) = (await terminal.run("discrepancies", "list", "--json")).document["discrepancies"]
    assert (listed["kind"], listed["word"], listed["reference"], listed["payout"]) == (
        "reference",
        "paid",
        "nobody",
        None,
    )
    closed = await terminal.run("discrepancies", "close", listed["id"], "--reason", "a test of the bank", *AS_ALICE)

    closed.assert_shown("closed")
    assert await audited(floor, "discrepancy.close") == ("alice", listed["id"], "a test of the bank")
    (await terminal.run("discrepancies", "list")).assert_shown("none")
    (await terminal.run("discrepancies", "list", "--all")).assert_shown("nobody")
    again = await terminal.run("discrepancies", "close", listed["id"], "--reason", "again", *AS_ALICE)
    again.assert_refused("is open")
    assert await floor.count("audit", "action = 'discrepancy.close'") == 1
    (await terminal.run("discrepancies", "close", "x", "--reason", "x")).assert_refused("not the id")
