"""Exported weights over HTTP: signed addresses that expire, so that any downloader can fetch them without a key."""

import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from tinsmith.api.calls import Call, Services, answer
from tinsmith.api.paths import CheckpointPath
from tinsmith.api.signing import read_token, sign
from tinsmith.errors import GoneError, NotFoundError
from tinsmith.manifests import MANIFEST, DamagedCheckpointError, verify_folder
from tinsmith.store import records
from tinsmith.wire import training_types

FILES = "/files"
LIFETIME_SECONDS = 3600.0
_PURPOSE = "download"


async def external_weights_urls(call: Call) -> Response:
    """GET …/external_weights/{name}/external_weights_urls: an address for each file of an export, if it is whole."""
    path = str(CheckpointPath(call.path("run_id"), "external", call.path("name")))
    checkpoint = await call.services.database.read_async(_require_export, path, call.owner)
    expires = time.time() + LIFETIME_SECONDS
    if checkpoint.expires_at is not None:
        expires = min(expires, checkpoint.expires_at)
    data_dir = call.services.settings.data_dir
    token = await run_in_threadpool(sign, data_dir, _PURPOSE, [path, expires])
    await run_in_threadpool(verify_folder, Path(checkpoint.folder))
    names = await run_in_threadpool(_files, Path(checkpoint.folder))
    base = str(call.request.url).partition("/training_runs/")[0]
    urls = {name: f"{base}{FILES}/{token}/{quote(name)}" for name in names}
    return answer(training_types.ExternalWeightsUrls(urls, datetime.fromtimestamp(expires, UTC).isoformat()))


def _require_export(conn: sa.Connection, path: str, owner: str) -> records.Checkpoint:
    return records.require_checkpoint(conn, path, owner)


async def download(services: Services, request: Request) -> Response:
    """GET /files/{token}/{name}: one file of an export. The address itself is the permission."""
    token = request.path_params["token"]
    path, expires = await run_in_threadpool(read_token, services.settings.data_dir, _PURPOSE, token)
    if time.time() > expires:
        raise GoneError("this address has expired; ask for new ones with external_weights_urls")
    checkpoint = await services.database.read_async(records.find_checkpoint, path)
    if checkpoint is None:
        raise GoneError(f"{path} does not exist any more (deleted or expired)")
    folder, name = Path(checkpoint.folder), request.path_params["name"]
    if name not in await run_in_threadpool(_files, folder):
        raise NotFoundError(f"{path} has no file {name!r}")
    return FileResponse(folder / name, media_type="application/octet-stream")


def _files(folder: Path) -> list[str]:
    """All but the checksums, which are for our own use. Raises DamagedCheckpointError."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.name != MANIFEST)
    except OSError as error:
        raise DamagedCheckpointError(f"{folder.name} cannot be read: {error.strerror}") from error
