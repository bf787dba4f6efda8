"""Sessions, models, samplers, checkpoints and engines: plain records and the verbs on them.

`find_x` gives None where there is nothing; `require_x` raises NotFoundError, also for somebody else's object, so that a
foreign id cannot be told from one that never was. Functions take a connection inside a transaction; those that take an
owner and change nothing also take EVERYBODY.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import sqlalchemy as sa

from tinsmith.errors import GoneError, NotFoundError, UserError
from tinsmith.store import audit, usage
from tinsmith.store.prepared import Prepared
from tinsmith.store.tables import checkpoints, engines, insert, models, samplers, sessions

EVERYBODY = "*"
"""In place of an owner, to find and list what belongs to anybody. Nothing is ever owned by it."""

_EXPIRED_AT_ONCE = 200  # checkpoints

LIVING = sa.text("models.state != 'closed'")
"""A condition on models; spelt out, so that the databases use the partial index."""

Record = TypeVar("Record", bound="_Row")


class _Row(Protocol):
    """A dataclass whose fields are a table's columns."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Session:
    id: str
    owner: str
    state: str
    tags: list[str]
    user_metadata: dict[str, Any]
    sdk_version: str
    project_id: str | None
    display_name: str | None
    finish_reason: str | None
    created_at: float
    seen_at: float


@dataclass(frozen=True, slots=True)
class Model:
    id: str
    session_id: str
    owner: str
    base: str
    base_name: str
    spec: dict[str, Any]
    user_metadata: dict[str, Any]
    state: str
    recovery_seq: int | None
    recovery_folder: str | None
    created_at: float
    used_at: float


@dataclass(frozen=True, slots=True)
class SamplerRecord:
    id: str
    session_id: str
    owner: str
    base: str
    base_name: str
    snapshot: str
    model_id: str | None
    created_at: float
    written_at: float | None = None  # its unnamed snapshot, if it is to have one and that was saved


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: str
    model_id: str
    kind: str
    name: str
    owner: str
    base: str
    base_name: str
    spec: dict[str, Any]
    folder: str
    size_bytes: int
    public: bool
    user_metadata: dict[str, Any]
    created_at: float
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class EngineRecord:
    base: str
    id: str
    pid: int
    state: str
    progress: str
    capabilities: dict[str, Any] | None
    beat_at: float
    statistics: dict[str, Any] | None = None
    starts: int = 1
    recoveries: int = 0


def create_session(conn: sa.Connection, session: Session) -> None:
    """Adds a session under a new id."""
    conn.execute(sa.insert(sessions), asdict(session))


def require_session(conn: sa.Connection, session_id: str, owner: str) -> Session:
    """The owner's session, open or finished. Raises NotFoundError."""
    session = _find(conn, Session, _SESSION, session_id)
    if session is None or not _belongs(session.owner, owner):
        raise NotFoundError(f"there is no session {session_id!r}")
    return session


def require_beating(conn: sa.Connection, session_id: str, owner: str) -> Session:
    """The owner's session, if it is not over. Raises NotFoundError, GoneError."""
    session = require_session(conn, session_id, owner)
    if session.state != "open":
        raise GoneError(f"session {session_id!r} is over ({session.finish_reason}); create a new one")
    return session


def signs_of_life(conn: sa.Connection, session_ids: Sequence[str]) -> dict[str, float]:
    """When each of these sessions was last heard of, of those that are open."""
    is_asked = sessions.c.id.in_(session_ids) & (sessions.c.state == "open")
    return {row.id: row.seen_at for row in conn.execute(sa.select(sessions.c.id, sessions.c.seen_at).where(is_asked))}


def touch_session(conn: sa.Connection, session_id: str, owner: str, now: float) -> Session:
    """Notes a heartbeat. Raises NotFoundError, or GoneError for a finished session."""
    session = require_beating(conn, session_id, owner)
    conn.execute(sa.update(sessions).where(sessions.c.id == session_id).values(seen_at=now))
    return replace(session, seen_at=now)


def finish_session(conn: sa.Connection, session_id: str, owner: str, reason: str) -> None:
    """Ends a session; one that is over keeps its first reason. Raises NotFoundError."""
    require_session(conn, session_id, owner)
    is_open = (sessions.c.id == session_id) & (sessions.c.state == "open")
    conn.execute(sa.update(sessions).where(is_open).values(state="finished", finish_reason=reason))


