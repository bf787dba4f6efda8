"""Adapters from elsewhere: announced, put file by file at signed addresses, then checked by the engine and kept.

An upload lives in a folder of its own until then. Its files are neither opened nor believed here: what an adapter is,
and whether it fits the base model, the engine finds out.
"""

import errno
import secrets
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import msgspec
import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.api.calls import Call, Services, answer
from tinsmith.api.futures import ended
from tinsmith.api.paths import CheckpointPath
from tinsmith.api.signing import read_token, sign
from tinsmith.api.submission import json_draft
from tinsmith.api.training import create_with_job
from tinsmith.errors import (
    BusyError,
    GoneError,
    LimitError,
    NotFoundError,
    TinsmithError,
    TooLargeError,
    UnavailableError,
    UserError,
)
from tinsmith.protocols import ModelSpec
from tinsmith.store import keys, queue, records
from tinsmith.wire import training_types

FILES = "/uploads"
LIFETIME_SECONDS = 3600.0
MOST_OPEN = 8
"""Uploads that an owner may have begun and not finished."""

RETRY_SECONDS = 2.0

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CONFIG_BYTES = 2**20
_SPARE_BYTES = 2**26
_BYTES_PER_PARAMETER = 8  # of the base: an adapter in fp32 whose rank is as large as its layers has about that many
_WRITE_BYTES = 2**20  # at a time
_PURPOSE = "upload"
_NOTE = "upload.json"
_NAME = "upload"  # of the checkpoint


class Upload(msgspec.Struct, frozen=True):
    """What was said when an upload was begun; kept beside its files."""

    id: str
    owner: str
    base: str
    base_name: str
    lora: training_types.LoraConfig
    project_id: str | None
    most_bytes: int
    expires: float

    @property
    def session_id(self) -> str:
        return f"upload-{self.id}"

    @property
    def model_id(self) -> str:
        return f"{self.session_id}:train:0"


async def start(call: Call) -> Response:
    """POST /external_weights_upload_start: an address for each file of an adapter."""
    body = await call.json(training_types.ExternalWeightsUploadStartRequest)
    services = call.services
    base = services.catalog.require(body.base_model).base
    capabilities = services.catalog.capabilities(base)
    if not 1 <= body.lora_config.rank <= capabilities.max_lora_rank:
        raise UserError(
            f"lora rank is {body.lora_config.rank}; 1 to {capabilities.max_lora_rank} are allowed "
            "(tinsmith serve --max-lora-rank); only adapters can be uploaded"
        )
    await services.database.read_async(keys.check_storage, call.owner, "", "external", "")
    upload = Upload(
        id=secrets.token_hex(16),
        owner=call.owner,
        base=base,
        base_name=body.base_model,
        lora=body.lora_config,
        project_id=body.destination_project_id,
        most_bytes=_SPARE_BYTES + _BYTES_PER_PARAMETER * capabilities.parameters,
        expires=time.time() + LIFETIME_SECONDS,
    )
    await run_in_threadpool(_open, services, upload)
    prefix = str(call.request.url).removesuffix("/external_weights_upload_start")
    urls = {name: f"{prefix}{FILES}/{_token(services, upload, name)}/{name}" for name in (_CONFIG, _WEIGHTS)}
    expires = datetime.fromtimestamp(upload.expires, UTC).isoformat()
    return answer(training_types.ExternalWeightsUploadStarted(upload.id, urls, expires))


def _token(services: Services, upload: Upload, name: str) -> str:
    return sign(services.settings.data_dir, _PURPOSE, [upload.id, name])


def _root(services: Services) -> Path:
    return services.settings.data_dir / "uploads"


def _open(services: Services, upload: Upload) -> None:
    """Makes the upload's folder, and removes those that nobody finished in time. Raises LimitError."""
    others = list(_uploads(_root(services)))
    for other in others:
        if other.expires < time.time():
            shutil.rmtree(_root(services) / other.id, ignore_errors=True)
    unfinished = [other for other in others if other.owner == upload.owner and other.expires >= time.time()]
    if len(unfinished) >= MOST_OPEN:
        soonest = min(other.expires for other in unfinished) - time.time()
        raise LimitError(
            f"{len(unfinished)} uploads were begun and not finished, {MOST_OPEN} at once are allowed; finish one, or "
            f"wait: the oldest expires in {soonest:.0f} s"
        )
    folder = _root(services) / upload.id
    folder.mkdir(parents=True)
    (folder / _NOTE).write_bytes(msgspec.json.encode(upload))


def _uploads(root: Path) -> Iterator[Upload]:
    for note in root.glob(f"*/{_NOTE}"):
        try:
            yield msgspec.json.decode(note.read_bytes(), type=Upload)
        except (OSError, msgspec.DecodeError):  # being made, or removed, by another process
            continue


def _find(services: Services, upload_id: str) -> Upload:
    """Raises GoneError if it is not there any more."""
    try:
        return msgspec.json.decode((_root(services) / upload_id / _NOTE).read_bytes(), type=Upload)
    except (OSError, msgspec.DecodeError) as error:
        raise GoneError("this upload is over; start another") from error


