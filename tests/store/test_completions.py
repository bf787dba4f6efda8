"""What has ended lately, and what a session's requests were, are found among very many; on both databases."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from tests.store import makers
from tinsmith.store import completions, queue, records, timeline
from tinsmith.store.database import Database
from tinsmith.store.tables import jobs


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin():
        yield conn


def ended(conn: sa.Connection, subject: str, seq: int, at: float) -> None:
    queue.submit(conn, replace(makers.job(subject, seq), kind="sample"))
    of_it = (jobs.c.subject == subject) & (jobs.c.seq == seq)
    conn.execute(sa.update(jobs).where(of_it).values(state="done", finished_at=at))


def test_many_ends_come_in_several_answers_and_none_is_left_out(
    conn: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "MOST", 4)
    times = [1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 4.0, 5.0, 5.0]
    for seq, at in enumerate(times):
        ended(conn, "s:sample:0", seq, at)
    ended(conn, "s:sample:0", completions.CLIENT_SEQS, 2.5)
    queue.submit(conn, replace(makers.job("s:sample:0", 99), kind="sample"))
    heard: list[float] = []
    while news := completions.ended_since(conn, "s:sample:0", 0, heard[-1] if heard else 0.0):
        assert len(news) <= 4
        heard += [end.finished_at for end in news]
    assert heard == times


def test_the_latest_ends_are_found_by_an_index(conn: sa.Connection) -> None:
    with makers.planned(conn) as plan:
        completions.ended_since(conn, "s:sample:0", 0, 1.0)
    assert any("ix_jobs_sampled" in line and "finished_at>" in line.replace(" ", "") for line in plan.found())


def test_a_timeline_has_the_latest_requests_of_all_of_a_session(
    conn: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers.make_model(conn, "m")
    records.create_session(conn, makers.session("t"))
    for id, session in (("x", "s"), ("y", "s"), ("z", "t")):
        records.create_sampler(conn, records.SamplerRecord(id, session, "alice", "tiny", "Tiny", "base", None, 1.0))
    for subject, seq in (("x", 0), ("m", 0), ("z", 0), ("y", 0), ("x", 1)):
        queue.submit(conn, makers.job(subject, seq))
    assert [(span.subject, span.seq) for span in timeline.spans(conn, "s")] == [("x", 0), ("m", 0), ("y", 0), ("x", 1)]
    monkeypatch.setattr(timeline, "MOST", 2)
    assert [span.subject for span in timeline.spans(conn, "s")] == ["y", "x"]
