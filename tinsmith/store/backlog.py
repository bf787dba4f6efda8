"""What has been accepted and not ended: how much of it each owner has, and what one request waits for.

Functions take a connection; they only read. Nothing here knows what kinds of jobs mean, but for samples: they have no
order among themselves.
"""

from collections import defaultdict
from dataclasses import dataclass

import sqlalchemy as sa

from tinsmith.store.prepared import Prepared
from tinsmith.store.tables import jobs, payloads

_LOOK_BACK = 1_000  # requests of the same model in which a missing one is looked for
_COUNTED = 10_000  # requests of others; further ones are not counted

# Conditions are spelt out instead of parameters: only then do the databases use the partial indexes.
_STATES = (sa.text("jobs.state = 'queued'"), sa.text("jobs.state = 'running'"))
_SUBJECT = sa.bindparam("of_subject", type_=sa.Text)
_SEQ = sa.bindparam("at_seq", type_=sa.BigInteger)

_OUTSTANDING = Prepared(
    any=sa.union_all(
        *(
            sa.select(jobs.c.owner, sa.func.count(), sa.func.coalesce(sa.func.sum(sa.func.length(payloads.c.body)), 0))
            .select_from(jobs.outerjoin(payloads, payloads.c.number == jobs.c.number))
            .where(state)
            .group_by(jobs.c.owner)
            for state in _STATES
        )
    )
)
_IS_DUE = Prepared(
    any=sa.select(jobs.c.number)
    .where(jobs.c.subject == _SUBJECT, jobs.c.seq.between(_SEQ, sa.bindparam("last", type_=sa.BigInteger)))
    .limit(1)
)


@dataclass(frozen=True, slots=True)
class Amount:
    """Requests, and bytes of their payloads."""

    requests: int = 0
    size: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.requests + other.requests, self.size + other.size)


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is before a request that has not ended: how many of its own subject, and of others (10,000 at most).

    `missing` says that one before it has not arrived.
    """

    kind: str
    is_queued: bool
    missing: bool
    own: int
    others: int


def outstanding(conn: sa.Connection) -> dict[str, Amount]:
    """By owner, for those who have anything under way."""
    found: dict[str, Amount] = defaultdict(Amount)
    for owner, requests, size in _OUTSTANDING(conn, {}):
        found[owner] += Amount(int(requests), int(size))
    return dict(found)


def is_due(conn: sa.Connection, subject: str, seq: int, *, ordered: bool) -> bool:
    """Whether a request has been accepted before, or (of a subject with an order) accepted ones wait for it."""
    return bool(_IS_DUE(conn, {"of_subject": subject, "at_seq": seq, "last": seq + _LOOK_BACK * ordered}))


def waiting(conn: sa.Connection, subject: str, seq: int) -> Waiting | None:
    """None once it has ended, or if there is no such request."""
    row = conn.execute(
        sa.select(jobs.c.number, jobs.c.kind, jobs.c.base, jobs.c.state).where(
            jobs.c.subject == subject, jobs.c.seq == seq
        )
    ).first()
    if row is None or row.state not in ("queued", "running"):
        return None
    before = sa.select(jobs.c.number, jobs.c.state).where(
        jobs.c.subject == subject, jobs.c.seq.between(max(0, seq - _LOOK_BACK), seq - 1)
    )
    states = [state for _, state in conn.execute(before)]
    others = sum(
        conn.scalar(
            sa.select(sa.func.count()).select_from(
                sa.select(jobs.c.number)
                .where(state, jobs.c.base == row.base, jobs.c.number < row.number, jobs.c.subject != subject)
                .limit(_COUNTED)
                .subquery()
            )
        )
        or 0
        for state in _STATES
    )
    missing = row.kind != "sample" and len(states) < min(seq, _LOOK_BACK)
    own = sum(state in ("queued", "running") for state in states)
    return Waiting(row.kind, row.state == "queued", missing, own, min(others, _COUNTED))
