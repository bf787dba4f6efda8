"""Records nobody can ask for any more: old empty sessions, samplers whose weights are gone, losses of what is over.

In small steps: `find` looks at a page of each kind, in the order of their ids, and so holds nobody up, however many
there are; `delete` is a transaction of its own, and looks again. Functions take a connection.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from tinsmith.store.tables import custom_losses, jobs, models, sampler_clients, samplers, sessions
from tinsmith.wire.jobs import GONE_SNAPSHOT

FORGET_SECONDS = 7 * 86400.0
LOOK_ROWS = 500  # of each kind, that one step looks at


@dataclass(frozen=True, slots=True)
class Place:
    """Behind which ids the next step looks; from the beginning if they are empty."""

    sessions: str = ""
    samplers: str = ""
    losses: str = ""


@dataclass(frozen=True, slots=True)
class Forgettable:
    """Ids of what may be deleted."""

    sessions: Sequence[str] = ()
    samplers: Sequence[str] = ()
    losses: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.sessions or self.samplers or self.losses)


def find(conn: sa.Connection, place: Place, now: float, silent_since: float) -> tuple[Forgettable, Place]:
    """A step's work, and where the next one goes on looking.

    Sessions that have nothing in them may go a week after their last sign of life, samplers whose snapshot is gone a
    week after they were made, once their requests are forgotten, and custom losses with sessions that are over, or have
    been silent since that time.
    """
    empty, behind_sessions = _look(conn, sessions, place.sessions, _is_empty(now))
    gone, behind_samplers = _look(conn, samplers, place.samplers, _is_gone(now))
    over, behind_losses = _look(conn, custom_losses, place.losses, _is_over(silent_since))
    return Forgettable(empty, gone, over), Place(behind_sessions, behind_samplers, behind_losses)


def delete(conn: sa.Connection, found: Forgettable, now: float, silent_since: float) -> None:
    """Carries out a step, but for what has come to life meanwhile, or somebody else's transaction holds.

    That may be giving a session its first model, or a sampler another client; one that begins later waits, and finds
    no session.
    """
    empty = _hold(conn, sessions, found.sessions)
    conn.execute(sa.delete(sessions).where(sessions.c.id.in_(empty), _is_empty(now)))
    gone = _hold(conn, samplers, found.samplers)
    conn.execute(sa.delete(sampler_clients).where(sampler_clients.c.sampler_id.in_(gone)))
    conn.execute(sa.delete(samplers).where(samplers.c.id.in_(gone)))
    conn.execute(sa.delete(custom_losses).where(custom_losses.c.id.in_(found.losses), _is_over(silent_since)))


def _hold(conn: sa.Connection, table: sa.Table, ids: Sequence[str]) -> list[str]:
    """Those rows that nobody else holds. A statement of its own: the next one sees what was committed until now."""
    return list(conn.scalars(sa.select(table.c.id).where(table.c.id.in_(ids)).with_for_update(skip_locked=True)))


def _is_empty(now: float) -> sa.ColumnElement[bool]:
    has_any = [sa.exists().where(table.c.session_id == sessions.c.id) for table in (models, samplers, custom_losses)]
    return (sessions.c.seen_at < now - FORGET_SECONDS) & ~sa.or_(*has_any)


def _is_gone(now: float) -> sa.ColumnElement[bool]:
    is_old = samplers.c.created_at < now - FORGET_SECONDS
    return (samplers.c.snapshot == GONE_SNAPSHOT) & is_old & ~sa.exists().where(jobs.c.subject == samplers.c.id)


def _is_over(silent_since: float) -> sa.ColumnElement[bool]:
    is_over = (sessions.c.state != "open") | (sessions.c.seen_at < silent_since)
    return sa.exists().where(sessions.c.id == custom_losses.c.session_id, is_over)


def _look(conn: sa.Connection, table: sa.Table, behind: str, may_go: sa.ColumnElement[bool]) -> tuple[list[str], str]:
    """Those ids of one page of a table that may go, and behind which id the next page begins."""
    page = sa.select(table.c.id, may_go).where(table.c.id > behind).order_by(table.c.id).limit(LOOK_ROWS)
    rows = conn.execute(page).all()
    return [id for id, goes in rows if goes], rows[-1][0] if len(rows) == LOOK_ROWS else ""
