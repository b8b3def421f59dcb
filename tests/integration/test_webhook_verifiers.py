"""What merchants verify callbacks with, the standard's own libraries, against requests as a server of theirs got them."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from ops.onboarding import rotate_webhook_secret
from tests.endpoint import Received, endpoint
from tests.factories import Merchant
from tests.flows import Desk, desk
from worker.callbacks.deliver import Deliverer
from worker.callbacks.send import open_session, render_headers

NODE_FOLDER: Final = Path(__file__).parents[1] / "node"
# Less than a test has.
INSTALL_SECONDS: Final = 90
VERIFY_SECONDS: Final = 60

BODIES: Final = {
    "non-ASCII": '{"name":"ঢাকা é 😀"}'.encode(),
    "a line separator": '{"name":"\u2028\u2029"}'.encode(),
    "19,999 bytes": b'{"x":"' + b"x" * 19_991 + b'"}',
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the secret to verify it by."""

    secret: str
    headers: dict[str, str]
    body: bytes


Verifier = Callable[[Sequence[Asked]], list[bool]]


def python(asked: Sequence[Asked]) -> list[bool]:
    """The library of PyPI."""

    def verifies(request: Asked) -> bool:
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            Webhook(request.secret).verify(request.body, headers)
        except (WebhookVerificationError, UnicodeDecodeError):
            return False
        return True

    return [verifies(request) for request in asked]


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library of npm, to the letter of the lock."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"there is no {' and no '.join(missing)} on this machine")
    folder = tmp_path_factory.mktemp("node")
    shutil.copytree(NODE_FOLDER, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
    quiet = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error")
    installed = subprocess.run(
        ["npm", "ci", *quiet], cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS
    )
    assert installed.returncode == 0, installed.stderr
    return folder


def run_node(folder: Path, asked: Sequence[Asked]) -> list[bool]:
    """The library of npm."""
    lines = [
        json.dumps({"secret": item.secret, "headers": item.headers, "body": base64.b64encode(item.body).decode()})
        for item in asked
    ]
    answered = subprocess.run(
        ["node", "verify.mjs"],
        cwd=folder,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=VERIFY_SECONDS,
    )
    assert answered.returncode == 0, answered.stderr
    return [json.loads(line) for line in answered.stdout.splitlines()]


@pytest.fixture(params=["PyPI", "npm"])
def verify(request: pytest.FixtureRequest) -> Verifier:
    """Verifies requests with the library of one language."""
    if request.param == "PyPI":
        return python
    folder: Path = request.getfixturevalue("node_folder")
    return lambda asked: run_node(folder, asked)


@dataclass(frozen=True, slots=True)
class Delivered:
    """A request as a merchant's server got it, the secrets it is signed by, newest first, and one that had ended."""

    request: Received
    secrets: tuple[str, str]
    ended: str

    def asked(self, secret: str) -> Asked:
        """The request, to be verified by that secret."""
        return Asked(secret, self.request.headers, self.request.body)


@pytest.fixture
async def delivered(database_url: str) -> AsyncIterator[Delivered]:
    """A callback that was delivered during a rotation, by a worker, over HTTP."""
    async with desk(database_url) as floor, endpoint() as server_of_merchant:
        merchant = await floor.merchant(webhook_url=server_of_merchant.url)
        older, newest = [await _rotate(floor, merchant, grace_seconds) for grace_seconds in (0, 3600)]
        await floor.create(merchant)
        await floor.settle()
        async with open_session(private_allowed=True, ports=frozenset()) as session:
            deliverer = Deliverer(floor.worker, floor.settings.keyring, session, floor.settings)
            await deliverer.run_round()
            await deliverer.drain(20)
        (request,) = server_of_merchant.received
        yield Delivered(request, (newest, older), merchant.webhook_secret)


async def _rotate(floor: Desk, merchant: Merchant, grace_seconds: int) -> str:
    issued = await rotate_webhook_secret(
        floor.owner,
        floor.settings.keyring,
        merchant=merchant.code,
        shop="shop-001",
        grace_seconds=grace_seconds,
        reason="a test",
        actor="tests",
    )
    return issued.secret


def flips(data: bytes) -> Iterator[bytes]:
    """The data with each of its bits flipped, one at a time."""
    for place in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        yield bytes(flipped)


async def test_each_live_secret_verifies_what_was_delivered_during_a_rotation_and_an_ended_one_does_not(
    delivered: Delivered, verify: Verifier
) -> None:
    asked = [delivered.asked(secret) for secret in (*delivered.secrets, delivered.ended)]
    assert await asyncio.to_thread(verify, asked) == [True, True, False]


@pytest.mark.parametrize("part", ["body", "webhook-id", "webhook-timestamp"])
async def test_a_flipped_bit_is_refused_by_every_live_secret(delivered: Delivered, verify: Verifier, part: str) -> None:
    whole = [delivered.asked(secret) for secret in delivered.secrets]
    if part == "body":
        changed = [Asked(item.secret, item.headers, body) for item in whole for body in flips(item.body)]
    else:
        changed = [
            Asked(item.secret, {**item.headers, part: value.decode("latin-1")}, item.body)
            for item in whole
            for value in flips(item.headers[part].encode())
        ]
    assert len(changed) > 100
    answers = await asyncio.to_thread(verify, [*whole, *changed])
    assert answers == [True, True] + [False] * len(changed)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_bodies_of_every_kind_verify(verify: Verifier, body: bytes) -> None:
    secrets = [f"whsec_{base64.b64encode(bytes([number]) * 32).decode()}" for number in (1, 2, 3)]
    headers = render_headers("evt_01jeb7qh2v5m8c3d6f9g0xktrb", secrets, time.time(), body)
    assert len(body) <= 19_999
    answers = await asyncio.to_thread(verify, [Asked(secret, headers, body) for secret in secrets])
    assert answers == [True, True, True]


def test_the_lock_of_npm_names_versions_and_digests_and_no_registry() -> None:
    text = (NODE_FOLDER / "package-lock.json").read_text()
    packages = [package for name, package in json.loads(text)["packages"].items() if name]
    assert len(packages) == 3
    assert all(package["integrity"].startswith("sha512-") and package["version"] for package in packages)
    assert "://" not in text
    assert "resolved" not in text
