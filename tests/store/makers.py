"""Jobs and records with everything filled in that a test does not care about."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from tinsmith.store import forgetting, pruning, queue, records, tables
from tinsmith.wire.jobs import Job, Outcome


def job(
    subject: str, seq: int, *, kind: str = "optim_step", base: str = "tiny", body: bytes = b"body", tokens: int = 1
) -> Job:
    return Job(subject, seq, kind, "alice", base, body, tokens)


def finish(conn: sa.Connection, subject: str, seq: int, *, body: bytes = b"result", error: str | None = None) -> None:
    """Submits a job and ends it."""
    queue.submit(conn, job(subject, seq))
    of_job = (tables.jobs.c.subject == subject) & (tables.jobs.c.seq == seq)
    number = conn.execute(sa.update(tables.jobs).where(of_job).values(state="running").returning(tables.jobs.c.number))
    outcome = Outcome(number.scalar_one(), None if error else body, error, "user" if error else None)
    assert queue.complete(conn, [outcome]) == [f"{subject}:{seq}"]


def session(id: str = "s", owner: str = "alice", created_at: float = 1.0) -> records.Session:
    return records.Session(id, owner, "open", ["a"], {"k": [1]}, "0.38.0", None, None, None, created_at, created_at)


def model(id: str = "m", session_id: str = "s", owner: str = "alice", created_at: float = 1.0) -> records.Model:
    spec = {"rank": 8, "seed": 1}
    return records.Model(
        id, session_id, owner, "tiny", "Tiny", spec, {}, "ready", None, None, created_at, used_at=created_at
    )


def make_model(conn: sa.Connection, id: str) -> None:
    records.create_session(conn, session())
    records.create_model(conn, model(id))


def prune(conn: sa.Connection, finished_before: float) -> None:
    """Deletes all that can be deleted, however many steps that takes."""
    place, more, found = pruning.Place(), True, pruning.Prunable()
    while more or found or place.jobs:
        found, place, more = pruning.find(conn, finished_before, place)
        pruning.delete(conn, found)


def forget(conn: sa.Connection, now: float, silent_since: float) -> None:
    """Forgets all that can be forgotten in one page."""
    found, place = forgetting.find(conn, forgetting.Place(), now, silent_since)
    assert place == forgetting.Place()
    forgetting.delete(conn, found, now, silent_since)


@dataclass
class Plan:
    """How a database carries out statements."""

    conn: sa.Connection
    statements: list[tuple[str, Any]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """On Postgres as if reading whole tables cost a fortune: where it plans to do so, there is no other way."""
        if self.conn.dialect.name == "postgresql":
            self.conn.exec_driver_sql("SET LOCAL enable_seqscan = off")
            self.conn.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
        explain = "EXPLAIN " if self.conn.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
        rows = [self.conn.exec_driver_sql(explain + text, values) for text, values in list(self.statements)]
        return [str(row[-1]) for found in rows for row in found]

    def found(self) -> list[str]:
        """The lines that say by which index rows are found, each with its condition."""
        lines = self.lines()
        return [" ".join(pair) for pair in itertools.pairwise([*lines, ""]) if "Index" in pair[0] or "INDEX" in pair[0]]

    def scans(self) -> list[str]:
        """The lines of the plans that read a whole table, or a whole index of one."""
        harmless = ("SCAN CONSTANT", "SCAN (")  # of nothing, and of what a part of the query has found
        return [
            line
            for line in self.lines()
            if "Seq Scan on" in line or (line.startswith("SCAN") and not line.startswith(harmless))
        ]


@contextmanager
def planned(conn: sa.Connection) -> Iterator[Plan]:
    """The plans of all statements that SQLAlchemy executes meanwhile."""
    plan = Plan(conn)

    def note(*arguments: Any) -> None:
        plan.statements.append((arguments[2], arguments[3]))

    sa.event.listen(conn, "before_cursor_execute", note)
    try:
        yield plan
    finally:
        sa.event.remove(conn, "before_cursor_execute", note)
