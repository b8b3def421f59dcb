"""What a merchant's server is sent, looked at beforehand, and an event that does nothing but try it."""

import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy.engine import make_url
from standardwebhooks import Webhook

from common.db.tables import metadata
from common.domain.ids import EVENT, new_id, parse_id, render_id
from tests.conftest import Server
from tests.endpoint import Endpoint, endpoint
from tests.factories import Merchant, environment, execute
from tests.flows import Desk, desk
from tests.terminal import Terminal
from worker.callbacks.deliver import Deliverer
from worker.callbacks.send import open_session

METADATA = "http://169.254.169.254/latest/meta-data"
REASON = ("--reason", "a test")
# What differs between two attempts.
OF_ITS_MOMENT = ("webhook-timestamp", "webhook-signature", "X-Timestamp", "X-Signature")


@pytest.fixture
async def floor(database_url: str) -> AsyncIterator[Desk]:
    """A migrated database."""
    async with desk(database_url) as opened:
        yield opened


@pytest.fixture
async def server_of_merchant() -> AsyncIterator[Endpoint]:
    """The merchant's server."""
    async with endpoint() as running:
        yield running


@pytest.fixture
def terminal(database_url: str) -> Terminal:
    """Somebody who has everything in the environment."""
    return Terminal(environment(database_url))


@pytest.fixture
async def merchant(floor: Desk, server_of_merchant: Endpoint) -> Merchant:
    """A merchant whose shop is called at that server."""
    return await floor.merchant(webhook_url=server_of_merchant.url)


async def told(floor: Desk, merchant: Merchant, **fields: Any) -> UUID:
    """An event that is still to be told."""
    await floor.create(merchant, **fields)
    await floor.settle()
    event_id: UUID = (await floor.one("SELECT id FROM events ORDER BY id DESC LIMIT 1")).id
    return event_id


async def rotate(terminal: Terminal, merchant: Merchant) -> str:
    """Give the shop another secret beside the one it has."""
    asked = ("shop", "secret", "rotate", f"{merchant.code}/shop-001", *REASON, "--json")
    return str((await terminal.run(*asked)).document["webhook_secret"])


async def deliver(floor: Desk) -> None:
    """One round, to its end."""
    async with open_session(private_allowed=True, ports=frozenset()) as session:
        deliverer = Deliverer(floor.worker, floor.settings.keyring, session, floor.settings)
        await deliverer.run_round()
        await deliverer.drain(20)


