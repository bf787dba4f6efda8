"""The queue: each accepted operation once, in order, with its result; on both databases."""

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from tests.store.makers import finish, job, make_model, prune
from tinsmith.store import queue, records, tables
from tinsmith.store.database import Database
from tinsmith.wire.jobs import Header, Outcome

FUTURE = 2e9  # seconds since the epoch: later than anything in these tests


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    """One transaction, for tests that need no second."""
    with database._writing.connect() as conn, conn.begin():
        yield conn


def numbers(headers: list[Header]) -> list[int]:
    return [header.number for header in headers]


def claimed(conn: sa.Connection, limit: int = 100) -> list[Header]:
    return queue.claim(conn, "tiny", "engine", limit)


def count(conn: sa.Connection, table: sa.Table) -> int:
    return conn.scalar(sa.select(sa.func.count()).select_from(table)) or 0


# Submitting


def test_a_submitted_job_comes_back_with_its_payload(conn: sa.Connection) -> None:
    assert queue.submit(conn, job("m", 1, body=b"\0\xffpayload", tokens=7)) == "m:1"
    [header] = claimed(conn)
    assert (header.subject, header.seq, header.kind, header.owner, header.tokens) == ("m", 1, "optim_step", "alice", 7)
    assert header.request_id == "m:1"
    assert abs(header.created_at - time.time()) < 60
    assert queue.payloads(conn, [header.number]) == {header.number: b"\0\xffpayload"}


def test_submitting_the_same_seq_again_changes_nothing(conn: sa.Connection) -> None:
    queue.submit(conn, job("m", 1, body=b"first"))
    assert queue.submit(conn, job("m", 1, kind="other", body=b"second")) == "m:1"
    [header] = claimed(conn)
    assert header.kind == "optim_step"
    assert queue.payloads(conn, [header.number]) == {header.number: b"first"}
    queue.submit(conn, job("m", 1))
    assert claimed(conn) == [], "a retry of a running job must not run it again"


def test_a_retry_after_the_end_does_not_run_again(conn: sa.Connection) -> None:
    finish(conn, "m", 1, body=b"result")
    queue.submit(conn, job("m", 1))
    assert claimed(conn) == []
    future = queue.find(conn, "m:1")
    assert future is not None and (future.state, future.body) == ("done", b"result")


def test_a_rejected_seq_is_consumed_and_keeps_no_payload(conn: sa.Connection) -> None:
    queue.reject(conn, job("m", 3), "no such loss")
    future = queue.find(conn, "m:3")
    assert future is not None
    assert (future.state, future.error, future.category, future.body) == ("failed", "no such loss", "user", None)
    assert claimed(conn) == []
    assert count(conn, tables.payloads) == 0


@pytest.mark.parametrize("state", ["queued", "running", "done"])
def test_rejecting_a_seq_that_was_accepted_changes_nothing(conn: sa.Connection, state: str) -> None:
    queue.submit(conn, job("m", 1, body=b"body"))
    headers = [] if state == "queued" else claimed(conn)
    if state == "done":
        queue.complete(conn, [Outcome(headers[0].number, b"result")])
    queue.reject(conn, job("m", 1), "too late")
    future = queue.find(conn, "m:1")
    assert future is not None and (future.state, future.error) == (state, None)


def test_errors_survive_characters_that_databases_refuse(conn: sa.Connection) -> None:
    queue.reject(conn, job("m", 1), "token \0 and \ud800")
    future = queue.find(conn, "m:1")
    assert future is not None and future.error == "token \\0 and \\ud800"


# Claiming


def test_jobs_are_claimed_oldest_first_and_once(conn: sa.Connection) -> None:
    for seq in (5, 2, 9, 1):
        queue.submit(conn, job("m", seq))
    first, second = claimed(conn, 3), claimed(conn, 3)
    assert [header.seq for header in first] == [5, 2, 9]
    assert [header.seq for header in second] == [1]
    assert claimed(conn, 3) == []


def test_an_engine_claims_only_its_own_base(conn: sa.Connection) -> None:
    queue.submit(conn, job("m", 1, base="other"))
    assert claimed(conn) == []
    assert len(queue.claim(conn, "other", "engine", 10)) == 1


def test_released_jobs_are_claimed_again_in_their_old_order(conn: sa.Connection) -> None:
    for seq in range(4):
        queue.submit(conn, job("m", seq))
    before = claimed(conn, 3)
    queue.complete(conn, [Outcome(before[1].number, b"")])
    assert queue.release(conn, "other") == 0
    assert queue.release(conn, "tiny") == 2
    assert [header.seq for _ in range(3) for header in claimed(conn, 1)] == [0, 2, 3]


