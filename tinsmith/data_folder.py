"""The layout of a data folder: which version of it this is, and making the present one of an older one.

1: recovery points and snapshots of the one model that was served lay in `recovery` and `snapshots`. 2: every engine has
a folder of its own for them, `engines/MODEL`. Checkpoints stay where they were written: their records say where.
Knows names of folders; neither what is in them nor databases.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from tinsmith.errors import ConfigError
from tinsmith.manifests import sync

LAYOUT = 2
FILE = "layout"
_MOVED = ("recovery", "snapshots")  # a folder for each model in each of them
_LEFT_OUT = "engine"  # what an engine of layout 1 noted for the next one about its own death

log = logging.getLogger(__name__)


def bring_up_to_date(data_dir: Path, models: Callable[[], Mapping[str, Path]]) -> None:
    """Moves what lies where an older version has put it, and notes the layout; may be repeated after a crash.

    `models` gives, by the name of its folder, in whose engine's folder each model now belongs; it is asked only if
    there is anything to be moved. Raises ConfigError for a folder of a newer version.
    """
    note = data_dir / FILE
    version = _version(note) if note.exists() else 1
    if version > LAYOUT:
        raise ConfigError(
            f"the data folder {data_dir} has layout {version}, and this version of Tinsmith knows them up to {LAYOUT}; "
            "start the version that has used it last, or a newer one"
        )
    if version == LAYOUT:
        return
    _move_into_engines(data_dir, models)
    draft = note.with_name(f".{FILE}.part")
    draft.write_text(f"{LAYOUT}\n")
    sync(draft)  # a power cut could leave the name without what it says
    draft.rename(note)
    sync(data_dir)


def _version(note: Path) -> int:
    text = note.read_text().strip()
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{note} is damaged: it says {text[:40]!r} instead of a layout's number ({LAYOUT})")
    return int(text)


def _move_into_engines(data_dir: Path, models: Callable[[], Mapping[str, Path]]) -> None:
    found = [folder for kind in _MOVED for folder in sorted((data_dir / kind).glob("[!.]*")) if folder.is_dir()]
    belongs = models() if found else {}
    for folder in found:
        kind = folder.parent.name
        if folder.name not in belongs:
            log.warning("%s belongs to no model of this database that is open still; it is left there", folder)
            continue
        target = belongs[folder.name] / kind / folder.name
        target.parent.mkdir(parents=True, exist_ok=True)
        log.info("moving %s to %s, where its engine looks for it", folder, target)
        folder.rename(target)
        sync(target.parent)
    shutil.rmtree(data_dir / _LEFT_OUT, ignore_errors=True)
    for kind in _MOVED:
        if (data_dir / kind).is_dir() and not any((data_dir / kind).iterdir()):
            (data_dir / kind).rmdir()
