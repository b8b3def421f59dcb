"""A webhook secret is exchanged without a gap: every live one signs what is sent, whenever it was created."""

import asyncio
import hashlib
import hmac
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from standardwebhooks import Webhook, WebhookVerificationError

from common.db.engine import in_transaction
from common.db.webhook_secrets import find_webhook_secrets
from common.sealing import WEBHOOK_SECRET_PURPOSE
from common.webhook_secrets import open_webhook_secrets
from migrations import run
from ops.onboarding import OnboardingRefused, rotate_webhook_secret
from tests.conftest import Server
from tests.endpoint import Endpoint, Received, endpoint
from tests.factories import Merchant, engine, environment, execute, fetch, settings
from tests.flows import Desk, cloned, desk, pass_callback_time
from tests.terminal import Terminal
from worker.callbacks.deliver import Deliverer
from worker.callbacks.send import open_session

REASON = ("--reason", "it may have leaked", "--actor", "alice")


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


async def rotate(terminal: Terminal, merchant: Merchant, *options: str) -> dict[str, Any]:
    """Rotate the secret of the merchant's shop; what is shown."""
    asked = ("shop", "secret", "rotate", f"{merchant.code}/shop-001", *options, *REASON, "--json")
    document: dict[str, Any] = (await terminal.run(*asked)).document
    return document


async def listed(terminal: Terminal, *options: str) -> list[dict[str, Any]]:
    """Webhook secrets as operators see them."""
    secrets: list[dict[str, Any]] = (await terminal.run("shop", "secret", "list", *options, "--json")).document[
        "secrets"
    ]
    return secrets


async def pass_time(floor: Desk, secret_id: str) -> None:
    """To the moment when an older secret ends."""
    statement = "UPDATE webhook_secrets SET not_after = created_at WHERE id = CAST(:id AS uuid)"
    await execute(floor.owner, statement, id=secret_id)


async def deliver(floor: Desk) -> None:
    """Send everything that waits."""
    await pass_callback_time(floor.owner)
    async with open_session(private_allowed=True, ports=frozenset()) as session:
        deliverer = Deliverer(floor.worker, floor.settings.keyring, session, floor.settings)
        while await deliverer.run_round():
            await deliverer.drain(20)


async def tell(floor: Desk, merchant: Merchant) -> None:
    """A payout that came to an end, and the try to tell of it."""
    await floor.create(merchant)
    await floor.settle()
    await deliver(floor)


def signers(request: Received, *secrets: str) -> list[str]:
    """Those of the secrets by which the request verifies, with the standard's own library."""
    headers = {name.lower(): value for name, value in request.headers.items()}

    def verifies(secret: str) -> bool:
        try:
            Webhook(secret).verify(request.body, headers)
        except WebhookVerificationError:
            return False
        return True

    return [secret for secret in secrets if verifies(secret)]


def body_formula(request: Received, secret: str) -> str:
    """`X-Signature` as a client of the older formula computes it."""
    signed = request.headers["X-Timestamp"].encode() + request.body
    return hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


# What is sent


async def test_during_the_grace_both_secrets_verify_and_after_it_only_the_new_one(
    floor: Desk, terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint
) -> None:
    old = merchant.webhook_secret
    new = (await rotate(terminal, merchant))["webhook_secret"]
    await tell(floor, merchant)
    await pass_time(floor, (await listed(terminal))[1]["id"])
    await tell(floor, merchant)

    during, after = server_of_merchant.received
    assert signers(during, new, old) == [new, old]
    assert signers(after, new, old) == [new]
    for request in (during, after):
        assert request.headers["X-Signature"] == body_formula(request, new)
    assert [
        item.count("v1,") for item in (during.headers["webhook-signature"], after.headers["webhook-signature"])
    ] == [
        2,
        1,
    ]


async def test_without_grace_the_old_secret_is_over_at_once(
    floor: Desk, terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint
) -> None:
    first = (await rotate(terminal, merchant, "--grace", "7d"))["webhook_secret"]
    second = (await rotate(terminal, merchant, "--grace", "0"))["webhook_secret"]

    await tell(floor, merchant)

    (request,) = server_of_merchant.received
    assert signers(request, second, first, merchant.webhook_secret) == [second]
    assert [row["state"] for row in await listed(terminal, "--all")] == ["current", "ended", "ended"]


