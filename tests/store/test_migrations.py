"""Migrations make exactly the tables that the queries are written for."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from tinsmith.errors import ConfigError
from tinsmith.store import migrations, queue, records, snapshots, tables, trying
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


def test_what_an_older_version_kept_is_there_after_the_upgrade(database_url: str) -> None:
    def become_old(conn: sa.Connection) -> None:
        config = Config(attributes={"connection": conn})
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        command.upgrade(config, "0002")
        for statement in OLD_ROWS:
            conn.execute(sa.text(statement.replace("BYTES", "BLOB" if conn.dialect.name == "sqlite" else "BYTEA")))

    def found(conn: sa.Connection) -> tuple[object, ...]:
        engine = records.find_engine(conn, "b")
        checkpoint = records.find_checkpoint(conn, PATH)
        future = queue.find(conn, "s:train:0:0")
        [header] = queue.claim(conn, "b", "e", 9)
        stored = conn.execute(sa.select(tables.storage.c.owner, tables.storage.c.session_id, tables.storage.c.until))
        assert engine is not None and checkpoint is not None and future is not None
        bodies = queue.payloads(conn, [header.number])
        return engine.starts, checkpoint.size_bytes, future.trace, bodies[header.number], [tuple(row) for row in stored]

    database = Database(database_url)
    database.write(become_old)
    database.migrate()
    assert database.write(found) == (1, 7, None, b"body", [("me", "s", None)])
    assert database.write(lambda conn: records.delete_checkpoint(conn, PATH)).size_bytes == 7
    database.close()


def test_snapshots_that_an_older_version_wrote_supersede_each_other(database_url: str) -> None:
    def become_old(conn: sa.Connection) -> None:
        config = Config(attributes={"connection": conn})
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        command.upgrade(config, "0006")
        for statement in OLD_ROWS[:2]:
            conn.execute(sa.text(statement))
        for name, at in (("x", 1), ("y", 2)):
            conn.execute(sa.text(OLD_SAMPLER), {"id": name, "at": at})

    database = Database(database_url)
    database.write(become_old)
    database.migrate()
    assert database.write(snapshots.release_superseded, "b", 100.0) == [("x", "s:train:0")]
    database.close()


PATH = "tinker://s:train:0/weights/x"
OLD_SAMPLER = (
    "INSERT INTO samplers (id, session_id, owner, base, base_name, snapshot, model_id, created_at)"
    " VALUES (:id, 's', 'me', 'b', 'B', :id, 's:train:0', :at)"
)
OLD_ROWS = (
    "INSERT INTO sessions (id, owner, state, tags, user_metadata, sdk_version, created_at, seen_at)"
    " VALUES ('s', 'me', 'open', '[]', '{}', '1', 1, 1)",
    "INSERT INTO models (id, session_id, owner, base, base_name, spec, user_metadata, state, created_at, used_at)"
    " VALUES ('s:train:0', 's', 'me', 'b', 'B', '{}', '{}', 'ready', 1, 1)",
    "INSERT INTO jobs (subject, seq, kind, owner, base, tokens, state, created_at)"
    " VALUES ('s:train:0', 0, 'create_model', 'me', 'b', 0, 'queued', 1)",
    "INSERT INTO payloads (number, body) SELECT number, CAST('body' AS BYTES) FROM jobs",
    "INSERT INTO checkpoints (path, model_id, kind, name, owner, base, base_name, spec, folder, size_bytes, public,"
    f" user_metadata, created_at) VALUES ('{PATH}', 's:train:0', 'training', 'x', 'me', 'b', 'B', '{{}}', '/x', 7,"
    " FALSE, '{}', 1)",
    "INSERT INTO engines (base, id, pid, state, progress, beat_at) VALUES ('b', 'e', 1, 'ready', '', 1)",
)
