"""What operators see of the whole store."""

import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from tests.store.makers import finish, job
from tinsmith.store import keys, overview, queue
from tinsmith.store.database import Database
from tinsmith.wire.jobs import Job, Outcome


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin():
        yield conn


def test_jobs_that_have_not_ended_are_counted_by_base_state_kind_and_owner(conn: sa.Connection) -> None:
    for subject, owner, kind, base in (
        ("a", "alice", "sample", "tiny"), ("b", "alice", "sample", "tiny"), ("c", "bob", "sample", "tiny"),
        ("d", "bob", "optim_step", "tiny"), ("e", "bob", "optim_step", "other"), ("f", "bob", "sample", "unserved"),
    ):  # fmt: skip
        queue.submit(conn, Job(subject, 1, kind, owner, base, b""))
    before = time.time()
    claimed = queue.claim(conn, "tiny", "engine", 1)
    queue.claim(conn, "other", "engine", 1)
    finish(conn, "z", 1)
    found = overview.pending(conn, ["tiny", "other"])
    assert {(p.base, p.state, p.kind, p.owner): p.jobs for p in found} == {
        ("tiny", "running", "sample", "alice"): 1,
        ("tiny", "queued", "sample", "alice"): 1,
        ("tiny", "queued", "sample", "bob"): 1,
        ("tiny", "queued", "optim_step", "bob"): 1,
        ("other", "running", "optim_step", "bob"): 1,
    }
    assert all(before - 60 < p.oldest_at <= before for p in found)
    running = next(p for p in found if (p.base, p.state) == ("tiny", "running"))
    assert running.oldest_at == claimed[0].created_at


def test_the_latest_failures_come_first_with_their_errors_and_traces(conn: sa.Connection) -> None:
    for seq in range(4):
        queue.submit(conn, Job("m", seq, "sample", "alice", "tiny", b"", trace=f"trace{seq}"))
        number = queue.claim(conn, "tiny", "engine", 1)[0].number
        outcome = Outcome(number, b"") if seq == 1 else Outcome(number, error=f"error {seq}", category="server")
        queue.complete(conn, [outcome])
    queue.reject(conn, job("n", 1, base="unserved"), "refused")
    found = overview.failures(conn, ["tiny"], 2)
    assert [(f.request_id, f.error, f.trace, f.category) for f in found] == [
        ("m:3", "error 3", "trace3", "server"),
        ("m:2", "error 2", "trace2", "server"),
    ]


def test_looking_for_failures_and_pending_jobs_uses_the_partial_indexes(sqlite_url: str) -> None:
    database, plans = Database(sqlite_url), []
    database.migrate()

    def explain(conn: sa.Connection) -> None:
        def note(_conn: object, cursor: object, statement: str, parameters: object, *_: object) -> None:
            if statement.lstrip().startswith("SELECT"):
                rows = conn.connection.cursor().execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
                plans.append(" ".join(str(row[3]) for row in rows))

        sa.event.listen(conn, "before_cursor_execute", note)
        overview.pending(conn, ["tiny"])
        overview.failures(conn, ["tiny"], 10)

    database.read(explain)
    database.close()
    assert [index in plan for plan, index in zip(plans, ("queued", "running", "finished"), strict=True)] == [True] * 3
    assert all("SCAN jobs USING INDEX" in plan or "SEARCH jobs USING INDEX" in plan for plan in plans)


def test_owners_are_called_as_their_keys(conn: sa.Connection) -> None:
    _, key = keys.new_key("anna")
    keys.create_key(conn, key)
    assert overview.names_of_owners(conn) == {key.owner: "anna"}


def test_a_jobs_trace_id_is_in_its_header_and_in_its_future(conn: sa.Connection) -> None:
    queue.submit(conn, Job("m", 1, "sample", "alice", "tiny", b"", trace="abc"))
    queue.submit(conn, Job("m", 2, "sample", "alice", "tiny", b""))
    assert [header.trace for header in queue.claim(conn, "tiny", "engine", 2)] == ["abc", None]
    futures = [queue.find(conn, f"m:{seq}") for seq in (1, 2)]
    assert [future.trace for future in futures if future] == ["abc", None]
