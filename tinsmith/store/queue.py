"""The job queue, which is also the command log: every accepted operation, in order, with its result.

Functions take a connection inside a transaction (`Database.write`, `Database.read`), so that callers can do several
things in one. A request id is `"{subject}:{seq}"`; the unique (subject, seq) makes a retry the same job.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

TERMINAL = ("done", "failed", "expired")


@dataclass(frozen=True, slots=True)
class Job:
    """What `submit` takes. `tokens` is its cost; `body` is the packed request (see `wire.packing`) or JSON."""

    subject: str
    seq: int
    kind: str
    owner: str
    base: str
    body: bytes
    tokens: int = 0

    @property
    def request_id(self) -> str:
        return f"{self.subject}:{self.seq}"


@dataclass(frozen=True, slots=True)
class Header:
    """A job without its payload: all that planning needs. `number` is the order of arrival."""

    number: int
    subject: str
    seq: int
    kind: str
    owner: str
    tokens: int
    created_at: float

    @property
    def request_id(self) -> str:
        return f"{self.subject}:{self.seq}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: a result, or an error with whose fault it was (`user` or `server`)."""

    number: int
    body: bytes | None = None
    error: str | None = None
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Future:
    """A job as its client sees it. `body` is the result once the state is `done`."""

    request_id: str
    kind: str
    owner: str
    state: str
    body: bytes | None
    error: str | None
    category: str | None


def submit(conn: sa.Connection, job: Job) -> str:
    """Adds a job; the same (subject, seq) again changes nothing. Returns the request id."""
    raise NotImplementedError


def reject(conn: sa.Connection, job: Job, error: str) -> None:
    """Marks a refused request's seq as consumed, so that the next ones do not wait for it. Keeps no payload."""
    raise NotImplementedError


def claim(conn: sa.Connection, base: str, engine: str, limit: int) -> list[Header]:
    """Takes up to `limit` queued jobs, oldest first, as running under `engine`."""
    raise NotImplementedError


def release(conn: sa.Connection, base: str) -> int:
    """Makes every running job of `base` queued again: what a starting engine does with a dead one's work."""
    raise NotImplementedError


def payloads(conn: sa.Connection, numbers: Sequence[int]) -> dict[int, bytes]:
    """The packed requests of these jobs."""
    raise NotImplementedError


def complete(conn: sa.Connection, outcomes: Sequence[Outcome]) -> list[str]:
    """Ends running jobs with their results or errors. Returns the request ids whose waiters are to be rung."""
    raise NotImplementedError


def find(conn: sa.Connection, request_id: str) -> Future | None:
    """A job's state and, when done, its result."""
    raise NotImplementedError


def settled(conn: sa.Connection, subject: str) -> int:
    """The highest seq S such that every seq from 0 to S of `subject` is terminal; -1 if seq 0 is not."""
    raise NotImplementedError


def log(conn: sa.Connection, subject: str, after: int) -> list[Header]:
    """The finished (`done`) jobs of a model behind its recovery point, in order: what a recovery re-executes."""
    raise NotImplementedError


def was_chunked(conn: sa.Connection, subject: str, seq: int) -> bool:
    """Whether a neighbour's arrival shows that this request was one chunk of a larger call.

    Clients send a call's later chunks before its first one, and everything else in order of seq.
    """
    raise NotImplementedError


def prune(conn: sa.Connection, finished_before: float, limit: int = 1000) -> int:
    """Deletes old results (their futures are `expired`) and the payloads that no recovery needs. Returns how many."""
    raise NotImplementedError
