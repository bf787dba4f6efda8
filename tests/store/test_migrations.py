"""Migrations make exactly the tables that the queries are written for."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tinsmith.errors import ConfigError
from tinsmith.store import tables
from tinsmith.store.database import Database


def schema(conn: sa.Connection) -> list[tuple[str, ...]]:
    """Every index, with the conditions that comparing metadata leaves out."""
    if conn.dialect.name == "sqlite":
        rows = conn.exec_driver_sql("SELECT tbl_name, name, sql FROM sqlite_master WHERE type = 'index' ORDER BY name")
    else:
        rows = conn.exec_driver_sql("SELECT tablename, indexname, indexdef FROM pg_indexes ORDER BY indexname")
    return [tuple(" ".join(str(value).split()) for value in row) for row in rows if "alembic" not in row[1]]


def recreate(conn: sa.Connection) -> None:
    tables.metadata.drop_all(conn)
    tables.metadata.create_all(conn)


def test_migrations_make_the_tables_that_the_code_knows(database: Database) -> None:
    def differences(conn: sa.Connection) -> object:
        return compare_metadata(MigrationContext.configure(conn), tables.metadata)

    assert database.read(differences) == []


def test_migrations_make_the_same_indexes_as_the_tables(database: Database) -> None:
    migrated = database.read(schema)
    database.write(recreate)
    assert migrated == database.read(schema)
    assert any("ix_jobs_queued" in row[1] and "queued" in row[2].split("WHERE")[1] for row in migrated)


def test_processes_that_migrate_together_take_turns(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    with ThreadPoolExecutor() as threads:
        assert list(threads.map(Database.migrate, databases)) == [None] * 4
    for database in databases:
        database.close()


def test_migrating_again_changes_nothing(database: Database) -> None:
    before = database.read(schema)
    database.migrate()
    assert database.read(schema) == before


def test_a_database_of_a_newer_version_is_refused(database: Database) -> None:
    database.write(lambda conn: conn.exec_driver_sql("UPDATE alembic_version SET version_num = 'future'") and None)
    with pytest.raises(ConfigError, match="newer version"):
        database.migrate()