def test_two_engines_at_once_never_claim_the_same_job(database: Database, migrated_url: str) -> None:
    for seq in range(50):
        database.write(queue.submit, job("m", seq))
    other = Database(migrated_url)
    taken: list[int] = []
    while headers := database.write(claimed, 3) + other.write(claimed, 3):
        taken += numbers(headers)
    other.close()
    assert len(taken) == len(set(taken)) == 50


def test_claiming_passes_over_what_an_open_transaction_claims(migrated_postgres_url: str) -> None:
    first, second = Database(migrated_postgres_url), Database(migrated_postgres_url)
    for seq in range(4):
        first.write(queue.submit, job("m", seq))

    def claim_inside_a_claim(conn: sa.Connection) -> tuple[list[Header], list[Header]]:
        return claimed(conn, 2), second.write(claimed, 10)

    mine, theirs = first.write(claim_inside_a_claim)
    assert ([header.seq for header in mine], [header.seq for header in theirs]) == ([0, 1], [2, 3])
    first.close()
    second.close()


# Completing


def test_results_and_errors_reach_their_futures(conn: sa.Connection) -> None:
    for seq in range(3):
        queue.submit(conn, job("m", seq))
    a, b, c = numbers(claimed(conn))
    rung = queue.complete(conn, [Outcome(a, b"good"), Outcome(b, error="bad", category="user"), Outcome(c, error="oh")])
    assert sorted(rung) == ["m:0", "m:1", "m:2"]
    futures = [queue.find(conn, f"m:{seq}") for seq in range(3)]
    assert [(f.state, f.body, f.error, f.category) for f in futures if f] == [
        ("done", b"good", None, None),
        ("failed", None, "bad", "user"),
        ("failed", None, "oh", "server"),
    ]


@pytest.mark.parametrize("first", [Outcome(0, b"first"), Outcome(0, error="first", category="user")])
@pytest.mark.parametrize("second", [Outcome(0, b"second"), Outcome(0, error="second", category="server")])
def test_completing_a_second_time_changes_nothing(conn: sa.Connection, first: Outcome, second: Outcome) -> None:
    queue.submit(conn, job("m", 1))
    [header] = claimed(conn)
    assert queue.complete(conn, [Outcome(header.number, first.body, first.error, first.category)]) == ["m:1"]
    before = queue.find(conn, "m:1")
    assert queue.complete(conn, [Outcome(header.number, second.body, second.error, second.category)]) == []
    assert queue.find(conn, "m:1") == before


def test_a_queued_job_can_be_completed_and_is_then_not_claimed(conn: sa.Connection) -> None:
    queue.submit(conn, job("m", 1))
    number = conn.scalar(sa.select(tables.jobs.c.number))
    assert number is not None
    assert queue.complete(conn, [Outcome(number, error="cancelled", category="user")]) == ["m:1"]
    assert claimed(conn) == []


def test_a_release_after_completion_brings_nothing_back(conn: sa.Connection) -> None:
    finish(conn, "m", 1)
    assert queue.release(conn, "tiny") == 0


def test_thousands_of_jobs_complete_in_one_call(conn: sa.Connection) -> None:
    for seq in range(2500):
        queue.submit(conn, job("m", seq))
    headers = claimed(conn, 5000)
    assert len(queue.payloads(conn, numbers(headers))) == 2500
    assert len(queue.complete(conn, [Outcome(number, b"r") for number in numbers(headers)])) == 2500
    assert count(conn, tables.results) == 2500


# Finding


@pytest.mark.parametrize("request_id", ["", "m", "m:", ":1", "m:x", "m:-1", "m:1 ", "m:²", "m:" + "9" * 40, "m\0:1"])
def test_an_id_that_is_none_is_not_found(conn: sa.Connection, request_id: str) -> None:
    queue.submit(conn, job("m", 1))
    assert queue.find(conn, request_id) is None


def test_a_subject_may_contain_colons(conn: sa.Connection) -> None:
    queue.submit(conn, job("session:train:0", 12))
    future = queue.find(conn, "session:train:0:12")
    assert future is not None and (future.state, future.owner, future.kind) == ("queued", "alice", "optim_step")


# History


