"""A session's timeline as a file for Perfetto (ui.perfetto.dev): what was asked when, and when it ended.

The file is in the JSON form of traces, which Perfetto reads whatever the file is called. Its address is signed and
needs no key; the file is made when it is fetched, so that it holds all that has happened until then.
"""

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import sqlalchemy as sa
from itsdangerous import BadSignature, URLSafeSerializer
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.api.calls import Call, Services, answer
from tinsmith.errors import GoneError, NotFoundError
from tinsmith.store import records, timeline
from tinsmith.store.server_secrets import require_secret
from tinsmith.wire import accounts

FILES = "/traces"
LIFETIME_SECONDS = 3600.0
_MICROSECONDS = 1e6


async def export_trace(call: Call) -> Response:
    """GET /sessions/{session_id}/trace_export: the address of the session's trace."""
    session_id = call.path("session_id")
    database = call.services.database
    await database.read_async(records.require_session, session_id, call.viewer)
    signer = await _signer(call.services)
    token = signer.dumps([session_id, time.time() + LIFETIME_SECONDS])
    base = str(call.request.url).partition("/sessions/")[0]
    return answer(accounts.TraceExport("ready", f"{base}{FILES}/{token}"))


async def download_trace(services: Services, request: Request) -> Response:
    """GET /traces/{token}: the trace. The address itself is the permission."""
    signer = await _signer(services)
    try:
        session_id, expires = signer.loads(request.path_params["token"])
    except BadSignature:
        raise NotFoundError("there is no such trace") from None
    if time.time() > expires:
        raise GoneError("this address has expired; ask for a new one with trace_export")
    content = await services.database.read_async(_trace, session_id)
    name = f'attachment; filename="{session_id}.pftrace"'
    return Response(content, media_type="application/json", headers={"Content-Disposition": name})


async def _signer(services: Services) -> URLSafeSerializer:
    secret = await services.database.write_async(require_secret, "traces")
    return URLSafeSerializer(secret, salt="trace")


def _trace(conn: sa.Connection, session_id: str) -> bytes:
    """The file: one thread for each model and sampler, on it a slice for each request, from its arrival to its end."""
    spans, threads = timeline.spans(conn, session_id), dict[str, int]()
    which = f" (its latest {timeline.MOST:,} requests)" if len(spans) == timeline.MOST else ""
    events: list[dict[str, Any]] = [_name("process_name", 0, f"session {session_id}{which}")]
    for span in spans:
        if span.subject not in threads:
            threads[span.subject] = len(threads) + 1
            events.append(_name("thread_name", threads[span.subject], span.subject))
        events.extend(_slice(span, threads[span.subject]))
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"})


def _name(kind: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": thread, "name": kind, "args": {"name": name}}


def _slice(span: timeline.Span, thread: int) -> Iterator[dict[str, Any]]:
    """Its beginning and its end, as an asynchronous pair: requests overlap."""
    about = {"cat": span.kind, "name": span.kind, "id": span.number, "pid": 1, "tid": thread}
    details = {"seq": span.seq, "tokens": span.tokens, "state": span.state}
    if span.error is not None:
        details["error"] = span.error
    yield {**about, "ph": "b", "ts": span.began_at * _MICROSECONDS, "args": details}
    if span.ended_at is not None:
        yield {**about, "ph": "e", "ts": span.ended_at * _MICROSECONDS}
