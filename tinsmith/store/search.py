"""Finding sessions: by id, name, project, metadata, owner and state, newest first, a page at a time."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from tinsmith.store.records import Session
from tinsmith.store.tables import checkpoints, models, sessions

_SAME_TIME = 1e-6  # seconds; what travels of a time is microseconds
_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Wanted:
    """What sessions must be like; None is anything.

    A session is found by its id or by its display name, if both are given. `owners` None: everybody's. `metadata` must
    be there as it is. `states` are `active`, `success`, `errored`, `interrupted`; `alive_since` is since when a living
    client would have been heard of.
    """

    owners: Collection[str] | None
    session_id: str | None = None
    display_name: str | None = None
    projects: Collection[str] | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    states: Collection[str] | None = None
    alive_since: float = 0.0


@dataclass(frozen=True, slots=True)
class Kept:
    """A session's checkpoints: how many, and their bytes."""

    count: int
    size_bytes: int


def state_of(session: Session, alive_since: float) -> str | None:
    """`active`, or how its client finished it; None if it is open and its client silent."""
    if session.state == "open":
        return "active" if session.seen_at >= alive_since else None
    return (session.finish_reason or "").partition(":")[0]


def find_sessions(
    conn: sa.Connection, wanted: Wanted, limit: int, behind: tuple[float, str] | None = None
) -> list[Session]:
    """Up to `limit` of them, behind the one made at this time and with this id, if that is given."""
    found: list[Session] = []
    for session in _candidates(conn, wanted, behind):
        if _fits(session, wanted):
            found.append(session)
            if len(found) == limit:
                break
    return found


def kept_by(conn: sa.Connection, session_ids: Sequence[str]) -> dict[str, Kept]:
    """What these sessions' checkpoints take; those without any are left out."""
    statement = (
        sa.select(models.c.session_id, sa.func.count(), sa.func.sum(checkpoints.c.size_bytes))
        .join(checkpoints, checkpoints.c.model_id == models.c.id)
        .where(models.c.session_id.in_(session_ids))
        .group_by(models.c.session_id)
    )
    return {session_id: Kept(count, int(size)) for session_id, count, size in conn.execute(statement)}


def _candidates(conn: sa.Connection, wanted: Wanted, behind: tuple[float, str] | None) -> Iterator[Session]:
    """Those that fit as far as the database can tell."""
    newest_first = (
        sa.select(sessions)
        .where(*_conditions(wanted))
        .order_by(sessions.c.created_at.desc(), sessions.c.id.desc())
        .limit(_AT_ONCE)
    )
    while True:
        statement = newest_first
        if behind is not None:
            at, session_id = behind
            older = sessions.c.created_at < at - _SAME_TIME
            same = sessions.c.created_at.between(at - _SAME_TIME, at + _SAME_TIME) & (sessions.c.id < session_id)
            statement = statement.where(older | same)
        page = [Session(**row) for row in conn.execute(statement).mappings()]
        yield from page
        if len(page) < _AT_ONCE:
            return
        behind = page[-1].created_at, page[-1].id


def _conditions(wanted: Wanted) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    if wanted.owners is not None:
        conditions.append(sessions.c.owner.in_(wanted.owners))
    if wanted.projects is not None:
        conditions.append(sessions.c.project_id.in_(wanted.projects))
    names = []
    if wanted.session_id is not None:
        names.append(sessions.c.id == wanted.session_id)
    if wanted.display_name is not None:
        words = wanted.display_name.split()
        names.append(sa.and_(sa.true(), *(sessions.c.display_name.icontains(word, autoescape=True) for word in words)))
    if names:
        conditions.append(sa.or_(*names))
    return conditions


def _fits(session: Session, wanted: Wanted) -> bool:
    metadata = session.user_metadata
    if any(metadata.get(key) != value for key, value in wanted.metadata):
        return False
    return wanted.states is None or state_of(session, wanted.alive_since) in wanted.states
