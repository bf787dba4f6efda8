"""The queue against a model of it in ten lines of Python, under every order of events that hypothesis thinks of."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.store.makers import job, make_model, prune
from tinsmith.store import queue, tables
from tinsmith.store.database import Database
from tinsmith.wire.jobs import Outcome

SUBJECTS = ("model", "sampler")  # a living model, and something that nobody recovers
subjects = st.sampled_from(SUBJECTS)
seqs = st.integers(0, 5)


@dataclass
class Expected:
    """What a job should look like."""

    number: int
    body: bytes
    state: str = "queued"
    result: bytes | None = None
    error: str | None = None


class QueueMachine(RuleBasedStateMachine):
    """Runs inside one transaction that is never committed."""

    def __init__(self, conn: sa.Connection) -> None:
        super().__init__()
        self.conn = conn
        self.jobs: dict[tuple[str, int], Expected] = {}
        self.arrived = 0

    def _new(self, subject: str, seq: int, body: bytes) -> Expected | None:
        if (subject, seq) in self.jobs:
            return None
        self.arrived += 1
        self.jobs[subject, seq] = Expected(self.arrived, body)
        return self.jobs[subject, seq]

    def _in(self, *states: str) -> list[Expected]:
        return sorted((job for job in self.jobs.values() if job.state in states), key=lambda job: job.number)

    @rule(subject=subjects, seq=seqs, body=st.binary(max_size=3))
    def submit(self, subject: str, seq: int, body: bytes) -> None:
        self._new(subject, seq, body)
        assert queue.submit(self.conn, job(subject, seq, body=body)) == f"{subject}:{seq}"

    @rule(subject=subjects, seq=seqs)
    def reject(self, subject: str, seq: int) -> None:
        expected = self._new(subject, seq, b"")
        if expected is not None:
            expected.state, expected.error = "failed", "refused"
        queue.reject(self.conn, job(subject, seq), "refused")

    @rule(limit=st.integers(1, 4))
    def claim(self, limit: int) -> None:
        wanted = self._in("queued")[:limit]
        headers = queue.claim(self.conn, "tiny", "engine", limit)
        assert [header.seq for header in headers] == [self._seq(expected) for expected in wanted]
        bodies = queue.payloads(self.conn, [header.number for header in headers])
        assert [bodies[header.number] for header in headers] == [expected.body for expected in wanted]
        for expected in wanted:
            expected.state = "running"

    @rule()
    def release(self) -> None:
        assert queue.release(self.conn, "tiny") == len(self._in("running"))
        for expected in self._in("running"):
            expected.state = "queued"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), fails=st.booleans())
    def complete(self, data: st.DataObject, fails: bool) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.jobs)), unique=True))
        outcomes, rung = [], []
        for key in chosen:
            expected = self.jobs[key]
            outcomes.append(Outcome(self._number(key), None if fails else b"r", "e" if fails else None))
            if expected.state in ("queued", "running"):
                rung.append(f"{key[0]}:{key[1]}")
                expected.state = "failed" if fails else "done"
                expected.result, expected.error = (None, "e") if fails else (b"r", None)
        assert sorted(queue.complete(self.conn, outcomes)) == sorted(rung)

    @rule()
    def prune_everything_old(self) -> None:
        prune(self.conn, 2e9)
        for key, expected in list(self.jobs.items()):
            if expected.state in ("done", "failed", "expired"):
                expected.state, expected.result = "expired", None
                if key[0] == "sampler":  # finished more than a week before the year 2033
                    del self.jobs[key]

    @invariant()
    def futures_are_what_the_model_says(self) -> None:
        for subject in SUBJECTS:
            for seq in range(6):
                future, expected = queue.find(self.conn, f"{subject}:{seq}"), self.jobs.get((subject, seq))
                assert (future is None) == (expected is None)
                if future is not None and expected is not None:
                    assert (future.state, future.body, future.error) == (
                        expected.state,
                        expected.result,
                        expected.error,
                    )

    @invariant()
    def history_is_the_unbroken_beginning(self) -> None:
        for subject in SUBJECTS:
            ended = []
            for seq in range(6):
                expected = self.jobs.get((subject, seq))
                if expected is None or expected.state in ("queued", "running"):
                    break
                ended.append((seq, "failed" if expected.error else "done"))
            past = queue.history(self.conn, subject, -1)
            assert [(entry.header.seq, entry.state) for entry in past] == ended

    @invariant()
    def chunks_are_those_that_arrived_out_of_order(self) -> None:
        for (subject, seq), expected in self.jobs.items():
            others = [(s, other.number) for (of, s), other in self.jobs.items() if of == subject]
            chunked = any((s > seq) != (number > expected.number) for s, number in others if s != seq)
            assert queue.was_chunked(self.conn, subject, seq) == chunked

    @invariant()
    def what_a_recovery_needs_is_there(self) -> None:
        numbers = [self._number(key) for key, e in self.jobs.items() if key[0] == "model" and e.error is None]
        assert len(queue.payloads(self.conn, numbers)) == len(numbers)

    def _number(self, key: tuple[str, int]) -> int:
        of_job = (tables.jobs.c.subject == key[0]) & (tables.jobs.c.seq == key[1])
        return int(self.conn.execute(sa.select(tables.jobs.c.number).where(of_job)).scalar_one())

    def _seq(self, expected: Expected) -> int:
        return next(seq for (_, seq), job in self.jobs.items() if job is expected)


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin() as transaction:
        make_model(conn, "model")
        yield conn
        transaction.rollback()


@pytest.mark.hypothesis
def test_the_queue_behaves_as_its_model(conn: sa.Connection) -> None:
    def machine() -> QueueMachine:
        for table in (tables.payloads, tables.results, tables.jobs):
            conn.execute(sa.delete(table))
        return QueueMachine(conn)

    examples = settings(max_examples=25, stateful_step_count=25, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=examples)
