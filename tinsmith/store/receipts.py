"""A row that is written with each transaction on Postgres, and tells afterwards whether that was committed.

A transaction's id alone does not: a server that crashed has forgotten ids of which nothing had reached its log, and
gives them out again, perhaps to another process before the first one asks. SQLite's commits end within the process, and
leave none. Before the tables are there only migrations write, which see by themselves where they are.
"""

import time
from dataclasses import dataclass
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from tinsmith.store.prepared import Prepared
from tinsmith.store.tables import receipts

KEPT_SECONDS = 86400.0  # of writers that are gone; far longer than any of them asks for its last one
_UNKNOWN_ID = "22023"  # of a transaction "in the future"

_IS_THERE = sa.text("SELECT to_regclass('receipts') IS NOT NULL")
_STATUS = sa.text("SELECT pg_xact_status(CAST(:transaction AS xid8))")
# One row for each writer. A transaction that has written nothing has no id, and needs no row.
_LEAVE = Prepared(
    postgresql=sa.text(
        "INSERT INTO receipts (writer, number, left_at)"
        " SELECT :writer, :number, :left_at WHERE pg_current_xact_id_if_assigned() IS NOT NULL"
        " ON CONFLICT (writer) DO UPDATE SET number = excluded.number, left_at = excluded.left_at"
        " RETURNING CAST(pg_current_xact_id() AS text)"
    )
)


@dataclass(frozen=True, slots=True)
class Receipt:
    """Of one transaction: its id, and what its writer's row says if it was committed."""

    transaction: str
    number: int


class Receipts:
    """Those of one writer, whose transactions follow each other."""

    def __init__(self) -> None:
        self._writer = uuid4().hex
        self._number = 0
        self._are_kept = False

    def begin(self, conn: sa.Connection) -> None:
        """To be called at a transaction's beginning."""
        if self._are_kept or conn.dialect.name != "postgresql":
            return
        self._are_kept = bool(conn.scalar(_IS_THERE))
        if self._are_kept:
            conn.execute(sa.delete(receipts).where(receipts.c.left_at < time.time() - KEPT_SECONDS))

    def leave(self, conn: sa.Connection) -> Receipt | None:
        """To be called right before a commit; None if nothing was written, or none is kept."""
        if not self._are_kept:
            return None
        self._number += 1
        rows = _LEAVE(conn, {"writer": self._writer, "number": self._number, "left_at": time.time()})
        return Receipt(rows[0][0], self._number) if rows else None

    def was_committed(self, conn: sa.Connection, receipt: Receipt) -> bool | None:
        """Whether the transaction of the writer's latest receipt was, on a connection since lost; None: it runs yet."""
        if _status(conn, receipt.transaction) == "in progress":
            return None
        with conn.begin():
            number = conn.scalar(sa.select(receipts.c.number).where(receipts.c.writer == self._writer))
        return bool(number == receipt.number)


def _status(conn: sa.Connection, transaction: str) -> str | None:
    """What the server knows of a transaction's id, which may be another's by now; None if it knows nothing."""
    try:
        with conn.begin():
            status: str | None = conn.scalar(_STATUS, {"transaction": transaction})
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != _UNKNOWN_ID:
            raise
        return None
    return status
