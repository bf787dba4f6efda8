"""Copies of checkpoints: under another run, of another project or session, also from another key's.

A copy shares its files' bytes on disk with the original (hard links), and outlives it. Its run cannot be trained on.
"""

import hashlib
import os
import secrets
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from tinsmith.api.calls import Call, answer
from tinsmith.api.paths import SEGMENTS, CheckpointPath, parse_path
from tinsmith.api.submission import require_open_session
from tinsmith.errors import NotFoundError, UserError
from tinsmith.manifests import sync
from tinsmith.store import audit, keys, records
from tinsmith.wire import accounts

ACCESS_TOKEN = "X-Tinker-Weights-Access-Token"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a copy goes: its session (`project_id`: one made for it) and its run."""

    session_id: str
    model_id: str
    project_id: str | None


async def copy_weights(call: Call) -> Response:
    """POST /copy_weights. The same request again answers with the same copy."""
    body = await call.json(accounts.CopyWeightsRequest)
    place = _place(call, body)
    token = body.weights_access_token or call.request.headers.get(ACCESS_TOKEN)
    reader = await call.reader(token)
    database = call.services.database
    if place.project_id is None:  # before anything on disk is called after it
        await database.read_async(records.require_session, place.session_id, call.owner)
    source = await database.read_async(records.require_checkpoint, str(parse_path(body.source_path)), reader)
    target = CheckpointPath(place.model_id, source.kind, source.name)
    folder = call.services.settings.data_dir / "checkpoints" / place.model_id.replace(":", "_") / SEGMENTS[source.kind]
    folder /= f"{source.name}-{secrets.token_hex(4)}"
    await run_in_threadpool(_link, Path(source.folder), folder)
    copy = replace(
        source,
        path=str(target),
        model_id=place.model_id,
        owner=call.owner,
        folder=str(folder.absolute()),
        public=False,
        created_at=time.time(),
        expires_at=None if body.ttl_seconds is None else time.time() + body.ttl_seconds,
    )
    try:
        is_new = await database.write_async(_record, copy, place, source)
    except BaseException:
        await run_in_threadpool(shutil.rmtree, folder, ignore_errors=True)
        raise
    if not is_new:
        await run_in_threadpool(shutil.rmtree, folder, ignore_errors=True)
    return answer(accounts.CopyWeightsResponse(copy.path))


def _place(call: Call, body: accounts.CopyWeightsRequest) -> _Place:
    if body.session_id is not None and body.model_seq_id is not None:
        return _Place(body.session_id, f"{body.session_id}:train:{body.model_seq_id}", None)
    if body.destination_project_id is None:
        raise UserError("copy_weights needs a destination_project_id, or a session_id and a model_seq_id")
    key = call.request.headers.get("X-Idempotency-Key") or secrets.token_hex(16)
    session_id = hashlib.sha256(f"{call.owner} {key}".encode()).hexdigest()[:16]
    return _Place(session_id, f"{session_id}:train:0", body.destination_project_id)


def _link(source: Path, target: Path) -> None:
    """Makes `target` a folder of the same files. Raises NotFoundError if the source goes away meanwhile."""
    draft = target.with_name(f".{target.name}.part")  # which a starting engine sweeps
    draft.mkdir(parents=True)
    try:
        for file in sorted(source.iterdir()):
            os.link(file, draft / file.name)
        sync(draft)
        draft.rename(target)
    except FileNotFoundError:
        shutil.rmtree(draft, ignore_errors=True)
        raise NotFoundError("the checkpoint was deleted while it was being copied") from None
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _record(conn: sa.Connection, copy: records.Checkpoint, place: _Place, source: records.Checkpoint) -> bool:
    """Whether the copy is new; otherwise it exists already."""
    model = records.find_model(conn, place.model_id)
    existing = records.find_checkpoint(conn, copy.path)
    if model is None:
        _create_run(conn, copy, place, source.path)
    elif model.owner != copy.owner:
        raise NotFoundError(f"there is no session {place.session_id!r}")
    elif existing is not None and model.user_metadata.get("copied_from") == source.path:
        return False
    else:
        raise UserError(f"run {place.model_id!r} exists already; use the next model_seq_id")
    keys.check_storage(conn, copy.owner, copy.model_id, copy.kind, copy.path, copy.size_bytes)
    records.create_checkpoint(conn, copy)
    about = {"tinker_path": copy.path, "model_id": copy.model_id, "copied_from": source.path}
    audit.note(conn, copy.owner, "checkpoint_copy", **about)
    if source.owner != copy.owner:
        audit.note(conn, source.owner, "checkpoint_read", **{**about, "tinker_path": source.path, "purpose": "copy"})
    return True


def _create_run(conn: sa.Connection, copy: records.Checkpoint, place: _Place, copied_from: str) -> None:
    if place.project_id is None:
        require_open_session(conn, place.session_id, copy.owner)
    else:
        records.create_session(conn, _session(copy, place))
    records.create_model(
        conn,
        records.Model(
            id=place.model_id,
            session_id=place.session_id,
            owner=copy.owner,
            base=copy.base,
            base_name=copy.base_name,
            spec=copy.spec,
            user_metadata={"copied_from": copied_from},
            state="closed",
            recovery_seq=None,
            recovery_folder=None,
            created_at=copy.created_at,
            used_at=copy.created_at,
        ),
    )


def _session(copy: records.Checkpoint, place: _Place) -> records.Session:
    """A finished session that holds nothing but the copy's run."""
    now = copy.created_at
    return records.Session(
        place.session_id, copy.owner, "finished", ["copy"], {}, "", place.project_id, None, "success", now, now
    )