def steady(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Headers in their order, but for those that each attempt has of its own."""
    return [(name, "" if name in OF_ITS_MOMENT else value) for name, value in headers.items()]


async def rows_of_all_tables(floor: Desk) -> dict[str, int]:
    """How many rows there are, by table."""
    return {name: await floor.count(name) for name in sorted(metadata.tables)}


# The preview


async def test_a_preview_is_to_the_byte_what_is_sent(
    floor: Desk, terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint
) -> None:
    new = await rotate(terminal, merchant)
    event_id = await told(floor, merchant)
    event = render_id(EVENT, event_id)

    shown = (await terminal.run("callbacks", "preview", event, "--json")).document
    printed = await terminal.run("callbacks", "preview", str(event_id))
    assert server_of_merchant.received == []
    await deliver(floor)

    (sent,) = server_of_merchant.received
    assert (shown["event"], shown["method"], shown["url"]) == (event, "POST", server_of_merchant.url)
    assert sent.lines[0] == "POST /told?by=us HTTP/1.1"
    assert shown["body"].encode() == sent.body
    assert steady(shown["headers"]) == steady(sent.headers)
    head, _, body = printed.out.partition("\n\n")
    assert body.encode() == sent.body + b"\n"
    line, *lines = head.split("\n")
    assert line == f"POST {server_of_merchant.url}"
    assert steady(dict(item.split(": ", 1) for item in lines)) == steady(sent.headers)
    for secret in (new, merchant.webhook_secret):
        assert Webhook(secret).verify(shown["body"], shown["headers"]) == json.loads(sent.body)
        assert secret not in json.dumps(shown) + printed.out
    assert abs(int(shown["headers"]["webhook-timestamp"]) - time.time()) < 60


async def test_a_preview_is_of_any_callback_whatever_became_of_it_and_stores_nothing(
    floor: Desk, terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint
) -> None:
    event_id = await told(floor, merchant, callback_url="https://merchant.example/told")
    await deliver(floor)
    before = await rows_of_all_tables(floor)

    shown = (await terminal.run("callbacks", "preview", event_id, "--json")).document

    assert (shown["url"], shown["headers"]["Host"]) == ("https://merchant.example/told", "merchant.example")
    assert await rows_of_all_tables(floor) == before


async def test_there_is_no_preview_of_what_nobody_is_told(floor: Desk, terminal: Terminal) -> None:
    uncalled = await told(floor, await floor.merchant())

    (await terminal.run("callbacks", "preview", uncalled)).assert_refused("nobody asked")
    (await terminal.run("callbacks", "preview", new_id())).assert_refused("no event")


async def test_signing_needs_the_keys_and_the_role_that_reads_secrets(
    database_url: str, floor: Desk, merchant: Merchant, server: Server
) -> None:
    event_id = await told(floor, merchant)
    login = f"ops_{uuid4().hex}"
    await server.run(f"CREATE ROLE {login} LOGIN PASSWORD 'ops' IN ROLE payouts_ops")
    url = make_url(database_url).set(username=login, password="ops").render_as_string(False)
    asked = (("callbacks", "preview", event_id), ("callbacks", "test", f"{merchant.code}/shop-001"))
    try:
        for words in asked:
            (await Terminal(environment(url)).run(*words)).assert_refused("payouts_worker")
            (await Terminal({"DATABASE_URL": database_url}).run(*words)).assert_refused("PAYOUTS_MASTER_KEYS")
    finally:
        await server.run(f"DROP ROLE {login}")
    assert await floor.count("audit", "action = 'callback.test'") == 0


async def test_a_secret_that_does_not_open_is_told(floor: Desk, terminal: Terminal, merchant: Merchant) -> None:
    event_id = await told(floor, merchant)
    await execute(floor.owner, "UPDATE webhook_secrets SET sealed = ''")

    (await terminal.run("callbacks", "preview", event_id)).assert_refused("does not open")
    (await terminal.run("callbacks", "test", f"{merchant.code}/shop-001")).assert_refused("does not open")


# The test event


async def test_a_test_event_is_signed_like_others_and_leaves_only_an_audit_line(
    floor: Desk, terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint
) -> None:
    new, shop = await rotate(terminal, merchant), f"{merchant.code}/shop-001"
    before = await rows_of_all_tables(floor)

    ended = (await terminal.run("callbacks", "test", shop, "--actor", "alice", "--json")).document

    (sent,) = server_of_merchant.received
    body = json.loads(sent.body)
    assert sent.body == json.dumps(body, separators=(",", ":")).encode("ascii")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", body.pop("created_at"))
    assert body == {"type": "test.ping", "id": ended["event"], "shop_code": "shop-001"}
    assert sent.headers["webhook-id"] == ended["event"]
    assert parse_id(EVENT, ended["event"]) is not None
    headers = {name.lower(): value for name, value in sent.headers.items()}
    for secret in (new, merchant.webhook_secret):
        Webhook(secret).verify(sent.body, headers)
    assert 0 <= ended.pop("duration_ms") < 60_000
    assert ended == {
        "event": ended["event"],
        "type": "test.ping",
        "url": server_of_merchant.url,
        "status": 200,
        "error": None,
        "excerpt": "ok",
    }
    assert await rows_of_all_tables(floor) == before | {"audit": before["audit"] + 1}
    row = await floor.one("SELECT * FROM audit WHERE action = 'callback.test'")
    assert (row.actor, row.subject) == ("alice", shop)
    assert row.detail == {"event": ended["event"], "url": server_of_merchant.url}


async def test_a_test_event_goes_to_another_url_when_asked(
    terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint
) -> None:
    async with endpoint() as other:
        other.answer = "204 No Content"
        other.content = b""
        shown = await terminal.run("callbacks", "test", f"{merchant.code}/shop-001", "--url", other.url)

        shown.assert_shown(other.url, "204")
        assert len(other.received) == 1
        assert server_of_merchant.received == []


@pytest.mark.parametrize(
    ("answer", "error"), [("500 Broken", "http_5xx"), ("404 Not Found", "http_4xx"), ("302 Found", "redirect")]
)
async def test_an_answer_that_is_no_2xx_is_shown_and_is_exit_code_1(
    terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint, answer: str, error: str
) -> None:
    server_of_merchant.answer = answer
    server_of_merchant.content = b"no\x1b[2J \xff"

    ended = await terminal.run("callbacks", "test", f"{merchant.code}/shop-001")

    assert ended.code == 1
    assert [word for word in (error, answer[:3], "no\ufffd[2J") if word not in ended.out] == []
    assert "\x1b" not in ended.out
    assert error in ended.err
    assert len(server_of_merchant.received) == 1, "no redirect is followed"


@pytest.mark.parametrize("private_allowed", ["0", "1"])
async def test_a_test_event_passes_the_same_guard_as_callbacks(
    database_url: str, floor: Desk, server_of_merchant: Endpoint, private_allowed: str
) -> None:
    """Of the shop's own URL and of one that an operator types, and of a port that is not for callbacks."""
    strict = Terminal(
        environment(database_url, PAYOUTS_CALLBACK_PRIVATE_ADDRESSES=private_allowed, PAYOUTS_CALLBACK_PORTS="80")
    )
    own = await floor.merchant(webhook_url=server_of_merchant.url)
    asked = [("--url", server_of_merchant.url), ()]
    if private_allowed == "0":
        asked += [("--url", METADATA), ("--url", "http://[::ffff:127.0.0.1]/"), ("--url", "http://localhost/")]

    for options in asked:
        ended = await strict.run("callbacks", "test", f"{own.code}/shop-001", *options, "--json")
        assert ended.code == 1
        document = json.loads(ended.out)
        assert (document["status"], document["error"], document["excerpt"]) == (None, "address_blocked", "")
    assert server_of_merchant.received == []
    assert await floor.count("audit", "action = 'callback.test'") == len(asked)


async def test_a_shop_without_a_url_or_none_at_all_is_told(floor: Desk, terminal: Terminal) -> None:
    merchant = await floor.merchant()

    (await terminal.run("callbacks", "test", f"{merchant.code}/shop-001")).assert_refused("no webhook URL", "--url")
    (await terminal.run("callbacks", "test", f"{merchant.code}/nowhere")).assert_refused("no shop nowhere")
    assert await floor.count("audit", "action = 'callback.test'") == 0
