"""The settings of one server: read once (file, then environment, then command line), frozen, printed at start.

The only reader of the environment: `read_environment` is called by the command line, `engine_environment` by who
starts an engine; everything else is given a `Settings`. Knows nothing of the machine; what is left at 0 or `auto` is
chosen where the model is loaded.
"""

import ipaddress
import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit, urlunsplit

from tinsmith.errors import ConfigError

PREFIX = "TINSMITH_"
EMBEDDED = "tiny"
TEST_PREFIX = "TINSMITH_TEST_"  # belongs to the test suite; servers ignore it


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a server is told. Sizes in bytes, tokens or seconds, as each name or comment says."""

    models: tuple[str, ...] = ()  # registered names, "tiny", Hugging Face folders, hub names; none: all registered ones
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    data_dir: Path = Path("tinsmith-data")
    database_url: str = ""  # empty: SQLite in data_dir
    aliases: dict[str, str] = field(default_factory=dict)  # other names for served models; "*" is any name
    api_keys: tuple[str, ...] = ()
    no_auth: bool = False
    max_lora_adapters: int = 64  # on the device at once; idle ones beyond it are paged out
    max_lora_rank: int = 128
    dtype: str = "auto"  # auto, float32, bfloat16
    device: str = "auto"  # auto, cpu, cuda
    deterministic: bool = False  # the same bits, whoever else is served and however often it is repeated
    threads: int = 0  # of arithmetic on the CPU; 0: one for a small model, else one per core
    max_context: int = 0  # tokens; 0: what the model's configuration says
    max_body_bytes: int = 256 * 2**20  # of a request, also after decompression
    memory_fraction: float = 0.0  # of the device's memory, for all engines together; 0: all that is free
    memory_shares: dict[str, float] = field(default_factory=dict)  # of that, by model; the others divide the rest
    kv_cache_tokens: int = 0  # 0: from free memory
    train_tokens: int = 0  # tokens in one micro-batch; 0: from free memory
    train_micro_batch_size: int = 0  # sequences in one training micro-batch at most; 0: only train_tokens bounds it
    gradient_checkpointing: str = "auto"  # auto (in passes that memory could not hold otherwise), on, off
    max_outstanding: int = 65_536  # requests accepted and not ended, of all keys; more are told to come again
    max_outstanding_per_key: int = 32_768
    max_outstanding_bytes: int = 8 * 2**30  # of what those requests hold
    max_outstanding_bytes_per_key: int = 4 * 2**30
    keep_checkpoints: int = 0  # the latest of each kind of every model that does not say; 0: all
    snapshot_hours: float = 24.0  # for which an unnamed snapshot stays unused, once superseded; 0: its session's
    future_hours: float = 24.0  # how long a finished result can be read
    poll_seconds: float = 30.0  # how long retrieve_future holds a request
    stuck_minutes: float = 15.0  # an engine that has not moved for so long is restarted; 0: never
    token_minutes: float = 60.0  # how long the tokens last that clients exchange keys for; 0: clients send their keys
    batched_polling: bool = False  # clients ask for the ends of all samples of a sampler at once
    price_train: float = 0.0  # USD per million tokens, as the next three; 0: no price
    price_prefill: float = 0.0
    price_cached_prefill: float = 0.0
    price_sample: float = 0.0
    price_storage: float = 0.0  # USD per GB (10^9 bytes) and month of 720 hours
    log: str = "info"  # debug, info, warning, error
    log_format: str = "text"  # text for people, json: one JSON object per line

    @property
    def effective_database_url(self) -> str:
        """`database_url`, or the SQLite file in `data_dir` when there is none."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'tinsmith.db'}"

    def to_json(self) -> str:
        """All settings, for a child process; `from_json` reads it."""
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self)}, default=str)

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """The inverse of `to_json`."""
        return _checked(_parsed(json.loads(text), "the parent's settings"))


CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda"),
    "gradient_checkpointing": ("auto", "on", "off"),
    "log": ("debug", "info", "warning", "error"),
    "log_format": ("text", "json"),
}

RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "max_lora_adapters": (1, 65536),
    "max_lora_rank": (1, 4096),
    "threads": (0, 4096),
    "max_context": (0, 2**31 - 1),
    "max_body_bytes": (2**10, 2**32),
    "memory_fraction": (0.0, 1.0),
    "kv_cache_tokens": (0, 2**40),
    "train_tokens": (0, 2**31 - 1),
    "train_micro_batch_size": (0, 2**31 - 1),
    "max_outstanding": (1, 2**31 - 1),
    "max_outstanding_per_key": (1, 2**31 - 1),
    "max_outstanding_bytes": (2**10, 2**50),
    "max_outstanding_bytes_per_key": (2**10, 2**50),
    "keep_checkpoints": (0, 2**31 - 1),
    "snapshot_hours": (0.0, 24 * 7),  # what was asked of a sampler is known for a week
    "future_hours": (0.01, 24 * 365),
    "poll_seconds": (0.1, 40.0),  # the client gives up after 45
    "stuck_minutes": (0.0, 60 * 24 * 7),
    "token_minutes": (0.0, 60 * 24),
    **{f"price_{kind}": (0.0, 1e6) for kind in ("train", "prefill", "cached_prefill", "sample", "storage")},
}


