"""Which unnamed snapshots are released; on both databases."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from tests.store import makers
from tinsmith.store import queue, records, snapshots
from tinsmith.store.database import Database
from tinsmith.wire.jobs import GONE_SNAPSHOT

OLD, NOW = 1000.0, 5000.0


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin():
        makers.make_model(conn, "m")
        yield conn


def sampler(conn: sa.Connection, name: str, at: float, snapshot: str | None = None, *, written: bool = True) -> None:
    written_at = at if written else None
    record = records.SamplerRecord(name, "s", "alice", "tiny", "Tiny", snapshot or name, "m", at, written_at)
    records.create_sampler(conn, record)


def test_only_unused_unnamed_and_superseded_snapshots_of_living_models_are_released(conn: sa.Connection) -> None:
    for name in ("old", "asked", "waited-for"):
        sampler(conn, name, OLD)
    sampler(conn, "named", OLD, "tinker://m/sampler_weights/x")
    sampler(conn, "shared", OLD, "m:inflight")
    sampler(conn, "recent", NOW - 10)
    sampler(conn, "newest", NOW)
    makers.finish(conn, "asked", 1)
    queue.submit(conn, replace(makers.job("waited-for", 1), kind="sample"))
    assert snapshots.release_superseded(conn, "tiny", NOW - 100) == [("old", "m")]
    assert snapshots.release_superseded(conn, "tiny", NOW - 100) == []
    assert snapshots.release_superseded(conn, "other", NOW + 100) == []
    found = records.find_sampler(conn, "old")
    assert found is not None and found.snapshot == GONE_SNAPSHOT
    assert snapshots.released(conn, "tiny") == [("old", "m")]
    assert snapshots.release_superseded(conn, "tiny", NOW + 100) == [("recent", "m")]  # the newest stays
    records.update_model(conn, "m", state="closed")
    assert snapshots.released(conn, "tiny") == snapshots.release_superseded(conn, "tiny", 2e9) == []


def test_only_a_snapshot_that_was_written_supersedes(conn: sa.Connection) -> None:
    sampler(conn, "good", OLD)
    sampler(conn, "failed", NOW, written=False)
    assert snapshots.release_superseded(conn, "tiny", NOW + 100) == []
    sampler(conn, "better", NOW + 1)
    assert snapshots.release_superseded(conn, "tiny", NOW + 100) == [("good", "m"), ("failed", "m")]


def test_a_snapshot_is_as_old_as_its_writing_however_long_its_save_waited(conn: sa.Connection) -> None:
    for name in ("late", "later"):
        sampler(conn, name, OLD if name == "late" else OLD + 1)
        records.update_sampler(conn, name, written_at=NOW)
    assert snapshots.release_superseded(conn, "tiny", NOW - 100) == []
    assert snapshots.release_superseded(conn, "tiny", NOW + 100) == [("late", "m")]


def test_engines_find_models_snapshots_and_given_up_samples_by_indexes(conn: sa.Connection) -> None:
    with makers.planned(conn) as plan:
        queue.give_up_silent(conn, "tiny", NOW)
        queue.give_up_session(conn, "s")
        snapshots.release_superseded(conn, "tiny", NOW)
        records.silent_models(conn, "tiny", NOW)
        records.closing_models(conn, "tiny", NOW)
    assert len(plan.statements) == 8 and plan.scans() == []
