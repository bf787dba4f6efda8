"""Sessions, models, samplers, checkpoints and engines: plain records and the verbs on them.

`find_x` gives None where there is nothing; `require_x` raises NotFoundError, also for somebody else's object, so that a
foreign id cannot be told from one that never was. Functions take a connection inside a transaction.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa


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


def create_session(conn: sa.Connection, session: Session) -> None: raise NotImplementedError
def require_session(conn: sa.Connection, session_id: str, owner: str) -> Session: raise NotImplementedError
def touch_session(conn: sa.Connection, session_id: str, owner: str, now: float) -> Session:
    """Notes a heartbeat. Raises NotFoundError, or GoneError for a finished session."""
    raise NotImplementedError
def finish_session(conn: sa.Connection, session_id: str, owner: str, reason: str) -> None: raise NotImplementedError
def list_sessions(conn: sa.Connection, owner: str, limit: int, offset: int) -> tuple[list[Session], int]: raise NotImplementedError

def create_model(conn: sa.Connection, model: Model) -> Model:
    """Adds a model; the same id again returns the one that exists, unchanged."""
    raise NotImplementedError
def require_model(conn: sa.Connection, model_id: str, owner: str) -> Model: raise NotImplementedError
def find_model(conn: sa.Connection, model_id: str) -> Model | None: raise NotImplementedError
def update_model(conn: sa.Connection, model_id: str, **changes: Any) -> None: raise NotImplementedError
def list_models(conn: sa.Connection, owner: str, limit: int, offset: int) -> tuple[list[Model], int]:
    """Newest first, with the total count."""
    raise NotImplementedError
def closed_models(conn: sa.Connection, base: str, model_ids: list[str]) -> list[str]:
    """Those of `model_ids` whose session is over."""
    raise NotImplementedError
def models_of_session(conn: sa.Connection, session_id: str) -> list[Model]: raise NotImplementedError

def create_sampler(conn: sa.Connection, sampler: SamplerRecord) -> SamplerRecord:
    """Adds a sampler; the same id again returns the one that exists, unchanged."""
    raise NotImplementedError
def require_sampler(conn: sa.Connection, sampler_id: str, owner: str) -> SamplerRecord: raise NotImplementedError
def find_sampler(conn: sa.Connection, sampler_id: str) -> SamplerRecord | None: raise NotImplementedError
def samplers_of_session(conn: sa.Connection, session_id: str) -> list[SamplerRecord]: raise NotImplementedError

def create_checkpoint(conn: sa.Connection, checkpoint: Checkpoint, *, overwrite: bool = False) -> None:
    """Raises UserError if the path exists and `overwrite` is false."""
    raise NotImplementedError
def find_checkpoint(conn: sa.Connection, path: str) -> Checkpoint | None:
    """None also when it has expired."""
    raise NotImplementedError
def require_checkpoint(conn: sa.Connection, path: str, owner: str) -> Checkpoint:
    """The owner's checkpoint, or a published one. Raises NotFoundError."""
    raise NotImplementedError
def list_checkpoints(conn: sa.Connection, owner: str, limit: int, offset: int, model_id: str | None = None) -> tuple[list[Checkpoint], int]: raise NotImplementedError
def delete_checkpoint(conn: sa.Connection, path: str) -> Checkpoint:
    """Removes the record and returns it (the files are the caller's to remove)."""
    raise NotImplementedError
def update_checkpoint(conn: sa.Connection, path: str, **changes: Any) -> None: raise NotImplementedError
def expired_checkpoints(conn: sa.Connection, now: float) -> list[Checkpoint]: raise NotImplementedError

def put_engine(conn: sa.Connection, engine: EngineRecord) -> None:
    """Writes the engine's whole record (an upsert by base)."""
    raise NotImplementedError
def find_engine(conn: sa.Connection, base: str) -> EngineRecord | None: raise NotImplementedError
