"""Jobs and records with everything filled in that a test does not care about."""

import sqlalchemy as sa

from tinsmith.store import pruning, queue, records, tables
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
