"""Training runs and their checkpoints: lists, details, lifetime, publication. A run is a model's public name."""

import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from tinsmith.api.calls import Call, answer
from tinsmith.api.paths import KINDS, CheckpointPath
from tinsmith.api.sessions import labels
from tinsmith.errors import NotFoundError
from tinsmith.protocols import ModelSpec
from tinsmith.store import audit, records
from tinsmith.wire import training_types

_RECENT = 100  # checkpoints of a run among which its last ones are looked for
_ALL = 100_000  # checkpoints of one run in its unpaged list


async def list_runs(call: Call) -> Response:
    """GET /training_runs: newest first."""
    limit, offset = call.page()
    runs, total = await call.services.database.read_async(_runs, call.viewer, limit, offset)
    return answer(training_types.TrainingRunList(runs, training_types.Cursor(offset, limit, total)))


def _runs(conn: sa.Connection, owner: str, limit: int, offset: int) -> tuple[list[training_types.TrainingRun], int]:
    models, total = records.list_models(conn, owner, limit, offset)
    return [_run(conn, model) for model in models], total


async def get_run(call: Call) -> Response:
    """GET /training_runs/{run_id}."""
    return answer(await call.services.database.read_async(_require_run, call.path("run_id"), call.viewer))


def _require_run(conn: sa.Connection, run_id: str, owner: str) -> training_types.TrainingRun:
    return _run(conn, records.require_model(conn, run_id, owner))


def _run(conn: sa.Connection, model: records.Model) -> training_types.TrainingRun:
    recent, _ = records.list_checkpoints(conn, model.owner, _RECENT, 0, model.id)
    last = {checkpoint.kind: _checkpoint(checkpoint) for checkpoint in reversed(recent)}
    spec = ModelSpec(**model.spec)
    return training_types.TrainingRun(
        training_run_id=model.id,
        base_model=model.base_name,
        model_owner=model.owner,
        is_lora=spec.is_lora,
        lora_rank=spec.rank if spec.is_lora else None,
        corrupted=model.state == "failed",
        last_request_time=_timestamp(model.used_at),
        last_checkpoint=last.get("training"),
        last_sampler_checkpoint=last.get("sampler"),
        user_metadata=labels(model.user_metadata),
    )


async def list_run_checkpoints(call: Call) -> Response:
    """GET /training_runs/{run_id}/checkpoints: all of one run, newest first."""
    return answer(await call.services.database.read_async(_run_checkpoints, call.path("run_id"), call.viewer))


def _run_checkpoints(conn: sa.Connection, run_id: str, owner: str) -> training_types.CheckpointList:
    records.require_model(conn, run_id, owner)
    checkpoints, total = records.list_checkpoints(conn, owner, _ALL, 0, run_id)
    return training_types.CheckpointList(
        [_checkpoint(each) for each in checkpoints], training_types.Cursor(0, _ALL, total)
    )


async def list_checkpoints(call: Call) -> Response:
    """GET /checkpoints: of all runs, newest first."""
    limit, offset = call.page(default=100)
    page, total = await call.services.database.read_async(records.list_checkpoints, call.viewer, limit, offset)
    return answer(
        training_types.CheckpointList([_checkpoint(each) for each in page], training_types.Cursor(offset, limit, total))
    )


async def delete_checkpoint(call: Call) -> Response:
    """DELETE /training_runs/{run_id}/checkpoints/{segment}/{name}: the record, then the files."""
    checkpoint = await call.services.database.write_async(_delete, _path(call), call.owner)
    await run_in_threadpool(shutil.rmtree, Path(checkpoint.folder), ignore_errors=True)
    return answer({})


def _delete(conn: sa.Connection, path: str, owner: str) -> records.Checkpoint:
    _require_own(conn, path, owner)
    return records.delete_checkpoint(conn, path)


async def publish(call: Call) -> Response:
    """POST …/publish: everybody on this server may load the checkpoint."""
    await call.services.database.write_async(_change, _path(call), call.owner, "publish", public=True)
    return answer({})


async def unpublish(call: Call) -> Response:
    """DELETE …/publish."""
    await call.services.database.write_async(_change, _path(call), call.owner, "unpublish", public=False)
    return answer({})


async def set_ttl(call: Call) -> Response:
    """PUT …/ttl: seconds from now, or null for ever."""
    body = await call.json(training_types.TtlRequest)
    expires_at = None if body.ttl_seconds is None else time.time() + body.ttl_seconds
    await call.services.database.write_async(_change, _path(call), call.owner, "set_ttl", expires_at=expires_at)
    return answer({})


def _change(conn: sa.Connection, /, path: str, owner: str, action: str, **changes: object) -> None:
    _require_own(conn, path, owner)
    records.update_checkpoint(conn, path, **changes)
    audit.note(conn, owner, f"checkpoint_{action}", tinker_path=path, **changes)


def _require_own(conn: sa.Connection, path: str, owner: str) -> None:
    """Raises NotFoundError also for a checkpoint that somebody else has published."""
    if records.require_checkpoint(conn, path, owner).owner != owner:
        raise NotFoundError(f"there is no checkpoint {path!r} of yours")


def _path(call: Call) -> str:
    segment = call.path("segment")
    if segment not in KINDS:
        raise NotFoundError(f"there are no checkpoints under {segment!r}; only under {', '.join(KINDS)}")
    return str(CheckpointPath(call.path("run_id"), KINDS[segment], call.path("name")))


def _checkpoint(checkpoint: records.Checkpoint) -> training_types.CheckpointInfo:
    return training_types.CheckpointInfo(
        checkpoint_id=CheckpointPath(checkpoint.model_id, checkpoint.kind, checkpoint.name).checkpoint_id,
        checkpoint_type=checkpoint.kind,
        time=_timestamp(checkpoint.created_at),
        tinker_path=checkpoint.path,
        size_bytes=checkpoint.size_bytes,
        public=checkpoint.public,
        user_metadata=labels(checkpoint.user_metadata),
        expires_at=None if checkpoint.expires_at is None else _timestamp(checkpoint.expires_at),
    )


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
