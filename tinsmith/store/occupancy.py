"""One server at a time works on a base model's jobs in a database: each one that starts takes over all that is running.

A lock says so that ends with the process: of a file beside an SQLite database, or of Postgres, by a connection that is
kept for nothing else. A connection can be lost; then the lock is taken again, unless another server was faster.
Postgres may learn of the loss much later than we do: a server ends what is left of its own connection.
Knows names of base models, nothing of jobs.
"""

import fcntl
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

import psycopg
import sqlalchemy as sa

from tinsmith.errors import ConfigError, UnavailableError
from tinsmith.store.notifications import Connection, connect

WAIT_SECONDS = 10.0  # for a server that has just been killed to be gone
CHECK_SECONDS = 5.0  # between two looks whether the lock is still held
_RETRY_SECONDS = 0.2
_TRY = "SELECT pg_try_advisory_lock(hashtextextended('tinsmith serves ' || %s, 0))"
_WHO = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
_END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %s AND backend_start = %s"

log = logging.getLogger(__name__)


class OccupiedError(ConfigError):
    """Another server works on a base model in the same database."""

    def __init__(self, base: str) -> None:
        super().__init__(
            f"another server works on the requests for {base!r} in this database, and two would take each other's; "
            "stop that one, serve another model here, or give this one a database of its own (--database-url)"
        )


class _Locks(Protocol):
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
        is_local = database_url.startswith("sqlite")
        self._locks: _Locks = _FileLocks(database_url) if is_local else _PostgresLocks(database_url)
        try:
            self._take()
        except BaseException as error:
            self._locks.release()
            if isinstance(error, psycopg.Error):
                raise UnavailableError(f"the database is away ({error}): try again") from error
            raise

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
        deadline = time.monotonic() + self._wait_seconds
        for base in self._bases:
            while not self._locks.take(base):
                if time.monotonic() >= deadline:
                    raise OccupiedError(base)
                time.sleep(_RETRY_SECONDS)


class _FileLocks:
    def __init__(self, database_url: str) -> None:
        self._database = Path(str(sa.make_url(database_url).database)).resolve()
        self._files: dict[str, IO[str]] = {}

    def take(self, base: str) -> bool:
        if base in self._files:
            return True
        name = f"{self._database.name}-{hashlib.sha256(base.encode()).hexdigest()[:8]}.lock"
        file = self._database.with_name(name).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._files[base] = file
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

    def take(self, base: str) -> bool:
        if self._conn is None:
            self._conn = self._connect()
        row = self._conn.execute(_TRY, [base]).fetchone()
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
