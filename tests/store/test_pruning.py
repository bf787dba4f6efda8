"""A day's worth of finished futures goes in small steps: few rows and bytes in a transaction, and no looking in it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from tests.store.makers import finish, job, make_model
from tinsmith.store import pruning, queue, records, tables
from tinsmith.store.database import Database


def fill(conn: sa.Connection, count: int, size: int = 100) -> None:
    """That many samples that ended yesterday, with payloads and results."""
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)"
    insert = "INSERT INTO jobs (subject, seq, kind, owner, base, tokens, state, created_at, finished_at)"
    row = "'sampler', i, 'sample', 'alice', 'tiny', 1, 'done', 1.0, 1.0 + i"
    conn.execute(sa.text(f"{insert} {numbers} SELECT {row} FROM n"), {"count": count})
    body = f"CAST('{'x' * size}' AS {'bytea' if conn.dialect.name == 'postgresql' else 'BLOB'})"
    for table in ("payloads", "results"):
        conn.execute(sa.text(f"INSERT INTO {table} (number, body) SELECT number, {body} FROM jobs"))


@contextmanager
def transactions(database: Database) -> Iterator[list[int]]:
    """How many rows each writing transaction changed, until the block ends; on SQLite."""
    found: list[int] = []
    before = [0]

    def note(conn: sa.Connection) -> None:
        changes = conn.connection.dbapi_connection.total_changes  # type: ignore[union-attr]
        found.append(changes - before[0])
        before[0] = changes

    sa.event.listen(database._writing, "commit", note)
    database.write(lambda conn: None)  # whatever changed before
    found.clear()
    yield found
    sa.event.remove(database._writing, "commit", note)


def prune(database: Database, finished_before: float) -> Iterator[pruning.Prunable]:
    """Steps as the engine takes them, between which others write."""
    place, more = pruning.Place(), True
    while more:
        found, place, more = database.read(pruning.find, finished_before, place)
        if found:
            database.write(pruning.delete, found)
        yield found


def count(database: Database, table: sa.Table) -> int:
    return database.read(lambda conn: conn.scalar(sa.select(sa.func.count()).select_from(table))) or 0


def test_two_hundred_thousand_futures_go_in_transactions_of_a_few_hundred_rows(migrated_sqlite_url: str) -> None:
    database, api = Database(migrated_sqlite_url), Database(migrated_sqlite_url)
    database.write(fill, 200_000)
    submitted = 0
    with transactions(database) as rows:
        for step, _ in enumerate(prune(database, time.time() - 86400)):
            if step % 50 == 0:  # another process writes, and nothing of this one's is open
                api.write(queue.submit, job("m", step))
                submitted += 1
    assert len(rows) >= 200_000 / pruning.ROWS
    assert max(rows) <= 4 * pruning.ROWS
    assert count(database, tables.results) == 0
    assert count(database, tables.payloads) == submitted > 5
    for each in (database, api):
        each.close()


@pytest.mark.parametrize(("largest", "steps"), [(1000, 5), (10, 10)])
def test_large_results_go_in_smaller_steps_and_the_largest_alone(
    largest: int, steps: int, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "LARGEST_BYTES", largest)
    database.write(fill, 10, 400)
    found = [step for step in prune(database, time.time()) if step]
    assert [(len(step.results), len(step.payloads)) for step in found] == [(10 // steps, 10 // steps)] * steps
    assert count(database, tables.results) == count(database, tables.payloads) == 0


def test_what_is_still_needed_is_looked_at_in_pages(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "LOOK_ROWS", 3)

    def history(conn: sa.Connection) -> None:
        make_model(conn, "m")
        for seq in range(10):
            finish(conn, "m", seq)
        records.update_model(conn, "m", recovery_seq=7)

    database.write(history)
    found = list(prune(database, 0.0))
    assert [len(step.payloads) for step in found] == [3, 3, 2, 0]
    assert not any(step.results or step.jobs for step in found)
