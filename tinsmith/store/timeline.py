"""What was asked of a session's models and samplers, when, and when it ended."""

from dataclasses import dataclass

import sqlalchemy as sa

from tinsmith.store.tables import jobs, models, samplers

MOST = 100_000
"""Requests of one session that are told of: its latest."""


@dataclass(frozen=True, slots=True)
class Span:
    """One request, from its arrival to its end, in seconds since the epoch."""

    number: int
    subject: str
    seq: int
    kind: str
    tokens: int
    state: str
    error: str | None
    began_at: float
    ended_at: float | None


def spans(conn: sa.Connection, session_id: str) -> list[Span]:
    """The latest `MOST` of a session, in order of arrival."""
    columns = (
        *(jobs.c.number, jobs.c.subject, jobs.c.seq, jobs.c.kind, jobs.c.tokens, jobs.c.state, jobs.c.error),
        *(jobs.c.created_at, jobs.c.finished_at),
    )
    subjects = sa.union_all(
        *(sa.select(table.c.id).where(table.c.session_id == session_id) for table in (models, samplers))
    )
    latest = sa.select(*columns).where(jobs.c.subject.in_(subjects)).order_by(jobs.c.number.desc()).limit(MOST)
    return [Span(*row) for row in conn.execute(latest)][::-1]