async def test_a_retry_that_was_created_before_a_rotation_is_signed_with_the_secrets_of_now(
    floor: Desk, terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint
) -> None:
    server_of_merchant.answer = "503 Not Now"
    await tell(floor, merchant)
    new = (await rotate(terminal, merchant, "--grace", "0"))["webhook_secret"]
    server_of_merchant.answer = "200 OK"
    await deliver(floor)

    before, after = server_of_merchant.received
    assert (before.body, before.headers["webhook-id"]) == (after.body, after.headers["webhook-id"])
    assert signers(before, new, merchant.webhook_secret) == [merchant.webhook_secret]
    assert signers(after, new, merchant.webhook_secret) == [new]
    assert (await floor.one("SELECT state FROM callbacks")).state == "delivered"


async def test_a_running_worker_follows_a_rotation_with_its_next_claim(
    floor: Desk, terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint
) -> None:
    async with open_session(private_allowed=True, ports=frozenset()) as session:
        deliverer = Deliverer(floor.worker, floor.settings.keyring, session, floor.settings)
        secrets = [merchant.webhook_secret]
        for _ in range(3):
            await floor.create(merchant)
            await floor.settle()
            await deliverer.run_round()
            await deliverer.drain(20)
            assert signers(server_of_merchant.received[-1], *secrets) == [secrets[-1]]
            secrets.append((await rotate(terminal, merchant, "--grace", "0"))["webhook_secret"])


async def test_callbacks_of_several_shops_in_one_claim_are_signed_each_by_its_own(
    floor: Desk, terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint
) -> None:
    other = await floor.merchant(webhook_url=server_of_merchant.url)
    rotated = (await rotate(terminal, other))["webhook_secret"]
    for each in (merchant, other):
        await floor.create(each)
    await floor.settle()
    await deliver(floor)

    keys = (merchant.webhook_secret, rotated, other.webhook_secret)
    found = sorted(signers(request, *keys) for request in server_of_merchant.received)
    assert found == sorted([[merchant.webhook_secret], [rotated, other.webhook_secret]])


# What operators do


async def test_a_rotation_shows_the_secret_once_and_is_written_down(
    floor: Desk, terminal: Terminal, merchant: Merchant
) -> None:
    shop = f"{merchant.code}/shop-001"
    shown = await terminal.run("shop", "secret", "rotate", shop, "--grace", "90m", *REASON)

    shown.assert_shown(shop, "older_until", "not shown again")
    (secret,) = re.findall(r"whsec_\S+", shown.out)
    current, older = await listed(terminal, shop)
    assert (current["state"], current["not_after"], older["state"]) == ("current", None, "ending")
    left = await floor.one("SELECT max(not_after) - now() AS it FROM webhook_secrets")
    assert timedelta(minutes=89) < left.it <= timedelta(minutes=90)
    row = await floor.one("SELECT * FROM audit WHERE action = 'shop.rotate_webhook_secret'")
    assert (row.actor, row.subject, row.reason) == ("alice", shop, "it may have leaked")
    assert row.detail == {"secret_id": current["id"], "grace_seconds": 5400}
    assert secret not in str(await listed(terminal)) + str(row.detail)
    stored = await fetch(floor.owner, "SELECT w::text AS it FROM webhook_secrets w")
    assert not any(secret in each.it or secret.encode().hex() in each.it for each in stored)


async def test_a_fourth_live_secret_is_refused_and_possible_again_when_one_has_gone(
    floor: Desk, terminal: Terminal, merchant: Merchant
) -> None:
    shop = f"{merchant.code}/shop-001"
    for _ in range(2):
        await rotate(terminal, merchant)

    refused = await terminal.run("shop", "secret", "rotate", shop, *REASON)

    refused.assert_refused("three live webhook secrets", "revoke")
    assert await floor.count("audit", "action = 'shop.rotate_webhook_secret'") == 2
    oldest = (await listed(terminal))[-1]["id"]
    (await terminal.run("shop", "secret", "revoke", shop, oldest, *REASON)).assert_shown(oldest, "yes")
    await rotate(terminal, merchant)
    assert [row["state"] for row in await listed(terminal)] == ["current", "ending", "ending"]


