"""What the application carries, and a request's place in its trace; here, so that handlers need not import the application."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
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


@dataclass(frozen=True, slots=True)
class Resources:
    """Everything that answering takes. `engine`: for all but accepting and who asks; `engine_of_one`: the same connections, for
    what is one statement. `tell_callbacks`: hears after the commit of the events, with their shops, whose callbacks are due.
    """

    settings: Settings
    keyring: Keyring
    readiness: Readiness
    gate: Gate
    authenticator: Authenticator
    rail_secrets: RailSecrets
    acceptor: Acceptor
    canceler: Canceler
    engine: Engine
    engine_of_one: Engine
    tell_callbacks: Callable[[Sequence[tuple[UUID, UUID]]], None]


RESOURCES: Final = web.AppKey("RESOURCES", Resources)
SPAN: Final = web.RequestKey("SPAN", Span)
