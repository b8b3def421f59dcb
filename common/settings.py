"""Settings: one frozen object, read from the environment once, nonsense refused at start.

`Settings.from_environ` is called by the composition roots alone; everything below them gets what it needs as a parameter.
The table in the README is checked against this file.
"""

import base64
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

from sqlalchemy.engine import URL as DatabaseUrl  # noqa: N811 a class, beside the one of yarl
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from yarl import URL

from common.domain.addresses import parse_callback_url
from common.domain.lane import MERCHANT_UNPROVEN_MAX
from common.domain.schedule import (
    LOOK_UP_DELAYS,
    PAYIN_LOOK_UP_DELAYS,
    SUBMIT_DELAYS,
    SUBMITTED_SILENCE_SECONDS,
    Patience,
)
from common.sealing import KEY_BYTES, Keyring
from common.secrecy import (
    PASSWORD_CHARACTERS_MIN,
    has_guessable_password,
    is_guessable_key,
    is_safe_way_to_broker,
    is_safe_way_to_database,
)

DEVELOPMENT: Final = "development"
PRODUCTION: Final = "production"

_PREFIX: Final = "PAYOUTS_"
# Where the database is, how it knows us and how it is known. All else has settings of its own, or is ours to choose.
_DATABASE_PARAMETERS: Final = frozenset(
    {
        *("host", "port", "passfile", "krbsrvname", "gsslib"),
        *("ssl", "sslmode", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslpassword", "sslnegotiation"),
        *("ssl_min_protocol_version", "ssl_max_protocol_version"),
    }
)
_DELAY_SECONDS_MAX: Final = 30 * 24 * 3600.0
_DELAYS_MAX: Final = 50
PORT_MAX: Final = 65_535
_META: Final = "setting"


class SettingsInvalid(Exception):
    """The environment does not make sense; the text names each variable and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class _Setting:
    variable: str
    parse: Callable[[str], Any]
    doc: str
    default: str | None = None


def _setting(variable: str, parse: Callable[[str], Any], default: str | None, doc: str) -> Any:
    """A field that is read from `variable`; without a default it must be set."""
    meta = {_META: _Setting(variable, parse, doc, default)}
    return field(metadata=meta) if default is None else field(default_factory=lambda: parse(default), metadata=meta)


class _Nonsense(ValueError):
    """A value that makes no sense; the text says what would, and never repeats it."""


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text, re.ASCII):
            raise _Nonsense("must be a whole number")
        value = int(text)
        if not low <= value <= high:
            raise _Nonsense(f"must be {low} to {high}")
        return value

    return parse


def _decimal(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", text, re.ASCII):
            raise _Nonsense("must be a number")
        value = float(text)
        if not low <= value <= high:
            raise _Nonsense(f"must be {low:g} to {high:g}")
        return value

    return parse


def _choice(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise _Nonsense(f"must be one of {', '.join(words)}")
        return text

    return parse


def _switch(text: str) -> bool:
    return _choice("0", "1")(text) == "1"


def _hosts(text: str) -> tuple[str, ...]:
    urls = tuple(url.strip() for url in text.split(",") if url.strip())
    if not all(map(_is_broker, urls)):
        raise _Nonsense("must be amqp://HOST… or amqps://HOST…, several by commas")
    return urls


def _is_broker(text: str) -> bool:
    try:
        url = URL(text)
    except ValueError:
        return False
    return url.scheme in ("amqp", "amqps") and bool(url.host)


def _queue_prefix(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,64}", text):
        raise _Nonsense("must be at most 64 characters of A-Z a-z 0-9 . _ -")
    return text


def _postgresql(text: str) -> str:
    try:
        if not re.match(r"postgres(ql)?(\+asyncpg)?://", text):
            raise ValueError
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise _Nonsense("must be postgresql://…") from None
    parameters = url.query
    if not all(map(_is_server, _servers(url))):
        raise _Nonsense(f"must name hosts, and ports of 1 to {PORT_MAX}")
    if "ssl" in parameters and "sslmode" in parameters:
        raise _Nonsense("must have one of ssl and sslmode, not both")
    if not set(parameters) <= _DATABASE_PARAMETERS:
        # Unnamed: it may be the rest of a password in which nobody escaped anything.
        raise _Nonsense(f"may have the parameters {', '.join(sorted(_DATABASE_PARAMETERS))}, and no others")
    return text


def _servers(url: DatabaseUrl) -> Iterator[tuple[str, str]]:
    """Hosts and ports as they stand in the URL, or in its parameters; several by commas. Empty: not said."""
    yield url.host or "", "" if url.port is None else str(url.port)
    for host in ",".join(url.normalized_query.get("host", ())).split(","):
        name, _, port = host.rpartition(":") if host.count(":") == 1 else (host, "", "")
        yield name, port
    for port in ",".join(url.normalized_query.get("port", ())).split(","):
        yield "", port


def _is_server(place: tuple[str, str]) -> bool:
    """Whether a connection can be asked for: asyncpg says the rest in a traceback. A host may be the folder of a socket."""
    host, port = place
    try:
        if not host.startswith("/"):
            host.encode("idna")
        return not port or 0 < int(port) <= PORT_MAX
    except ValueError:
        return False


def _address(text: str) -> str:
    if not text.strip():
        raise _Nonsense("must name an address")
    return text


def _ports(text: str) -> frozenset[int]:
    return frozenset(_integer(1, PORT_MAX)(port) for port in text.split(",") if port)


def _networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    try:
        return tuple(ip_network(network.strip()) for network in text.split(",") if network.strip())
    except ValueError:
        raise _Nonsense("must be networks such as 192.0.2.0/24, separated by commas") from None


def _delays(text: str) -> tuple[float, ...]:
    delays = tuple(_decimal(0.1, _DELAY_SECONDS_MAX)(delay) for delay in text.split(","))
    if len(delays) > _DELAYS_MAX:
        raise _Nonsense(f"must be at most {_DELAYS_MAX} delays")
    return delays


def _key(text: str) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except ValueError:
        raise _Nonsense("must be base64") from None
    if len(key) != KEY_BYTES:
        raise _Nonsense(f"must be {KEY_BYTES} bytes, base64")
    return key


def _master_keys(text: str) -> dict[int, bytes]:
    pairs = [pair.partition(":") for pair in text.split(",")]
    if not all(separator and key_id.isdecimal() for key_id, separator, _ in pairs):
        raise _Nonsense("must look like 1:<base64>,2:<base64>")
    keys = {_integer(1, 65_535)(key_id): _key(key) for key_id, _, key in pairs}
    if len(keys) != len(pairs):
        raise _Nonsense("must not have an id twice")
    return keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set. Units are in the names."""

    environment: str = _setting(
        "PAYOUTS_ENV",
        _choice(DEVELOPMENT, PRODUCTION),
        DEVELOPMENT,
        "`production` refuses secrets of examples, debugging, private callbacks, and ways on which others can listen",
    )
    database_url: str = field(
        repr=False,
        metadata={
            _META: _Setting(
                "DATABASE_URL",
                _postgresql,
                "PostgreSQL, `postgresql://…`; the login must be a member of the `payouts_*` roles",
            )
        },
    )
    amqp_urls: tuple[str, ...] = field(
        default_factory=tuple,
        repr=False,
        metadata={
            _META: _Setting(
                "AMQP_URL", _hosts, "RabbitMQ, several hosts by commas; empty: PostgreSQL alone carries the work", ""
            )
        },
    )
    amqp_queue_prefix: str = _setting(
        "PAYOUTS_AMQP_QUEUE_PREFIX",
        _queue_prefix,
        "",
        "before the name of every queue, so that tenants can share a broker",
    )
    amqp_shards: int = _setting(
        "PAYOUTS_AMQP_SHARDS", _integer(1, 64), "1", "queues per kind of work; the same for every process"
    )
    amqp_prefetch: int = _setting(
        "PAYOUTS_AMQP_PREFETCH",
        _integer(8, 1000),
        "16",
        "messages ahead of each queue and process; a claim takes up to 8",
    )
    master_keys: dict[int, bytes] = field(
        repr=False,
        metadata={
            _META: _Setting(
                "PAYOUTS_MASTER_KEYS", _master_keys, "seal secrets and recipients: `id:base64` of 32 bytes, by commas"
            )
        },
    )
    content_key: bytes = field(
        repr=False,
        metadata={
            _META: _Setting(
                "PAYOUTS_CONTENT_KEY", _key, "hashes recipients for idempotency: base64 of 32 bytes; never changes"
            )
        },
    )

    host: str = _setting("PAYOUTS_HOST", _address, "127.0.0.1", "address the gateway listens on")
    port: int = _setting("PORT", _integer(1, PORT_MAX), "8080", "port of the gateway; its processes share it")
    admin_port: int = _setting(
        "PAYOUTS_ADMIN_PORT", _integer(0, PORT_MAX), "0", "metrics and health, one per process; 0: none"
    )
    admin_host: str = _setting(
        "PAYOUTS_ADMIN_HOST", _address, "127.0.0.1", "address of the admin port; no merchant may reach it"
    )
    log_format: str = _setting(
        "PAYOUTS_LOG_FORMAT", _choice("json", "console"), "json", "log lines for programs or people"
    )
    log_level: str = _setting(
        "PAYOUTS_LOG_LEVEL",
        _choice("debug", "info", "warning", "error"),
        "info",
        "`warning` leaves out the line of each request and attempt; `debug` adds what libraries say",
    )

    database_pool_max: int = _setting(
        "PAYOUTS_DATABASE_POOL_MAX",
        _integer(2, 100),
        "8",
        "connections per process; the sum must fit `max_connections`",
    )
    database_processes: int = _setting(
        "PAYOUTS_DATABASE_PROCESSES",
        _integer(0, 10_000),
        "0",
        "gateways and workers on this database, with those that a rolling change adds; 0: not told",
    )
    database_connect_timeout_seconds: float = _setting(
        "PAYOUTS_DATABASE_CONNECT_TIMEOUT_SECONDS",
        _decimal(0.1, 60),
        "5",
        "to open a connection, or to get one of the pool",
    )
    database_statement_timeout_seconds: float = _setting(
        "PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS",
        _decimal(0.1, 300),
        "10",
        "for one statement; 5 s later a server that is silent is given up",
    )
    database_lock_timeout_seconds: float = _setting(
        "PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS",
        _decimal(0.05, 60),
        "2",
        "for one lock; then that shop's requests get 503",
    )

    ready_silence_seconds_max: float = _setting(
        "PAYOUTS_READY_SILENCE_SECONDS_MAX",
        _decimal(0.5, 300),
        "5",
        "without an answer of the database, until `/readyz` says 503",
    )

    signature_window_seconds: int = _setting(
        "PAYOUTS_SIGNATURE_WINDOW_SECONDS", _integer(30, 300), "60", "how far `X-Timestamp` may be off, either way"
    )
    key_cache_seconds: float = _setting(
        "PAYOUTS_KEY_CACHE_SECONDS", _decimal(0, 5), "5", "a revoked key may work for this long"
    )
    key_requests_per_second_max: int = _setting(
        "PAYOUTS_KEY_REQUESTS_PER_SECOND_MAX",
        _integer(0, 100_000),
        "0",
        "per key and gateway process, then 429; 0: no limit",
    )
    requests_max: int = _setting(
        "PAYOUTS_REQUESTS_MAX", _integer(1, 100_000), "4000", "requests at work per gateway process, then 503 at once"
    )
    request_seconds_max: float = _setting(
        "PAYOUTS_REQUEST_SECONDS_MAX", _decimal(0.1, 300), "10", "from the end of a request to its answer, then 503"
    )
    body_timeout_seconds: float = _setting(
        "PAYOUTS_BODY_TIMEOUT_SECONDS", _decimal(0.1, 60), "10", "to receive a request's body"
    )
    accept_committers: int = _setting(
        "PAYOUTS_ACCEPT_COMMITTERS",
        _integer(1, 16),
        "1",
        "transactions that accept payouts at the same time, per process; shops that are behind have some more",
    )
    accept_batch_max: int = _setting(
        "PAYOUTS_ACCEPT_BATCH_MAX", _integer(1, 128), "128", "payouts per accepting transaction"
    )
    accept_queue_max: int = _setting(
        "PAYOUTS_ACCEPT_QUEUE_MAX", _integer(1, 100_000), "2000", "creates that may wait per process, then 503"
    )
    accept_wait_seconds_max: float = _setting(
        "PAYOUTS_ACCEPT_WAIT_SECONDS_MAX",
        _decimal(0.1, 60),
        "5",
        "how long a create may wait for its transaction, then 503; with less than a second left it is accepted the slower way",
    )
    callback_private_addresses: bool = _setting(
        "PAYOUTS_CALLBACK_PRIVATE_ADDRESSES", _switch, "0", "1 lets callbacks reach private and loopback addresses"
    )
    callback_https_only: bool = _setting(
        "PAYOUTS_CALLBACK_HTTPS_ONLY", _switch, "0", "1 refuses callbacks over http, but for shops that may"
    )
    callback_ports: frozenset[int] = _setting(
        "PAYOUTS_CALLBACK_PORTS",
        _ports,
        "80,443,8080,8443",
        "ports a callback may use, but for shops with their own; empty: any",
    )
    callback_networks_forbidden: tuple[IPv4Network | IPv6Network, ...] = _setting(
        "PAYOUTS_CALLBACK_NETWORKS_FORBIDDEN",
        _networks,
        "",
        "networks that no callback may reach although their addresses are public, such as our own",
    )

    settle_batch_max: int = _setting("PAYOUTS_SETTLE_BATCH_MAX", _integer(1, 512), "256", "payouts per claim")
    settle_lease_seconds: float = _setting(
        "PAYOUTS_SETTLE_LEASE_SECONDS", _decimal(1, 3600), "60", "a worker that is silent for longer lost its payouts"
    )
    settle_concurrency: int = _setting(
        "PAYOUTS_SETTLE_CONCURRENCY", _integer(1, 10_000), "1024", "calls in flight per rail and process"
    )
    settle_shop_concurrency: int = _setting(
        "PAYOUTS_SETTLE_SHOP_CONCURRENCY", _integer(1, 10_000), "768", "calls in flight per shop, rail and process"
    )
    rail_timeout_seconds: float = _setting(
        "PAYOUTS_RAIL_TIMEOUT_SECONDS", _decimal(0.1, 600), "20", "for one call to a rail; then the outcome is unknown"
    )
    rail_connect_timeout_seconds: float = _setting(
        "PAYOUTS_RAIL_CONNECT_TIMEOUT_SECONDS",
        _decimal(0.1, 60),
        "5",
        "to open a connection to a rail; then nothing was sent",
    )
    submit_delays_seconds: tuple[float, ...] = _setting(
        "PAYOUTS_SUBMIT_DELAYS_SECONDS",
        _delays,
        ",".join(map(str, SUBMIT_DELAYS)),
        "between tries to send what a rail did not accept; after the last one `provider_unavailable`",
    )
    look_up_delays_seconds: tuple[float, ...] = _setting(
        "PAYOUTS_LOOK_UP_DELAYS_SECONDS",
        _delays,
        ",".join(map(str, LOOK_UP_DELAYS)),
        "between questions what became of a payout; the last one repeats for ever",
    )
    submitted_silence_seconds: float = _setting(
        "PAYOUTS_SUBMITTED_SILENCE_SECONDS",
        _decimal(60, 30 * 24 * 3600),
        str(SUBMITTED_SILENCE_SECONDS),
        "a payout that its rail has taken, and tells nothing of for longer, is in doubt (`verifying`)",
    )
    payin_look_up_delays_seconds: tuple[float, ...] = _setting(
        "PAYOUTS_PAYIN_LOOK_UP_DELAYS_SECONDS",
        _delays,
        ",".join(map(str, PAYIN_LOOK_UP_DELAYS)),
        "between questions whether a payin was paid; the last one repeats until its end",
    )
    payin_concurrency: int = _setting(
        "PAYOUTS_PAYIN_CONCURRENCY", _integer(1, 10_000), "32", "questions about payins in flight per rail and process"
    )
    rail_breaker_failures: int = _setting(
        "PAYOUTS_RAIL_BREAKER_FAILURES",
        _integer(1, 10_000),
        "20",
        "calls in a row without an answer, until a rail is left in peace",
    )
    rail_breaker_rest_seconds: float = _setting(
        "PAYOUTS_RAIL_BREAKER_REST_SECONDS", _decimal(0.1, 3600), "10", "of peace, until one call tries again"
    )
    scan_interval_seconds: float = _setting(
        "PAYOUTS_SCAN_INTERVAL_SECONDS",
        _decimal(0.005, 60),
        "0.02",
        "between looks for due work when there was none and no messages arrive",
    )
    sandbox_settle_seconds: float = _setting(
        "PAYOUTS_SANDBOX_SETTLE_SECONDS", _decimal(0, 3600), "60", "from `submitted` to success for recipient 0001"
    )
    callback_concurrency: int = _setting(
        "PAYOUTS_CALLBACK_CONCURRENCY", _integer(1, 10_000), "512", "callbacks in flight per process"
    )
    callback_lane_concurrency: int = _setting(
        "PAYOUTS_CALLBACK_LANE_CONCURRENCY",
        _integer(1, 10_000),
        "256",
        "of these, to one origin of one shop: what it can hold up when it falls silent",
    )
    callback_retry_share: float = _setting(
        "PAYOUTS_CALLBACK_RETRY_SHARE",
        _decimal(0.01, 1),
        "0.5",
        "part of these that may have failed before; the rest is kept for first attempts",
    )
    callback_slow_share: float = _setting(
        "PAYOUTS_CALLBACK_SLOW_SHARE",
        _decimal(0.01, 1),
        "0.3",
        "part of these for receivers that take over 2 s, or that nobody knows yet",
    )
    callback_reserve_share: float = _setting(
        "PAYOUTS_CALLBACK_RESERVE_SHARE",
        _decimal(0, 0.9),
        "0.25",
        f"part of these that no merchant with more than {MERCHANT_UNPROVEN_MAX} in flight may use",
    )
    callback_hold_hours: float = _setting(
        "PAYOUTS_CALLBACK_HOLD_HOURS",
        _decimal(1, 8760),
        "120",
        "of nothing but failures, until a lane is held for people; its callbacks are kept",
    )
    callback_timeout_seconds: float = _setting(
        "PAYOUTS_CALLBACK_TIMEOUT_SECONDS", _decimal(0.1, 120), "17", "hard deadline of one callback attempt"
    )
    callback_lease_seconds: float = _setting(
        "PAYOUTS_CALLBACK_LEASE_SECONDS",
        _decimal(1, 3600),
        "60",
        "a worker that is silent for longer lost its callbacks",
    )
    callback_attempts_keep_days: int = _setting(
        "PAYOUTS_CALLBACK_ATTEMPTS_KEEP_DAYS",
        _integer(30, 3650),
        "90",
        "for the log of callback attempts; it goes by whole weeks",
    )
    drain_seconds: float = _setting(
        "PAYOUTS_DRAIN_SECONDS", _decimal(0, 300), "25", "after SIGTERM, to finish what was begun"
    )

    def allows_callback(self, url: str, *, shop_http: bool, shop_ports: Collection[int] | None) -> bool:
        """Whether callbacks of a shop with these exceptions may go to the URL, by its text alone."""
        judged = parse_callback_url(
            url,
            private_allowed=self.callback_private_addresses,
            https_only=self.callback_https_only and not shop_http,
            ports=self.callback_ports if shop_ports is None else frozenset(shop_ports),
        )
        return judged is not None

    @property
    def patience(self) -> Patience:
        """When rails are asked again."""
        return Patience(self.submit_delays_seconds, self.look_up_delays_seconds, self.submitted_silence_seconds)

    @property
    def keyring(self) -> Keyring:
        """The keys of `common.sealing`; new values are sealed with the master key of the highest id."""
        return Keyring(self.master_keys, max(self.master_keys), self.content_key)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Settings":
        """Read everything at once. Raises: `SettingsInvalid`, naming all that is wrong and never a value."""
        values: dict[str, Any] = {}
        problems: list[str] = []
        for item in fields(cls):
            setting: _Setting = item.metadata[_META]
            text = environ.get(setting.variable)
            try:
                if text is not None:
                    values[item.name] = setting.parse(text)
            except _Nonsense as error:
                problems.append(f"{setting.variable}: {error}")
        missing = {f.metadata[_META].variable for f in fields(cls) if f.name in _REQUIRED and f.name not in values}
        problems += [f"{variable}: must be set" for variable in sorted(missing - {p.split(":")[0] for p in problems})]
        known = {f.metadata[_META].variable for f in fields(cls)}
        problems += [
            f"{name}: no such setting" for name in sorted(environ) if name.startswith(_PREFIX) and name not in known
        ]
        if not problems:
            settings = cls(**values)
            problems = settings._contradictions()
            if settings.environment == PRODUCTION:
                problems += [*settings._refused_in_production(), *_debugging(environ)]
            if not problems:
                return settings
        raise SettingsInvalid("; ".join(problems))

    def _contradictions(self) -> list[str]:
        """Relations between settings that must hold, or work would be done twice."""
        problems = []
        if self.callback_lease_seconds < self.callback_timeout_seconds + _RECORDING_SECONDS:
            problems.append(
                f"PAYOUTS_CALLBACK_LEASE_SECONDS: must exceed PAYOUTS_CALLBACK_TIMEOUT_SECONDS by {_RECORDING_SECONDS:g}"
            )
        if self.settle_lease_seconds < self.rail_timeout_seconds + _RECORDING_SECONDS:
            problems.append(
                f"PAYOUTS_SETTLE_LEASE_SECONDS: must exceed PAYOUTS_RAIL_TIMEOUT_SECONDS by {_RECORDING_SECONDS:g}"
            )
        if self.database_pool_max < self.accept_committers + _POOL_SPARE:
            problems.append(f"PAYOUTS_DATABASE_POOL_MAX: must exceed PAYOUTS_ACCEPT_COMMITTERS by {_POOL_SPARE}")
        return problems

    def _refused_in_production(self) -> Iterator[str]:
        """What is right on a developer's machine and nowhere else; never a value."""
        master_keys = list(self.master_keys.values())
        for variable, refused, why in (
            ("DATABASE_URL", has_guessable_password(self.database_url), _GUESSABLE_PASSWORD),
            (
                "DATABASE_URL",
                not is_safe_way_to_database(self.database_url),
                "must say sslmode=verify-full, unless the database is on this machine",
            ),
            ("AMQP_URL", any(map(has_guessable_password, self.amqp_urls)), _GUESSABLE_PASSWORD),
            (
                "AMQP_URL",
                not all(map(is_safe_way_to_broker, self.amqp_urls)),
                "must be amqps:// and verify, unless the broker is on this machine",
            ),
            ("PAYOUTS_MASTER_KEYS", any(map(is_guessable_key, master_keys)), _GUESSABLE_KEY),
            ("PAYOUTS_MASTER_KEYS", len(set(master_keys)) < len(master_keys), "must not have a key twice"),
            ("PAYOUTS_CONTENT_KEY", is_guessable_key(self.content_key), _GUESSABLE_KEY),
            ("PAYOUTS_CONTENT_KEY", self.content_key in master_keys, "must be no master key"),
            ("PAYOUTS_LOG_FORMAT", self.log_format != "json", "must be json"),
            ("PAYOUTS_LOG_LEVEL", self.log_level == "debug", "must not be debug"),
            ("PAYOUTS_CALLBACK_PRIVATE_ADDRESSES", self.callback_private_addresses, "must be 0"),
            (
                "PAYOUTS_CALLBACK_HTTPS_ONLY",
                not self.callback_https_only,
                "must be 1 (`payouts shop callbacks` makes exceptions)",
            ),
        ):
            if refused:
                yield f"{variable}: {why}, in {PRODUCTION}"


def _debugging(environ: Mapping[str, str]) -> Iterator[str]:
    """What makes Python tell of more than our log does: arguments too. Source: Python, "Debug Mode" of asyncio."""
    for variable in ("PYTHONASYNCIODEBUG", "PYTHONDEVMODE"):
        if environ.get(variable):
            yield f"{variable}: must not be set, in {PRODUCTION}"


# What a lease leaves for writing down the outcome of a call that ended at its deadline.
_RECORDING_SECONDS: Final = 5.0
# One connection for a shop that is behind, one for reads.
_POOL_SPARE: Final = 2
_GUESSABLE_PASSWORD: Final = (
    f"must have a password of {PASSWORD_CHARACTERS_MIN} or more characters that is no example's"
)
_GUESSABLE_KEY: Final = "must be random"
_REQUIRED: Final = frozenset({"database_url", "master_keys", "content_key"})