def load_settings(
    config_file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Settings:
    """Settings from a TOML file, then TINSMITH_* variables, then `overrides` (what the command line says).

    Each source may leave out any setting, and replaces whole settings (also lists). Raises ConfigError for unknown
    names, wrong types and values out of range.
    """
    values: dict[str, Any] = {}
    if config_file is not None:
        values |= _parsed(_read_toml(config_file), str(config_file))
    values |= _parsed(_from_variables(environment or {}), "the environment", PREFIX)
    values |= _parsed(overrides or {}, "the command line")
    return _checked(values)


def read_environment() -> dict[str, str]:
    """The process's environment, for `load_settings`."""
    return dict(os.environ)


def engine_environment(settings: Settings) -> dict[str, str]:
    """The engine's environment: this process's, and what libraries read there as soon as they are loaded."""
    wanted = {"OMP_WAIT_POLICY": "PASSIVE"}  # torch's threads sleep while they wait: see docs/log.md
    if settings.deterministic:
        wanted["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return wanted | read_environment()


def describe(settings: Settings) -> list[tuple[str, str]]:
    """(name, value) of every setting, in order, with API keys and the database's password masked."""
    return [(f.name, _shown(f.name, getattr(settings, f.name))) for f in fields(settings)]


def mask_password(url: str) -> str:
    """A database URL that can be printed."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))


def _shown(name: str, value: object) -> str:
    if name == "api_keys":
        return ", ".join(f"{key[:4]}***" for key in value) if isinstance(value, tuple) else ""
    if isinstance(value, dict):
        return ", ".join(f"{key}={value}" for key, value in value.items())
    if name == "models" and isinstance(value, tuple):
        return ", ".join(value)
    return mask_password(str(value)) if name == "database_url" else str(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _from_variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX) and not name.startswith(TEST_PREFIX)
    }


def _parsed(raw: Mapping[str, object], source: str, prefix: str = "") -> dict[str, Any]:
    types = get_type_hints(Settings)
    unknown = [name for name in raw if name not in types]
    if unknown:
        allowed = ", ".join(prefix + (name.upper() if prefix else name) for name in types)
        name = prefix + (unknown[0].upper() if prefix else unknown[0])
        raise ConfigError(f"unknown setting {name!r} in {source}; allowed: {allowed}")
    values = {}
    for name, value in raw.items():
        try:
            values[name] = _PARSERS[types[name]](value)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"setting {name!r} in {source}: {error}") from error
    return values


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"expected a whole number, got {value!r}")
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"expected a whole number, got {value!r}") from None


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"expected a number, got {value!r}")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"expected a number, got {value!r}") from None


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError(f"expected true or false, got {value!r}")
    return words[value.lower()]


def _path(value: object) -> Path:
    return Path(value).expanduser() if isinstance(value, (str, Path)) else Path(_text(value))


def _texts(value: object) -> tuple[str, ...]:
    """A list, or (in a variable) one text with commas."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a list of texts, got {value!r}")
    return tuple(_text(part) for part in value)


def _pairs(value: object) -> dict[str, str]:
    """A table, or NAME=MODEL texts."""
    if isinstance(value, dict):
        return {_text(name): _text(model) for name, model in value.items()}
    pairs = [(part, *part.partition("=")) for part in _texts(value)]
    for part, name, equals, model in pairs:
        if not (name and equals and model):
            raise ValueError(f"expected NAME=MODEL, got {part!r}")
    return {name: model for _, name, _, model in pairs}


def _shares(value: object) -> dict[str, float]:
    """A table, or NAME=FRACTION texts."""
    raw = value if isinstance(value, dict) else _pairs(value)
    shares = {_text(name): _number(share) for name, share in raw.items()}
    if any(not 0 < share <= 1 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
        shown = ", ".join(f"{name}={share:g}" for name, share in shares.items())
        raise ValueError(f"expected fractions above 0 that add up to 1 at most, got {shown}")
    return shares


_PARSERS: dict[Any, Callable[[object], Any]] = {
    str: _text,
    int: _integer,
    float: _number,
    bool: _flag,
    Path: _path,
    tuple[str, ...]: _texts,
    dict[str, str]: _pairs,
    dict[str, float]: _shares,
}


def _checked(values: dict[str, Any]) -> Settings:
    settings = replace(Settings(), **values)
    for name, allowed in CHOICES.items():
        value = getattr(settings, name)
        if value not in allowed:
            raise ConfigError(f"setting {name!r} is {value!r}; allowed: {', '.join(allowed)}")
    for name, (low, high) in RANGES.items():
        value = getattr(settings, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise ConfigError(f"setting {name!r} is {value}; allowed: {low} to {high}")
    if not all(settings.models):
        raise ConfigError("setting 'models' holds an empty name; give 'tiny', a folder or a hub name")
    _check_access(settings)
    return settings


def _check_access(settings: Settings) -> None:
    if settings.api_keys and settings.no_auth:
        raise ConfigError("api_keys and no_auth exclude each other; give one of them")
    for key in settings.api_keys:
        if not key.startswith(("tml-", "eyJ")):
            raise ConfigError(f"API key {key[:4]}*** must start with tml-; the client refuses any other")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
