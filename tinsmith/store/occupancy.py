"""One server at a time works on a base model's jobs in a database: each one that starts takes over all that is running.

A lock says so that ends with the process: of a file beside an SQLite database, or of Postgres, by a connection that is
kept for nothing else. A connection can be lost; then the lock is taken again, unless another server was faster.
Postgres may learn of the loss much later than we do: a server ends what is left of its own connection. Another lock,
which all servers of a database share, keeps its tables from being changed under them.
Knows names of base models, nothing of jobs.
"""

import fcntl
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import psycopg
import sqlalchemy as sa

from tinsmith.errors import ConfigError, UnavailableError
from tinsmith.store import migrations
from tinsmith.store.database import Database
from tinsmith.store.notifications import Connection, connect

WAIT_SECONDS = 10.0  # for a server that has just been killed to be gone
CHECK_SECONDS = 5.0  # between two looks whether the lock is still held
_RETRY_SECONDS = 0.2
_TRY = "SELECT pg_try_advisory_lock(hashtextextended('tinsmith serves ' || %s, 0))"
_ENTER = "SELECT pg_try_advisory_lock{}(hashtextextended('tinsmith works here', 0))"
_WHO = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
_END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %s AND backend_start = %s"

log = logging.getLogger(__name__)


class OccupiedError(ConfigError):
    """Another server works in the same database: on one of the models, or with tables that would have to be changed."""


_OF_THE_MODEL = (
    "another server works on the requests for {!r} in this database, and two would take each other's; "
    "stop that one, serve another model here, or give this one a database of its own (--database-url)"
)
_WITH_OLD_TABLES = (
    "the tables of this database are an older version's, and a server works with them; stop it, and they will be "
    "brought up to date, or use a database of its own for this version (--database-url)"
)
_BEING_CHANGED = "the tables of this database are being brought up to date by another version; try again"


def migrate_alone(database: Database, database_url: str, wait_seconds: float = WAIT_SECONDS) -> None:
    """Brings a database's tables up to date, if they are not, while no server works with them.

    Raises OccupiedError if one does, after some seconds; ConfigError for a newer version's; UnavailableError.
    """

    def is_decided() -> bool:
        """Servers that start together all wait here, for one of them."""
        return database.read(migrations.level) in (migrations.CURRENT, migrations.NEWER)

    if is_decided():
        database.migrate()
        return
    with _locks_of(database_url) as locks:
        _wait_for(
            lambda: is_decided() or locks.enter(alone=True),
            wait_seconds,
            lambda: _WITH_OLD_TABLES if locks.enter(alone=False) else _BEING_CHANGED,
        )
        database.migrate()
        locks.release()


class _Locks(Protocol):
    def enter(self, *, alone: bool) -> bool:
        """Whether we are one of the servers in the database now, or (`alone`) all others are kept out."""

    def take(self, base: str) -> bool:
        """Whether it is ours now, or was already."""

    def are_held(self) -> bool:
        """Whether those that were taken are still ours."""

    def release(self) -> None: ...


class Occupancy:
    """This server's hold on the base models that it serves; `close` gives them up."""

    def __init__(self, database_url: str, bases: Sequence[str], wait_seconds: float = WAIT_SECONDS) -> None:
        """Raises OccupiedError if another server holds one of them, after some seconds; UnavailableError."""
        self._bases = bases
        self._wait_seconds = wait_seconds
        with _locks_of(database_url) as self._locks:
            self._take()

    def keep(self, stop: threading.Event, lost: Callable[[OccupiedError], None]) -> None:
        """Until `stop`: takes again what a lost connection has let go; `lost` is told if another server was faster."""
        while not stop.wait(CHECK_SECONDS):
            self.check(lost)

    def check(self, lost: Callable[[OccupiedError], None]) -> None:
        """One look of `keep`."""
        try:
            if not self._locks.are_held():
                self._take()
        except OccupiedError as error:
            lost(error)
        except psycopg.Error as error:  # the next look may find the database again
            log.warning("the database is away, and with it the hold on %s: %s", ", ".join(self._bases), error)

    def close(self) -> None:
        self._locks.release()

    def _take(self) -> None:
        _wait_for(lambda: self._locks.enter(alone=False), self._wait_seconds, lambda: _BEING_CHANGED)
        for base in self._bases:
            _wait_for(partial(self._locks.take, base), self._wait_seconds, partial(_OF_THE_MODEL.format, base))


@contextmanager
def _locks_of(database_url: str) -> Iterator[_Locks]:
    """A database's locks, which are let go of if the block raises. Raises UnavailableError for what Postgres raises."""
    locks: _Locks = _FileLocks(database_url) if database_url.startswith("sqlite") else _PostgresLocks(database_url)
    try:
        yield locks
    except BaseException as error:
        locks.release()
        if isinstance(error, psycopg.Error):
            raise UnavailableError(f"the database is away ({error}): try again") from error
        raise


def _wait_for(lock: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not lock():
        if time.monotonic() >= deadline:
            raise OccupiedError(otherwise())
        time.sleep(_RETRY_SECONDS)


class _FileLocks:
    def __init__(self, database_url: str) -> None:
        self._database = Path(str(sa.make_url(database_url).database)).resolve()
        self._files: dict[str, IO[str]] = {}

    def enter(self, *, alone: bool) -> bool:
        return self._lock("servers", fcntl.LOCK_EX if alone else fcntl.LOCK_SH)

    def take(self, base: str) -> bool:
        return self._lock(hashlib.sha256(base.encode()).hexdigest()[:8], fcntl.LOCK_EX)

    def _lock(self, name: str, how: int) -> bool:
        if name in self._files:
            return True
        file = self._database.with_name(f"{self._database.name}-{name}.lock").open("w")
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._files[name] = file
        return True

    def are_held(self) -> bool:
        return True  # as long as this process lives

    def release(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class _PostgresLocks:
    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._conn: Connection | None = None
        self._who: tuple[Any, ...] | None = None  # this server's connection, as Postgres knows it

    def enter(self, *, alone: bool) -> bool:
        return self._try(_ENTER.format("" if alone else "_shared"))

    def take(self, base: str) -> bool:
        return self._try(_TRY, base)

    def _try(self, lock: str, *values: str) -> bool:
        if self._conn is None:
            self._conn = self._connect()
        row = self._conn.execute(lock, values).fetchone()
        return bool(row and row[0])

    def are_held(self) -> bool:
        with suppress(psycopg.Error):
            if self._conn is not None:
                self._conn.execute("SELECT 1")
                return True
        self.release()
        return False

    def release(self) -> None:
        if self._conn is not None:
            self._conn.close()
            self._conn = None

    def _connect(self) -> Connection:
        """A connection without locks; ends the one before, which Postgres may take to be alive for hours."""
        conn = connect(self._url, "tinsmith server")
        try:
            if self._who is not None:
                conn.execute(_END, self._who)
            self._who = conn.execute(_WHO).fetchone()
        except psycopg.Error:
            conn.close()
            raise
        return conn
