"""What is noted about owners: acts, tokens and room; and what clients and processes share through the database."""

import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from tests.store.makers import job, make_model, session
from tinsmith.store import audit, clients, queue, records, server_secrets, tables, usage
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell
from tinsmith.store.ledger import Ledger
from tinsmith.wire.jobs import Outcome, Usage

HOUR = usage.HOUR
ACCOUNT = usage.Account("alice", "s", "tiny")


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin():
        yield conn


def checkpoint(path: str = "tinker://m/weights/a", size: int = 10, **fields: object) -> records.Checkpoint:
    values: dict[str, object] = {"expires_at": None, "owner": "alice"} | fields
    return records.Checkpoint(
        path, "m", "training", "a", str(values["owner"]), "tiny", "Tiny", {}, "/folder", size, False, {}, 1.0,
        values["expires_at"],  # type: ignore[arg-type]
    )  # fmt: skip


def events(conn: sa.Connection, owner: str | None = None, resource: str | None = None) -> list[str]:
    return [entry.event for entry in audit.entries(conn, owner, 0.0, time.time() + 1, resource)]


def test_acts_are_listed_in_order_by_owner_time_and_resource(conn: sa.Connection) -> None:
    before = time.time()
    audit.note(conn, "alice", "checkpoint_publish", tinker_path="tinker://m/weights/a")
    audit.note(conn, "bob", "key_create", name="bob")
    assert events(conn) == ["checkpoint_publish", "key_create"]
    assert events(conn, "bob") == ["key_create"]
    assert events(conn, None, "checkpoint") == ["checkpoint_publish"]
    assert audit.entries(conn, None, 0.0, before) == []
    (entry,) = audit.entries(conn, "alice", before, time.time() + 1)
    assert (entry.owner, entry.details) == ("alice", {"tinker_path": "tinker://m/weights/a"})


def test_making_replacing_deleting_and_expiring_a_checkpoint_leave_traces(conn: sa.Connection) -> None:
    make_model(conn, "m")
    records.create_checkpoint(conn, checkpoint())
    records.create_checkpoint(conn, checkpoint(size=20), overwrite=True)
    records.delete_checkpoint(conn, "tinker://m/weights/a")
    records.create_checkpoint(conn, checkpoint("tinker://m/weights/b", expires_at=time.time() - 1))
    records.delete_checkpoint(conn, "tinker://m/weights/b")
    assert events(conn) == ["checkpoint_create"] * 2 + ["checkpoint_delete", "checkpoint_create", "checkpoint_expire"]
    spans = conn.execute(sa.select(tables.storage.c.size_bytes, tables.storage.c.until)).all()
    assert [size for size, _ in spans] == [10, 20, 10]
    assert all(until is not None for _, until in spans)


def test_a_refused_checkpoint_leaves_none(conn: sa.Connection) -> None:
    make_model(conn, "m")
    records.create_checkpoint(conn, checkpoint())
    with pytest.raises(Exception, match="exists"):
        records.create_checkpoint(conn, checkpoint())
    assert events(conn) == ["checkpoint_create"]


def test_tokens_add_up_by_hour_and_kind(conn: sa.Connection) -> None:
    one = Usage("alice", "s:train:0:1", {"train": 5})
    sampled = Usage("alice", "s:sample:0:0", {"prefill": 3, "cached_prefill": 0, "sample": 7})
    usage.add(conn, "tiny", [one, one, sampled], 2 * HOUR + 1.0)
    usage.add(conn, "tiny", [one], 2 * HOUR + 3599.0)
    usage.add(conn, "tiny", [one], 3 * HOUR)
    usage.add(conn, "tiny", [Usage("bob", "t:train:0:1", {"train": 1})], 2 * HOUR)
    counted = [(each.hour, each.kind, each.count) for each in usage.tokens(conn, "alice", 2, 4)]
    assert counted == [(2, "train", 15), (2, "sample", 7), (2, "prefill", 3), (3, "train", 5)]
    assert usage.tokens(conn, "alice", 2, 3)[0].account == ACCOUNT
    assert sum(each.count for each in usage.tokens(conn, None, 2, 3)) == 26


def test_a_job_is_counted_when_it_ends_and_only_once(migrated_url: str, database: Database) -> None:
    doorbell = Doorbell(migrated_url)
    ledger = Ledger(database, doorbell, "tiny")
    for seq in range(2):
        database.write(queue.submit, job("s:sample:0", seq, kind="sample"))
    numbers = [header.number for header in ledger.claim(10)]
    database.write(queue.give_up, "s:sample:0", 1)
    outcomes = [
        Outcome(number, b"x", used=Usage("alice", f"s:sample:0:{seq}", {"sample": 4}))
        for seq, number in enumerate(numbers)
    ]
    ledger.complete(outcomes)
    ledger.complete(outcomes)
    doorbell.close()
    now = int(time.time() // HOUR)
    assert [each.count for each in database.read(usage.tokens, "alice", now - 1, now + 1)] == [4]


def test_room_is_counted_for_as_long_as_it_is_taken(conn: sa.Connection) -> None:
    usage.begin_storage(conn, "a", ACCOUNT, 100, 10 * HOUR + 1800)
    usage.end_storage(conn, "a", 12 * HOUR + 900)
    usage.begin_storage(conn, "b", ACCOUNT, 1, 11 * HOUR)
    found = {each.hour: (each.made, each.byte_hours) for each in usage.stored(conn, "alice", 10, 14, 13 * HOUR + 1800)}
    assert found == {10: (1, 50.0), 11: (1, 101.0), 12: (0, 26.0), 13: (0, 0.5)}
    assert usage.stored(conn, "bob", 10, 14, 14 * HOUR) == []
    assert [each.byte_hours for each in usage.stored(conn, None, 12, 13, 99 * HOUR)] == [26.0]


def test_what_is_kept_is_listed_by_project_and_owner(conn: sa.Connection) -> None:
    make_model(conn, "m")
    records.create_checkpoint(conn, checkpoint(size=10))
    records.create_checkpoint(conn, checkpoint("tinker://m/weights/b", size=20))
    assert usage.shelves(conn, "alice", None) == [usage.Shelf(None, "alice", 2, 30)]
    conn.execute(sa.update(tables.sessions).values(project_id="p"))
    assert usage.shelves(conn, None, "p") == [usage.Shelf("p", "alice", 2, 30)]
    assert usage.shelves(conn, "bob", None) == usage.shelves(conn, None, "q") == []


def test_any_number_of_sessions_are_described_at_once(conn: sa.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "_AT_ONCE", 2)
    for name in "abcde":
        records.create_session(conn, session(name))
    assert usage.sessions_about(conn, list("abcdex")) == {name: (None, {"k": [1]}) for name in "abcde"}


def test_a_server_secret_is_made_once_for_each_purpose(conn: sa.Connection) -> None:
    first = server_secrets.require_secret(conn, "tokens")
    assert len(first) == 32 and server_secrets.require_secret(conn, "tokens") == first
    assert server_secrets.require_secret(conn, "traces") != first


def test_clients_that_join_a_sampler_get_numbers_of_their_own(conn: sa.Connection) -> None:
    records.create_session(conn, session())
    for name in ("x", "y"):
        records.create_sampler(conn, records.SamplerRecord(name, "s", "alice", "tiny", "Tiny", "base", None, 1.0))
    assert [clients.join(conn, name) for name in ("x", "x", "y", "x")] == [1, 2, 1, 3]
