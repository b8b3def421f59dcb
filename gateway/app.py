"""The gateway's composition root: routes with what each demands, and the life of everything they use."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from http import HTTPStatus
from typing import Final

import structlog
from aiohttp import web
from prometheus_client import Histogram
from uuid_utils import uuid4

from common import tracing
from common.admin import Readiness, livez, readyz
from common.db.callbacks import Event, ids_to_tell, traceparents_of
from common.db.engine import Engine, close_engine, create_engine, each_alone
from common.domain.ids import PAYOUT, render_id
from common.domain.signing import RAIL_WINDOW_SECONDS
from common.domain.times import render_time
from common.errors import (
    BodyTooLarge,
    FieldError,
    InvalidRequest,
    InvariantViolated,
    MethodNotAllowed,
    Overloaded,
    PayoutsError,
    RouteNotFound,
    UnreadableRequest,
    UnsupportedMediaType,
)
from common.log import LogEvent, get_logger
from common.messaging.link import Link
from common.messaging.publisher import Publisher
from common.messaging.topology import Topology, Work
from common.process import end_tasks
from common.settings import Settings
from gateway.accept import Acceptor
from gateway.auth import Authenticator, Caller, Credentials, RailSecrets, read_credentials, read_signature
from gateway.balance import show_balance
from gateway.callbacks import list_payin_callbacks, list_payout_callbacks, resend_payout_callback
from gateway.cancel import Canceler
from gateway.deciding import Order
from gateway.errors import REQUEST_ID, SERVER, render_error
from gateway.events import list_events
from gateway.gate import Gate
from gateway.log import SUBJECT, Subject, log_request
from gateway.payins import create_payin, show_payin
from gateway.payouts import cancel_payout, create_payout, list_payout_events, show_payout
from gateway.rails import receive_event
from gateway.resources import RESOURCES, SPAN, Resources

PREFIX: Final = "/api/v1"
BODY_BYTES_MAX: Final = 64 * 1024

Handler = Callable[[web.Request, Caller, bytes], Awaitable[web.Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route and what it demands. `body_formula`: whether it opens to the older signature too."""

    method: str
    path: str
    scope: str
    body_formula: bool
    handle: Handler


ENDPOINTS: Final = (
    Endpoint("POST", "/payouts", "payouts:write", True, create_payout),
    Endpoint("GET", "/payouts/{external_id}", "payouts:read", True, show_payout),
    Endpoint("POST", "/payouts/{external_id}/cancel", "payouts:write", False, cancel_payout),
    Endpoint("GET", "/payouts/{external_id}/events", "payouts:read", False, list_payout_events),
    Endpoint("GET", "/payouts/{external_id}/callbacks", "payouts:read", False, list_payout_callbacks),
    Endpoint("POST", "/payouts/{external_id}/callbacks/resend", "payouts:write", False, resend_payout_callback),
    Endpoint("POST", "/payins", "payins:write", True, create_payin),
    Endpoint("GET", "/payins/{external_id}", "payins:read", True, show_payin),
    Endpoint("GET", "/payins/{external_id}/callbacks", "payins:read", False, list_payin_callbacks),
    Endpoint("GET", "/events", "payouts:read", False, list_events),
    Endpoint("GET", "/balance", "balance:read", True, show_balance),
)

# For confirms that are still under way when we leave; the scan finds whatever is not confirmed.
_PUBLISH_DRAIN_SECONDS: Final = 5.0

