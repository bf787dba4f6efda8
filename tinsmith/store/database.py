"""One database behind one writer thread (group commit) and a few readers; SQLite by default, Postgres by URL."""

from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa

P = ParamSpec("P")
R = TypeVar("R")


class Database:
    """`write` and `read` run a function of (connection, *args) in a transaction and return its value.

    Writes that arrive together share one commit, each in its own savepoint: one that raises fails alone.
    """

    def __init__(self, url: str) -> None: ...
    def migrate(self) -> None: ...
    def write(self, function: Callable[Concatenate[sa.Connection, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        raise NotImplementedError
    async def write_async(self, function: Callable[Concatenate[sa.Connection, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        raise NotImplementedError
    def read(self, function: Callable[Concatenate[sa.Connection, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        raise NotImplementedError
    async def read_async(self, function: Callable[Concatenate[sa.Connection, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        raise NotImplementedError
    def close(self) -> None: ...
