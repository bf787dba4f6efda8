"""The database: writes share commits and fail alone; nothing is lost or written twice when connections are."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.store.cutting_proxy import Cut, CuttingProxy
from tests.store.makers import job, session
from tests.throwaway_postgres import ThrowawayPostgres, throwaway_postgres
from tinsmith.errors import ConfigError, NotFoundError, UnavailableError
from tinsmith.store import queue, records, tables
from tinsmith.store.database import Database, parse_url
from tinsmith.store.receipts import KEPT_SECONDS, Receipt, Receipts

notes = sa.Table("notes", sa.MetaData(), sa.Column("text", sa.Text, primary_key=True))


@pytest.fixture
def noted(database: Database) -> Database:
    database.write(notes.create)
    return database


def note(conn: sa.Connection, text: str) -> str:
    conn.execute(sa.insert(notes), {"text": text})
    return text


def noted_texts(conn: sa.Connection) -> list[str]:
    return sorted(conn.scalars(sa.select(notes.c.text)))


class Held:
    """Holds the writer thread inside one write, so that further writes wait and then share a commit."""

    def __init__(self, database: Database) -> None:
        self._entered, self._let_go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=database.write, args=(self._hold,))

    def _hold(self, conn: sa.Connection) -> None:
        self._entered.set()
        assert self._let_go.wait(30)

    def __enter__(self) -> None:
        self._thread.start()
        assert self._entered.wait(30)

    def __exit__(self, *_: object) -> None:
        self._let_go.set()
        self._thread.join()


def together(database: Database, *writes: Callable[[sa.Connection], object]) -> list[Future[object]]:
    """Runs writes in one batch."""
    with Held(database):
        futures = [database._writer.add(write) for write in writes]
    for future in futures:
        future.exception(30)
    return futures


# Group commit


def test_a_write_returns_its_value_and_a_read_sees_it(noted: Database) -> None:
    assert noted.write(note, text="a") == "a"
    assert noted.read(noted_texts) == ["a"]


def test_a_write_that_raises_fails_alone(noted: Database) -> None:
    def half_done(conn: sa.Connection) -> None:
        note(conn, "half")
        raise NotFoundError("there is no such thing")

    first, refused, duplicate, last = together(
        noted, lambda c: note(c, "a"), half_done, lambda c: note(c, "a"), lambda c: note(c, "b")
    )
    assert (first.result(), last.result()) == ("a", "b")
    with pytest.raises(NotFoundError, match="no such thing"):
        refused.result()
    with pytest.raises(sa.exc.IntegrityError):
        duplicate.result()
    assert noted.read(noted_texts) == ["a", "b"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_failed_statement_fails_alone_wherever_it_stands_in_the_batch(noted: Database, place: int) -> None:
    writes: list[Callable[[sa.Connection], object]] = [lambda conn: note(conn, "a"), lambda conn: note(conn, "b")]
    writes.insert(place, lambda conn: conn.exec_driver_sql("SELECT nonsense FROM nowhere"))
    futures = together(noted, *writes)
    assert isinstance(futures.pop(place).exception(), sa.exc.DBAPIError)
    assert [future.result() for future in futures] == ["a", "b"]
    assert noted.read(noted_texts) == ["a", "b"]


def test_a_lone_write_that_raises_leaves_nothing(noted: Database) -> None:
    def half_done(conn: sa.Connection) -> None:
        note(conn, "half")
        raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        noted.write(half_done)
    assert noted.read(noted_texts) == []


def test_when_all_writes_of_a_batch_raise_nothing_is_written(noted: Database) -> None:
    def half_done(conn: sa.Connection) -> None:
        note(conn, "half")
        raise ValueError("halfway")

    assert all(isinstance(future.exception(), ValueError) for future in together(noted, half_done, half_done))
    assert noted.read(noted_texts) == []


def test_writes_that_wait_together_share_one_transaction(noted: Database) -> None:
    def commits(conn: sa.Connection) -> object:
        if conn.dialect.name == "postgresql":
            return conn.exec_driver_sql("SELECT pg_current_xact_id()::text").scalar()
        return conn.get_transaction()

    assert len({future.result() for future in together(noted, *[commits] * 20)}) == 1


def test_writes_run_in_order_of_arrival(noted: Database) -> None:
    order: list[int] = []
    together(noted, *[lambda conn, n=n: order.append(n) for n in range(200)])
    assert order == list(range(200))


def test_a_write_inside_a_write_is_refused_instead_of_waiting_for_itself(noted: Database) -> None:
    with pytest.raises(RuntimeError, match="same connection"):
        noted.write(lambda conn: noted.write(note, "a"))


def test_reads_cannot_write(noted: Database) -> None:
    with pytest.raises(sa.exc.DBAPIError):
        noted.read(note, "a")
    assert noted.read(noted_texts) == []


# Threads, tasks and the end


def test_many_threads_write_and_read_at_once(noted: Database) -> None:
    def write_and_look(n: int) -> bool:
        noted.write(note, str(n))
        return str(n) in noted.read(noted_texts)

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(write_and_look, range(200)))


def test_tasks_write_and_read_at_once(noted: Database) -> None:
    async def write_and_look(n: int) -> bool:
        assert await noted.write_async(note, str(n)) == str(n)
        return str(n) in await noted.read_async(noted_texts)

    async def all_of_them() -> list[bool]:
        return await asyncio.gather(*(write_and_look(n) for n in range(100)))

    assert all(asyncio.run(all_of_them()))


def test_errors_reach_the_task_that_caused_them(noted: Database) -> None:
    async def run() -> list[object]:
        return await asyncio.gather(
            noted.write_async(records.require_session, "x", "alice"),
            noted.write_async(note, "a"),
            noted.read_async(records.require_session, "x", "alice"),
            return_exceptions=True,
        )

    missing, written, unread = asyncio.run(run())
    assert isinstance(missing, NotFoundError) and isinstance(unread, NotFoundError) and written == "a"


def test_a_cancelled_write_that_had_not_begun_is_not_written(noted: Database) -> None:
    async def cancel() -> None:
        with Held(noted):
            task = asyncio.create_task(noted.write_async(note, "a"))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancel())
    assert noted.write(noted_texts) == []


def test_a_loop_that_is_gone_does_not_disturb_the_others(noted: Database) -> None:
    async def start() -> None:
        asyncio.get_running_loop().call_soon(noted._writer.add_async, lambda conn: note(conn, "a"))
        await asyncio.sleep(0)

    with Held(noted):
        asyncio.run(start())
    assert noted.write(noted_texts) == ["a"]


def test_closing_finishes_the_writes_that_wait_and_refuses_later_ones(database_url: str) -> None:
    database = Database(database_url)
    database.write(notes.create)
    with Held(database):
        futures = [database._writer.add(lambda conn, n=n: note(conn, str(n))) for n in range(100)]
        closing = threading.Thread(target=database.close)
        closing.start()
    closing.join()
    assert [future.result() for future in futures] == [str(n) for n in range(100)]
    with pytest.raises(UnavailableError, match="shutting down"):
        database.write(note, "late")
    database.close()


# URLs


@pytest.mark.parametrize("url", ["mysql://host/x", "nonsense", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused_with_what_is_allowed(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///path/to/file or postgresql://"):
        Database(url)


def test_the_folder_of_a_new_database_is_made(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/new/folder/x.db")
    database.migrate()
    database.close()
    assert (tmp_path / "new/folder/x.db").exists()


# SQLite


def test_sqlite_waits_for_another_process_to_finish_its_write(sqlite_url: str) -> None:
    database, other = Database(sqlite_url), Database(sqlite_url)
    database.write(notes.create)
    with Held(other):
        waiting = database._writer.add(lambda conn: note(conn, "a"))
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        assert database.read(noted_texts) == [], "readers do not wait"
    assert waiting.result(30) == "a"
    database.close()
    other.close()


def test_sqlite_enforces_foreign_keys(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    database.migrate()
    with pytest.raises(sa.exc.IntegrityError):
        database.write(lambda conn: conn.execute(sa.insert(tables.results), {"number": 1, "body": b""}) and None)
    database.close()


def test_what_sqlite_committed_survives_a_killed_process(sqlite_url: str) -> None:
    program = (
        "import os, signal, sys\n"
        "from tests.store.makers import job\n"
        "from tinsmith.store import queue\n"
        "from tinsmith.store.database import Database\n"
        "database = Database(sys.argv[1])\n"
        "database.migrate()\n"
        "for seq in range(20): database.write(queue.submit, job('m', seq))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, sqlite_url], check=False, timeout=60)
    database = Database(sqlite_url)
    assert len(database.write(queue.claim, "tiny", "engine", 100)) == 20
    database.close()


# Postgres


@pytest.fixture
def proxy(migrated_postgres_url: str) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(migrated_postgres_url)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_lost_in_a_commit_neither_loses_nor_repeats_the_write(proxy: CuttingProxy, when: Cut) -> None:
    database = Database(proxy.url)
    database.write(notes.create)
    runs: list[str] = []

    def run_and_note(conn: sa.Connection) -> int:
        runs.append(note(conn, "a"))
        return len(runs)

    proxy.cut_next(when)
    assert database.write(run_and_note) == (2 if when == "before" else 1)
    assert proxy.cuts == 1
    assert database.read(noted_texts) == ["a"]
    assert database._writer._away_since is None, "the next loss is waited for as long as this one"
    database.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_whole_batch_survives_a_connection_lost_in_its_commit(proxy: CuttingProxy, when: Cut) -> None:
    database = Database(proxy.url)
    database.write(notes.create)
    with Held(database):
        futures = [database._writer.add(lambda conn, n=n: note(conn, str(n))) for n in range(10)]
        futures.append(database._writer.add(lambda conn: note(conn, "0")))
        proxy.cut_next(when)
    assert [future.result() for future in futures[:10]] == [str(n) for n in range(10)]
    assert isinstance(futures[10].exception(), sa.exc.IntegrityError)
    database.close()


def test_connections_that_the_server_ends_are_replaced(postgres: ThrowawayPostgres, postgres_url: str) -> None:
    database, other = Database(postgres_url), Database(postgres_url)
    database.migrate()
    database.read(lambda conn: None)

    def end_the_others(conn: sa.Connection) -> None:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        conn.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")

    other.write(end_the_others)
    assert database.write(queue.submit, job("m", 1)) == "m:1"
    other.write(end_the_others)
    assert database.read(queue.find, "m:1") is not None
    database.close()
    other.close()


def test_a_server_that_restarts_is_waited_for_and_one_that_stays_away_is_named() -> None:
    with throwaway_postgres() as server:
        if server is None:
            pytest.skip("NOT TESTED ON POSTGRES: initdb and pg_ctl are not installed")
        _check_restart(server)
        hasty = Database(server.url(), patience=0.2)
    with pytest.raises(UnavailableError, match="away"):
        hasty.write(queue.submit, job("m", 1))
    with pytest.raises(UnavailableError, match="away"):
        hasty.read(queue.find, "m:1")
    hasty.close()


def _check_restart(server: ThrowawayPostgres) -> None:
    database = Database(server.url(), patience=30.0)
    database.migrate()
    database.write(queue.submit, job("m", 1))
    with ThreadPoolExecutor(1) as threads:
        restarting = threads.submit(server.restart)
        for seq in range(2, 100):
            database.write(queue.submit, job("m", seq))
            assert database.read(queue.find, f"m:{seq}") is not None
            if restarting.done() and seq > 20:
                break
        restarting.result()
    database.close()


@pytest.fixture
def connections(migrated_postgres_url: str) -> Iterator[tuple[sa.Connection, sa.Connection]]:
    engine = sa.create_engine(parse_url(migrated_postgres_url), poolclass=sa.NullPool)
    with engine.connect() as first, engine.connect() as second:
        yield first, second


def write_with_receipt(conn: sa.Connection, receipts: Receipts) -> Receipt:
    receipts.begin(conn)
    conn.execute(sa.insert(tables.server_secrets), {"name": os.urandom(8).hex(), "value": b""})
    receipt = receipts.leave(conn)
    assert receipt is not None
    return receipt


def test_a_receipt_says_how_its_transaction_ended(connections: tuple[sa.Connection, sa.Connection]) -> None:
    conn, other = connections
    receipts = Receipts()
    for commit in (True, False, True):
        transaction = conn.begin()
        receipt = write_with_receipt(conn, receipts)
        assert receipts.was_committed(other, receipt) is None
        transaction.commit() if commit else transaction.rollback()
        assert receipts.was_committed(other, receipt) is commit


def test_an_id_that_a_crashed_server_gave_to_another_transaction_does_not_speak_for_the_first(
    connections: tuple[sa.Connection, sa.Connection],
) -> None:
    conn, other = connections
    receipts = Receipts()
    transaction = conn.begin()
    lost = write_with_receipt(conn, receipts)
    transaction.rollback()
    with other.begin():
        anothers = write_with_receipt(other, Receipts())
    assert receipts.was_committed(other, Receipt(anothers.transaction, lost.number)) is False
    assert receipts.was_committed(other, Receipt(str(int(anothers.transaction) + 10_000), lost.number)) is False


def test_a_write_lost_in_a_crash_is_told_from_the_one_that_gets_its_id_afterwards() -> None:
    with throwaway_postgres() as server:
        if server is None:
            pytest.skip("NOT TESTED ON POSTGRES: initdb and pg_ctl are not installed")
        database = Database(server.url())
        database.migrate()
        database.close()
        engine = sa.create_engine(parse_url(server.url()), poolclass=sa.NullPool)
        lost, receipts = engine.connect(), Receipts()
        lost.begin()
        receipt = write_with_receipt(lost, receipts)
        server.restart()
        with engine.connect() as other:
            ids = []
            while not ids or int(ids[-1]) < int(receipt.transaction):
                with other.begin():
                    ids.append(write_with_receipt(other, Receipts()).transaction)
            assert receipts.was_committed(other, receipt) is False
        lost.invalidate()
        lost.close()


def test_transactions_that_write_nothing_leave_no_receipt(connections: tuple[sa.Connection, sa.Connection]) -> None:
    conn, _ = connections
    receipts = Receipts()
    for _ in range(2):
        with conn.begin():
            receipts.begin(conn)
            conn.scalar(sa.select(tables.server_secrets.c.name))
            assert receipts.leave(conn) is None


def test_before_there_are_tables_no_receipts_are_kept(postgres_url: str) -> None:
    engine = sa.create_engine(parse_url(postgres_url), poolclass=sa.NullPool)
    with engine.begin() as conn:
        receipts = Receipts()
        receipts.begin(conn)
        notes.create(conn)
        assert receipts.leave(conn) is None


def test_receipts_of_writers_long_gone_are_deleted(migrated_postgres_url: str) -> None:
    def leave(conn: sa.Connection, writer: str, age: float) -> None:
        conn.execute(sa.insert(tables.receipts), {"writer": writer, "number": 1, "left_at": time.time() - age})

    database = Database(migrated_postgres_url)
    database.write(leave, "gone", KEPT_SECONDS + 60)
    database.write(leave, "recent", KEPT_SECONDS - 60)
    later = Database(migrated_postgres_url)
    later.write(queue.submit, job("m", 1))
    writers = later.read(lambda conn: set(conn.scalars(sa.select(tables.receipts.c.writer))))
    assert "gone" not in writers and "recent" in writers and len(writers) == 3
    for each in (database, later):
        each.close()


def test_writes_that_deadlock_with_another_process_run_again(postgres_url: str) -> None:
    first, second = Database(postgres_url), Database(postgres_url)
    first.migrate()
    for id in ("a", "b"):
        first.write(records.create_session, session(id))
    both_hold_one = threading.Barrier(2)

    def touch_both(conn: sa.Connection, one: str, two: str) -> None:
        records.touch_session(conn, one, "alice", 2.0)
        if both_hold_one.n_waiting < 2 and not both_hold_one.broken:
            with suppress(threading.BrokenBarrierError):
                both_hold_one.wait(5)
            both_hold_one.abort()
        records.touch_session(conn, two, "alice", 2.0)

    with ThreadPoolExecutor() as threads:
        futures = [
            threads.submit(first.write, touch_both, "a", "b"),
            threads.submit(second.write, touch_both, "b", "a"),
        ]
        assert [future.result(60) for future in futures] == [None, None]
    first.close()
    second.close()


def test_a_settled_write_waits_for_the_disk_once_with_its_neighbours(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(sqlite_url)
    synced: list[str] = []
    database.migrate()
    fdatasync = os.fdatasync

    def noted(file: int) -> None:
        fdatasync(file)
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))

    monkeypatch.setattr(os, "fdatasync", noted)

    async def write() -> None:
        await database.write_async(lambda conn: None)
        await database.settle()

    async def main() -> None:
        await asyncio.create_task(database.settle())
        assert synced == []
        await asyncio.gather(*(asyncio.create_task(write()) for _ in range(50)))

    asyncio.run(main())
    database.close()
    assert 1 <= len(synced) < 10
    assert set(synced) == {f"{sqlite_url.removeprefix('sqlite:///')}-wal"}