def test_history_ends_before_the_first_job_that_has_not(conn: sa.Connection) -> None:
    for seq in (0, 1, 3, 4):
        finish(conn, "m", seq)
    queue.submit(conn, job("m", 5))
    assert [past.header.seq for past in queue.history(conn, "m", -1)] == [0, 1], "2 has not arrived"
    queue.reject(conn, job("m", 2), "refused")
    assert [past.header.seq for past in queue.history(conn, "m", -1)] == [0, 1, 2, 3, 4], "5 has not ended"
    assert [past.header.seq for past in queue.history(conn, "m", 2)] == [3, 4]
    assert queue.history(conn, "m", 5) == []
    assert queue.history(conn, "nobody", -1) == []


def test_history_says_how_jobs_ended_even_when_their_results_have_expired(conn: sa.Connection) -> None:
    make_model(conn, "m")
    finish(conn, "m", 0)
    finish(conn, "m", 1, error="diverged")
    queue.reject(conn, job("m", 2), "refused")
    before = queue.history(conn, "m", -1)
    assert [past.state for past in before] == ["done", "failed", "failed"]
    prune(conn, FUTURE)
    assert queue.history(conn, "m", -1) == before


def test_chunks_are_told_from_requests_in_order(conn: sa.Connection) -> None:
    for seq in (0, 1, 4, 3, 2, 5, 6):  # 2, 3 and 4 are one call: its first part comes last
        queue.submit(conn, job("m", seq))
    assert [seq for seq in range(8) if queue.was_chunked(conn, "m", seq)] == [2, 3, 4]


def test_two_chunked_calls_in_a_row_are_all_chunks(conn: sa.Connection) -> None:
    for seq in (0, 2, 1, 5, 4, 3, 6):
        queue.submit(conn, job("m", seq))
    assert [seq for seq in range(8) if queue.was_chunked(conn, "m", seq)] == [1, 2, 3, 4, 5]


def test_other_subjects_do_not_make_chunks(conn: sa.Connection) -> None:
    for subject, seq in (("m", 1), ("other", 2), ("other", 1), ("m", 2)):
        queue.submit(conn, job(subject, seq))
    assert not queue.was_chunked(conn, "m", 1) and not queue.was_chunked(conn, "m", 2)


def test_a_refused_chunk_is_a_chunk(conn: sa.Connection) -> None:
    queue.submit(conn, job("m", 0))
    queue.reject(conn, job("m", 2), "bad datum")
    queue.submit(conn, job("m", 1))
    for header in claimed(conn):
        queue.complete(conn, [Outcome(header.number, b"")])
    assert [(past.header.seq, past.chunked) for past in queue.history(conn, "m", -1)] == [
        (0, False),
        (1, True),
        (2, True),
    ]
    assert [past.chunked for past in queue.history(conn, "m", 1)] == [True], "also when its first part is further back"


# Crowds


def test_samples_of_owners_in_a_crowd_stay_queued_and_all_else_passes_them(conn: sa.Connection) -> None:
    asked = [("loud", "sample"), ("loud", "forward"), ("calm", "sample"), ("noisy", "sample"), ("loud", "sample")]
    for seq, (owner, kind) in enumerate(asked):
        queue.submit(conn, replace(job(kind, seq, kind=kind), owner=owner))
    first = queue.claim(conn, "tiny", "engine", 10, ["loud", "noisy"])
    assert [(header.owner, header.kind) for header in first] == [("loud", "forward"), ("calm", "sample")]
    assert [header.owner for header in claimed(conn)] == ["loud", "noisy", "loud"]


# Pruning


def test_old_results_expire_and_young_ones_stay(conn: sa.Connection) -> None:
    finish(conn, "m", 1, body=b"old")
    conn.execute(sa.update(tables.jobs).values(finished_at=100.0))
    finish(conn, "m", 2, body=b"young")
    prune(conn, 200.0)
    old, young = queue.find(conn, "m:1"), queue.find(conn, "m:2")
    assert old is not None and (old.state, old.body) == ("expired", None)
    assert young is not None and (young.state, young.body) == ("done", b"young")


def test_pruning_keeps_the_payloads_that_a_recovery_needs(conn: sa.Connection) -> None:
    make_model(conn, "m")
    for seq in range(4):
        finish(conn, "m", seq)
    finish(conn, "m", 4, error="diverged")
    queue.submit(conn, job("m", 5))
    finish(conn, "sampler", 0)
    records.update_model(conn, "m", recovery_seq=1)
    prune(conn, 0.0)
    kept = conn.execute(sa.select(tables.jobs.c.subject, tables.jobs.c.seq).join(tables.payloads)).all()
    assert sorted(kept) == [("m", 2), ("m", 3), ("m", 5)]


