"""Sessions as people look for them: searched, and put into projects."""

import time
from datetime import UTC, datetime

import sqlalchemy as sa
from starlette.responses import Response

from tinsmith.api.calls import Call, answer
from tinsmith.api.sessions import labels
from tinsmith.errors import UserError
from tinsmith.store import audit, records, search
from tinsmith.wire import accounts

NO_PROJECT = "default"
"""How sessions without a project are listed."""

_ALIVE_SECONDS = 900.0  # a client that was not heard of for longer may be gone


async def search_sessions(call: Call) -> Response:
    """POST /sessions/search: newest first."""
    body = await call.json(accounts.SessionSearchRequest)
    wanted = search.Wanted(
        owners=_owners(call, body.owner),
        session_id=body.session_id,
        display_name=body.display_name,
        projects=None if body.project_ids is None else frozenset(body.project_ids),
        metadata=tuple(body.user_metadata.items()),
        states=None if body.statuses is None else frozenset(_states(body)),
        alive_since=time.time() - _ALIVE_SECONDS,
    )
    page = await call.services.database.read_async(_page, wanted, body.limit, _behind(body.cursor))
    return answer(page)


def _page(
    conn: sa.Connection, wanted: search.Wanted, limit: int, behind: tuple[float, str] | None
) -> accounts.SessionSearchResponse:
    found = search.find_sessions(conn, wanted, limit + 1, behind)
    page = found[:limit]
    kept = search.kept_by(conn, [session.id for session in page])
    summaries = [_summary(session, kept.get(session.id, search.Kept(0, 0)), wanted.alive_since) for session in page]
    cursor = None
    if len(found) > limit:
        cursor = accounts.SearchCursor(summaries[-1].created_at, page[-1].id)
    return accounts.SessionSearchResponse(summaries, cursor)


def _summary(session: records.Session, kept: search.Kept, alive_since: float) -> accounts.SessionSummary:
    status: accounts.FinishedStatus | accounts.ActiveStatus | None = None
    state = search.state_of(session, alive_since)
    if state == "active":
        status = accounts.ActiveStatus()
    elif state is not None:
        _, _, detail = (session.finish_reason or "").partition(": ")
        status = accounts.FinishedStatus({"type": state}, detail or None)
    return accounts.SessionSummary(
        session_id=session.id,
        created_at=datetime.fromtimestamp(session.created_at, UTC).isoformat(),
        owner=session.owner,
        project_id=session.project_id or NO_PROJECT,
        status=status,
        checkpoints_count=kept.count,
        display_name=session.display_name,
        user_metadata=labels(session.user_metadata),
        checkpoint_storage_bytes=kept.size_bytes,
    )


def _owners(
    call: Call, asked: accounts.OwnOwner | accounts.AccessibleOwner | accounts.UserOwner
) -> frozenset[str] | None:
    """Whose sessions are looked through: what is asked for, as far as the caller may see it."""
    if isinstance(asked, accounts.OwnOwner):
        return frozenset({call.owner})
    named = frozenset(asked.owner_urns) if isinstance(asked, accounts.UserOwner) else None
    if call.viewer == records.EVERYBODY:
        return named
    return frozenset({call.owner}) if named is None else named & {call.owner}


def _states(body: accounts.SessionSearchRequest) -> list[str]:
    states = []
    for query in body.statuses or ():
        if isinstance(query, accounts.ActiveQuery):
            states.append("active")
        elif isinstance(query, accounts.FinishedQuery):
            states += query.reasons or ["success", "errored", "interrupted"]
    return states


def _behind(cursor: accounts.SearchCursor | None) -> tuple[float, str] | None:
    if cursor is None:
        return None
    try:
        return datetime.fromisoformat(cursor.last_created_at).timestamp(), cursor.last_session_id
    except (ValueError, OverflowError):
        raise UserError(
            f"the cursor's last_created_at is {cursor.last_created_at[:80]!r}; it must be the time of an earlier answer"
        ) from None


async def assign_project(call: Call) -> Response:
    """PUT /sessions/{session_id}/project."""
    body = await call.json(accounts.ProjectRequest)
    await call.services.database.write_async(_assign, call.path("session_id"), call.owner, body.project_id)
    return answer({})


def _assign(conn: sa.Connection, session_id: str, owner: str, project_id: str) -> None:
    records.require_session(conn, session_id, owner)
    records.update_session(conn, session_id, project_id=project_id)
    audit.note(conn, owner, "project_session_assign", session_id=session_id, project_id=project_id)
