"""Records that cost a client nothing to make: how many an owner may have, and when they are forgotten.

Sessions that never had anything in them are forgotten a week after their last sign of life, custom losses with their
sessions. Until then they are bounded by number, and losses by size. Functions take a connection inside a transaction.
"""

import json
import time
from typing import Any

import sqlalchemy as sa

from tinsmith.errors import LimitError, TooLargeError
from tinsmith.store import records
from tinsmith.store.tables import custom_losses, models, samplers, sessions

SESSIONS_A_DAY = 5_000  # of one owner
SESSION_BYTES = 2**16  # of what a session is called and described by
LOSSES, LOSS_BYTES = 10_000, 2**24  # of one owner, in sessions that are not over; each new one reads what is there
FORGET_SECONDS = 7 * 86400.0
_DAY_SECONDS = 86400.0
_AT_ONCE = 500  # records that are forgotten in one transaction


def create_session(conn: sa.Connection, session: records.Session) -> None:
    """Adds a session under a new id. Raises TooLargeError, and LimitError for one too many a day."""
    described = [session.tags, session.user_metadata, session.sdk_version, session.project_id, session.display_name]
    if (size := len(json.dumps(described))) > SESSION_BYTES:
        raise TooLargeError(f"tags, metadata and names of the session take {size} bytes; allowed: {SESSION_BYTES}")
    since = time.time() - _DAY_SECONDS
    recent = (
        sa.select(sessions.c.id)
        .where(sessions.c.owner == session.owner, sessions.c.created_at > since)
        .limit(SESSIONS_A_DAY)
        .subquery()
    )
    if (conn.scalar(sa.select(sa.func.count()).select_from(recent)) or 0) >= SESSIONS_A_DAY:
        raise LimitError(
            f"this key has created {SESSIONS_A_DAY} sessions within a day, as many as it may; use one for more "
            "(a ServiceClient is a session, and may have any number of training and sampling clients)"
        )
    records.create_session(conn, session)


def check_losses(conn: sa.Connection, owner: str, program: dict[str, Any]) -> None:
    """Raises LimitError if an owner's custom losses are too many, or too large, with one more."""
    sizes = sa.func.coalesce(sa.func.sum(sa.func.length(sa.cast(custom_losses.c.program, sa.Text))), 0)
    number, size = conn.execute(sa.select(sa.func.count(), sizes).where(custom_losses.c.owner == owner)).one()
    if number >= LOSSES or size + len(json.dumps(program)) > LOSS_BYTES:
        raise LimitError(
            f"this key has {number} custom losses of {size} bytes, of at most {LOSSES} and {LOSS_BYTES} bytes; they go "
            "with their sessions: finish some (ServiceClient.close)"
        )


def forget(conn: sa.Connection, now: float, silent_since: float) -> None:
    """Deletes some custom losses of sessions that are over, or silent since then, and some old empty sessions.

    None that somebody else's transaction holds: it may be giving a session its first model.
    """
    over = sa.select(sessions.c.id).where((sessions.c.state != "open") | (sessions.c.seen_at < silent_since))
    losses = sa.select(custom_losses.c.id).where(custom_losses.c.session_id.in_(over)).limit(_AT_ONCE)
    losses = losses.with_for_update(skip_locked=True)
    conn.execute(sa.delete(custom_losses).where(custom_losses.c.id.in_(losses)))
    empty = sa.select(sessions.c.id).where(sessions.c.seen_at < now - FORGET_SECONDS)
    for table in (models, samplers, custom_losses):
        empty = empty.where(~sa.exists().where(table.c.session_id == sessions.c.id))
    empty = empty.limit(_AT_ONCE).with_for_update(skip_locked=True)
    conn.execute(sa.delete(sessions).where(sessions.c.id.in_(empty)))
