"""Whether a database can be used: questions for `tinsmith doctor`, which leave no trace in it."""

from pathlib import Path

import sqlalchemy as sa


def try_to_write(conn: sa.Connection) -> None:
    """Raises the driver's error if nothing can be written. On SQLite, having begun a transaction to write says it."""
    if conn.dialect.name == "postgresql":
        conn.execute(sa.text("CREATE TEMPORARY TABLE tinsmith_doctor (tried integer) ON COMMIT DROP"))


def damage(conn: sa.Connection, largest: int) -> str:
    """What is wrong with an SQLite file of at most `largest` bytes, which is read through; empty if nothing is."""
    if conn.dialect.name != "sqlite" or Path(str(conn.engine.url.database)).stat().st_size > largest:
        return ""
    found = str(conn.exec_driver_sql("PRAGMA quick_check(1)").scalar_one())
    return "" if found == "ok" else found