@pytest.mark.parametrize("state", ["closed", "failed"])
def test_a_model_that_is_over_leaves_nothing_behind_but_its_record(conn: sa.Connection, state: str) -> None:
    make_model(conn, "m")
    finish(conn, "m", 0)
    finish(conn, "m", 1, error="diverged")
    prune(conn, FUTURE)
    assert count(conn, tables.jobs) == 2 and count(conn, tables.payloads) == 1
    records.update_model(conn, "m", state=state)
    prune(conn, FUTURE)
    assert [count(conn, table) for table in (tables.jobs, tables.payloads, tables.results)] == [0, 0, 0]
    assert records.find_model(conn, "m") is not None


def test_expired_jobs_of_samplers_are_forgotten_a_week_later(conn: sa.Connection) -> None:
    finish(conn, "sampler", 0)
    now = time.time()
    prune(conn, now + 60)
    future = queue.find(conn, "sampler:0")
    assert future is not None and future.state == "expired"
    prune(conn, now + 8 * 86400)
    assert queue.find(conn, "sampler:0") is None


# Plans


@pytest.mark.parametrize("state", ["queued", "running"])
def test_claim_and_release_find_their_jobs_by_the_partial_indexes(migrated_sqlite_url: str, state: str) -> None:
    database = Database(migrated_sqlite_url)
    release = sa.update(tables.jobs).where(queue._RUNNING, tables.jobs.c.base == "b")
    statement = queue._CLAIM._statements["any"] if state == "queued" else release

    def plan(conn: sa.Connection) -> str:
        compiled = statement.compile(dialect=conn.dialect)
        question = f"EXPLAIN QUERY PLAN {compiled.string}"
        return str(conn.exec_driver_sql(question, (1,) * len(compiled.positiontup)).all())

    explained = database.read(plan)
    database.close()
    assert f"ix_jobs_{state}" in explained, explained


# Several processes


def submit_range(url: str, start: int, count: int) -> None:
    database = Database(url)
    for seq in range(start, start + count):
        database.write(queue.submit, job("m", seq, body=str(seq).encode()))
    database.close()


def test_processes_that_submit_the_same_requests_make_each_job_once(database: Database, migrated_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=submit_range, args=(migrated_url, start, 60)) for start in (0, 30, 60)]
    for process in processes:
        process.start()
    bodies: dict[int, bytes] = {}
    give_up_at = time.monotonic() + 60
    while len(bodies) < 120 and time.monotonic() < give_up_at:
        headers = database.write(claimed, 7)
        payloads = database.read(queue.payloads, numbers(headers))
        assert not bodies.keys() & {header.seq for header in headers}, "a job was claimed twice"
        bodies |= {header.seq: payloads[header.number] for header in headers}
        database.write(queue.complete, [Outcome(number, payloads[number]) for number in numbers(headers)])
        time.sleep(0.01)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert bodies == {seq: str(seq).encode() for seq in range(120)}
    assert [past.header.seq for past in database.read(queue.history, "m", -1)] == list(range(120))


def test_those_that_are_over_are_found_among_many_at_once(conn: sa.Connection) -> None:
    finish(conn, "m:0", 1)
    finish(conn, "m:0", 2, error="failed")
    for seq in (3, 4):
        queue.submit(conn, job("m:0", seq))
    queue.give_up(conn, "m:0", 4)
    asked = ["m:0:1", "m:0:2", "m:0:3", "m:0:4", "m:0:5", "nobody:1", "m:0", "m:0:x", "m\0:1"]
    assert sorted(queue.are_over(conn, asked)) == ["m:0:1", "m:0:2", "m:0:4"]
    assert queue.are_over(conn, []) == []


def test_an_engine_that_goes_gives_back_only_what_it_was_running(conn: sa.Connection) -> None:
    for seq in (1, 2):
        queue.submit(conn, job("m", seq))
    [first] = queue.claim(conn, "tiny", "old", 1)
    [second] = queue.claim(conn, "tiny", "new", 1)
    assert queue.release(conn, "tiny", "old") == 1
    assert numbers(queue.claim(conn, "tiny", "new", 9)) == [first.number]
    assert queue.release(conn, "tiny") == 2
    assert numbers(queue.claim(conn, "tiny", "newest", 9)) == [first.number, second.number]
