"""Folders of weights on disk: written beside their place, sealed, fsynced, renamed into it, then never changed."""

import errno
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from tinsmith.errors import TinsmithError
from tinsmith.manifests import seal_folder, sync, writer_of

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(TinsmithError):
    """There is no room to write a folder; nothing of it was left behind."""


def write_folder(target: Path, fill: Callable[[Path], None], written_by: str = "") -> int:
    """Creates `target` with what `fill(folder)` writes, atomically. Returns its size in bytes. Raises DiskFullError.

    `written_by` is the request that wants the folder recorded, for `orphans`.
    """
    try:
        return _write_folder(target, fill, written_by)
    except Exception as error:
        if _is_full(error):
            raise DiskFullError(
                f"{target.name} could not be written: no space is left on the server's disk ({error}); nothing was "
                "changed. Have checkpoints deleted or room made there, then try again"
            ) from error
        raise


def _write_folder(target: Path, fill: Callable[[Path], None], written_by: str) -> int:
    _make_folder(target.parent)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.part"
    temporary.mkdir()
    try:
        fill(temporary)
        seal_folder(temporary, written_by)
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        temporary.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return sum(path.stat().st_size for path in target.iterdir())


def _make_folder(folder: Path) -> None:
    """Creates a folder, if it is missing, with its parents; a power cut takes none of their names away."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Deletes a folder, if it is there; renamed first, so that no half-deleted folder stands in its place."""
    doomed = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.gone")
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> None:
    """Removes what a crash left half-written or half-deleted below `root`."""
    for pattern in (".*.part", ".*.gone"):
        for leftover in root.rglob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def orphans(root: Path, recorded: Iterable[str], is_known: Callable[[str], bool]) -> list[Path]:
    """Folders three levels below `root` that nobody can ask for, left by an engine that died before it had them
    recorded, or after their record had gone.

    `recorded` are paths of folders that have a record, wherever they lay when it was made. A folder counts only if the
    request that wrote it `is_known`: one that came from another database is left alone.
    """
    places = {Path(folder).parts[-3:] for folder in recorded}
    lost = [folder for folder in root.glob("*/*/[!.]*") if folder.parts[-3:] not in places]
    return [folder for folder in lost if (request_id := writer_of(folder)) and is_known(request_id)]


def folder_name(identifier: str) -> str:
    """A file name for a model or sampler id, unique as the id is."""
    return identifier.replace(":", "_").replace("/", "_")


def _is_full(error: Exception) -> bool:
    """Whether the disk, a quota or a limit on file sizes was in the way; safetensors has only words for it."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    words = re.search(r"os error (\d+)", str(error))
    return words is not None and int(words[1]) in _FULL
