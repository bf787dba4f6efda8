"""Folders of weights for readers outside this server: named as they know the base, encrypted if they ask for it.

Knows the files' names; nothing of what is in them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tinsmith.age import encrypt_folder, is_encrypted, read_recipients
from tinsmith.errors import UserError
from tinsmith.manifests import verify_folder

_ADAPTER_CONFIG = "adapter_config.json"
_BASE = "base.json"


def prepare_export(folder: Path, base_name: str, recipients: Sequence[str]) -> None:
    """Makes an export of freshly saved weights: what the base is on this server is nobody else's business."""
    (folder / _BASE).unlink(missing_ok=True)
    config_file = folder / _ADAPTER_CONFIG
    if config_file.exists():
        config = json.loads(config_file.read_text())
        config_file.write_text(json.dumps(config | {"base_model_name_or_path": base_name}, indent=2) + "\n")
    if recipients:
        encrypt_folder(folder, read_recipients(recipients))


def readable_folder(folder: str, path: str) -> Path:
    """The folder of the checkpoint at `path`, whole. Raises DamagedCheckpointError; UserError if it is encrypted."""
    verified = verify_folder(Path(folder))
    if is_encrypted(verified):
        raise UserError(
            f"{path} is encrypted to its recipients, so this server cannot read it; load the checkpoint that it was "
            "made from, or upload it again decrypted (tinsmith import)"
        )
    return verified
