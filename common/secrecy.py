"""Whether a secret is one that somebody could know, and a way one on which somebody could listen or pretend.

Pure rules: `common.settings` refuses by them in production, `payouts doctor` advises by them anywhere.
"""

import re
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from itertools import pairwise
from typing import Final

import sqlalchemy
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from yarl import URL

PASSWORD_CHARACTERS_MIN: Final = 16
# What people write where a password shall stand one day, and what servers are shipped with.
_PLACEHOLDERS: Final = ("change", "example", "guest", "password", "placeholder", "postgres", "secret")
# 32 random bytes have 30 different ones; fewer than this many never happens.
_DIFFERENT_BYTES_MIN: Final = 16

# Source: PostgreSQL, "SSL Support", table "SSL Mode Descriptions": only these know whom they talk to.
_VERIFIED: Final = frozenset({"verify-ca", "verify-full"})

_WITH_PORT: Final = re.compile(r"^\[?([^\[\]]*?)\]?(?<!:):[0-9]*$")


def is_guessable_key(key: bytes) -> bool:
    """Whether bytes that should be random are a text, a row of numbers or a repetition, as in examples."""
    steps = {(after - before) % 256 for before, after in pairwise(key)}
    return len(set(key)) < _DIFFERENT_BYTES_MIN or len(steps) == 1 or all(0x20 <= byte < 0x7F for byte in key)


def is_guessable_password(password: str) -> bool:
    """Whether it is short, or one of an example or of a server as it is shipped."""
    return len(password) < PASSWORD_CHARACTERS_MIN or any(word in password.lower() for word in _PLACEHOLDERS)


def has_guessable_password(url: str) -> bool:
    """Whether the URL of a database or a broker carries such a password; one without a password carries none."""
    password = _database(url).password if url.startswith("postgres") else URL(url).password
    return password is not None and is_guessable_password(str(password))


def is_safe_way_to_broker(url: str) -> bool:
    """Whether nobody can listen or pretend to be the broker: on this machine, or TLS that verifies."""
    broker = URL(url)
    return _is_local(broker.host or "") or (broker.scheme == "amqps" and broker.query.get("no_verify_ssl", "0") == "0")


def is_safe_way_to_database(url: str) -> bool:
    """Whether nobody can listen or pretend to be the database: on this machine, or TLS that verifies."""
    database = _database(url)
    mode = database.query.get("sslmode", database.query.get("ssl"))
    return all(map(_is_local, _hosts(database))) or mode in _VERIFIED


def _database(url: str) -> sqlalchemy.URL:
    """The URL of a database in parts; one that is none has none."""
    try:
        return make_url(url)
    except (ArgumentError, ValueError):
        return sqlalchemy.URL.create("postgresql")


def _hosts(database: sqlalchemy.URL) -> Iterator[str]:
    """Every host that it names, without the port. None: a socket of this machine."""
    named: str | Sequence[str] = database.query.get("host", ())
    for host in [named] if isinstance(named, str) else named:
        yield _WITH_PORT.sub(r"\1", host)
    if database.host:
        yield database.host


def _is_local(host: str) -> bool:
    """Whether it is this machine: loopback, or the folder of a socket."""
    try:
        return host == "localhost" or host.startswith("/") or ip_address(host).is_loopback
    except ValueError:
        return False
