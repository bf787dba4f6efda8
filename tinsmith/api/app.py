"""The API process as an ASGI application: which route leads where, and how errors become answers."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tinsmith.api import (
    accounts,
    clients,
    copies,
    custom_losses,
    downloads,
    futures,
    identity,
    runs,
    sampling,
    search,
    service,
    sessions,
    traces,
    training,
    uploads,
    weights,
)
from tinsmith.api.auth import Access
from tinsmith.api.backlog import Backlog
from tinsmith.api.calls import Handler, Services, answer, endpoint
from tinsmith.api.catalog import Catalog
from tinsmith.api.chat.errors import dialect_of, error_body
from tinsmith.api.chat.parts import Chat
from tinsmith.api.chat.routes import chat_routes
from tinsmith.api.chat.streams import TokenStreams
from tinsmith.api.metrics import metrics, status
from tinsmith.api.observation import HEADER, HttpCounts, Observed, trace_of
from tinsmith.api.pacing import Pacing
from tinsmith.api.presence import Presence
from tinsmith.api.tokens import InvalidTokenError
from tinsmith.api.turns import InTurn, Turns
from tinsmith.api.waiting import Waiters
from tinsmith.config import Settings
from tinsmith.errors import BusyError, TinsmithError
from tinsmith.observe import REQUESTS, note
from tinsmith.served import Served
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell

PREFIX = "/api/v1"
_RUN = "/training_runs/{run_id}"
_CHECKPOINT = f"{_RUN}/checkpoints/{{segment}}/{{name}}"

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    # They are tried in order, so those on every step's way come first.
    ("POST", "/retrieve_future", futures.retrieve_future),
    ("POST", "/asample", sampling.asample),
    ("POST", "/forward_backward", training.forward_backward),
    ("POST", "/optim_step", training.optim_step),
    ("POST", "/client/config", service.client_config),
    ("POST", "/client/dynamic_config", service.client_dynamic_config),
    ("POST", "/auth/token", identity.issue_token),
    ("GET", "/auth/apikey/me", identity.describe_key),
    ("DELETE", "/auth/apikey/me", identity.revoke_own_key),
    ("GET", "/openapi.json", service.openapi),
    ("GET", "/get_server_capabilities", service.server_capabilities),
    ("POST", "/telemetry", service.telemetry),
    ("POST", "/create_session", sessions.create_session),
    ("POST", "/session_heartbeat", sessions.session_heartbeat),
    ("POST", "/sessions/{session_id}/finish", sessions.finish_session),
    ("GET", "/sessions", sessions.list_sessions),
    ("GET", "/sessions/{session_id}", sessions.get_session),
    ("POST", "/sessions/search", search.search_sessions),
    ("PUT", "/sessions/{session_id}/project", search.assign_project),
    ("GET", "/sessions/{session_id}/trace_export", traces.export_trace),
    ("POST", "/create_model", training.create_model),
    ("POST", "/get_info", training.get_info),
    ("POST", "/create_custom_loss", custom_losses.create_custom_loss),
    ("POST", "/save_weights", weights.save_weights),
    ("POST", "/save_weights_for_sampler", weights.save_weights_for_sampler),
    ("POST", "/save_weights_external", weights.save_weights_external),
    ("POST", "/external_weights_upload_start", uploads.start),
    ("POST", "/external_weights_upload_finish", uploads.finish),
    ("POST", "/load_weights", weights.load_weights),
    ("POST", "/weights_info", weights.weights_info),
    ("POST", "/copy_weights", copies.copy_weights),
    ("POST", "/create_sampling_session", sampling.create_sampling_session),
    ("GET", "/samplers/{sampler_id}", sampling.get_sampler),
    ("POST", "/join_sampling_session", clients.join_sampling_session),
    ("POST", "/retrieve_futures", clients.retrieve_futures),
    ("POST", "/cancel_future", sampling.cancel_future),
    ("GET", "/training_runs", runs.list_runs),
    ("GET", "/training_runs/{run_id}", runs.get_run),
    ("GET", "/training_runs/{run_id}/checkpoints", runs.list_run_checkpoints),
    ("GET", "/checkpoints", runs.list_checkpoints),
    ("DELETE", _CHECKPOINT, runs.delete_checkpoint),
    ("POST", f"{_CHECKPOINT}/publish", runs.publish),
    ("DELETE", f"{_CHECKPOINT}/publish", runs.unpublish),
    ("PUT", f"{_CHECKPOINT}/ttl", runs.set_ttl),
    ("GET", "/audit", accounts.audit_log),
    ("GET", "/billing/usage/events", accounts.usage_events),
    ("GET", "/billing/usage/checkpoints/current", accounts.current_storage),
    ("GET", f"{_RUN}/checkpoints/external_weights/{{name}}/external_weights_urls", downloads.external_weights_urls),
)

log = logging.getLogger(__name__)


def create_app(settings: Settings, served: Sequence[Served], database: Database, doorbell: Doorbell) -> Starlette:
    """The application; its `state.leave` ends all waiting. Database and doorbell are the caller's to open and close."""
    catalog, access = Catalog(served, settings.aliases, database, doorbell), Access(settings, database)
    services = Services(
        settings,
        database,
        doorbell,
        catalog,
        Waiters(doorbell, database),
        access,
        Pacing(),
        Backlog(settings, database),
        Presence(database),
        Turns(),
    )

    chat = Chat.over(TokenStreams(doorbell))

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        services.catalog.start()
        services.waiters.start()
        try:
            yield
        finally:
            services.catalog.close()
            services.waiters.close()
            chat.streams.shut()

    routes = _open_routes(services)
    ours = [(method, PREFIX + path, handler) for method, path, handler in ROUTES]
    ours += [("GET", "/metrics", metrics), ("GET", "/status", status)]
    for method, path, handler in (*ours, *chat_routes(chat)):
        routes.append(Route(path, endpoint(services, handler), methods=[method]))
    counts = HttpCounts(services.registry, routes)
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Observed, counts=counts), Middleware(InTurn, turns=services.turns)],
        lifespan=lifespan,
        exception_handlers={
            TinsmithError: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_bug,
        },
    )
    app.state.services, app.state.chat, app.state.counts = services, chat, counts
    app.state.leave = partial(_leave, services, chat)
    return app


