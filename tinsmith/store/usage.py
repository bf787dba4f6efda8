"""What every owner has used: tokens by the hour, and which checkpoints took how much room for how long.

Tokens are counted in the transaction that ends their job, so a request that is repeated after a crash counts once.
Knows no prices. Functions take a connection inside a transaction; an owner of None means everybody's.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects import postgresql, sqlite

from tinsmith.store.prepared import Prepared
from tinsmith.store.tables import checkpoints, models, sessions, storage, usage
from tinsmith.wire.jobs import Usage

HOUR = 3600
About = dict[str, tuple[str | None, dict[str, object]]]
_AT_ONCE = 1000  # parameters of one query
TOKEN_KINDS = ("train", "prefill", "cached_prefill", "sample")


def _adding(dialect: ModuleType) -> sa.ClauseElement:
    """Adds tokens to a row, or the row."""
    values = {column.name: sa.bindparam(column.name, type_=column.type) for column in usage.c}
    statement = dialect.insert(usage).values(values)
    more = {"tokens": usage.c.tokens + statement.excluded.tokens}
    added: sa.ClauseElement = statement.on_conflict_do_update(index_elements=list(usage.primary_key), set_=more)
    return added


_ADD = Prepared(sqlite=_adding(sqlite), postgresql=_adding(postgresql))


@dataclass(frozen=True, slots=True)
class Account:
    """To whom and what something is attributed."""

    owner: str
    session_id: str
    base: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one account used of one kind in one hour (since the epoch)."""

    hour: int
    account: Account
    kind: str
    count: int


@dataclass(frozen=True, slots=True)
class Stored:
    """An account's checkpoints in one hour: how many were made, and the bytes kept times hours."""

    hour: int
    account: Account
    made: int
    byte_hours: float


@dataclass(frozen=True, slots=True)
class Shelf:
    """What one owner keeps now, in one project (None: in no project)."""

    project_id: str | None
    owner: str
    checkpoints: int
    size_bytes: int


def add(conn: sa.Connection, base: str, used: Iterable[Usage], now: float) -> None:
    """Counts what jobs have used that end in this transaction."""
    counted: Counter[tuple[str, str, str]] = Counter()
    for one in used:
        for kind, tokens in one.tokens.items():
            if tokens:
                counted[one.owner, one.session_id, kind] += tokens
    for (owner, session_id, kind), tokens in sorted(counted.items()):  # in one order: nobody deadlocks
        row = {"hour": int(now // HOUR), "owner": owner, "session_id": session_id, "base": base, "kind": kind}
        _ADD(conn, row | {"tokens": tokens})


def tokens(conn: sa.Connection, owner: str | None, first_hour: int, last_hour: int) -> list[Tokens]:
    """What was used in these hours (the last one excluded), oldest first."""
    conditions = [usage.c.hour >= first_hour, usage.c.hour < last_hour]
    if owner is not None:
        conditions.append(usage.c.owner == owner)
    columns = (usage.c.hour, usage.c.owner, usage.c.session_id, usage.c.base, usage.c.kind, usage.c.tokens)
    statement = sa.select(*columns).where(*conditions).order_by(usage.c.hour, usage.c.tokens.desc())
    return [Tokens(hour, Account(*account), kind, n) for hour, *account, kind, n in conn.execute(statement)]


def begin_storage(conn: sa.Connection, path: str, account: Account, size_bytes: int, now: float) -> None:
    """Notes that a checkpoint takes room from now on; one that it replaces ends."""
    end_storage(conn, path, now)
    conn.execute(
        sa.insert(storage).values(
            path=path,
            owner=account.owner,
            session_id=account.session_id,
            base=account.base,
            size_bytes=size_bytes,
            since=now,
        )
    )


def end_storage(conn: sa.Connection, path: str, now: float) -> None:
    """Notes that a checkpoint is gone."""
    kept = (storage.c.path == path) & storage.c.until.is_(None)
    conn.execute(sa.update(storage).where(kept).values(until=now))


def stored(conn: sa.Connection, owner: str | None, first_hour: int, last_hour: int, now: float) -> list[Stored]:
    """What was stored in these hours (the last one excluded, none after `now`), oldest first."""
    begin, end = first_hour * HOUR, min(last_hour * HOUR, now)
    conditions = [storage.c.since < end, storage.c.until.is_(None) | (storage.c.until > begin)]
    if owner is not None:
        conditions.append(storage.c.owner == owner)
    columns = (storage.c.owner, storage.c.session_id, storage.c.base)
    spans = sa.select(*columns, storage.c.size_bytes, storage.c.since, storage.c.until).where(*conditions)
    hours = last_hour - first_hour
    sizes: defaultdict[Account, NDArray[np.float64]] = defaultdict(lambda: np.zeros(hours))
    made: defaultdict[Account, NDArray[np.float64]] = defaultdict(lambda: np.zeros(hours))
    for *account, size, since, until in conn.execute(spans):
        owned = Account(*account)
        _add_span(sizes[owned], size, max(since, begin) - begin, min(until or end, end) - begin)
        if since >= begin:
            made[owned][int((since - begin) // HOUR)] += 1
    return sorted(_by_hour(first_hour, sizes, made), key=lambda each: each.hour)


def _add_span(hours: NDArray[np.float64], size: int, begin: float, end: float) -> None:
    """Adds byte-hours of a checkpoint that was kept from `begin` to `end`, in seconds after the first hour's start."""
    edges = np.arange(len(hours)) * float(HOUR)
    hours += size * (np.minimum(end, edges + HOUR) - np.maximum(begin, edges)).clip(min=0) / HOUR


def _by_hour(
    first_hour: int, sizes: dict[Account, NDArray[np.float64]], made: dict[Account, NDArray[np.float64]]
) -> Iterator[Stored]:
    for account, hours in sizes.items():
        for index in np.flatnonzero(hours):
            count = int(made[account][index]) if account in made else 0
            yield Stored(first_hour + int(index), account, count, float(hours[index]))


def shelves(conn: sa.Connection, owner: str | None, project_id: str | None) -> list[Shelf]:
    """What is kept now, by project and owner; of one project, or all."""
    conditions: list[sa.ColumnElement[bool]] = []
    if owner is not None:
        conditions.append(checkpoints.c.owner == owner)
    if project_id is not None:
        conditions.append(sessions.c.project_id == project_id)
    groups = (sessions.c.project_id, checkpoints.c.owner)
    statement = (
        sa.select(*groups, sa.func.count(), sa.func.sum(checkpoints.c.size_bytes))
        .join(models, models.c.id == checkpoints.c.model_id)
        .join(sessions, sessions.c.id == models.c.session_id)
        .where(*conditions)
        .group_by(*groups)
        .order_by(checkpoints.c.owner, sessions.c.project_id)
    )
    return [Shelf(project, each, count, int(size)) for project, each, count, size in conn.execute(statement)]


def sessions_about(conn: sa.Connection, session_ids: Sequence[str]) -> About:
    """The project and the user's metadata of each of these sessions."""
    found: About = {}
    for start in range(0, len(session_ids), _AT_ONCE):
        some = session_ids[start : start + _AT_ONCE]
        columns = (sessions.c.id, sessions.c.project_id, sessions.c.user_metadata)
        statement = sa.select(*columns).where(sessions.c.id.in_(some))
        found |= {session_id: (project_id, metadata) for session_id, project_id, metadata in conn.execute(statement)}
    return found
