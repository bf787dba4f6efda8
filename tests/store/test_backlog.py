"""What is under way, of whom, and what a request waits for; on both databases."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from tests.store.makers import finish, job
from tinsmith.store import backlog, queue
from tinsmith.store.backlog import Amount, Waiting
from tinsmith.store.database import Database


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin():
        yield conn


def test_only_what_has_not_ended_is_outstanding(conn: sa.Connection) -> None:
    assert backlog.outstanding(conn) == {}
    for seq in range(3):
        queue.submit(conn, job("m", seq, body=b"12345"))
    queue.submit(conn, replace(job("n", 0, body=b""), owner="bob"))
    finish(conn, "m", 3)
    queue.claim(conn, "tiny", "engine", 1)
    assert backlog.outstanding(conn) == {"alice": Amount(3, 15), "bob": Amount(1, 0)}


def test_a_request_is_due_if_it_was_accepted_or_others_wait_for_it(conn: sa.Connection) -> None:
    queue.submit(conn, job("m", 5))
    due = {seq: [backlog.is_due(conn, "m", seq, ordered=ordered) for ordered in (True, False)] for seq in (4, 5, 6)}
    assert due == {4: [True, False], 5: [True, True], 6: [False, False]}
    assert not backlog.is_due(conn, "other", 1, ordered=True)


def test_what_a_request_waits_for(conn: sa.Connection) -> None:
    finish(conn, "m", 0)
    queue.submit(conn, job("n", 0))
    queue.submit(conn, job("m", 1))
    queue.submit(conn, job("m", 3))
    queue.submit(conn, job("s", 7, kind="sample"))
    queue.submit(conn, job("elsewhere", 0, base="large"))
    assert backlog.waiting(conn, "m", 1) == Waiting("optim_step", True, False, own=0, others=1)
    assert backlog.waiting(conn, "m", 3) == Waiting("optim_step", True, True, own=1, others=1)
    assert backlog.waiting(conn, "s", 7) == Waiting("sample", True, False, own=0, others=3)
    queue.claim(conn, "tiny", "engine", 2)
    assert backlog.waiting(conn, "m", 1) == Waiting("optim_step", False, False, own=0, others=1)
    assert backlog.waiting(conn, "m", 0) is None