def _leave(services: Services, chat: Chat) -> None:
    services.waiters.leave()
    chat.streams.wake()


def _open_routes(services: Services) -> list[Route]:
    """Those that take no key: health, and files, whose address is the permission."""

    async def health(_request: Request) -> Response:
        return service.health(services)

    files = (
        ("GET", f"{downloads.FILES}/{{token}}/{{name}}", downloads.download),
        ("PUT", f"{uploads.FILES}/{{token}}/{{name}}", uploads.put),
        ("GET", f"{traces.FILES}/{{token}}", traces.download_trace),
    )
    routes = [Route(f"{PREFIX}/healthz", health, methods=["GET"])]
    routes += [Route(PREFIX + path, partial(handler, services), methods=[method]) for method, path, handler in files]
    return routes


async def _on_error(request: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, TinsmithError) else 500
    if status >= 500:
        log.warning("%s %s: %d %s (trace %s)", request.method, request.url.path, status, error, trace_of(request))
    else:
        path = request.url.path
        note(REQUESTS, logging.INFO, "refused", trace=trace_of(request), path=path, status=status, error=str(error))
    response = _explain(request, str(error), status)
    if status in (429, 503):
        response.headers["x-should-retry"] = "true"
    if isinstance(error, InvalidTokenError):  # who has the key gets a new token and asks again
        response.headers["WWW-Authenticate"] = 'Bearer error="invalid_token"'
    if isinstance(error, BusyError):
        response.headers["retry-after"] = f"{error.retry_seconds:.0f}"
    return response


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _explain(request, f"there is no {request.method} {request.url.path} here", 404)
    if error.status_code != 405:
        return _explain(request, error.detail, error.status_code)
    path = request.url.path
    fitting = (route for route in request.app.routes if isinstance(route, Route) and route.path_regex.match(path))
    allowed = ", ".join(sorted({method for route in fitting for method in route.methods or ()}))
    response = _explain(request, f"{path} does not take {request.method}, only {allowed}", 405)
    response.headers["allow"] = allowed
    return response


async def _on_disconnect(request: Request, _error: Exception) -> Response:
    return _explain(request, "the client went away before its body had arrived, or its answer was there", 400)


async def _on_bug(request: Request, error: Exception) -> Response:
    trace = trace_of(request)
    log.error("%s %s failed (trace %s)", request.method, request.url.path, trace, exc_info=error)
    response = _explain(request, f"the server failed on this request; its log says why (trace {trace})", 500)
    response.headers[HEADER] = trace  # made outside of what gives the others theirs
    return response


def _explain(request: Request, reason: str, status: int) -> Response:
    """An error, as the request's kind of client reads it."""
    return answer(error_body(dialect_of(request), status, reason), status)
