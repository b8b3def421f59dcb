"""Who is asking: API keys, the two signature formulas, scopes and networks, the shop a request is about; and rails."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Final
from uuid import UUID

from aiohttp import web

from common.db.engine import READ_ATTEMPTS_MAX, Engine, each_alone, in_transaction
from common.db.merchants import ApiKey, Shop, ShopKey, find_active_shops, find_api_keys
from common.db.rails import find_rail_secrets
from common.domain.signing import V1_PREFIX, parse_timestamp, sign_body, sign_v1, signatures_equal
from common.errors import (
    AccessDenied,
    ApiKeyRequired,
    DefaultShopMissing,
    InvalidApiKey,
    InvalidSignature,
    InvalidTimestampFormat,
    NotFound,
    RateLimited,
    SecretUnreadable,
    ShopNotFound,
    SignatureRequired,
    TimestampRequired,
    TimestampWindowExceeded,
)
from common.log import LogEvent, get_logger
from common.sealing import API_KEY_PURPOSE, RAIL_SECRET_PURPOSE, Keyring, SealBroken
from gateway.cache import ENTRIES_MAX, Cache
from gateway.log import SUBJECT
from gateway.schemas import read_query

# In place of the secret of a rail that our keys do not open; no secret is empty.
_UNREADABLE: Final = ""
_DUMMY_SECRET: Final = "sk_of_nobody_the_work_of_checking_is_the_same"  # noqa: S105 opens nothing


@dataclass(frozen=True, slots=True)
class Credentials:
    """The three headers, as sent, after the checks that need nothing else."""

    public_id: str
    timestamp: str
    signature: str


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated merchant and what its key may do."""

    merchant_id: UUID
    key: ApiKey


@dataclass(frozen=True, slots=True)
class LiveKey:
    """A key that can sign, with its secret in the clear; only ever in memory. `ends_at`: Unix seconds.

    `secret` None: our keys do not open it. That is our fault, and says nothing of who signs with it.
    """

    key: ApiKey
    secret: str | None
    ends_at: float

    def __repr__(self) -> str:
        return f"LiveKey({self.key.id})"


def read_credentials(request: web.Request, *, now: float, window_seconds: float) -> Credentials:
    """The headers that authenticate, checked in the contract's order.

    Raises: `ApiKeyRequired`, and as `read_signature`.
    """
    public_id = request.headers.get("X-API-Key", "")
    if not public_id:
        raise ApiKeyRequired
    return Credentials(public_id, *read_signature(request, now=now, window_seconds=window_seconds))


def read_signature(request: web.Request, *, now: float, window_seconds: float) -> tuple[str, str]:
    """When a request was signed and its signature, as sent. `now` is Unix seconds.

    Raises: `TimestampRequired`, `SignatureRequired`, `InvalidTimestampFormat`, `TimestampWindowExceeded`.
    """
    headers = request.headers
    timestamp, signature = headers.get("X-Timestamp", ""), headers.get("X-Signature", "")
    if not timestamp:
        raise TimestampRequired
    if not signature:
        raise SignatureRequired
    signed_at = parse_timestamp(timestamp)
    if signed_at is None:
        raise InvalidTimestampFormat
    if abs(now - signed_at) > window_seconds:
        raise TimestampWindowExceeded
    return timestamp, signature


