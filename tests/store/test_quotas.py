"""Records that are free to make are bounded, and forgotten in time; on both databases."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from tests.store import makers
from tinsmith.errors import LimitError, NotFoundError, TooLargeError
from tinsmith.store import quotas, records
from tinsmith.store.custom_losses import create_custom_loss, require_custom_loss
from tinsmith.store.database import Database, parse_url
from tinsmith.store.tables import sessions

PROGRAM = {"nodes": ["x" * 100]}


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin():
        yield conn


def session(id: str, *, owner: str = "alice", age: float = 0.0, **changes: object) -> records.Session:
    return replace(makers.session(id, owner, time.time() - age), **changes)  # type: ignore[arg-type]


def ids(conn: sa.Connection) -> set[str]:
    return set(conn.scalars(sa.select(sessions.c.id)))


def test_a_key_creates_so_many_sessions_a_day_and_other_keys_theirs(
    conn: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "SESSIONS_A_DAY", 2)
    quotas.create_session(conn, session("yesterday", age=90_000))
    for name in "ab":
        quotas.create_session(conn, session(name))
    with pytest.raises(LimitError, match="2 sessions within a day"):
        quotas.create_session(conn, session("c"))
    quotas.create_session(conn, session("d", owner="ben"))
    assert ids(conn) == {"yesterday", "a", "b", "d"}


def test_what_a_session_is_described_by_is_bounded(conn: sa.Connection) -> None:
    with pytest.raises(TooLargeError, match=str(quotas.SESSION_BYTES)):
        quotas.create_session(conn, session("a", user_metadata={"k": "x" * quotas.SESSION_BYTES}))
    quotas.create_session(conn, session("a", user_metadata={"k": "x" * (quotas.SESSION_BYTES // 2)}))


@pytest.mark.parametrize("bound", [("LOSSES", 2), ("LOSS_BYTES", 300)], ids=str)
def test_custom_losses_of_a_key_are_bounded_by_number_and_size(
    bound: tuple[str, int], conn: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, *bound)
    for name, owner in (("a", "alice"), ("b", "alice"), ("c", "ben")):
        quotas.create_session(conn, session(name, owner=owner))
    create_custom_loss(conn, "a", "alice", 0, PROGRAM)
    create_custom_loss(conn, "b", "alice", 0, PROGRAM)
    with pytest.raises(LimitError, match="2 custom losses"):
        create_custom_loss(conn, "a", "alice", 1, PROGRAM)
    assert create_custom_loss(conn, "a", "alice", 0, PROGRAM) == "a:loss:0"  # the same again
    create_custom_loss(conn, "c", "ben", 0, PROGRAM)
    records.finish_session(conn, "b", "alice", "done")
    quotas.forget(conn, time.time(), 0.0)
    create_custom_loss(conn, "a", "alice", 1, PROGRAM)


def test_custom_losses_go_with_their_sessions(conn: sa.Connection) -> None:
    for name, age in (("open", 0.0), ("silent", 90_000.0), ("finished", 0.0)):
        records.create_session(conn, session(name, age=age))
        create_custom_loss(conn, name, "alice", 0, PROGRAM)
    records.finish_session(conn, "finished", "alice", "done")
    quotas.forget(conn, time.time(), time.time() - 86_400)
    assert require_custom_loss(conn, "open:loss:0", "alice") == PROGRAM
    for name in ("silent", "finished"):
        with pytest.raises(NotFoundError):
            require_custom_loss(conn, f"{name}:loss:0", "alice")


def test_old_sessions_without_anything_in_them_are_forgotten_and_no_others(conn: sa.Connection) -> None:
    old = quotas.FORGET_SECONDS + 1
    for name, age in (("empty", old), ("young", old - 100), ("trained", old), ("sampled", old)):
        records.create_session(conn, session(name, age=age))
    records.create_model(conn, makers.model("m", "trained"))
    records.create_sampler(conn, records.SamplerRecord("s", "sampled", "alice", "tiny", "Tiny", "base", None, 1.0))
    quotas.forget(conn, time.time(), 0.0)
    assert ids(conn) == {"young", "trained", "sampled"}


def test_an_old_session_that_gets_its_first_model_at_this_moment_stays(migrated_postgres_url: str) -> None:
    engine = sa.create_engine(parse_url(migrated_postgres_url))
    with engine.begin() as conn:
        for name in ("idle", "waking"):
            records.create_session(conn, session(name, age=quotas.FORGET_SECONDS + 1))
    with engine.connect() as other, other.begin():
        records.create_model(other, makers.model("m", "waking"))
        with engine.begin() as conn:
            conn.execute(sa.text("SET LOCAL lock_timeout = 1000"))
            quotas.forget(conn, time.time(), 0.0)
    with engine.connect() as conn:
        assert ids(conn) == {"waking"}
    engine.dispose()
