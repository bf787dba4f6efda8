"""Stands around the whole application: gives every request its trace id, and counts and times what is answered.

The trace id is in every answer, as `X-Trace-Id`. Knows routes and statuses, nothing of what requests are about.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.metrics import disable_created_metrics
from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinsmith.observe import trace_id

HEADER = "x-trace-id"
_KEY = "tinsmith.trace"  # in the ASGI scope
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 45.0)
_NONE = "none"  # in place of a path that is no route's
_ABOUT_THE_SERVER = frozenset({_NONE, "/api/v1/healthz", "/metrics", "/status"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


def new_registry() -> CollectorRegistry:
    """For the metrics of one API process; begins with those of the process itself."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which says when it began
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def trace_of(request: Request) -> str:
    """The trace id of the request."""
    trace: str = request.scope[_KEY]
    return trace


def answer_for(request: Request, trace: str | None) -> None:
    """The answer is about a job that was submitted with this trace id, and names that one."""
    request.scope[_KEY] = trace or request.scope[_KEY]


class HttpCounts:
    """How many requests each route has answered, with which status, and how fast. Bounded by the number of routes."""

    def __init__(self, registry: CollectorRegistry, routes: Iterable[BaseRoute]) -> None:
        self._paths = {route.endpoint: route.path for route in routes if isinstance(route, Route)}
        labels = ("route", "method", "status")
        self._requests = Counter("tinsmith_http_requests", "Answered HTTP requests.", labels, registry=registry)
        help_text = "Seconds from a request's headers to the end of its answer; retrieve_future waits for its job."
        self._seconds = Histogram(
            "tinsmith_http_request_seconds", help_text, ["route"], buckets=_SECONDS, registry=registry
        )
        self._known: dict[tuple[Any, str, int], Callable[[float], None]] = {}
        self.answered = 0
        """Requests that were of use to somebody: neither questions how the server is, nor the server's own failures."""

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """One request that was answered, or broke."""
        key = (scope.get("endpoint"), scope["method"], status)
        count = self._known.get(key) or self._learn(*key)
        count(seconds)

    def _learn(self, endpoint: Any, method: str, status: int) -> Callable[[float], None]:
        """Finds the counters of a route, once: the look-up costs more than the counting."""
        path = self._paths.get(endpoint, _NONE)
        counter = self._requests.labels(path, method if method in _METHODS else "other", str(status))
        histogram = self._seconds.labels(path)

        is_of_use = int(status < 500 and path not in _ABOUT_THE_SERVER)

        def count(seconds: float) -> None:
            self.answered += is_of_use
            counter.inc()
            histogram.observe(seconds)

        if method in _METHODS:  # clients invent methods
            self._known[endpoint, method, status] = count
        return count


class Observed:
    """ASGI middleware: see the module."""

    def __init__(self, app: ASGIApp, counts: HttpCounts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[_KEY] = _trace_from(scope["headers"])
        status = 500  # what is answered to a request that breaks

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-trace-id", scope[_KEY].encode())]
            await send(message)

        began = time.perf_counter()
        try:
            await self._app(scope, receive, observed)
        finally:
            self._counts.count(scope, status, time.perf_counter() - began)


def _trace_from(headers: Iterable[tuple[bytes, bytes]]) -> str:
    traceparent = request_id = None
    for name, value in headers:
        if name == b"traceparent":
            traceparent = value.decode("latin-1")
        elif name == b"x-request-id":
            request_id = value.decode("latin-1")
    return trace_id(traceparent, request_id)
