"""One database behind one writer thread (group commit) and a few readers; SQLite by default, Postgres by URL.

Knows connections and transactions; what is read and written are functions of a connection (`queue`, `records`).
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.pool import NullPool

from tinsmith.errors import ConfigError, UnavailableError
from tinsmith.store import migrations
from tinsmith.store.writer import Writer, is_full, is_lost

P = ParamSpec("P")
R = TypeVar("R")

_READERS = 4
_LOCK_MILLISECONDS = 30_000  # how long one process waits for another one's write to an SQLite file
_RETRY_SECONDS = 0.05

_wrote: ContextVar[bool] = ContextVar("wrote", default=False)

_SQLITE_PRAGMAS = (
    f"busy_timeout = {_LOCK_MILLISECONDS}",
    "journal_mode = WAL",
    "synchronous = NORMAL",
    "foreign_keys = ON",
    f"journal_size_limit = {64 * 2**20}",
)
_POSTGRES_OPTIONS = {
    "application_name": "tinsmith",
    "connect_timeout": "5",
    "keepalives_idle": "30",  # a server that vanished is noticed in a minute, not in hours
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}


class Database:
    """`write` and `read` run a function of (connection, *args) in a transaction and return its value.

    Writes that arrive together share one commit; one that raises fails alone. Functions may run more than once (a
    neighbour that raised, a lost connection, a deadlock), but are committed once; they must neither commit themselves
    nor go on after an error of the database. While that is away, calls wait up to `patience` seconds, then raise
    UnavailableError.
    """

    def __init__(self, url: str, patience: float = 10.0) -> None:
        """Connects with the first call. Raises ConfigError for a URL that is neither SQLite's nor Postgres's."""
        parsed = parse_url(url)
        self._patience = patience
        self._reading = _create_engine(parsed, writes=False)
        self._writing = _create_engine(parsed, writes=True)
        self._writer = Writer(self._writing, patience)
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="tinsmith-reader")
        self._log = Path(f"{parsed.database}-wal") if parsed.get_backend_name() == "sqlite" else None
        self._wanted = self._synced = 0  # how often a sync was asked for, and how many of those are fulfilled
        self._syncing = asyncio.Lock()

    def migrate(self) -> None:
        """Brings the tables to this version. Raises ConfigError if they belong to a newer one."""
        self.write(migrations.upgrade)

    def write(self, function: Callable[Concatenate[sa.Connection, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Returns what `function` returned, once that is committed; raises what it raised, with nothing written."""
        return self._writer.add(lambda conn: function(conn, *args, **kwargs)).result()

    def write_soon(
        self, function: Callable[Concatenate[sa.Connection, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[R]:
        """`write` that is waited for later; what is written after it is committed after it, or with it."""
        return self._writer.add(lambda conn: function(conn, *args, **kwargs))

    async def write_async(
        self, function: Callable[Concatenate[sa.Connection, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """`write` without blocking the event loop. A cancelled call may still be written."""
        _wrote.set(True)
        return await self._writer.add_async(lambda conn: function(conn, *args, **kwargs))

    def read(self, function: Callable[Concatenate[sa.Connection, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Returns what `function` returned. Each of its queries sees what is committed when it runs. Writing raises."""
        give_up_at = time.monotonic() + self._patience
        while True:
            try:
                conn = self._reading.connect()
            except OperationalError as error:
                _wait(error, give_up_at)
                continue
            with conn:
                try:
                    return function(conn, *args, **kwargs)
                except Exception as error:
                    if is_full(error):
                        raise UnavailableError(f"the database cannot be read for its disk ({error})") from error
                    if not is_lost(conn, error):
                        raise
                    _wait(error, give_up_at)

    async def read_async(
        self, function: Callable[Concatenate[sa.Connection, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """`read` without blocking the event loop."""
        run = partial(self.read, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    def sync(self) -> None:
        """Returns once everything committed so far, by any process, will outlive a power cut too.

        Postgres sees to that with each commit; SQLite leaves its log to the operating system for some seconds.
        """
        if self._log is None:
            return
        try:
            descriptor = os.open(self._log, os.O_RDONLY)
        except FileNotFoundError:  # all of it is in the database file, which was synced
            return
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    async def settle(self) -> None:
        """`sync` for what the running task has written by `write_async`; tasks that wait together share one."""
        if self._log is None or not _wrote.get():
            return
        self._wanted += 1
        mine = self._wanted
        async with self._syncing:
            if self._synced < mine:
                covered = self._wanted
                await asyncio.get_running_loop().run_in_executor(self._threads, self.sync)
                self._synced = covered

    def close(self) -> None:
        """Finishes the writes that wait; later ones raise UnavailableError."""
        self._writer.close()
        self._threads.shutdown()
        self._reading.dispose()
        self._writing.dispose()


def parse_url(url: str) -> sa.URL:
    """The URL with its driver named and its file absolute, so that all processes agree. Raises ConfigError."""
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"the database URL {url!r} is malformed; {_URLS}") from error
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ConfigError(f"the database {parsed.drivername!r} is not supported; {_URLS}")
    if parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"an SQLite database in memory cannot be shared between processes; {_URLS}")
    return parsed.set(drivername="sqlite+pysqlite", database=str(Path(str(parsed.database)).resolve()))


_URLS = "use sqlite:///path/to/file or postgresql://user:password@host/database"


def _create_engine(url: sa.URL, *, writes: bool) -> sa.Engine:
    options: dict[str, Any] = {"poolclass": NullPool}
    if not writes:  # single queries: a transaction around each would cost two more round trips
        options = {"pool_size": _READERS, "max_overflow": _READERS, "isolation_level": "AUTOCOMMIT"}
    if url.get_backend_name() == "sqlite":
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, **options)
        sa.event.listen(engine, "connect", partial(_prepare_sqlite, writes=writes))
        if writes:
            # The driver would begin late, and then fail at once where it should wait for the lock.
            sa.event.listen(engine, "begin", lambda conn: conn.exec_driver_sql("BEGIN IMMEDIATE"))
        return engine
    missing = {key: value for key, value in _POSTGRES_OPTIONS.items() if key not in url.query}
    engine = sa.create_engine(url, connect_args=missing, **options)
    if not writes:
        sa.event.listen(engine, "connect", _make_read_only)
    return engine


def _prepare_sqlite(conn: sqlite3.Connection, _record: object, *, writes: bool) -> None:
    conn.isolation_level = None
    for pragma in (*_SQLITE_PRAGMAS, f"query_only = {not writes}"):
        conn.execute(f"PRAGMA {pragma}")


def _make_read_only(conn: "psycopg.Connection[Any]", _record: object) -> None:
    conn.execute("SET default_transaction_read_only = on")


def _wait(cause: BaseException, give_up_at: float) -> None:
    if time.monotonic() > give_up_at:
        raise UnavailableError(f"the database is away ({cause}): try again") from cause
    time.sleep(_RETRY_SECONDS)
