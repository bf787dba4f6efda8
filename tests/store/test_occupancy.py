"""Two servers on one database: each base model is one server's, until that ends or loses it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from tinsmith.errors import ConfigError
from tinsmith.store import migrations
from tinsmith.store.database import Database
from tinsmith.store.notifications import connect
from tinsmith.store.occupancy import Occupancy, OccupiedError, migrate_alone


def become_old(url: str) -> None:
    """Leaves a database with the tables of an older version."""

    def upgrade(conn: sa.Connection) -> None:
        config = Config(attributes={"connection": conn})
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        command.upgrade(config, "0002")

    with opened(url) as database:
        database.write(upgrade)


@contextmanager
def opened(url: str) -> Iterator[Database]:
    database = Database(url)
    try:
        yield database
    finally:
        database.close()


LONG = 30.0  # seconds: only a test that fails waits for so long


@contextmanager
def serving(url: str, *bases: str, wait_seconds: float = LONG) -> Iterator[Occupancy]:
    """A server. Postgres lets go of what the one before it had a moment after that has ended."""
    occupancy = Occupancy(url, bases, wait_seconds)
    try:
        yield occupancy
    finally:
        occupancy.close()


def cut_off(url: str) -> None:
    """Ends the connections that hold locks in this database, as a restart of Postgres would; returns when they have."""
    held = (
        "FROM pg_locks WHERE locktype = 'advisory' "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    with connect(url) as conn:
        conn.execute(f"SELECT pg_terminate_backend(pid) {held}".encode())
        while conn.execute(f"SELECT pid {held}".encode()).fetchall():
            time.sleep(0.01)


def test_a_second_server_of_the_same_model_is_refused_with_what_to_do(database_url: str) -> None:
    with serving(database_url, "other", "tiny"):
        with pytest.raises(OccupiedError, match=r"'tiny'.*--database-url"):
            Occupancy(database_url, ["third", "tiny"], wait_seconds=0.0)
        with serving(database_url, "third"):  # the refused one has let go of what it had
            pass


def test_servers_of_different_models_share_a_database(database_url: str) -> None:
    with serving(database_url, "tiny"), serving(database_url, "other"):
        pass


def test_a_model_is_free_when_its_server_has_ended(database_url: str) -> None:
    for _ in range(2):
        with serving(database_url, "tiny"):
            pass


def test_tables_are_not_changed_under_a_server_that_works_with_them(database_url: str) -> None:
    become_old(database_url)
    with opened(database_url) as database:
        with serving(database_url, "tiny"):
            with pytest.raises(OccupiedError, match=r"older version's.*--database-url"):
                migrate_alone(database, database_url, wait_seconds=0.0)
            assert database.read(migrations.level) == migrations.OLDER
        migrate_alone(database, database_url, wait_seconds=LONG)
        assert database.read(migrations.level) == migrations.CURRENT
        with serving(database_url, "tiny"):
            migrate_alone(database, database_url, wait_seconds=0.0)  # nothing is to be changed


def test_a_server_does_not_begin_while_tables_are_being_changed(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def migrate(database: Database) -> None:
        with pytest.raises(OccupiedError, match="being brought up to date"):
            Occupancy(database_url, ["tiny"], wait_seconds=0.0)
        refused.append(database)

    refused: list[Database] = []
    monkeypatch.setattr(Database, "migrate", migrate)
    with opened(database_url) as database:
        migrate_alone(database, database_url)
        assert refused == [database]
    with serving(database_url, "tiny"):
        pass


def test_who_comes_while_another_changes_the_tables_is_not_told_to_stop_a_server(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def migrate(database: Database) -> None:
        with pytest.raises(OccupiedError, match="being brought up to date"):
            migrate_alone(database, database_url, wait_seconds=0.0)
        refused.append(database)

    refused: list[Database] = []
    become_old(database_url)
    monkeypatch.setattr(Database, "migrate", migrate)
    with opened(database_url) as database:
        migrate_alone(database, database_url)
        assert refused == [database]


def test_tables_of_a_newer_version_are_refused_with_that(database_url: str) -> None:
    def become_new(conn: sa.Connection) -> None:
        conn.exec_driver_sql("UPDATE alembic_version SET version_num = 'future'")

    with opened(database_url) as database:
        database.migrate()
        database.write(become_new)
        with serving(database_url, "tiny"), pytest.raises(ConfigError, match="newer version"):
            migrate_alone(database, database_url)


def test_servers_that_start_together_wait_for_the_one_that_makes_the_tables(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(which: object, *, alone: bool) -> bool:
        """Another server was faster, and works with the new tables already."""
        database.migrate()
        return False

    monkeypatch.setattr("tinsmith.store.occupancy._FileLocks.enter", tried)
    monkeypatch.setattr("tinsmith.store.occupancy._PostgresLocks.enter", tried)
    with opened(database_url) as database:
        migrate_alone(database, database_url, wait_seconds=LONG)
        assert database.read(migrations.level) == migrations.CURRENT


def test_a_model_in_another_database_is_another_one(database_url: str, sqlite_url: str) -> None:
    with serving(database_url, "tiny"), serving(f"{sqlite_url}-2", "tiny"):
        pass


def test_who_loses_the_connection_takes_the_model_again(postgres_url: str) -> None:
    lost: list[OccupiedError] = []
    with serving(postgres_url, "tiny") as first:
        first.check(lost.append)
        cut_off(postgres_url)
        first.check(lost.append)
        assert lost == []
        with pytest.raises(OccupiedError):
            Occupancy(postgres_url, ["tiny"], wait_seconds=0.0)


def test_who_loses_the_connection_before_postgres_does_takes_the_model_again(postgres_url: str) -> None:
    lost: list[OccupiedError] = []
    with serving(postgres_url, "tiny") as first:
        alive, first._locks._conn = first._locks._conn, None  # type: ignore[attr-defined]
        first.check(lost.append)
        alive.close()
        assert lost == []
        with pytest.raises(OccupiedError):
            Occupancy(postgres_url, ["tiny"], wait_seconds=0.0)


def test_who_finds_another_server_there_afterwards_is_told(postgres_url: str) -> None:
    lost: list[OccupiedError] = []
    with serving(postgres_url, "tiny", wait_seconds=0.0) as first:
        cut_off(postgres_url)
        with serving(postgres_url, "tiny"):
            first.check(lost.append)
    assert len(lost) == 1


def test_a_database_that_is_away_is_waited_for(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[OccupiedError] = []
    with serving(postgres_url, "tiny") as first:
        cut_off(postgres_url)
        with monkeypatch.context() as away:
            away.setattr(psycopg, "connect", refuse)
            first.check(lost.append)
        assert lost == []
        first.check(lost.append)
        with pytest.raises(OccupiedError):
            Occupancy(postgres_url, ["tiny"], wait_seconds=0.0)


def refuse(*_arguments: object, **_options: object) -> None:
    raise psycopg.OperationalError("connection refused")
