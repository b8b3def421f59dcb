"""HTTP as bytes, for what no client library would send, and the contract's shape of every error answer."""

import asyncio
import hashlib
import hmac
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from common.db.engine import Engine
from common.domain.signing import sign_body, sign_v1
from common.settings import Settings
from ops.ports import choose_port
from tests.factories import Merchant, add_funded_merchant
from tests.stack import DEADLINE_SECONDS, Stack

TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{8,64}", re.ASCII)
_REASON: Final = re.compile(r"[a-z]+(_[a-z]+)*", re.ASCII)

PAYOUTS: Final = "/api/v1/payouts"
BALANCE: Final = "/api/v1/balance"


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer. Header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an error answer says, after its shape was judged."""

    status: int
    code: str
    message: str
    reason: str


def read_refusal(answer: Answer) -> Refusal:
    """Judge that an answer has the contract's shape of an error, to the letter, and return what it says."""
    assert answer.headers["content-type"].split(";")[0] == "application/json", answer
    body = answer.json
    message, code, request_id = body["message"], body["code"], body["request_id"]
    reason = body["error"]["reason"]
    assert _REASON.fullmatch(reason), body
    error = {"code": code, "message": message, "reason": reason}
    if code == "external_id_reused":
        error["fields"] = body["error"]["fields"]
    expected: dict[str, Any] = {"message": message, "code": code, "error": error, "request_id": request_id}
    if code == "validation_error":
        errors = expected["errors"] = body["errors"]
        assert errors and all(error.keys() == {"field", "message"} for error in errors), body
        assert errors[0]["message"] == message, body
    if answer.status == 401:
        expected["server_time"] = body["server_time"]
        assert TIME.fullmatch(body["server_time"]), body
    assert body == expected
    assert REQUEST_ID.fullmatch(request_id)
    assert answer.headers["x-request-id"] == request_id
    if answer.status in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1
    assert b"Traceback" not in answer.body
    assert b".py" not in answer.body
    return Refusal(answer.status, code, message, reason)


class Wire:
    """One connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Write bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    def abort(self) -> None:
        """Hang up without a good-bye."""
        self._writer.transport.abort()

    async def read_answer(self, *, bodiless: bool = False) -> Answer:
        """The next answer; `bodiless`: to a HEAD. Interim answers are passed over."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status_line, *lines = head.rstrip().split("\r\n")
            status = int(status_line.split(" ")[1])
            if status == 100:
                return await self.read_answer(bodiless=bodiless)
            headers = {}
            for line in lines:
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            length = 0 if bodiless else int(headers["content-length"])
            return Answer(status, headers, await self._reader.readexactly(length))

    async def wait_closed(self) -> None:
        """Return when the gateway has closed the connection; more bytes are an error."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert await self._reader.read() == b""


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway process on a database, seen from outside, and the owner's way into that database."""

    stack: Stack
    port: int
    owner: Engine

    @property
    def settings(self) -> Settings:
        """What the gateway reads."""
        return self.stack.settings

    async def merchant(self, **options: Any) -> Merchant:
        """A merchant of its own, with money."""
        return await add_funded_merchant(self.owner, self.settings, **options)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Wire]:
        """A connection of one's own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield Wire(reader, writer)
        finally:
            writer.transport.abort()

    async def send(self, data: bytes, *, bodiless: bool = False) -> Answer:
        """Send bytes on a connection of their own; the first answer."""
        async with self.connect() as wire:
            await wire.send(data)
            return await wire.read_answer(bodiless=bodiless)

    async def ask(self, merchant: Merchant, method: str, target: str, body: bytes = b"", **options: Any) -> Answer:
        """Send one signed request on a connection of its own."""
        return await self.send(signed_request(merchant, method, target, body, **options))

    async def create(self, merchant: Merchant, body: bytes, **options: Any) -> Answer:
        """`POST /payouts`."""
        return await self.ask(merchant, "POST", PAYOUTS, body, **options)

    @asynccontextmanager
    async def beside(self, **overrides: str) -> AsyncIterator["Gateway"]:
        """A second process with other settings, on the same database and a port of its own."""
        port = choose_port()
        process = await self.stack.start("gateway", PORT=str(port), **overrides)
        try:
            yield Gateway(self.stack, port, self.owner)
        finally:
            await process.stop()


def timestamp_now(offset_seconds: float = 0) -> str:
    """Unix seconds as `X-Timestamp` carries them."""
    return str(int(time.time() + offset_seconds))


def sign_raw(secret: str, timestamp: str, method: str, target: bytes, body: bytes) -> str:
    """The v1 formula over a target that need not be text; written from the contract, not from the product."""
    path, _, query = target.partition(b"?")
    pairs = b"&".join(sorted(query.split(b"&"))) if query else b""
    lines = (b"v1", timestamp.encode(), method.encode(), path, pairs, hashlib.sha256(body).hexdigest().encode())
    return "v1=" + hmac.new(secret.encode(), b"\n".join(lines), "sha256").hexdigest()


def signed_headers(
    merchant: Merchant,
    method: str,
    target: str,
    body: bytes = b"",
    *,
    formula: str = "v1",
    timestamp: str | None = None,
) -> dict[str, str]:
    """The three headers that authenticate. `formula`: `v1` or `body`."""
    timestamp = timestamp or timestamp_now()
    path, _, query = target.partition("?")
    signature = (
        sign_v1(merchant.api_secret, timestamp, method, path, query, body)
        if formula == "v1"
        else sign_body(merchant.api_secret, timestamp, body)
    )
    return {"X-API-Key": merchant.api_key, "X-Timestamp": timestamp, "X-Signature": signature}


def signed_request(
    merchant: Merchant,
    method: str,
    target: str,
    body: bytes = b"",
    *,
    formula: str = "v1",
    timestamp: str | None = None,
    content_type: str | None = "application/json",
    headers: dict[str, str] | None = None,
) -> bytes:
    """A whole signed request. `headers` are added, and replace those of the same name."""
    fields = signed_headers(merchant, method, target, body, formula=formula, timestamp=timestamp)
    if content_type is not None:
        fields["Content-Type"] = content_type
    return plain_request(method, target.encode(), body, fields | (headers or {}))


def plain_request(method: str, target: bytes, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """A whole request. Header values are sent as Latin-1, so that any byte can stand in one."""
    fields = {"Host": "localhost", **(headers or {})}
    if body and "Transfer-Encoding" not in fields:
        fields["Content-Length"] = str(len(body))
    lines = [f"{name}: {value}\r\n".encode("latin-1") for name, value in fields.items()]
    return b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method.encode(), target, b"".join(lines), body)


def chunked(*chunks: bytes) -> bytes:
    """A body in chunks, as RFC 9112, 7.1 frames them."""
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
