"""Records that are free to make are bounded by key; on both databases."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from tests.store import makers
from tinsmith.errors import LimitError, TooLargeError
from tinsmith.store import quotas, records
from tinsmith.store.custom_losses import create_custom_loss
from tinsmith.store.database import Database
from tinsmith.store.tables import samplers, sessions

PROGRAM = {"nodes": ["x" * 100]}


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin():
        yield conn


def session(id: str, *, owner: str = "alice", age: float = 0.0, **changes: object) -> records.Session:
    return replace(makers.session(id, owner, time.time() - age), **changes)  # type: ignore[arg-type]


def ids(conn: sa.Connection) -> set[str]:
    return set(conn.scalars(sa.select(sessions.c.id)))


def create(conn: sa.Connection, id: str, *, is_keys: bool = True, **changes: object) -> None:
    quotas.create_session(conn, session(id, **changes), is_keys=is_keys)  # type: ignore[arg-type]


def sample(conn: sa.Connection, id: str, *, owner: str = "alice", age: float = 0.0, is_keys: bool = True) -> None:
    made_at = time.time() - age
    record = records.SamplerRecord(id, "s", owner, "tiny", "Tiny", "base", None, made_at)
    assert quotas.create_sampler(conn, record, is_keys=is_keys).id == id


def test_a_key_creates_so_many_sessions_a_day_and_other_keys_theirs(
    conn: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "SESSIONS_A_DAY", 2)
    create(conn, "yesterday", age=90_000)
    for name in "ab":
        create(conn, name)
    with pytest.raises(LimitError, match="2 sessions within a day"):
        create(conn, "c")
    create(conn, "d", owner="ben")
    assert ids(conn) == {"yesterday", "a", "b", "d"}


def test_a_key_makes_so_many_samplers_a_day_and_other_keys_theirs(
    conn: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "SAMPLERS_A_DAY", 2)
    records.create_session(conn, session("s"))
    sample(conn, "yesterday", age=90_000)
    for name in ("a", "b", "a"):  # the same one again is no new one
        sample(conn, name)
    with pytest.raises(LimitError, match="2 samplers within a day"):
        sample(conn, "c")
    sample(conn, "d", owner="ben")
    assert {record.id for record in records.samplers_of_session(conn, "s")} == {"yesterday", "a", "b", "d"}


def test_without_keys_nobody_has_created_too_much(conn: sa.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "SESSIONS_A_DAY", 1)
    monkeypatch.setattr(quotas, "SAMPLERS_A_DAY", 1)
    for name in ("s", "t"):
        create(conn, name, is_keys=False)
        sample(conn, f"of-{name}", is_keys=False)
    assert ids(conn) == {"s", "t"}


def test_what_a_session_is_described_by_is_bounded(conn: sa.Connection) -> None:
    with pytest.raises(TooLargeError, match=str(quotas.SESSION_BYTES)):
        create(conn, "a", user_metadata={"k": "x" * quotas.SESSION_BYTES}, is_keys=False)
    create(conn, "a", user_metadata={"k": "x" * (quotas.SESSION_BYTES // 2)})


def test_recent_sessions_and_samplers_are_counted_by_an_index(conn: sa.Connection) -> None:
    with makers.planned(conn) as plan:
        quotas._made_within_a_day(conn, sessions, "alice", 5)
        quotas._made_within_a_day(conn, samplers, "alice", 5)
    assert len(plan.statements) == 2 and plan.scans() == []


@pytest.mark.parametrize("bound", [("LOSSES", 2), ("LOSS_BYTES", 300)], ids=str)
def test_custom_losses_of_a_key_are_bounded_by_number_and_size(
    bound: tuple[str, int], conn: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, *bound)
    for name, owner in (("a", "alice"), ("b", "alice"), ("c", "ben")):
        records.create_session(conn, session(name, owner=owner))
    create_custom_loss(conn, "a", "alice", 0, PROGRAM)
    create_custom_loss(conn, "b", "alice", 0, PROGRAM)
    with pytest.raises(LimitError, match="2 custom losses"):
        create_custom_loss(conn, "a", "alice", 1, PROGRAM)
    assert create_custom_loss(conn, "a", "alice", 0, PROGRAM) == "a:loss:0"  # the same again
    create_custom_loss(conn, "c", "ben", 0, PROGRAM)
    records.finish_session(conn, "b", "alice", "done")
    makers.forget(conn, time.time(), 0.0)
    create_custom_loss(conn, "a", "alice", 1, PROGRAM)
