"""Records that nobody can ask for any more are found a page at a time, and deleted; on both databases."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from tests.store import makers
from tinsmith.errors import NotFoundError
from tinsmith.store import clients, forgetting, queue, records
from tinsmith.store.custom_losses import create_custom_loss, require_custom_loss
from tinsmith.store.database import Database, parse_url
from tinsmith.store.tables import samplers, sessions
from tinsmith.wire.jobs import GONE_SNAPSHOT

OLD = forgetting.FORGET_SECONDS + 1


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin():
        yield conn


def session(id: str, age: float = 0.0) -> records.Session:
    return makers.session(id, "alice", time.time() - age)


def ids(conn: sa.Connection, table: sa.Table = sessions) -> set[str]:
    return set(conn.scalars(sa.select(table.c.id)))


def sampler(conn: sa.Connection, id: str, session_id: str, *, snapshot: str = "base", age: float = OLD) -> None:
    made_at = time.time() - age
    records.create_sampler(
        conn, records.SamplerRecord(id, session_id, "alice", "tiny", "Tiny", snapshot, None, made_at)
    )


def test_custom_losses_go_with_their_sessions(conn: sa.Connection) -> None:
    for name, age in (("open", 0.0), ("silent", 90_000.0), ("finished", 0.0)):
        records.create_session(conn, session(name, age=age))
        create_custom_loss(conn, name, "alice", 0, {"nodes": []})
    records.finish_session(conn, "finished", "alice", "done")
    makers.forget(conn, time.time(), time.time() - 86_400)
    assert require_custom_loss(conn, "open:loss:0", "alice") == {"nodes": []}
    for name in ("silent", "finished"):
        with pytest.raises(NotFoundError):
            require_custom_loss(conn, f"{name}:loss:0", "alice")


def test_old_sessions_with_nothing_in_them_are_forgotten_and_no_others(conn: sa.Connection) -> None:
    for name, age in (("empty", OLD), ("young", OLD - 100), ("trained", OLD), ("sampled", OLD), ("loss", OLD)):
        records.create_session(conn, session(name, age=age))
    records.create_model(conn, makers.model("m", "trained"))
    sampler(conn, "s", "sampled")
    create_custom_loss(conn, "loss", "alice", 0, {})
    makers.forget(conn, time.time(), 0.0)
    assert ids(conn) == {"young", "trained", "sampled", "loss"}


def test_samplers_whose_weights_are_gone_are_forgotten_once_their_requests_are(conn: sa.Connection) -> None:
    records.create_session(conn, session("s", age=OLD))
    for name, snapshot, age in (
        ("gone", GONE_SNAPSHOT, OLD),
        ("young", GONE_SNAPSHOT, OLD - 100),
        ("asked", GONE_SNAPSHOT, OLD),
        ("there", "there", OLD),
        ("base", "base", OLD),
    ):
        sampler(conn, name, "s", snapshot=snapshot, age=age)
        clients.join(conn, name)
    makers.finish(conn, "asked", 1)
    makers.forget(conn, time.time(), 0.0)
    assert ids(conn, samplers) == {"young", "asked", "there", "base"}


def test_pages_follow_each_other_until_all_has_been_looked_at(
    conn: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "LOOK_ROWS", 2)
    for name in "abcde":
        records.create_session(conn, session(name, age=OLD if name in "bde" else 0.0))
    place, found = forgetting.Place(), []
    for _ in range(4):
        forgettable, place = forgetting.find(conn, place, time.time(), 0.0)
        found.append(forgettable.sessions)
    assert found == [["b"], ["d"], ["e"], ["b"]]


def test_what_has_come_to_life_since_it_was_found_stays(conn: sa.Connection) -> None:
    for name in "abc":
        records.create_session(conn, session(name, age=OLD))
    create_custom_loss(conn, "c", "alice", 0, {})
    now = time.time()
    found, _ = forgetting.find(conn, forgetting.Place(), now, now - 86_400)
    assert found == forgetting.Forgettable(["a", "b"], [], ["c:loss:0"])
    for name in "ac":
        records.touch_session(conn, name, "alice", now)
    forgetting.delete(conn, found, now, now - 86_400)
    assert ids(conn) == {"a", "c"}
    assert require_custom_loss(conn, "c:loss:0", "alice") == {}


def test_nothing_reads_a_whole_table(conn: sa.Connection) -> None:
    now = time.time()
    some = forgetting.Forgettable(["a"], ["b"], ["c"])
    with makers.planned(conn) as plan:
        forgetting.find(conn, forgetting.Place("a", "b", "c"), now, now)
        forgetting.delete(conn, some, now, now)
    assert len(plan.statements) >= 7 and plan.scans() == []


def test_an_old_session_that_gets_its_first_model_at_this_moment_stays(migrated_postgres_url: str) -> None:
    engine = sa.create_engine(parse_url(migrated_postgres_url))
    with engine.begin() as conn:
        for name in ("idle", "waking"):
            records.create_session(conn, session(name, age=OLD))
    with engine.connect() as other, other.begin():
        records.create_model(other, makers.model("m", "waking"))
        with engine.begin() as conn:
            conn.execute(sa.text("SET LOCAL lock_timeout = 1000"))
            makers.forget(conn, time.time(), 0.0)
    with engine.connect() as conn:
        assert ids(conn) == {"waking"}
    engine.dispose()


def test_a_sampler_that_gets_another_client_at_this_moment_stays(migrated_postgres_url: str) -> None:
    engine = sa.create_engine(parse_url(migrated_postgres_url))
    with engine.begin() as conn:
        records.create_session(conn, session("s", age=OLD))
        for name in ("idle", "joined"):
            sampler(conn, name, "s", snapshot=GONE_SNAPSHOT)
    with engine.connect() as other, other.begin():
        clients.join(other, "joined")
        with engine.begin() as conn:
            conn.execute(sa.text("SET LOCAL lock_timeout = 1000"))
            makers.forget(conn, time.time(), 0.0)
    with engine.connect() as conn:
        assert ids(conn, samplers) == {"joined"}
    engine.dispose()


def test_a_finished_session_gives_up_the_samples_of_all_its_samplers_and_no_others(conn: sa.Connection) -> None:
    for name in ("s", "t"):
        records.create_session(conn, session(name))
        for number in range(2):
            sampler(conn, f"{name}:sample:{number}", name)
            queue.submit(conn, replace(makers.job(f"{name}:sample:{number}", 1), kind="sample"))
    queue.claim(conn, "tiny", "e", 1)
    assert sorted(queue.give_up_session(conn, "s")) == ["s:sample:0:1", "s:sample:1:1"]
    assert queue.give_up_session(conn, "s") == []
    states = {id: future.state for id in ("s:sample:0:1", "t:sample:0:1") if (future := queue.find(conn, id))}
    assert states == {"s:sample:0:1": "expired", "t:sample:0:1": "queued"}
