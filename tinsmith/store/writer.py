"""One thread that does all writing of a process: writes that wait together share one commit.

Knows transactions and how they fail, and nothing of what is written. A write that raises fails alone; a batch that
failed for the database's sake (connection lost, deadlock) runs again, unless it turns out to have been committed.
"""

import asyncio
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from tinsmith.errors import UnavailableError
from tinsmith.store.prepared import Prepared
from tinsmith.store.receipts import Receipt, Receipts

R = TypeVar("R")

_BATCH = 64  # Postgres keeps this many subtransactions of a session in shared memory
_RETRY_SECONDS = 0.05
_CONFLICTS = ("40001", "40P01")  # serialization failure, deadlock
_NO_RESOURCES = ("53", "58030")  # disk or memory full, too many connections; an error of the disk
# Never released: the commit cleans up, and letting go of each would cost another round trip.
_SAVE = Prepared(any=sa.text("SAVEPOINT one_write"))
_TAKE_BACK = Prepared(any=sa.text("ROLLBACK TO SAVEPOINT one_write"))


@dataclass(frozen=True, slots=True)
class _Write:
    function: Callable[[sa.Connection], Any]
    future: "Future[Any] | asyncio.Future[Any]"

    def begin(self) -> bool:
        """Whether anybody waits for it still."""
        if isinstance(self.future, Future):
            return self.future.set_running_or_notify_cancel()
        return not self.future.cancelled()


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one write returned or raised, to be told once the batch is committed."""

    value: Any = None
    error: BaseException | None = None


class _ConflictError(Exception):
    """Another process's transaction was in the way; everything was rolled back."""


class _LostError(Exception):
    """The connection is gone. Nothing was committed, unless `receipt` says that `outcomes` were."""

    def __init__(self, outcomes: list[_Outcome], receipt: Receipt | None) -> None:
        self.outcomes = outcomes
        self.receipt = receipt


