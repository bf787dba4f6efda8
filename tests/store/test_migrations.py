"""Migrations make exactly the tables that the queries are written for."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tinsmith.errors import ConfigError
from tinsmith.store import migrations, tables, trying
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


def test_a_database_says_which_version_it_is_of(database_url: str) -> None:
    def become(revision: str) -> None:
        database.write(
            lambda conn: conn.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{revision}'") and None
        )

    database = Database(database_url)
    assert database.read(migrations.level) == migrations.EMPTY
    database.migrate()
    assert database.read(migrations.level) == migrations.CURRENT
    for revision, level in (("0001", migrations.OLDER), ("future", migrations.NEWER)):
        become(revision)
        assert database.read(migrations.level) == level
    database.close()


def test_trying_a_database_leaves_no_trace(database: Database) -> None:
    before = database.read(schema)
    for _ in range(2):
        database.write(trying.try_to_write)
        assert database.read(trying.damage, 2**40) == ""
    assert database.read(schema) == before


def test_a_damaged_file_is_found_unless_it_is_too_large_to_read(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    database.migrate()
    database.close()
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    content = bytearray(file.read_bytes())
    content[8192:12288] = bytes(4096)
    file.write_bytes(content)
    database = Database(sqlite_url)
    assert database.read(trying.damage, 2**40)
    assert database.read(trying.damage, 1000) == ""
    database.close()