async def put(services: Services, request: Request) -> Response:
    """PUT /uploads/{token}/{name}: one file of an adapter. The address itself is the permission."""
    token, asked = request.path_params["token"], request.path_params["name"]
    upload_id, name = await run_in_threadpool(read_token, services.settings.data_dir, _PURPOSE, token)
    if asked != name:
        raise NotFoundError("there is no such file")
    upload = await run_in_threadpool(_find, services, upload_id)
    if upload.expires < time.time():
        raise GoneError("this address has expired; start another upload")
    if token in services.arriving:
        raise BusyError("this file is being sent already; wait for its end", RETRY_SECONDS)
    services.arriving.add(token)
    try:
        await _store(services, request, upload, name)
    finally:
        services.arriving.discard(token)
    return answer({})


async def _store(services: Services, request: Request, upload: Upload, name: str) -> None:
    target = _root(services) / upload.id / name
    draft = target.with_name(f".{name}.{secrets.token_hex(4)}")
    try:
        await _receive(request, draft, _CONFIG_BYTES if name == _CONFIG else upload.most_bytes)
        await run_in_threadpool(draft.rename, target)
    except OSError as error:
        raise _unwritten(error) from error
    finally:
        await run_in_threadpool(draft.unlink, missing_ok=True)


def _unwritten(error: OSError) -> TinsmithError:
    if isinstance(error, FileNotFoundError):
        return GoneError("this upload is over; start another")
    reason = "no space is left on the server's disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    return TinsmithError(f"the file could not be written: {reason}")


async def _receive(request: Request, into: Path, limit: int) -> None:
    """Writes the body to a file as it comes. Raises TooLargeError beyond `limit` bytes, OSError."""
    file = await run_in_threadpool(into.open, "xb")
    size, waiting = 0, bytearray()
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise TooLargeError(f"the file is larger than {limit} bytes, the most that an adapter may have here")
            waiting += part
            if len(waiting) >= _WRITE_BYTES:
                await run_in_threadpool(_write, file, waiting)
                waiting = bytearray()
        await run_in_threadpool(_write, file, waiting)
    finally:
        await run_in_threadpool(file.close)


def _write(file: BinaryIO, data: bytearray) -> None:
    file.write(data)


async def finish(call: Call) -> Response:
    """POST /external_weights_upload_finish: answers once the engine has made a checkpoint of the files.

    The same upload again gives the same checkpoint.
    """
    body = await call.json(training_types.ExternalWeightsUploadFinishRequest)
    services = call.services
    if not body.upload_id.isalnum():
        raise NotFoundError(f"there is no upload {body.upload_id!r}")
    request_id = f"upload-{body.upload_id}:train:0:0"
    if await services.database.read_async(queue.find, request_id) is None:
        upload = await run_in_threadpool(_require_whole, call, body.upload_id)
        await services.database.write_async(_submit, upload, str(_root(services) / upload.id), call.trace)
        services.doorbell.ring("jobs")
        call.accepted(request_id)
    future = await ended(call, request_id)
    if future is None:
        raise UnavailableError("the upload is still being checked; ask again")
    await run_in_threadpool(shutil.rmtree, _root(services) / body.upload_id, ignore_errors=True)
    await services.database.write_async(records.finish_session, f"upload-{body.upload_id}", call.owner, future.state)
    if future.state != "done":
        raise UserError(f"the upload was not taken: {future.error or future.state}")
    path = msgspec.json.decode(future.body or b"{}")["path"]
    return answer(training_types.ExternalWeightsUploadFinished(path))


def _require_whole(call: Call, upload_id: str) -> Upload:
    """The caller's upload, with all its files. Raises NotFoundError, UserError."""
    folder = _root(call.services) / upload_id
    try:
        upload = _find(call.services, upload_id)
    except GoneError:
        raise NotFoundError(f"there is no upload {upload_id!r}") from None
    if upload.owner != call.owner:
        raise NotFoundError(f"there is no upload {upload_id!r}")
    missing = [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{' and '.join(missing)} of this upload have not arrived; PUT them at their addresses first")
    return upload


def _submit(conn: sa.Connection, upload: Upload, folder: str, trace: str) -> None:
    """A session, a model and its only job; another process may have been faster."""
    now = time.time()
    session = records.Session(
        id=upload.session_id,
        owner=upload.owner,
        state="open",
        tags=[_NAME],
        user_metadata={},
        sdk_version="",
        project_id=upload.project_id,
        display_name=None,
        finish_reason=None,
        created_at=now,
        seen_at=now,
    )
    if queue.find(conn, f"{upload.model_id}:0") is not None:
        return
    records.create_session(conn, session)
    promised = {part: getattr(upload.lora, part) for part in ("rank", "train_attn", "train_mlp", "train_unembed")}
    path = str(CheckpointPath(upload.model_id, "external", _NAME))
    draft = json_draft("import_weights", folder=folder, name=_NAME, path=path, promised=promised)
    create_with_job(conn, _model(upload, now), draft, None, trace)


def _model(upload: Upload, now: float) -> records.Model:
    return records.Model(
        id=upload.model_id,
        session_id=upload.session_id,
        owner=upload.owner,
        base=upload.base,
        base_name=upload.base_name,
        spec=ModelSpec(rank=upload.lora.rank, seed=0).to_dict(),
        user_metadata={},
        state="creating",
        recovery_seq=None,
        recovery_folder=None,
        created_at=now,
        used_at=now,
    )
