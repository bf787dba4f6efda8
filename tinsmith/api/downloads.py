"""Exported weights over HTTP: signed addresses that expire, so that any downloader can fetch them without a key."""

import os
import secrets
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from itsdangerous import BadSignature, URLSafeSerializer
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from tinsmith.api.calls import Call, Services, answer
from tinsmith.api.paths import CheckpointPath
from tinsmith.errors import GoneError, NotFoundError
from tinsmith.store import records
from tinsmith.wire import types

FILES = "/files"
LIFETIME_SECONDS = 3600.0
_OURS = "manifest.json"  # checksums for our own use, no part of the export


async def external_weights_urls(call: Call) -> Response:
    """GET …/external_weights/{name}/external_weights_urls: an address for each file of an export."""
    path = str(CheckpointPath(call.path("run_id"), "external", call.path("name")))
    checkpoint = await call.services.database.read_async(_require_export, path, call.owner)
    expires = time.time() + LIFETIME_SECONDS
    if checkpoint.expires_at is not None:
        expires = min(expires, checkpoint.expires_at)
    token = await run_in_threadpool(_sign, call.services, path, expires)
    names = await run_in_threadpool(_files, Path(checkpoint.folder))
    base = str(call.request.url).partition("/training_runs/")[0]
    urls = {name: f"{base}{FILES}/{token}/{quote(name)}" for name in names}
    return answer(types.ExternalWeightsUrls(urls, datetime.fromtimestamp(expires, UTC).isoformat()))


def _require_export(conn: sa.Connection, path: str, owner: str) -> records.Checkpoint:
    return records.require_checkpoint(conn, path, owner)


async def download(services: Services, request: Request) -> Response:
    """GET /files/{token}/{name}: one file of an export. The address itself is the permission."""
    path, expires = await run_in_threadpool(_read_token, services, request.path_params["token"])
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
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.name != _OURS)


def _sign(services: Services, path: str, expires: float) -> str:
    token: str = _serializer(services).dumps([path, expires])
    return token


def _read_token(services: Services, token: str) -> tuple[str, float]:
    try:
        path, expires = _serializer(services).loads(token)
    except BadSignature:
        raise NotFoundError("there is no such file") from None
    return path, expires


def _serializer(services: Services) -> URLSafeSerializer:
    return URLSafeSerializer(_secret(services.settings.data_dir / "download.key"), salt="download")


def _secret(file: Path) -> bytes:
    """The key that all API processes over one data folder sign with; the first one to need it makes it."""
    if not file.exists():
        draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, secrets.token_bytes(32))
        os.close(descriptor)
        with suppress(FileExistsError):
            os.link(draft, file)  # unlike a rename, it never replaces another process's key
        draft.unlink()
    return file.read_bytes()
