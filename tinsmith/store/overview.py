"""What an operator asks of the whole server: what waits and runs, which engines there are, what failed lately.

Functions take a connection; they look at everybody's jobs, so their answers are for operators only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from tinsmith.store import keys
from tinsmith.store.tables import jobs

_LATEST = 5_000  # finished jobs, among which failures are looked for: a look must stay cheap
_STATES = {"queued": sa.text("jobs.state = 'queued'"), "running": sa.text("jobs.state = 'running'")}
_FINISHED = sa.text("jobs.state IN ('done', 'failed')")  # spelt out: only then the partial index is used


@dataclass(frozen=True, slots=True)
class Pending:
    """Jobs of one kind, of one owner, for one base model, that wait (`queued`) or are in its engine's hands."""

    base: str
    state: str
    kind: str
    owner: str
    jobs: int
    oldest_at: float  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class Failure:
    """One job that ended in an error."""

    request_id: str
    base: str
    kind: str
    owner: str
    category: str
    error: str
    finished_at: float
    trace: str | None


def pending(conn: sa.Connection, bases: Sequence[str]) -> list[Pending]:
    """All jobs of these base models that have not ended, counted."""
    found = []
    for state, condition in _STATES.items():
        by = (jobs.c.base, jobs.c.kind, jobs.c.owner)
        statement = sa.select(*by, sa.func.count(), sa.func.min(jobs.c.created_at)).where(condition).group_by(*by)
        for base, kind, owner, count, oldest_at in conn.execute(statement.where(jobs.c.base.in_(bases))):
            found.append(Pending(base, state, kind, owner, count, oldest_at))
    return found


def failures(conn: sa.Connection, bases: Sequence[str], limit: int) -> list[Failure]:
    """The latest failures, newest first, if they are among the latest few thousand jobs that ended."""
    latest = sa.select(jobs).where(_FINISHED).order_by(jobs.c.finished_at.desc()).limit(_LATEST).subquery("jobs")
    statement = (
        sa.select(latest)
        .where(latest.c.state == "failed", latest.c.base.in_(bases))
        .order_by(latest.c.finished_at.desc())
        .limit(limit)
    )
    return [
        Failure(
            request_id=f"{row.subject}:{row.seq}",
            base=row.base,
            kind=row.kind,
            owner=row.owner,
            category=row.category,
            error=row.error or "",
            finished_at=row.finished_at,
            trace=row.trace,
        )
        for row in conn.execute(statement)
    ]


def names_of_owners(conn: sa.Connection) -> dict[str, str]:
    """Owner → the name of the key whose it is. Owners with keys of the settings, or none, have no name."""
    return {key.owner: key.name for key in keys.list_keys(conn)}
