"""Typed keys of what the application carries; here, so that handlers need not import the application."""

from collections.abc import Callable, Sequence
from uuid import UUID

from aiohttp import web

from common.admin import Readiness
from common.db.engine import Engine
from common.sealing import Keyring
from common.settings import Settings
from common.tracing import Span
from gateway.accept import Acceptor
from gateway.auth import Authenticator, RailSecrets
from gateway.cancel import Canceler
from gateway.gate import Gate

READINESS = web.AppKey("READINESS", Readiness)
SETTINGS = web.AppKey("SETTINGS", Settings)
ENGINE = web.AppKey("ENGINE", Engine)
KEYRING = web.AppKey("KEYRING", Keyring)
AUTHENTICATOR = web.AppKey("AUTHENTICATOR", Authenticator)
GATE = web.AppKey("GATE", Gate)
RAIL_SECRETS = web.AppKey("RAIL_SECRETS", RailSecrets)
CANCELER = web.AppKey("CANCELER", Canceler)
ACCEPTOR = web.AppKey("ACCEPTOR", Acceptor)
# Hears after the commit of the events, with their shops, whose callbacks are due.
TELL_CALLBACKS = web.AppKey[Callable[[Sequence[tuple[UUID, UUID]]], None]]("TELL_CALLBACKS")
# A request's place in its trace.
SPAN = web.RequestKey("SPAN", Span)