def update_session(conn: sa.Connection, /, session_id: str, **changes: Any) -> None:
    """Sets columns of a session. Raises NotFoundError."""
    _update(conn, sessions.c.id, session_id, changes)


def list_sessions(conn: sa.Connection, owner: str, limit: int, offset: int) -> tuple[list[Session], int]:
    """Newest first, with the total count."""
    return _page(conn, Session, sessions, sessions.c.id, _of(sessions, owner), limit, offset)


def create_model(conn: sa.Connection, model: Model) -> Model:
    """Adds a model; the same id again returns the one that exists, unchanged."""
    return _create(conn, Model, models, model)


def require_model(conn: sa.Connection, model_id: str, owner: str) -> Model:
    """The owner's model, in whatever state. Raises NotFoundError."""
    model = find_model(conn, model_id)
    if model is None or not _belongs(model.owner, owner):
        raise NotFoundError(f"there is no model {model_id!r}")
    return model


def find_model(conn: sa.Connection, model_id: str) -> Model | None:
    return _find(conn, Model, _MODEL, model_id)


def update_model(conn: sa.Connection, /, model_id: str, **changes: Any) -> None:
    """Sets columns of a model. Raises NotFoundError."""
    _update(conn, models.c.id, model_id, changes)


def base_of(conn: sa.Connection, subject: str, owner: str) -> str:
    """The base of an owner's model or sampler. Raises NotFoundError."""
    is_model = find_model(conn, subject) is not None
    return require_model(conn, subject, owner).base if is_model else require_sampler(conn, subject, owner).base


def bases_of_models(conn: sa.Connection) -> dict[str, str]:
    """The base of every model that is not closed."""
    found = conn.execute(sa.select(models.c.id, models.c.base).where(LIVING))
    return {row.id: row.base for row in found}


def list_models(conn: sa.Connection, owner: str, limit: int, offset: int) -> tuple[list[Model], int]:
    """Newest first, with the total count."""
    return _page(conn, Model, models, models.c.id, _of(models, owner), limit, offset)


def closing_models(conn: sa.Connection, base: str, unseen_since: float) -> list[str]:
    """Models that are not closed yet although their session is finished, or was not heard of since that time."""
    is_over = (sessions.c.state == "finished") | (sessions.c.seen_at < unseen_since)
    return _living_models(conn, base, is_over)


def silent_models(conn: sa.Connection, base: str, unseen_since: float) -> list[str]:
    """Models that are not closed yet, and whose session was not heard of since that time."""
    return _living_models(conn, base, sessions.c.seen_at < unseen_since)


def _living_models(conn: sa.Connection, base: str, which: sa.ColumnElement[bool]) -> list[str]:
    statement = (
        sa.select(models.c.id)
        .join(sessions, sessions.c.id == models.c.session_id)
        .where(models.c.base == base, LIVING, which)
    )
    return list(conn.scalars(statement))


def open_models(conn: sa.Connection, owner: str) -> list[Model]:
    """The owner's models that can still be used, oldest first."""
    statement = (
        sa.select(models)
        .join(sessions, sessions.c.id == models.c.session_id)
        .where(models.c.owner == owner, models.c.state.in_(["creating", "ready"]), sessions.c.state == "open")
        .order_by(models.c.created_at, models.c.id)
    )
    return [Model(**row) for row in conn.execute(statement).mappings()]


def models_of_session(conn: sa.Connection, session_id: str) -> list[Model]:
    """Oldest first."""
    return _of_session(conn, Model, models, session_id)


def create_sampler(conn: sa.Connection, sampler: SamplerRecord) -> SamplerRecord:
    """Adds a sampler; the same id again returns the one that exists, unchanged."""
    return _create(conn, SamplerRecord, samplers, sampler)


def require_sampler(conn: sa.Connection, sampler_id: str, owner: str) -> SamplerRecord:
    """The owner's sampler. Raises NotFoundError."""
    sampler = find_sampler(conn, sampler_id)
    if sampler is None or not _belongs(sampler.owner, owner):
        raise NotFoundError(f"there is no sampler {sampler_id!r}")
    return sampler


def find_sampler(conn: sa.Connection, sampler_id: str) -> SamplerRecord | None:
    return _find(conn, SamplerRecord, _SAMPLER, sampler_id)


def update_sampler(conn: sa.Connection, /, sampler_id: str, **changes: Any) -> None:
    """Sets columns of a sampler. Raises NotFoundError."""
    _update(conn, samplers.c.id, sampler_id, changes)


