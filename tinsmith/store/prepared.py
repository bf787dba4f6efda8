"""Statements that every request runs: compiled once and run straight on the driver.

SQLAlchemy's execution of a small statement costs about five times what the statement itself costs, and a queue consists
of small statements. Knows nothing of tables; parameters and results are of types that drivers take as they are (text,
numbers, bytes). Errors are the driver's own, which `Database` understands as well as SQLAlchemy's.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.compiler import SQLCompiler


class Prepared:
    """One statement for all databases, or one for each dialect's name."""

    def __init__(self, **statements: sa.ClauseElement) -> None:
        """`any=statement`, or `sqlite=…, postgresql=…`."""
        self._statements = statements
        self._compiled: dict[str, SQLCompiler] = {}

    def __call__(self, conn: sa.Connection, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        """Runs it in the connection's transaction; the rows, if it returns any. All parameters, always the same."""
        compiled = self._compiled.get(conn.dialect.name) or self._compile(conn.dialect, list(parameters))
        values = compiled.construct_params(parameters)
        cursor = conn.connection.cursor()
        try:
            positions = compiled.positiontup
            cursor.execute(compiled.string, values if positions is None else [values[name] for name in positions])
            return [] if cursor.description is None else list(cursor.fetchall())
        finally:
            cursor.close()

    def _compile(self, dialect: sa.Dialect, columns: list[str]) -> SQLCompiler:
        statement = self._statements["any" if "any" in self._statements else dialect.name]
        compiled = statement.compile(dialect=dialect, column_keys=columns)
        assert isinstance(compiled, SQLCompiler)
        self._compiled[dialect.name] = compiled
        return compiled
