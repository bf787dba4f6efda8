"""Keys in the database: stored without their secrets, revoked by name or beginning, and what their owners may store."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.store.makers import make_model
from tinsmith.errors import LimitError, NotFoundError, UserError
from tinsmith.store import keys, records
from tinsmith.store.database import Database


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin():
        yield conn


def add(conn: sa.Connection, name: str, **fields: object) -> keys.Key:
    key = replace(keys.new_key(name)[1], **fields)  # type: ignore[arg-type]
    keys.create_key(conn, key)
    return key


def save(conn: sa.Connection, path: str, size: int, kind: str = "training") -> None:
    record = records.Checkpoint(
        path, "m", kind, "a", "alice", "tiny", "Tiny", {}, "/folder", size, False, {}, time.time(), None
    )
    records.create_checkpoint(conn, record)


def test_a_key_comes_back_as_it_was(conn: sa.Connection) -> None:
    key = add(conn, "anna", expires_at=2.0**40, tokens_per_second=0.5, max_models=3, max_storage=2**60)
    assert keys.list_keys(conn) == [key]
    keys.touch_key(conn, key.digest, 5.0)
    assert keys.list_keys(conn) == [replace(key, used_at=5.0)]


def test_only_owners_with_another_weight_than_the_usual_are_told(conn: sa.Connection) -> None:
    add(conn, "anna")
    heavy = add(conn, "ben", weight=2.5)
    assert keys.weights(conn) == {heavy.owner: 2.5}


def test_a_secret_is_random_and_nowhere_in_the_database(migrated_sqlite_url: str) -> None:
    database = Database(migrated_sqlite_url)
    secret, key = keys.new_key("anna")
    database.write(keys.create_key, key)
    database.close()
    stored = b"".join(
        path.read_bytes() for path in Path(migrated_sqlite_url.removeprefix("sqlite:///")).parent.iterdir()
    )
    assert key.digest.encode() in stored
    assert secret.removeprefix(key.prefix).encode() not in stored
    assert secret.startswith("tml-") and len(set(secret[4:])) > 8
    assert secret != keys.new_key("anna")[0]


@pytest.mark.parametrize("name", ["", " anna", "an\0na", "anna\n", "tml-anna", "a" * 101])
def test_a_name_that_would_be_mistaken_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot be called"):
        keys.new_key(name)


def test_a_name_is_taken_until_its_key_is_revoked(conn: sa.Connection) -> None:
    first = add(conn, "anna")
    with pytest.raises(UserError, match="'anna' already"):
        add(conn, "anna")
    keys.revoke_key(conn, "anna")
    second = add(conn, "anna")
    assert [key.state(time.time()) for key in keys.list_keys(conn)] == ["revoked", "active"]
    assert first.owner != second.owner


def test_a_key_is_revoked_by_its_name_its_beginning_or_itself(conn: sa.Connection) -> None:
    for name in ("name", "beginning", "itself"):
        secret, key = keys.new_key(name)
        keys.create_key(conn, key)
        called = {"name": key.name, "beginning": key.prefix, "itself": secret}[name]
        revoked = keys.revoke_key(conn, called)
        assert revoked.name == name and revoked.revoked_at is not None
        with pytest.raises(NotFoundError) as unknown:
            keys.revoke_key(conn, called)
        assert secret not in str(unknown.value)


def test_a_beginning_of_several_keys_revokes_none(conn: sa.Connection) -> None:
    for name in ("anna", "ben"):
        add(conn, name)
    with pytest.raises(UserError, match="'anna', 'ben'"):
        keys.revoke_key(conn, "tml-")
    assert [key.revoked_at for key in keys.list_keys(conn)] == [None, None]


def test_a_key_expires_at_its_time() -> None:
    key = replace(keys.new_key("anna")[1], expires_at=10.0)
    assert (key.state(9.0), key.state(10.0)) == ("active", "expired")


def test_a_checkpoint_must_fit_into_what_is_left(conn: sa.Connection) -> None:
    make_model(conn, "m")
    keys.check_storage(conn, "alice", "m", "training", "tinker://m/weights/new")
    add(conn, "a", owner="alice", max_storage=250)
    save(conn, "tinker://m/weights/one", 100)
    save(conn, "tinker://m/sampler_weights/one", 40, "sampler")
    keys.check_storage(conn, "alice", "m", "training", "tinker://m/weights/two")
    save(conn, "tinker://m/weights/two", 100)
    keys.check_storage(conn, "alice", "m", "training", "tinker://m/weights/two")
    keys.check_storage(conn, "alice", "m", "external", "tinker://m/external_weights/one")
    with pytest.raises(LimitError, match=r"'a' stores 240 bytes of at most 250.* needs 40"):
        keys.check_storage(conn, "alice", "m", "sampler", "tinker://m/sampler_weights/two")
    save(conn, "tinker://m/external_weights/one", 10, "external")
    with pytest.raises(LimitError, match="250 bytes"):
        keys.check_storage(conn, "alice", "m2", "training", "tinker://m2/weights/first")
    keys.check_storage(conn, "ben", "m", "training", "tinker://m/weights/two")