def samplers_of_session(conn: sa.Connection, session_id: str) -> list[SamplerRecord]:
    """Oldest first."""
    return _of_session(conn, SamplerRecord, samplers, session_id)


def create_checkpoint(conn: sa.Connection, checkpoint: Checkpoint, *, overwrite: bool = False) -> None:
    """Adds a checkpoint. Raises UserError if the path exists (and has not expired) and `overwrite` is false."""
    row = asdict(checkpoint)
    replaceable = sa.true() if overwrite else checkpoints.c.expires_at <= time.time()
    statement = insert(conn, checkpoints).values(row)
    upsert = statement.on_conflict_do_update(index_elements=["path"], set_=row, where=replaceable)
    if conn.execute(upsert.returning(checkpoints.c.path)).first() is None:
        raise UserError(f"checkpoint {checkpoint.path!r} exists; choose another name, or pass overwrite=True")
    now, session_id = time.time(), checkpoint.model_id.partition(":")[0]
    account = usage.Account(checkpoint.owner, session_id, checkpoint.base)
    usage.begin_storage(conn, checkpoint.path, account, checkpoint.size_bytes, now)
    about = {"tinker_path": checkpoint.path, "model_id": checkpoint.model_id}
    audit.note(conn, checkpoint.owner, "checkpoint_create", **about, size_bytes=checkpoint.size_bytes)


def find_checkpoint(conn: sa.Connection, path: str) -> Checkpoint | None:
    """None also when it has expired."""
    checkpoint = _find(conn, Checkpoint, _CHECKPOINT, path)
    if checkpoint is None or (checkpoint.expires_at is not None and checkpoint.expires_at <= time.time()):
        return None
    return checkpoint


def require_checkpoint(conn: sa.Connection, path: str, owner: str) -> Checkpoint:
    """The owner's checkpoint, or a published one. Raises NotFoundError."""
    checkpoint = find_checkpoint(conn, path)
    if checkpoint is None or not (checkpoint.public or _belongs(checkpoint.owner, owner)):
        raise NotFoundError(f"there is no checkpoint {path!r}")
    return checkpoint


def list_checkpoints(
    conn: sa.Connection, owner: str, limit: int, offset: int, model_id: str | None = None
) -> tuple[list[Checkpoint], int]:
    """The owner's checkpoints that have not expired (of one model), newest first, with the total count."""
    conditions = [*_of(checkpoints, owner), _has_not_expired()]
    if model_id is not None:
        conditions.append(checkpoints.c.model_id == model_id)
    return _page(conn, Checkpoint, checkpoints, checkpoints.c.path, conditions, limit, offset)


def delete_checkpoint(conn: sa.Connection, path: str) -> Checkpoint:
    """Removes the record and returns it (the files are the caller's to remove). Raises NotFoundError."""
    row = (
        conn.execute(sa.delete(checkpoints).where(checkpoints.c.path == path).returning(checkpoints)).mappings().first()
    )
    if row is None:
        raise NotFoundError(f"there is no checkpoint {path!r}")
    checkpoint, now = Checkpoint(**row), time.time()
    has_expired = checkpoint.expires_at is not None and checkpoint.expires_at <= now
    usage.end_storage(conn, path, now)
    event = "checkpoint_expire" if has_expired else "checkpoint_delete"
    audit.note(conn, checkpoint.owner, event, tinker_path=path, model_id=checkpoint.model_id)
    return checkpoint


def update_checkpoint(conn: sa.Connection, /, path: str, **changes: Any) -> None:
    """Sets columns of a checkpoint. Raises NotFoundError."""
    _update(conn, checkpoints.c.path, path, changes)


def expired_checkpoints(conn: sa.Connection, now: float) -> list[Checkpoint]:
    """Some whose time was over before `now`, for the caller to remove their files and records in this transaction.

    The first of them, as many as a transaction should delete. Others who ask at the same time are not given them.
    """
    expired = sa.select(checkpoints).where(checkpoints.c.expires_at <= now).order_by(checkpoints.c.expires_at)
    expired = expired.limit(_EXPIRED_AT_ONCE).with_for_update(skip_locked=True)
    return [Checkpoint(**row) for row in conn.execute(expired).mappings()]


def checkpoint_folders(conn: sa.Connection) -> list[str]:
    """Of every checkpoint that has a record."""
    return list(conn.scalars(sa.select(checkpoints.c.folder)))