REQUEST_SECONDS: Final = Histogram(
    "payouts_request_seconds",
    "How long requests took, from their head to their answer",
    ["method", "route", "status"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{8,64}", re.ASCII)


def create_app(settings: Settings, readiness: Readiness, *, schema_revision: str) -> web.Application:
    """The application; connects to nothing before it starts."""
    app = web.Application(middlewares=[answer], client_max_size=BODY_BYTES_MAX)
    app.cleanup_ctx.append(_resources(settings, readiness, schema_revision))
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz(readiness))
    app.router.add_post(PREFIX + "/rails/{rail}/events", _receive_event)
    for endpoint in ENDPOINTS:
        app.router.add_route(endpoint.method, PREFIX + endpoint.path, _guarded(endpoint))
    return app


async def _watch(readiness: Readiness, engine: Engine, schema_revision: str, settings: Settings) -> None:
    """Tell whether the database is one to work with, and then whether it answers, for ever."""
    await readiness.wait_for_database(engine, schema_revision, settings)
    await readiness.watch_database(engine)


def _resources(
    settings: Settings, readiness: Readiness, schema_revision: str
) -> Callable[[web.Application], AsyncIterator[None]]:
    async def resources(app: web.Application) -> AsyncIterator[None]:
        keyring = settings.keyring
        # Accepting and reading have connections of their own, so that neither can starve the other. Who asks, and whether we
        # are ready, is asked on those of accepting, which nothing holds for long.
        busy_committers = max(1, (settings.database_pool_max - settings.accept_committers) // 2)
        accepting = settings.accept_committers + busy_committers
        accept_engine = create_engine(
            settings, role="payouts_gateway", application="payouts-gateway-accept", pool_max=accepting
        )
        read_pool = max(1, settings.database_pool_max - accepting)
        engine = create_engine(settings, role="payouts_gateway", application="payouts-gateway-read", pool_max=read_pool)
        authenticator = Authenticator(
            accept_engine,
            keyring,
            cache_seconds=settings.key_cache_seconds,
            requests_per_second_max=settings.key_requests_per_second_max,
        )
        publisher = Publisher(Topology(settings.amqp_queue_prefix, settings.amqp_shards))
        acceptor = Acceptor(
            accept_engine,
            committers=settings.accept_committers,
            busy_committers=busy_committers,
            busy_seconds_max=settings.database_lock_timeout_seconds,
            batch_max=settings.accept_batch_max,
            queue_max=settings.accept_queue_max,
            wait_seconds=settings.accept_wait_seconds_max,
            tell=partial(_tell, publisher) if settings.amqp_urls else lambda _: None,
        )
        canceler = Canceler(
            engine,
            slots=max(1, read_pool // 2),
            busy_seconds_max=settings.database_lock_timeout_seconds,
            tell=partial(_tell_events, publisher) if settings.amqp_urls else lambda _: None,
        )
        app[RESOURCES] = Resources(
            settings=settings,
            keyring=keyring,
            readiness=readiness,
            gate=Gate(requests_max=settings.requests_max, seconds_max=settings.request_seconds_max),
            authenticator=authenticator,
            rail_secrets=RailSecrets(engine, keyring, cache_seconds=settings.key_cache_seconds),
            acceptor=acceptor,
            canceler=canceler,
            engine=engine,
            engine_of_one=each_alone(engine),
            tell_callbacks=partial(publisher.offer, Work.CALLBACK) if settings.amqp_urls else lambda _: None,
        )
        # The broker may come later, or never: accepting does not need it.
        links = [Link("publish", settings.amqp_urls, publisher.session)] if settings.amqp_urls else []
        readiness.watch(links)
        publishing = [asyncio.create_task(link.run()) for link in links]
        watching = asyncio.create_task(_watch(readiness, accept_engine, schema_revision, settings))
        yield
        watching.cancel()
        await acceptor.close(settings.drain_seconds)
        await publisher.drain(_PUBLISH_DRAIN_SECONDS)
        await end_tasks(publishing, 0)
        await asyncio.gather(close_engine(accept_engine), close_engine(engine))

    return resources


def _tell(publisher: Publisher, orders: Sequence[Order]) -> None:
    """After the commit: have the payouts settled now, with the contexts of those requests that are traced."""
    traceparents = [order.traceparent for order in orders if order.traceparent is not None]
    publisher.offer(Work.SETTLE, [(order.id, order.shop_id) for order in orders], traceparents)


def _tell_events(publisher: Publisher, events: Sequence[Event]) -> None:
    """After the commit: have the callbacks of these events sent now."""
    publisher.offer(Work.CALLBACK, ids_to_tell(events), traceparents_of(events))


def _guarded(endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.Response]]:
    """The handler behind authentication: no route can forget it."""

    async def handle(request: web.Request) -> web.Response:
        resources = request.app[RESOURCES]
        window_seconds = resources.settings.signature_window_seconds
        credentials = read_credentials(request, now=time.time(), window_seconds=window_seconds)
        body = await _read_body(request, resources)
        return await resources.gate.let_in(partial(serve, request, resources.authenticator, credentials, body))

    async def serve(
        request: web.Request, authenticator: Authenticator, credentials: Credentials, body: bytes
    ) -> web.Response:
        # The older formula binds no route: a captured create must not open a look-up, so those have no body.
        body_formula = endpoint.body_formula and (endpoint.method == "POST" or not body)
        caller = await authenticator.authenticate(
            request, credentials, body, scope=endpoint.scope, body_formula=body_formula
        )
        if endpoint.method == "POST" and body and request.content_type != "application/json":
            raise UnsupportedMediaType
        return await handle_endpoint(request, caller, body)

    # The acceptor lets go of whoever no longer waits; a transaction first has to get rid of a silent connection.
    handle_endpoint = endpoint.handle if endpoint.handle is create_payout else _left_to_end(endpoint.handle)
    return handle


def _left_to_end(handle: Handler) -> Handler:
    """The handler, which goes on to its end within the limits of its transactions, though nobody waits for it any more."""

    async def left(request: web.Request, caller: Caller, body: bytes) -> web.Response:
        return await asyncio.shield(handle(request, caller, body))

    return left


async def _receive_event(request: web.Request) -> web.Response:
    """A rail's event, which its own secret signs."""
    resources = request.app[RESOURCES]
    signed = read_signature(request, now=time.time(), window_seconds=RAIL_WINDOW_SECONDS)
    body = await _read_body(request, resources)
    return await resources.gate.let_in(lambda: asyncio.shield(receive_event(request, *signed, body)))


async def _read_body(request: web.Request, resources: Resources) -> bytes:
    """The body as received.

    Raises: `BodyTooLarge`, `InvalidRequest` when it does not arrive in time, `UnreadableRequest` when it breaks off.
    """
    if (request.content_length or 0) > BODY_BYTES_MAX:
        raise BodyTooLarge
    try:
        if request.content.is_eof():
            return await request.read()
        async with asyncio.timeout(resources.settings.body_timeout_seconds):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLarge from None
    except TimeoutError:
        if resources.readiness.leaving:
            # Nothing more is read on the way out; that is not the merchant's fault.
            raise Overloaded from None
        raise InvalidRequest(FieldError("body", "Request body was not received in time")) from None
    except (ConnectionError, web.RequestPayloadError):
        raise UnreadableRequest from None


@web.middleware
async def answer(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Around every request: its id, its one log line, and the contract's shape for whatever went wrong."""
    started = time.monotonic()
    sent_id = request.headers.get(REQUEST_ID, "")
    request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else uuid4().hex
    matched = request.match_info.route
    # The route's pattern, never the path: paths carry merchants' ids.
    route = "-" if matched.resource is None else matched.resource.canonical
    subject = Subject()
    request[SUBJECT] = subject
    status, error = None, None
    # Every request has a task, and by that a context, of its own.
    structlog.contextvars.bind_contextvars(request_id=request_id)
    with _begin(request, route) as span:
        request[SPAN] = span
        try:
            response, error = await _answer(request, handler, request_id)
            status = response.status
            headers = response.headers
            headers[REQUEST_ID] = request_id
            headers["Server"] = SERVER
            return response
        finally:
            if status is not None:
                # The route's method: a client may make up any.
                _request_timer(matched.method, route, status).observe(time.monotonic() - started)
            if span.traceparent is not None:
                _note(span, request, request_id, route, status, error)
            log_request(
                request_id=request_id,
                method=request.method,
                route=route,
                status=status,
                error=error,
                subject=subject,
                started=started,
                trace_id=tracing.trace_id_of(span.traceparent),
            )


async def _answer(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]], request_id: str
) -> tuple[web.StreamResponse, PayoutsError | None]:
    headers = {}
    try:
        return await handler(request), None
    except PayoutsError as raised:
        # Without its frames: they hold this request, and it would hold them, until garbage is collected.
        error = raised.with_traceback(None)
    except web.HTTPMethodNotAllowed as raised:
        error, headers = MethodNotAllowed(), {"Allow": ", ".join(sorted(raised.allowed_methods))}
    except web.HTTPNotFound:
        error = RouteNotFound()
    except Exception:
        get_logger().exception(LogEvent.REQUEST_CRASHED)
        error = InvariantViolated()
    response = render_error(error, request_id=request_id, server_time=render_time(datetime.now(UTC)))
    response.headers.update(headers)
    if not request.content.is_eof():
        # Whatever of the body is still under way would be taken for the next request.
        response.force_close()
    return response, error


def _begin(request: web.Request, route: str) -> tracing.Span:
    """The span of a request to the API; what asks how we are is not traced."""
    if not route.startswith(PREFIX):
        return tracing.NO_SPAN
    return tracing.begin(f"{request.method} {route}", caller=request.headers.get("traceparent"))


def _note(
    span: tracing.Span,
    request: web.Request,
    request_id: str,
    route: str,
    status: int | None,
    error: PayoutsError | None,
) -> None:
    """What a request's span says of it."""
    subject = request[SUBJECT]
    span.note(
        {
            "http.request.method": request.method,
            "http.route": route,
            "http.response.status_code": status,
            "payouts.request_id": request_id,
            "payouts.shop_id": None if subject.shop_id is None else str(subject.shop_id),
            "payouts.payout_id": None if subject.payout_id is None else render_id(PAYOUT, subject.payout_id),
            "payouts.reason": None if error is None else error.reason,
        }
    )
    if error is not None and status is not None and status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        span.fail(error.reason)


@cache
def _request_timer(method: str, route: str, status: int) -> Histogram:
    """The one of these labels, at hand: to look it up costs as much as to use it."""
    return REQUEST_SECONDS.labels(method, route, status)
