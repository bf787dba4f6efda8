"""Which samples of one client have ended since it last asked.

The samples of a sampler end in one engine's transactions, one after the other; so the time of the last end that a
client has heard of is where it goes on. (A system clock that is set back would hide ends.)
"""

from dataclasses import dataclass

import sqlalchemy as sa

from tinsmith.store.tables import jobs, results

MOST = 10_000  # in one answer: more than end in one transaction

_ARE_SAMPLES = sa.text("jobs.kind = 'sample'")  # spelt out: only then do the databases use the partial index

CLIENT_SEQS = 10**9
"""Client n of a sampler (see `clients`) numbers its samples from n times this."""


@dataclass(frozen=True, slots=True)
class End:
    """A sample that is over: `size` is that of its result in bytes, None if there is none."""

    request_id: str
    finished_at: float
    state: str
    size: int | None


def ended_since(conn: sa.Connection, sampler_id: str, client: int, since: float) -> list[End]:
    """The client's samples that ended after `since`, in order; the first of many, but all that ended at one time."""
    statement = (
        sa.select(jobs.c.seq, jobs.c.finished_at, jobs.c.state, sa.func.length(results.c.body))
        .select_from(jobs.outerjoin(results, results.c.number == jobs.c.number))
        .where(_ARE_SAMPLES, jobs.c.subject == sampler_id, jobs.c.finished_at > since)
        .where(jobs.c.seq >= client * CLIENT_SEQS, jobs.c.seq < (client + 1) * CLIENT_SEQS)
        .order_by(jobs.c.finished_at, jobs.c.number)
        .limit(MOST)
    )
    ends = [End(f"{sampler_id}:{seq}", *rest) for seq, *rest in conn.execute(statement)]
    if len(ends) < MOST:
        return ends
    return [end for end in ends if end.finished_at < ends[-1].finished_at] or ends
