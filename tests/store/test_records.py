"""Records: nobody meets a stranger's, ids can be created twice, lists are newest first."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from tests.store.makers import make_model, model, session
from tinsmith.errors import GoneError, NotFoundError, UserError
from tinsmith.store import records
from tinsmith.store.database import Database


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin():
        yield conn


def sampler(id: str = "x", owner: str = "alice", created_at: float = 1.0) -> records.SamplerRecord:
    return records.SamplerRecord(id, "s", owner, "tiny", "Tiny", "base", None, created_at)


def checkpoint(path: str = "tinker://m/weights/a", **changes: Any) -> records.Checkpoint:
    record = records.Checkpoint(
        path, "m", "training", "a", "alice", "tiny", "Tiny", {"rank": 8}, "/folder", 2**40, False, {"k": "v"}, 1.0, None
    )
    return replace(record, **changes)


def test_records_come_back_as_they_were(conn: sa.Connection) -> None:
    records.create_session(conn, session())
    assert records.require_session(conn, "s", "alice") == session()
    assert records.create_model(conn, model()) == model() == records.find_model(conn, "m")
    assert records.create_sampler(conn, sampler()) == sampler() == records.find_sampler(conn, "x")
    records.create_checkpoint(conn, checkpoint())
    assert records.find_checkpoint(conn, checkpoint().path) == checkpoint()


@pytest.mark.parametrize(
    "require", [records.require_session, records.require_model, records.require_sampler, records.require_checkpoint]
)
@pytest.mark.parametrize("id", ["s", "m", "x", "tinker://m/weights/a", "nothing", "nul\0"])
def test_a_stranger_cannot_tell_a_foreign_object_from_none(
    conn: sa.Connection, require: Callable[[sa.Connection, str, str], object], id: str
) -> None:
    make_model(conn, "m")
    records.create_sampler(conn, sampler())
    records.create_checkpoint(conn, checkpoint())
    with pytest.raises(NotFoundError) as foreign:
        require(conn, id, "mallory")
    with pytest.raises(NotFoundError) as missing:
        require(conn, "elsewhere", "mallory")
    assert str(foreign.value).replace(repr(id), "?") == str(missing.value).replace(repr("elsewhere"), "?")


def test_creating_the_same_id_again_returns_what_exists(conn: sa.Connection) -> None:
    records.create_session(conn, session())
    records.create_model(conn, model())
    assert records.create_model(conn, replace(model(), base_name="other", spec={})) == model()
    records.create_sampler(conn, sampler())
    assert records.create_sampler(conn, replace(sampler(), snapshot="other")) == sampler()


def test_a_finished_session_takes_no_heartbeats(conn: sa.Connection) -> None:
    records.create_session(conn, session())
    assert records.touch_session(conn, "s", "alice", 9.0).seen_at == 9.0
    assert records.require_session(conn, "s", "alice").seen_at == 9.0
    records.finish_session(conn, "s", "alice", "success")
    records.finish_session(conn, "s", "alice", "again")
    with pytest.raises(GoneError, match="success"):
        records.touch_session(conn, "s", "alice", 10.0)
    with pytest.raises(NotFoundError):
        records.finish_session(conn, "s", "mallory", "malice")


def test_lists_are_the_owners_newest_first_and_counted(conn: sa.Connection) -> None:
    for n in range(5):
        records.create_session(conn, session(f"s{n}", created_at=float(n)))
        records.create_model(conn, model(f"m{n}", f"s{n}", created_at=float(n)))
    records.create_session(conn, session("foreign", owner="bob", created_at=9.0))
    sessions, session_count = records.list_sessions(conn, "alice", 2, 1)
    models, model_count = records.list_models(conn, "alice", 10, 3)
    assert ([s.id for s in sessions], session_count) == (["s3", "s2"], 5)
    assert ([m.id for m in models], model_count) == (["m1", "m0"], 5)
    assert records.list_models(conn, "bob", 10, 0) == ([], 0)


def test_what_belongs_to_a_session_is_listed_oldest_first(conn: sa.Connection) -> None:
    records.create_session(conn, session())
    for n in (2, 0, 1):
        records.create_model(conn, model(f"m{n}", created_at=float(n)))
        records.create_sampler(conn, sampler(f"x{n}", created_at=float(n)))
    assert [m.id for m in records.models_of_session(conn, "s")] == ["m0", "m1", "m2"]
    assert [x.id for x in records.samplers_of_session(conn, "s")] == ["x0", "x1", "x2"]
    assert records.models_of_session(conn, "other") == []


def test_models_of_finished_and_silent_sessions_are_to_be_closed(conn: sa.Connection) -> None:
    for name, seen_at in (("finished", 9.0), ("silent", 1.0), ("alive", 9.0)):
        records.create_session(conn, session(name, created_at=seen_at))
        records.create_model(conn, model(f"m-{name}", name))
    records.finish_session(conn, "finished", "alice", "success")
    assert sorted(records.closing_models(conn, "tiny", 5.0)) == ["m-finished", "m-silent"]
    records.update_model(conn, "m-silent", state="closed")
    assert records.closing_models(conn, "tiny", 5.0) == ["m-finished"]
    assert records.closing_models(conn, "other", 5.0) == []


@pytest.mark.parametrize(
    ("update", "id", "changes"),
    [
        (records.update_model, "m", {"state": "closed", "recovery_seq": 2**40}),
        (records.update_sampler, "x", {"snapshot": "s2"}),
        (records.update_checkpoint, "tinker://m/weights/a", {"public": True, "expires_at": None}),
    ],
)
def test_updates_change_what_they_name_and_refuse_what_is_not_there(
    conn: sa.Connection, update: Callable[..., None], id: str, changes: dict[str, Any]
) -> None:
    make_model(conn, "m")
    records.create_sampler(conn, sampler())
    records.create_checkpoint(conn, checkpoint())
    update(conn, id, **changes)
    found = [records.find_model(conn, id), records.find_sampler(conn, id), records.find_checkpoint(conn, id)]
    [record] = [record for record in found if record]
    assert {name: getattr(record, name) for name in changes} == changes
    with pytest.raises(NotFoundError, match="elsewhere"):
        update(conn, "elsewhere", **changes)


def test_a_checkpoint_is_replaced_only_when_asked_or_expired(conn: sa.Connection) -> None:
    make_model(conn, "m")
    records.create_checkpoint(conn, checkpoint(size_bytes=1))
    with pytest.raises(UserError, match=r"tinker://m/weights/a.*overwrite"):
        records.create_checkpoint(conn, checkpoint(size_bytes=2))
    records.create_checkpoint(conn, checkpoint(size_bytes=3, expires_at=time.time() - 1), overwrite=True)
    assert records.find_checkpoint(conn, checkpoint().path) is None
    records.create_checkpoint(conn, checkpoint(size_bytes=4))
    assert records.require_checkpoint(conn, checkpoint().path, "alice").size_bytes == 4


def test_an_expired_checkpoint_is_nowhere_but_among_the_expired(conn: sa.Connection) -> None:
    make_model(conn, "m")
    now = time.time()
    old, new = (
        checkpoint("tinker://m/weights/old", expires_at=now - 1),
        checkpoint("tinker://m/weights/new", expires_at=now + 99),
    )
    records.create_checkpoint(conn, old)
    records.create_checkpoint(conn, new)
    assert records.list_checkpoints(conn, "alice", 10, 0) == ([new], 1)
    assert records.list_checkpoints(conn, "alice", 10, 0, "m") == ([new], 1)
    assert records.list_checkpoints(conn, "alice", 10, 0, "other") == ([], 0)
    assert records.expired_checkpoints(conn, now) == [old]
    assert records.delete_checkpoint(conn, old.path) == old
    assert records.expired_checkpoints(conn, now) == []
    with pytest.raises(NotFoundError):
        records.delete_checkpoint(conn, old.path)


def test_many_expired_checkpoints_go_in_several_transactions(
    conn: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_EXPIRED_AT_ONCE", 2)
    make_model(conn, "m")
    for name, at in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        records.create_checkpoint(conn, checkpoint(f"tinker://m/weights/{name}", expires_at=at))
    gone = []
    while expired := records.expired_checkpoints(conn, 9.0):
        gone.append([records.delete_checkpoint(conn, each.path).path[-1] for each in expired])
    assert gone == [["a", "b"], ["c"]]


def test_a_published_checkpoint_is_anybodys_to_read(conn: sa.Connection) -> None:
    make_model(conn, "m")
    records.create_checkpoint(conn, checkpoint())
    records.update_checkpoint(conn, checkpoint().path, public=True)
    assert records.require_checkpoint(conn, checkpoint().path, "mallory").public
    assert records.list_checkpoints(conn, "mallory", 10, 0) == ([], 0)


def test_an_engines_record_is_its_latest(conn: sa.Connection) -> None:
    assert records.find_engine(conn, "tiny") is None
    loading = records.EngineRecord("tiny", "1", 42, "loading", "reading weights", None, 1.0)
    ready = records.EngineRecord("tiny", "1", 42, "ready", "", {"vocab_size": 256}, 2.0, {"tokens": {"sampled": 1}})
    for record in (loading, ready):
        records.put_engine(conn, record)
        assert records.find_engine(conn, "tiny") == record


def test_starts_of_engines_are_counted_and_those_after_a_death_apart(conn: sa.Connection) -> None:
    def counts(engine_id: str, state: str) -> tuple[int, int]:
        records.put_engine(conn, records.EngineRecord("tiny", engine_id, 42, state, "", None, 1.0))
        found = records.find_engine(conn, "tiny")
        assert found is not None
        return found.starts, found.recoveries

    assert [counts("a", state) for state in ("loading", "ready", "stopped")] == [(1, 0)] * 3
    assert [counts("b", state) for state in ("loading", "ready")] == [(2, 0)] * 2
    assert counts("c", "loading") == (3, 1)
    records.retire_engines(conn, ["tiny"], before=2.0)
    assert records.find_engine(conn, "tiny").state == "lost"  # type: ignore[union-attr]
    assert counts("d", "failed") == (4, 2)
    records.retire_engines(conn, ["tiny"], before=2.0)
    assert records.find_engine(conn, "tiny").state == "stopped"  # type: ignore[union-attr]
    assert counts("e", "ready") == (5, 2)


def test_two_engines_that_clear_away_what_has_expired_never_meet(database: Database, migrated_url: str) -> None:
    def make(conn: sa.Connection) -> None:
        make_model(conn, "m")
        for name in "ab":
            records.create_checkpoint(conn, checkpoint(f"tinker://m/weights/{name}", expires_at=1.0))

    def drop(conn: sa.Connection) -> list[str]:
        expired = [each.path for each in records.expired_checkpoints(conn, 2.0)]
        if len(expired) == 2 and conn.dialect.name == "postgresql":  # SQLite lets only one write at a time
            assert other.write(drop) == []
        return [records.delete_checkpoint(conn, path).path for path in expired]

    database.write(make)
    other = Database(migrated_url)
    assert len(database.write(drop)) == 2
    assert other.write(drop) == []
    other.close()


def test_only_engines_of_before_and_of_ones_own_models_are_retired(conn: sa.Connection) -> None:
    for base, beat_at in (("mine", 1.0), ("other", 1.0), ("later", 3.0)):
        records.put_engine(conn, records.EngineRecord(base, "e", 1, "ready", "", None, beat_at))
    records.retire_engines(conn, ["mine", "later"], 2.0)
    states = {base: found.state for base in ("mine", "other", "later") if (found := records.find_engine(conn, base))}
    assert states == {"mine": "lost", "other": "ready", "later": "ready"}


def test_why_an_engine_failed_is_what_was_said_first(conn: sa.Connection) -> None:
    records.put_engine(conn, records.EngineRecord("tiny", "e", 1, "ready", "", None, 1.0))
    for reason in ("no memory", "crashed"):
        records.fail_engine(conn, "tiny", reason)
    failed = records.find_engine(conn, "tiny")
    assert failed is not None and (failed.state, failed.progress) == ("failed", "no memory")
    assert failed.beat_at > 1.0
