"""A base model's files: found on this machine or fetched from the hub, and what they say without being loaded."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from tinsmith.config import EMBEDDED
from tinsmith.errors import ConfigError
from tinsmith.served import Served

_WEIGHT_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_CODE_FILES = ["*.py"]
_HEADER_BYTES = 2**27  # more than any real safetensors file has


def model_folder(served: Served, report: Callable[[str], None]) -> Path:
    """The model's folder on this machine; a hub model is downloaded first. Raises ConfigError."""
    if served.base == EMBEDDED:
        from tinsmith.demo import tiny_folder

        return tiny_folder()
    folder = Path(served.folder or served.base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face model")
        return folder
    if folder.is_absolute() or served.base.startswith((".", "~")):  # no hub name
        raise ConfigError(f"the folder {folder} of model {served.name!r} does not exist (any more)")
    return _download(served, report)


def _download(served: Served, report: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    report(f"fetching {served.base}")
    wanted = _WEIGHT_FILES + (_CODE_FILES if served.trust_remote_code else [])
    try:
        return Path(snapshot_download(served.base, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{served.base!r} is no folder here, and could not be fetched from the hub: {reason}"
        ) from error


def count_parameters(folder: Path) -> int:
    """How many numbers the safetensors files hold, from their headers. Raises ConfigError if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = ", ".join(
            sorted(path.name for pattern in ("*.bin", "*.pt", "*.gguf") for path in folder.glob(pattern))
        )
        found = f"only {others}" if others else "no weights at all"
        raise ConfigError(f"{folder} has {found}; Tinsmith loads safetensors files only, since others can run code")
    return sum(math.prod(shape) for file in files for shape in _shapes(file))


def _shapes(file: Path) -> Iterator[list[int]]:
    """Of all tensors in one file."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > _HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(opened.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        if file.stat().st_size != end:
            raise ValueError(f"{file.stat().st_size} bytes of {end}")
        yield from (entry["shape"] for entry in tensors)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no complete safetensors file: {error}") from error
