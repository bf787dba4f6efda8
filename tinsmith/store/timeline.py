"""What was asked of one model or sampler, when, and when it ended."""

from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from tinsmith.store.tables import jobs


@dataclass(frozen=True, slots=True)
class Span:
    """One request, from its arrival to its end, in seconds since the epoch."""

    number: int
    seq: int
    kind: str
    tokens: int
    state: str
    error: str | None
    began_at: float
    ended_at: float | None


def spans(conn: sa.Connection, subject: str) -> Iterator[Span]:
    """In order of arrival."""
    columns = (
        *(jobs.c.number, jobs.c.seq, jobs.c.kind, jobs.c.tokens, jobs.c.state, jobs.c.error),
        *(jobs.c.created_at, jobs.c.finished_at),
    )
    for row in conn.execute(sa.select(*columns).where(jobs.c.subject == subject).order_by(jobs.c.number)):
        yield Span(*row)