async def test_an_older_secret_is_revoked_and_the_current_one_is_not(
    floor: Desk, terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint
) -> None:
    shop = f"{merchant.code}/shop-001"
    new = (await rotate(terminal, merchant))["webhook_secret"]
    current, older = [row["id"] for row in await listed(terminal)]

    for secret_id, words in ((current, "--grace 0"), (str(uuid4()), "has no secret")):
        (await terminal.run("shop", "secret", "revoke", shop, secret_id, *REASON)).assert_refused(words)
    for _ in range(2):
        (await terminal.run("shop", "secret", "revoke", shop, older, *REASON)).assert_shown(older)

    await tell(floor, merchant)
    (request,) = server_of_merchant.received
    assert signers(request, new, merchant.webhook_secret) == [new]
    assert [row["id"] for row in await listed(terminal)] == [current]
    row = (await fetch(floor.owner, "SELECT * FROM audit WHERE action = 'shop.revoke_webhook_secret'"))[0]
    assert (row.actor, row.subject, row.reason) == ("alice", shop, "it may have leaked")
    assert row.detail == {"secret_id": older}


async def test_a_secret_of_another_shop_is_not_revoked(floor: Desk, terminal: Terminal, merchant: Merchant) -> None:
    other = await floor.merchant()
    await rotate(terminal, other)
    older = (await listed(terminal, f"{other.code}/shop-001"))[1]["id"]

    refused = await terminal.run("shop", "secret", "revoke", f"{merchant.code}/shop-001", older, *REASON)

    refused.assert_refused("has no secret")
    assert len(await listed(terminal)) == 3


async def test_who_asks_about_a_shop_that_is_not_there_is_told(terminal: Terminal, merchant: Merchant) -> None:
    nowhere = f"{merchant.code}/nowhere"

    (await terminal.run("shop", "secret", "rotate", nowhere, *REASON)).assert_refused("no shop nowhere")
    (await terminal.run("shop", "secret", "revoke", nowhere, uuid4(), *REASON)).assert_refused("no shop nowhere")
    (await terminal.run("shop", "secret", "list", nowhere)).assert_shown("none")


async def test_of_rotations_at_the_same_time_only_those_count_that_were_shown(
    floor: Desk, merchant: Merchant, database_url: str
) -> None:
    ops = engine(database_url, role="payouts_ops")

    async def attempt() -> str | None:
        try:
            issued = await rotate_webhook_secret(
                ops,
                floor.settings.keyring,
                merchant=merchant.code,
                shop="shop-001",
                grace_seconds=3600,
                reason="a test",
                actor="tests",
            )
        except OnboardingRefused:
            return None
        return issued.secret

    shown = [secret for secret in await asyncio.gather(*(attempt() for _ in range(6))) if secret]
    await ops.dispose()

    found = await in_transaction(floor.worker, lambda tx: find_webhook_secrets(tx, [merchant.shop.id]))
    live = open_webhook_secrets(floor.settings.keyring, found[merchant.shop.id])
    assert 1 <= len(shown) <= 2
    assert set(live) == {merchant.webhook_secret, *shown}
    assert await floor.count("audit", "action = 'shop.rotate_webhook_secret'") == len(shown)


# A shop's webhook URL


