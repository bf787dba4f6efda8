"""The manifest that seals a folder of weights: its files' sizes and checksums.

It is written last. A folder without one, or whose files differ from it, is refused by name. Knows nothing of what is in
the files.
"""

import hashlib
import json
import os
from pathlib import Path

from tinsmith.errors import TinsmithError

MANIFEST = "manifest.json"


class DamagedCheckpointError(TinsmithError):
    """A folder of weights does not hold what its manifest says."""


def seal_folder(folder: Path, written_by: str) -> None:
    """Writes the manifest of the files that are there. `written_by` is the request that wants the folder recorded."""
    files = {path.name: {"sha256": _digest(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())}
    manifest = {"format": 1, "written_by": written_by, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def verify_folder(folder: Path) -> Path:
    """The folder itself. Raises DamagedCheckpointError if it is missing, incomplete or altered."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            if _digest(folder / name) != entry["sha256"]:
                raise DamagedCheckpointError(f"{folder.name}: {name} does not match its checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder.name} is incomplete: {error}") from error
    return folder


def writer_of(folder: Path) -> str:
    """The request that a folder was written by; empty if it does not say so."""
    try:
        return str(json.loads((folder / MANIFEST).read_text()).get("written_by", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Has a file, or what a folder says of its files, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
