"""Who did what: one row for every act on a checkpoint, a session's project or a key, in the act's own transaction.

Events are called `{resource}_{action}`. Functions take a connection inside a transaction.
"""

import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tinsmith.store.tables import audit

RESOURCES = {"checkpoints": "checkpoint", "projects": "project", "organizations": "key"}
"""How clients call what events are about, and how the events' names begin."""

_MOST = 100_000  # rows in one answer


@dataclass(frozen=True, slots=True)
class Entry:
    """One act. `at` in seconds since the epoch; `owner` is whose object it was."""

    at: float
    owner: str
    event: str
    details: dict[str, Any]


def note(conn: sa.Connection, owner: str, event: str, **details: object) -> None:
    """Adds a row about what happens in this transaction."""
    conn.execute(sa.insert(audit).values(at=time.time(), owner=owner, event=event, details=details))


def entries(
    conn: sa.Connection, owner: str | None, since: float, until: float, resource: str | None = None
) -> list[Entry]:
    """What happened from `since` until before `until`, oldest first; of one owner, and about one resource, or all."""
    conditions = [audit.c.at >= since, audit.c.at < until]
    if owner is not None:
        conditions.append(audit.c.owner == owner)
    if resource is not None:
        conditions.append(audit.c.event.startswith(f"{resource}_", autoescape=True))
    statement = (
        sa.select(audit.c.at, audit.c.owner, audit.c.event, audit.c.details)
        .where(*conditions)
        .order_by(audit.c.number)
        .limit(_MOST)
    )
    return [Entry(*row) for row in conn.execute(statement)]