class Authenticator:
    """Judges callers and finds their shops; both are remembered for at most `cache_seconds`."""

    def __init__(
        self,
        engine: Engine,
        keyring: Keyring,
        *,
        cache_seconds: float,
        requests_per_second_max: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine_of_one = each_alone(engine)
        self._keyring = keyring
        self._clock = clock
        self._keys = Cache(self._load_keys, seconds=cache_seconds)
        self._shops = Cache(self._load_shops, seconds=cache_seconds)
        self._rates = _Rates(requests_per_second_max)

    async def authenticate(
        self, request: web.Request, credentials: Credentials, body: bytes, *, scope: str, body_formula: bool
    ) -> Caller:
        """The caller behind a request. `body_formula`: whether this route opens to the older formula.

        An unknown key costs the same work as a known one, and is answered before a wrong signature.
        Raises: `InvalidApiKey`, `InvalidSignature`, `AccessDenied`, `RateLimited`, `DatabaseUnavailable`, `SecretUnreadable`.
        """
        live = await self._keys.get(credentials.public_id) if _is_storable(credentials.public_id) else None
        if live is not None and (live.key.merchant_status == "closed" or self._clock() >= live.ends_at):
            live = None
        secret = _DUMMY_SECRET if live is None else live.secret
        if secret is None:
            raise SecretUnreadable
        signed = _signature_holds(secret, request, credentials, body, body_formula=body_formula)
        if live is None:
            raise InvalidApiKey
        if not signed or (live.key.v1_only and not credentials.signature.startswith(V1_PREFIX)):
            raise InvalidSignature
        if scope not in live.key.scopes or live.key.merchant_status == "suspended":
            raise AccessDenied
        if live.key.allowed_networks is not None and not _within(request.remote, live.key.allowed_networks):
            raise AccessDenied
        self._rates.count(live.key.id, now=self._clock())
        request[SUBJECT].merchant_id = live.key.merchant_id
        return Caller(live.key.merchant_id, live.key)

    async def resolve_shop(self, request: web.Request, caller: Caller, code: str | None) -> Shop:
        """The caller's active shop of that code, or its default one: what the request is about.

        Raises: `ShopNotFound`, `DefaultShopMissing`, `DatabaseUnavailable`.
        """
        shop = await self._shops.get((caller.merchant_id, code)) if code is None or _is_storable(code) else None
        if shop is not None and (not caller.key.shop_ids or shop.id in caller.key.shop_ids):
            request[SUBJECT].shop_id = shop.id
            return shop
        if code is None:
            raise DefaultShopMissing
        raise ShopNotFound(code)

    async def resolve_subject(self, request: web.Request, caller: Caller, missing: type[NotFound]) -> tuple[Shop, str]:
        """The shop of a look-up, and the merchant's id of what it is about.

        Raises: `missing` for an id that nobody can have; as `resolve_shop`.
        """
        shop = await self.resolve_shop(request, caller, read_query(request, "shop_code"))
        external_id = request.match_info["external_id"]
        if "\x00" in external_id:
            raise missing
        return shop, external_id

    async def _load_keys(self, public_ids: Sequence[str]) -> list[LiveKey | None]:
        keys = await in_transaction(
            self._engine_of_one, lambda tx: find_api_keys(tx, public_ids), attempts_max=READ_ATTEMPTS_MAX
        )
        return [self._open(keys.get(public_id)) for public_id in public_ids]

    def _open(self, key: ApiKey | None) -> LiveKey | None:
        if key is None:
            return None
        secret = None
        try:
            secret = self._keyring.open(
                key.secret_sealed, owner=key.merchant_id, row=key.id, purpose=API_KEY_PURPOSE
            ).decode()
        except SealBroken as error:
            get_logger().error(LogEvent.SECRET_UNSEALABLE, api_key_id=str(key.id), error=str(error))
        ends = [moment.timestamp() for moment in (key.expires_at, key.revoked_at) if moment is not None]
        return LiveKey(key, secret, min(ends, default=math.inf))

    async def _load_shops(self, wanted: Sequence[ShopKey]) -> list[Shop | None]:
        shops = await in_transaction(
            self._engine_of_one, lambda tx: find_active_shops(tx, wanted), attempts_max=READ_ATTEMPTS_MAX
        )
        return [shops.get(key) for key in wanted]


class RailSecrets:
    """The secrets of rails, remembered for at most `cache_seconds`; only ever in memory."""

    def __init__(self, engine: Engine, keyring: Keyring, *, cache_seconds: float) -> None:
        self._engine_of_one = each_alone(engine)
        self._keyring = keyring
        self._secrets = Cache(self._load, seconds=cache_seconds)

    async def check(self, name: str, request: web.Request, timestamp: str, signature: str, body: bytes) -> None:
        """Whether the rail of that name has signed the request. An unknown rail costs the same work as a known one.

        Raises: `InvalidSignature`, `DatabaseUnavailable`, `SecretUnreadable`.
        """
        secret = await self._secrets.get(name) if _is_storable(name) else None
        if secret == _UNREADABLE:
            raise SecretUnreadable
        path, _, query = request.raw_path.partition("?")
        expected = sign_v1(secret or _DUMMY_SECRET, timestamp, request.method, path, query, body)
        if not signatures_equal(expected, signature) or secret is None:
            raise InvalidSignature

    async def _load(self, names: Sequence[str]) -> list[str | None]:
        found = await in_transaction(
            self._engine_of_one, lambda tx: find_rail_secrets(tx, names), attempts_max=READ_ATTEMPTS_MAX
        )
        return [self._open(name, *found[name]) if name in found else None for name in names]

    def _open(self, name: str, rail_id: UUID, sealed: bytes) -> str | None:
        try:
            return self._keyring.open(sealed, owner=rail_id, row=rail_id, purpose=RAIL_SECRET_PURPOSE).decode()
        except SealBroken as error:
            get_logger().error(LogEvent.SECRET_UNSEALABLE, rail=name, error=str(error))
            return _UNREADABLE


def _signature_holds(
    secret: str, request: web.Request, credentials: Credentials, body: bytes, *, body_formula: bool
) -> bool:
    if credentials.signature.startswith(V1_PREFIX):
        path, _, query = request.raw_path.partition("?")
        expected = sign_v1(secret, credentials.timestamp, request.method, path, query, body)
        return signatures_equal(expected, credentials.signature)
    expected = sign_body(secret, credentials.timestamp, body)
    return signatures_equal(expected, credentials.signature) and body_formula


def _within(remote: str | None, networks: tuple[str, ...]) -> bool:
    if remote is None:
        return False
    address = ip_address(remote.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in ip_network(network) for network in networks)


def _is_storable(text: str) -> bool:
    """Whether it can be the id of anything: PostgreSQL stores no NUL, and we give out nothing that cannot be printed."""
    return "\x00" not in text and text.isprintable()


class _Rates:
    """Requests of each key in the running second; exact enough to keep one client from taking a whole process."""

    def __init__(self, per_second_max: int) -> None:
        self._per_second_max = per_second_max
        self._counts: OrderedDict[UUID, tuple[int, int]] = OrderedDict()

    def count(self, key_id: UUID, *, now: float) -> None:
        """Count one request. Raises: `RateLimited` when the key has had its share of this second."""
        if self._per_second_max == 0:
            return
        second, count = self._counts.pop(key_id, (int(now), 0))
        count = count + 1 if second == int(now) else 1
        self._counts[key_id] = (int(now), count)
        if len(self._counts) > ENTRIES_MAX:
            self._counts.popitem(last=False)
        if count > self._per_second_max:
            raise RateLimited
