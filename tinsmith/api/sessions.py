"""Sessions: a client process's models and samplers, under one id. A finished session takes no new ones."""

import json
import secrets
import time
from typing import Any

import sqlalchemy as sa
from starlette.responses import Response

from tinsmith.api.calls import Call, answer
from tinsmith.store import queue, quotas, records
from tinsmith.wire import service_types, types


async def create_session(call: Call) -> Response:
    """POST /create_session."""
    body = await call.json(service_types.CreateSessionRequest)
    now = time.time()
    session = records.Session(
        id=secrets.token_hex(8),
        owner=call.owner,
        state="open",
        tags=body.tags,
        user_metadata=body.user_metadata or {},
        sdk_version=body.sdk_version,
        project_id=body.project_id,
        display_name=body.display_name,
        finish_reason=None,
        created_at=now,
        seen_at=now,
    )
    is_keys = call.caller.has_key
    await call.services.database.write_async(quotas.create_session, session, is_keys=is_keys)
    return answer(service_types.CreateSessionResponse(session.id))


async def session_heartbeat(call: Call) -> Response:
    """POST /session_heartbeat."""
    body = await call.json(service_types.SessionHeartbeatRequest)
    await call.services.presence.beat(body.session_id, call.owner)
    return answer(service_types.SessionHeartbeatResponse())


async def finish_session(call: Call) -> Response:
    """POST /sessions/{session_id}/finish: the first reason stands. Samples under way are given up."""
    body = await call.json(service_types.FinishSessionRequest)
    reason = body.reason.type if body.detail is None else f"{body.reason.type}: {body.detail}"
    services = call.services
    session_id = call.path("session_id")
    given_up = await services.database.write_async(_finish, session_id, call.owner, reason)
    services.presence.forget(session_id)
    services.doorbell.ring("jobs", ["jobs", *given_up])  # the engine may let go of the session's models, too
    services.doorbell.ring("done", given_up)
    return answer({})


def _finish(conn: sa.Connection, session_id: str, owner: str, reason: str) -> list[str]:
    records.finish_session(conn, session_id, owner, reason)
    return queue.give_up_session(conn, session_id)


async def list_sessions(call: Call) -> Response:
    """GET /sessions: ids, newest first."""
    limit, offset = call.page()
    sessions, _ = await call.services.database.read_async(records.list_sessions, call.viewer, limit, offset)
    return answer(service_types.SessionList([session.id for session in sessions]))


async def get_session(call: Call) -> Response:
    """GET /sessions/{session_id}."""
    return answer(await call.services.database.read_async(_info, call.path("session_id"), call.viewer))


def _info(conn: sa.Connection, session_id: str, owner: str) -> service_types.SessionInfo:
    session = records.require_session(conn, session_id, owner)
    return service_types.SessionInfo(
        training_run_ids=[model.id for model in records.models_of_session(conn, session_id)],
        sampler_ids=[sampler.id for sampler in records.samplers_of_session(conn, session_id)],
        user_metadata=labels(session.user_metadata),
        display_name=session.display_name,
    )


def labels(metadata: dict[str, Any]) -> types.Labels:
    """Metadata as the SDK reads it back: values that are no text, as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
