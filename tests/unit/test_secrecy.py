"""Which secrets somebody could know, and on which ways somebody could listen."""

import base64
import hashlib
import secrets
from pathlib import Path

import pytest
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.engine import make_url

from common.db.engine import driver_url
from common.secrecy import (
    has_guessable_password,
    is_guessable_key,
    is_guessable_password,
    is_safe_way_to_broker,
    is_safe_way_to_database,
)

GOOD = "kJ3-xW9_pQ7.tR5~mN1z"
RANDOM = hashlib.sha256(b"as good as random").digest()


@pytest.mark.parametrize(
    "key",
    [
        bytes(32),
        bytes(range(32)),
        bytes(range(0, 96, 3)),
        b"change-me-change-me-change-me-32",
        b"0123456789abcdef0123456789abcdef",
        RANDOM[:8] * 4,
        RANDOM[:14] + bytes(18),
    ],
)
def test_keys_of_examples_are_guessable(key: bytes) -> None:
    assert len(key) == 32
    assert is_guessable_key(key)


def test_random_keys_are_not() -> None:
    assert not any(is_guessable_key(secrets.token_bytes(32)) for _ in range(10_000))


@pytest.mark.parametrize("password", ["", "guest", "payouts", "x" * 15, "change-me-change-me", "The-Example-Of-A-Page"])
def test_short_passwords_and_those_of_examples_are_guessable(password: str) -> None:
    assert is_guessable_password(password)
    assert has_guessable_password(f"postgresql://payouts:{password}@db/payouts")
    assert has_guessable_password(f"amqps://payouts:{password}@mq/payouts")


def test_long_ones_are_not_and_an_url_without_a_password_has_none() -> None:
    assert not is_guessable_password(GOOD)
    for url in (f"postgresql://u:{GOOD}@db/p", f"amqps://u:{GOOD}@mq/p", "postgresql://u@db/p", "amqps://mq/p"):
        assert not has_guessable_password(url)


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("postgresql:///payouts", True),
        ("postgresql://u@localhost/payouts", True),
        ("postgres://u@127.0.0.1:5432/payouts", True),
        ("postgresql+asyncpg://u@[::1]:5432/payouts", True),
        ("postgresql://u@/payouts?host=/run/postgresql", True),
        ("postgresql://u@/payouts?host=127.0.0.1:5432&host=[::1]:5433&host=::1", True),
        ("postgresql://u@/payouts?host=127.0.0.1:5432&host=db-2:5432", False),
        ("postgresql://u@localhost/payouts?host=db:5432", False),
        ("postgresql://u@localhost.example/payouts", False),
        ("postgresql://u@10.0.0.7/payouts", False),
        *((f"postgresql://u@db/payouts?sslmode={mode}", False) for mode in ("disable", "allow", "prefer", "require")),
        ("postgresql://u@db/payouts?ssl=require", False),
        ("postgresql://u@db/payouts?sslrootcert=/ca.pem", False),
        ("postgresql://u@db/payouts?sslmode=verify-ca", True),
        ("postgresql://u@db/payouts?sslmode=verify-full&sslrootcert=/ca.pem", True),
        ("postgresql://u@/payouts?host=db-1:5432&host=db-2:5432&ssl=verify-full", True),
    ],
)
def test_the_way_to_a_database_is_safe_on_this_machine_or_verified(url: str, safe: bool) -> None:
    assert is_safe_way_to_database(url) is safe


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("amqp://u@localhost/", True),
        ("amqp://u@[::1]:5672/", True),
        ("amqp://u@mq/", False),
        ("amqp://u@10.0.0.7/", False),
        ("amqps://u@mq/", True),
        ("amqps://u@mq/?cafile=/ca.pem", True),
        ("amqps://u@mq/?no_verify_ssl=1", False),
    ],
)
def test_the_way_to_a_broker_is_safe_on_this_machine_or_verified(url: str, safe: bool) -> None:
    assert is_safe_way_to_broker(url) is safe


def test_what_a_database_url_says_of_tls_reaches_the_driver() -> None:
    """SQLAlchemy would hand `sslmode` to asyncpg as an argument that it does not have."""
    url = driver_url(f"postgresql://u:{GOOD}@db/payouts?sslmode=verify-full&sslrootcert=/etc/tls/ca.pem&timeout=3")
    _, arguments = dialect().create_connect_args(make_url(url))  # type: ignore[no-untyped-call]

    assert arguments.pop("dsn") == "postgresql://?sslmode=verify-full&sslrootcert=%2Fetc%2Ftls%2Fca.pem"
    assert arguments == {"host": "db", "database": "payouts", "user": "u", "password": GOOD, "timeout": "3"}
    assert driver_url("postgresql://u@db/payouts?ssl=require") == "postgresql+asyncpg://u@db/payouts?ssl=require"


def test_every_key_that_the_repository_shows_is_guessable() -> None:
    """Whoever copies a key from a test or a page has one that everybody knows."""
    from tests.factories import KEY

    assert is_guessable_key(base64.b64decode(KEY))
    assert "PAYOUTS_MASTER_KEYS=1:" not in (Path(__file__).parents[2] / "README.md").read_text()
