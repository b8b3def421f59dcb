"""Typed keys of what the application carries; here, so that handlers need not import the application."""

from collections.abc import Callable, Sequence

from aiohttp import web

from common.admin import Readiness
from common.db.callbacks import Event
from common.db.engine import Engine
from common.sealing import Keyring
from common.settings import Settings
from gateway.accept import Acceptor
from gateway.auth import Authenticator

READINESS = web.AppKey("READINESS", Readiness)
SETTINGS = web.AppKey("SETTINGS", Settings)
ENGINE = web.AppKey("ENGINE", Engine)
KEYRING = web.AppKey("KEYRING", Keyring)
AUTHENTICATOR = web.AppKey("AUTHENTICATOR", Authenticator)
TELL_EVENTS: web.AppKey[Callable[[Sequence[Event]], None]] = web.AppKey("TELL_EVENTS")
ACCEPTOR = web.AppKey("ACCEPTOR", Acceptor)