def put_engine(conn: sa.Connection, engine: EngineRecord) -> None:
    """Writes the engine's record (an upsert by base), but for its counts, which are kept here.

    A new id is a start; one after an engine that had not stopped in order is a recovery, too.
    """
    row = asdict(engine)
    del row["starts"], row["recoveries"]
    is_new = engines.c.id != engine.id
    is_recovery = is_new & engines.c.state.not_in(["stopped", "failed"])
    counts = {
        "starts": engines.c.starts + sa.case((is_new, 1), else_=0),
        "recoveries": engines.c.recoveries + sa.case((is_recovery, 1), else_=0),
    }
    statement = insert(conn, engines).values(row)
    conn.execute(statement.on_conflict_do_update(index_elements=["base"], set_=row | counts))


def retire_engines(conn: sa.Connection, bases: Sequence[str], before: float) -> None:
    """Engines that were killed with an earlier server left word that they are ready; that is no longer so.

    Nor is it that one has failed. Of models beside `bases`, another server on the same database may know more.
    """
    stale = engines.c.base.in_(bases) & (engines.c.beat_at < before)
    lost = stale & engines.c.state.in_(["loading", "ready"])
    conn.execute(sa.update(engines).where(lost).values(state="lost", progress="it was killed with its server"))
    conn.execute(sa.update(engines).where(stale, engines.c.state == "failed").values(state="stopped"))


def fail_engine(conn: sa.Connection, base: str, reason: str) -> None:
    """Notes why a base model's engine does not run; it may have said so itself already."""
    silent = (engines.c.base == base) & (engines.c.state != "failed")
    conn.execute(sa.update(engines).where(silent).values(state="failed", progress=reason, beat_at=time.time()))


def find_engine(conn: sa.Connection, base: str) -> EngineRecord | None:
    return _find(conn, EngineRecord, _ENGINE, base)


def _belongs(owner: str, to: str) -> bool:
    return to in (owner, EVERYBODY)


def _of(table: sa.Table, owner: str) -> list[sa.ColumnElement[bool]]:
    return [] if owner == EVERYBODY else [table.c.owner == owner]


def _has_not_expired() -> sa.ColumnElement[bool]:
    return checkpoints.c.expires_at.is_(None) | (checkpoints.c.expires_at > time.time())


def _create(conn: sa.Connection, record: type[Record], table: sa.Table, value: Record) -> Record:
    row = asdict(value)
    conn.execute(insert(conn, table).values(row).on_conflict_do_nothing(index_elements=["id"]))
    return record(**conn.execute(sa.select(table).where(table.c.id == row["id"])).mappings().one())


def _find(conn: sa.Connection, record: type[Record], select: Prepared, key: str) -> Record | None:
    if "\0" in key:  # which Postgres cannot even look for
        return None
    rows = select(conn, {"key": key})
    return record(*rows[0]) if rows else None


def _select_by(key: sa.Column[str]) -> Prepared:
    return Prepared(any=sa.select(key.table).where(key == sa.bindparam("key", type_=sa.Text)))


# The columns of a table are in the order of its record's fields.
_SESSION, _MODEL, _SAMPLER = _select_by(sessions.c.id), _select_by(models.c.id), _select_by(samplers.c.id)
_CHECKPOINT, _ENGINE = _select_by(checkpoints.c.path), _select_by(engines.c.base)


def _update(conn: sa.Connection, key: sa.Column[str], value: str, changes: dict[str, Any]) -> None:
    table = key.table
    if not conn.execute(sa.update(table).where(key == value).values(changes)).rowcount:
        raise NotFoundError(f"there is no {table.name.removesuffix('s')} {value!r}")


def _of_session(conn: sa.Connection, record: type[Record], table: sa.Table, session_id: str) -> list[Record]:
    statement = sa.select(table).where(table.c.session_id == session_id).order_by(table.c.created_at, table.c.id)
    return [record(**row) for row in conn.execute(statement).mappings()]


def _page(
    conn: sa.Connection,
    record: type[Record],
    table: sa.Table,
    key: sa.Column[str],
    conditions: list[sa.ColumnElement[bool]],
    limit: int,
    offset: int,
) -> tuple[list[Record], int]:
    newest_first = sa.select(table).where(*conditions).order_by(table.c.created_at.desc(), key.desc())
    rows = conn.execute(newest_first.limit(limit).offset(offset)).mappings()
    total = conn.scalar(sa.select(sa.func.count()).select_from(table).where(*conditions))
    return [record(**row) for row in rows], total or 0
