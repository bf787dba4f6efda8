"""What watching costs a request, counted in calls of functions: a call takes about a tenth of a microsecond."""

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from tinsmith.api.observation import HttpCounts, Observed
from tinsmith.engine.watching import Watch
from tinsmith.observe import REQUESTS
from tinsmith.wire.jobs import Header, Outcome

HEADERS = [(b"host", b"127.0.0.1"), (b"x-api-key", b"tml-x"), (b"content-type", b"application/json")]


def calls(action: Callable[[], object]) -> int:
    """How many functions, of Python's or of C's, one run of `action` calls."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # what it would collect is somebody else's
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


async def endpoint(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def http() -> tuple[Callable[[], object], Callable[[], object]]:
    """One request with and without what stands around the application."""
    counts = HttpCounts(CollectorRegistry(), [Route("/x", endpoint)])
    observed = Observed(endpoint, counts)

    async def send(_message: object) -> None: ...

    def run(app: Any) -> None:
        scope = {"type": "http", "method": "POST", "headers": HEADERS, "endpoint": endpoint}
        coroutine = app(scope, None, send)
        with pytest.raises(StopIteration):
            coroutine.send(None)

    run(observed)  # a route's first request finds its counters
    return lambda: run(observed), lambda: run(endpoint)


def job() -> Callable[[], object]:
    """One training job of a batch of one, told to the watch from its beginning to its end."""
    watch = Watch(None, None)  # type: ignore[arg-type]  # asked for a report only
    header = Header(1, "s:train:0", 1, "forward_backward", "me", 64, time.time(), "trace")
    outcome = Outcome(1, b"")

    def tell() -> None:
        watch.begin([header])
        watch.end(header, outcome)

    tell()
    return tell


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    level = REQUESTS.level
    REQUESTS.setLevel("WARNING")
    yield
    REQUESTS.setLevel(level)


def test_a_request_costs_a_few_dozen_calls_more_for_being_counted() -> None:
    watched, alone = http()
    assert 0 < calls(watched) - calls(alone) <= 45


def test_a_job_costs_the_engine_a_few_dozen_calls() -> None:
    assert 0 < calls(job()) <= 40


def test_many_statuses_and_invented_methods_make_no_more_counters() -> None:
    counts = HttpCounts(CollectorRegistry(), [Route("/x", endpoint)])
    for number in range(500):
        counts.count({"endpoint": None, "method": f"M{number}"}, 404, 0.0)
    assert len(counts._known) == 0
    counts.count({"endpoint": endpoint, "method": "GET"}, 200, 0.0)
    assert len(counts._known) == 1