async def test_a_shop_is_called_elsewhere_from_now_on_and_what_is_told_already_stays_where_it_was(
    floor: Desk, terminal: Terminal, merchant: Merchant, server_of_merchant: Endpoint
) -> None:
    shop, elsewhere = f"{merchant.code}/shop-001", "http://127.0.0.1:1/elsewhere"
    await floor.create(merchant)
    await floor.settle()

    changed = await terminal.run(
        "shop", "webhook", shop, elsewhere, "--reason", "they have moved", "--actor", "alice", "--json"
    )

    assert changed.document == {"shop": shop, "webhook_url": elsewhere}
    await floor.create(merchant)
    await floor.settle()
    urls = await fetch(floor.owner, "SELECT url FROM callbacks ORDER BY event_id")
    assert [row.url for row in urls] == [server_of_merchant.url, elsewhere]
    (await terminal.run("shop", "webhook", shop, "--none", "--reason", "they ask")).assert_shown(shop)
    await floor.create(merchant)
    await floor.settle()
    assert await floor.count("callbacks") == 2
    rows = await fetch(
        floor.owner, "SELECT actor, subject, reason, detail FROM audit WHERE action = 'shop.webhook' ORDER BY id"
    )
    assert (rows[0].actor, rows[0].subject) == ("alice", shop)
    assert [row.reason for row in rows] == ["they have moved", "they ask"]
    assert [row.detail for row in rows] == [{"url": elsewhere}, {"url": None}]


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "http://127.0.0.1/",
        "http://localhost/",
        "https://merchant.example:22/",
        "https://user:password@merchant.example/",
        "ftp://merchant.example/",
        "http://2130706433/",
        "merchant.example",
        "https://merchant.example/" + "x" * 2048,
    ],
)
async def test_a_webhook_url_is_judged_like_a_callback_url(
    database_url: str, floor: Desk, merchant: Merchant, url: str
) -> None:
    strict = Terminal(
        environment(database_url, PAYOUTS_CALLBACK_PRIVATE_ADDRESSES="0", PAYOUTS_CALLBACK_PORTS="80,443")
    )
    shop = f"{merchant.code}/shop-001"

    (await strict.run("shop", "webhook", shop, url, "--reason", "x")).assert_refused("URL")
    allowed = await strict.run("shop", "webhook", shop, "https://merchant.example/hook", "--reason", "x")
    allowed.assert_shown("merchant.example")
    assert await floor.count("audit", "action = 'shop.webhook'") == 1


# The move


async def test_the_secrets_that_shops_had_move_and_still_open(server: Server) -> None:
    """Their seal is bound to owner and row: both were the shop."""
    async with cloned(server, "template0") as url:
        await _migrate(url, before="0011")
        keyring = settings(url).keyring
        shop_ids = [uuid4(), uuid4()]
        owner = engine(url)
        await execute(owner, "INSERT INTO merchants (id, code, name) VALUES (:id, 'old', 'Old')", id=shop_ids[0])
        for number, shop_id in enumerate(shop_ids):
            await execute(
                owner,
                "INSERT INTO shops (id, merchant_id, code, currency, currency_exponent, rail, webhook_secret_sealed,"
                " created_at) VALUES (:id, :merchant, :code, 'BDT', 2, 'sandbox', :sealed, now() - interval '1 year')",
                id=shop_id,
                merchant=shop_ids[0],
                code=f"shop-{number}",
                sealed=keyring.seal(
                    f"whsec_{number}".encode(), owner=shop_id, row=shop_id, purpose=WEBHOOK_SECRET_PURPOSE, now=0.0
                ),
            )
        assert await run.upgrade(url) == run.newest_revision()
        async with desk(url) as moved:
            found = await in_transaction(moved.worker, lambda tx: find_webhook_secrets(tx, shop_ids))
            ages = await fetch(moved.owner, "SELECT not_after, now() - created_at AS age FROM webhook_secrets")
        await owner.dispose()

    assert {shop_id: open_webhook_secrets(keyring, secrets) for shop_id, secrets in found.items()} == {
        shop_id: [f"whsec_{number}"] for number, shop_id in enumerate(shop_ids)
    }
    assert all(row.not_after is None and row.age > timedelta(days=300) for row in ages)


async def _migrate(url: str, *, before: str) -> None:
    """Roles, and the schema as it was before that revision."""
    original = command.upgrade

    def stop_before(config: Config, _head: str) -> None:
        original(config, str(ScriptDirectory.from_config(config).get_revision(before).down_revision))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "upgrade", stop_before)
        await run.upgrade(url)
