"""Statements that every request runs: compiled once and run straight on the driver.

SQLAlchemy's execution of a small statement costs about five times what the statement itself costs, and a queue consists
of small statements. Knows nothing of tables; parameters are of types that drivers take as they are (text, numbers,
bytes). Errors are the driver's own, which `Database` understands as well as SQLAlchemy's.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.selectable import ReturnsRows


class Prepared:
    """One statement for all databases, or one for each dialect's name."""

    def __init__(self, **statements: sa.ClauseElement) -> None:
        """`any=statement`, or `sqlite=…, postgresql=…`."""
        self._statements = statements
        self._compiled: dict[str, _Compiled] = {}

    def __call__(self, conn: sa.Connection, parameters: dict[str, Any]) -> list[Any]:
        """Runs it in the connection's transaction, always with the same names; the rows (tuples), if it returns any."""
        compiled = self._compiled.get(conn.dialect.name) or self._compile(conn.dialect, list(parameters))
        with closing(compiled.cursor(conn)) as cursor:
            cursor.execute(compiled.sql, compiled.arguments(parameters))
            return [] if cursor.description is None else compiled.rows(cursor.fetchall())

    def many(self, conn: sa.Connection, parameters: Sequence[dict[str, Any]]) -> None:
        """Runs it once for each of `parameters` (at least one)."""
        compiled = self._compiled.get(conn.dialect.name) or self._compile(conn.dialect, list(parameters[0]))
        with closing(compiled.cursor(conn)) as cursor:
            cursor.executemany(compiled.sql, [compiled.arguments(each) for each in parameters])

    def _compile(self, dialect: sa.Dialect, names: list[str]) -> "_Compiled":
        statement = self._statements["any" if "any" in self._statements else dialect.name]
        self._compiled[dialect.name] = compiled = _Compiled(statement, dialect, names)
        return compiled


class _Compiled:
    def __init__(self, statement: sa.ClauseElement, dialect: sa.Dialect, names: list[str]) -> None:
        compiler = statement.compile(dialect=dialect, column_keys=names)
        assert isinstance(compiler, SQLCompiler)
        self.sql = compiler.string
        self._complete = compiler.construct_params
        self._positions = compiler.positiontup
        self._cursor_options = {"binary": True} if dialect.name == "postgresql" else {}
        columns = statement.exported_columns if isinstance(statement, ReturnsRows) else ()
        convert = [_converter(column.type, dialect) for column in columns]
        self._convert = convert if any(convert) else None

    def cursor(self, conn: sa.Connection) -> Any:
        """A cursor of the driver's; on Postgres one that gets bytes as bytes, and not as twice as much text."""
        return conn.connection.cursor(**self._cursor_options)

    def arguments(self, parameters: dict[str, Any]) -> Any:
        """The parameters in the driver's form."""
        values = self._complete(parameters)
        return values if self._positions is None else [values[name] for name in self._positions]

    def rows(self, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The driver's rows, with JSON and booleans made what SQLAlchemy would make of them."""
        if self._convert is None:
            return list(rows)
        return [tuple(to(value) if to else value for to, value in zip(self._convert, row, strict=True)) for row in rows]


def _converter(type: "sa.types.TypeEngine[Any]", dialect: sa.Dialect) -> Callable[[Any], Any] | None:
    if not isinstance(type, sa.JSON | sa.Boolean):
        return None
    return type.dialect_impl(dialect).result_processor(dialect, None)
