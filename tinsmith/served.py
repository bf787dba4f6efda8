"""The base models of one server: what each is called, where its weights are, and what its engine may use.

Knows names and numbers; neither files nor databases nor torch.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinsmith.config import EMBEDDED, Settings
from tinsmith.errors import ConfigError

ANY_NAME = "*"
"""The alias that stands for every name that is not served otherwise."""


@dataclass(frozen=True, slots=True)
class Served:
    """One base model of a server, and how its engine runs it."""

    name: str  # what clients call it
    base: str  # its key in the database: "tiny", a folder's absolute path, or a hub name
    folder: str = ""  # where its files are; empty: to be found, or fetched from the hub
    dtype: str = "auto"  # auto, float32, bfloat16
    max_context: int = 0  # tokens; 0: what the model was made for
    trust_remote_code: bool = False
    memory_bytes: int = 0  # that its engine may use of the device; 0: all that is free
    neighbours: int = 0  # other engines on the same device

    @property
    def slug(self) -> str:
        """A name for files, different for every base model."""
        name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(self.base).name)[:80]
        return name if name == self.base else f"{name}-{hashlib.sha256(self.base.encode()).hexdigest()[:8]}"


def base_of(model: str) -> str:
    """A model's one key, however it is written: a folder's absolute path, else the name as given."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if model != EMBEDDED and folder.is_dir() else model


def choose_served(settings: Settings, registered: Sequence[Served]) -> tuple[Served, ...]:
    """The models to serve: those that the settings name, else all registered ones, else the embedded one.

    A setting that holds for all models (dtype, max_context) goes before what one was registered with.
    Raises ConfigError for a model named twice, and for an alias or a share of memory of a model that is not served.
    """
    known = {model.name: model for model in registered}
    names = settings.models or tuple(known) or (EMBEDDED,)
    served = [known.get(name) or Served(name, base_of(name)) for name in names]
    for base, times in Counter(model.base for model in served).items():
        if times > 1:
            twice = ", ".join(repr(model.name) for model in served if model.base == base)
            raise ConfigError(f"{twice} are the same model, {base}; name it once (--alias gives it further names)")
    _check_names(settings, served)
    return tuple(
        replace(
            model,
            dtype=settings.dtype if settings.dtype != "auto" else model.dtype,
            max_context=settings.max_context or model.max_context,
            neighbours=len(served) - 1,
        )
        for model in served
    )


def find_served(served: Sequence[Served], name: str) -> Served | None:
    """The model that is called `name`, or is at the folder `name`."""
    return next((model for model in served if name in (model.name, model.base) or base_of(name) == model.base), None)


def shares_by_name(settings: Settings, served: Sequence[Served]) -> Mapping[str, float]:
    """Model → the share of memory that the settings give it; those without one are left out."""
    found = [(find_served(served, name), share) for name, share in settings.memory_shares.items()]
    return {model.name: share for model, share in found if model is not None}


def _check_names(settings: Settings, served: Sequence[Served]) -> None:
    serves = f"this server serves {', '.join(repr(model.name) for model in served)}"
    first = served[0].name
    for alias, target in settings.aliases.items():
        if find_served(served, target) is None:
            raise ConfigError(
                f"alias {alias}={target} does not name a served model; {serves}, so write {alias}={first}"
            )
    for name in settings.memory_shares:
        if find_served(served, name) is None:
            raise ConfigError(f"memory share of {name!r}, which is not served; {serves}")