class Writer:
    """Runs functions of a connection, in order of arrival, each in a savepoint of a shared transaction.

    `patience` is for how many seconds a database that went away is waited for before writes fail.
    """

    def __init__(self, engine: sa.Engine, patience: float) -> None:
        self._engine = engine
        self._patience = patience
        self._conn: sa.Connection | None = None
        self._receipts = Receipts()
        self._away_since: float | None = None
        self._writes: SimpleQueue[_Write | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tinsmith-writer", daemon=True)
        self._thread.start()

    def add(self, function: Callable[[sa.Connection], R]) -> "Future[R]":
        """Queues a write; the future has its value once it is committed. Raises UnavailableError after `close`."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("a write cannot wait for another write: call its function with the same connection")
        future: Future[R] = Future()
        self._put(_Write(function, future))
        return future

    def add_async(self, function: Callable[[sa.Connection], R]) -> "asyncio.Future[R]":
        """`add` for the running event loop, which is woken once for all writes of a commit."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._put(_Write(function, future))
        return future

    def _put(self, write: _Write) -> None:
        with self._lock:
            if self._closed:
                raise UnavailableError("the database is closed: the server is shutting down")
            self._writes.put(write)

    def close(self) -> None:
        """Runs what waits, then ends the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._writes.put(None)
        self._thread.join()

    def _run(self) -> None:
        while batch := self._gather():
            self._finish(batch)
        if self._conn is not None:
            self._conn.close()

    def _gather(self) -> list[_Write]:
        """Waits for a write, and takes those that came with it; empty at the end."""
        batch: list[_Write] = []
        write = self._writes.get()
        while write is not None:
            batch.append(write)
            if len(batch) == _BATCH:
                return batch
            try:
                write = self._writes.get_nowait()
            except Empty:
                return batch
        if batch:
            self._writes.put(None)
        return batch

    def _finish(self, batch: list[_Write]) -> None:
        live = [write for write in batch if write.begin()]
        try:
            outcomes = self._commit_at_last(live)
        except BaseException as error:
            outcomes = [_Outcome(error=error)] * len(live)
        for_loops: defaultdict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], _Outcome]]] = defaultdict(
            list
        )
        for write, outcome in zip(live, outcomes, strict=True):
            if isinstance(write.future, Future):
                _tell(write.future, outcome)
            else:
                for_loops[write.future.get_loop()].append((write.future, outcome))
        for loop, told in for_loops.items():
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_tell_all, told)

    def _commit_at_last(self, batch: list[_Write]) -> list[_Outcome]:
        """Commits the batch once, however often that must be tried."""
        unsure: _LostError | None = None
        while True:
            try:
                conn = self._connection()
                if unsure and unsure.receipt:
                    committed = self._receipts.was_committed(conn, unsure.receipt)
                    if committed is None:
                        self._wait(unsure.__cause__, unsure)
                        continue
                    if committed:
                        self._away_since = None
                        return unsure.outcomes
                unsure = None
                outcomes = _commit(conn, batch, self._receipts)
                self._away_since = None
                return outcomes
            except _ConflictError as error:
                if len(batch) > 1:  # what collides in company may not collide alone
                    return [outcome for write in batch for outcome in self._commit_at_last([write])]
                self._wait(error.__cause__, unsure)
            except _LostError as error:
                unsure = error
                self._disconnect()
                self._wait(error.__cause__, unsure)
            except OperationalError as error:  # no connection, or no answer to the first question on it
                self._disconnect()
                self._wait(error, unsure)

    def _connection(self) -> sa.Connection:
        if self._conn is None:
            self._conn = self._engine.connect()
        return self._conn

    def _disconnect(self) -> None:
        if self._conn is not None:
            self._conn.invalidate()
            self._conn.close()
            self._conn = None

    def _wait(self, cause: BaseException | None, unsure: _LostError | None) -> None:
        """Sleeps a moment before the next try, or raises UnavailableError when the patience is at an end."""
        now = time.monotonic()
        self._away_since = self._away_since or now
        if now - self._away_since > self._patience:
            fate = "whether it was written is unknown" if unsure and unsure.receipt else "nothing was written"
            raise UnavailableError(f"the database is away ({cause}); {fate}: try again") from cause
        time.sleep(_RETRY_SECONDS)


def _tell_all(told: list[tuple["asyncio.Future[Any]", _Outcome]]) -> None:
    for future, outcome in told:
        if not future.cancelled():
            _tell(future, outcome)


def _tell(future: "Future[Any] | asyncio.Future[Any]", outcome: _Outcome) -> None:
    if outcome.error is not None:
        future.set_exception(outcome.error)
    else:
        future.set_result(outcome.value)


def _commit(conn: sa.Connection, batch: list[_Write], receipts: Receipts, *, guarded: bool = False) -> list[_Outcome]:
    """One transaction of all writes. Raises _ConflictError, _LostError, or what the commit itself raises.

    Savepoints cost a round trip each, so the first try does without; if a write raises, all run again, `guarded`.
    """
    receipt, outcomes = None, []
    try:
        with conn.begin() as transaction:
            receipts.begin(conn)
            outcomes = _run_all(conn, batch, guarded)
            failed = [outcome for outcome in outcomes if outcome.error is not None]
            again = bool(failed) and not guarded and len(batch) > 1
            if again or len(failed) == len(batch):
                transaction.rollback()
            else:
                receipt = receipts.leave(conn)
    except (_ConflictError, _LostError):
        raise
    except Exception as error:
        _raise_if_retriable(conn, error, outcomes, receipt)
        raise
    return _commit(conn, batch, receipts, guarded=True) if again else outcomes


def _run_all(conn: sa.Connection, batch: list[_Write], guarded: bool) -> list[_Outcome]:
    """Runs the writes; those that are not `guarded` only up to the first that raises."""
    outcomes = []
    for write in batch:
        if guarded:
            _SAVE(conn, {})
        outcomes.append(_run(conn, write))
        if outcomes[-1].error is not None:
            if not guarded:
                break
            _TAKE_BACK(conn, {})
    return outcomes


def _run(conn: sa.Connection, write: _Write) -> _Outcome:
    """Runs one write; its error is its own, unless it says that the whole transaction is lost."""
    try:
        return _Outcome(write.function(conn))
    except BaseException as error:
        _raise_if_retriable(conn, error, [], None)
        return _Outcome(error=error)


def _raise_if_retriable(
    conn: sa.Connection, error: BaseException, outcomes: list[_Outcome], receipt: Receipt | None
) -> None:
    if is_lost(conn, error):
        raise _LostError(outcomes, receipt) from error
    if _state(error) in _CONFLICTS:
        raise _ConflictError from error
    if is_full(error):
        raise UnavailableError(f"the database has no room or cannot write ({error}); nothing was written") from error


def is_full(error: BaseException) -> bool:
    """Whether the database's disk was in the way: of everything, not of one write."""
    code = getattr(_driver_error(error), "sqlite_errorcode", 0) & 0xFF  # the rest of the bits say what exactly
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR) or _state(error).startswith(_NO_RESOURCES)


def _driver_error(error: BaseException) -> BaseException | None:
    return error.orig if isinstance(error, DBAPIError) else error


def _state(error: BaseException) -> str:
    """Postgres's five characters for what happened."""
    return getattr(_driver_error(error), "sqlstate", None) or ""


def is_lost(conn: sa.Connection, error: BaseException) -> bool:
    """Whether `error` means that the connection is gone; it is then unusable, and its transaction never committed."""
    if not conn.invalidated and isinstance(error, conn.dialect.loaded_dbapi.Error):
        driver_conn = conn.connection.dbapi_connection
        if conn.dialect.is_disconnect(error, driver_conn, None):
            conn.invalidate(error)
    return conn.invalidated
