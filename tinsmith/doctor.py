"""What may keep a server from working on this machine, found before it is started: one finding for each thing.

Changes nothing, needs no running server, and asks a process of its own about torch, which may not even load. Knows
settings and files; nothing of how a server works.
"""

import errno
import http.client
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tinsmith import __version__, sizing
from tinsmith.config import EMBEDDED, Settings, is_loopback, mask_password
from tinsmith.errors import ConfigError, TinsmithError
from tinsmith.model_files import count_parameters, model_folder
from tinsmith.served import Served, choose_served

if TYPE_CHECKING:
    from tinsmith.store.database import Database

OK, WARN, FAIL = "ok", "warn", "fail"
LITTLE_MEMORY = 2 * 2**30  # bytes, of which a warning is given
LITTLE_DISK, NO_DISK = 10 * 2**30, 2**30
MANY_FILES = 4096  # open at once: one for each connection
_CHECKED_DATABASE = 2**30  # bytes; a larger SQLite file is not read through
_PROBE_SECONDS = 180.0  # a first import of torch from a slow disk
_SHARED = {"nfs", "nfs4", "cifs", "smbfs", "smb3", "fuse.sshfs", "9p", "glusterfs", "lustre", "ceph"}
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}

_PROBE = """
import json, torch, transformers
found = {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda, "gpus": []}
for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    free, total = torch.cuda.mem_get_info(index)
    found["gpus"].append({"name": torch.cuda.get_device_name(index), "free": free, "total": total})
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `advice` says what to do unless the level is OK."""

    name: str
    level: str
    says: str
    advice: str = ""


def examine(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """All findings about a server with these settings, one by one as they are made."""
    probe = probe_torch(environment)
    yield check_python()
    yield check_torch(probe)
    yield from check_devices(settings, probe)
    yield check_cores(settings)
    yield check_memory(sizing.free_host_memory())
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield check_data_dir(settings.data_dir)
    yield check_disk(settings.data_dir)
    yield from check_database(settings)
    yield from check_models(settings, probe)
    yield check_port(settings)
    yield check_proxy(environment)


def check_python() -> Finding:
    return Finding("python", OK, f"Tinsmith {__version__}, Python {platform.python_version()}, {platform.platform()}")


def probe_torch(environment: Mapping[str, str]) -> dict[str, Any] | str:
    """What torch says of itself and of GPUs; or, as text, why it cannot be asked."""
    command = [sys.executable, "-P", "-c", _PROBE]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, env=dict(environment))
    except subprocess.TimeoutExpired:
        return f"no answer within {_PROBE_SECONDS:.0f} s"
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()
        return lines[-1] if lines else f"the process ended with code {ended.returncode}"
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def check_torch(probe: dict[str, Any] | str) -> Finding:
    if isinstance(probe, str):
        return Finding(
            "torch", FAIL, f"cannot be used: {probe}", "install it again: pip install --force-reinstall torch"
        )
    cuda = f"CUDA {probe['cuda']}" if probe["cuda"] else "without CUDA"
    return Finding("torch", OK, f"torch {probe['torch']} {cuda}, transformers {probe['transformers']}")


def check_devices(settings: Settings, probe: dict[str, Any] | str) -> Iterator[Finding]:
    """The GPUs, or that there is none."""
    if isinstance(probe, str):
        return
    for index, gpu in enumerate(probe["gpus"]):
        says = f"{gpu['name']}, {_gb(gpu['free'])} of {_gb(gpu['total'])} free"
        if gpu["free"] < gpu["total"] / 2:
            yield Finding(f"gpu {index}", WARN, says, "other processes use it; nvidia-smi shows which")
        else:
            yield Finding(f"gpu {index}", OK, says)
    if probe["gpus"]:
        return
    has_driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()
    if settings.device == "cuda":
        advice = "use --device cpu or auto, or install a driver and a torch that match"
        yield Finding("gpu", FAIL, "device 'cuda' is set, but torch finds no GPU", advice)
    elif has_driver:
        advice = "install a torch with CUDA that fits the driver (nvidia-smi shows its version)"
        yield Finding("gpu", WARN, "there is an NVIDIA driver, but torch finds no GPU; the CPU would be used", advice)
    else:
        yield Finding("gpu", OK, "none; the CPU is used")


def check_cores(settings: Settings) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if settings.threads > cores:
        return Finding(
            "cpu", WARN, f"threads is {settings.threads}, of {cores} cores", f"set --threads to {cores} at most"
        )
    return Finding("cpu", OK, f"{cores} cores")


def check_memory(free: int) -> Finding:
    says = f"{_gb(free)} free of {_gb(psutil.virtual_memory().total)}"
    if free < LITTLE_MEMORY:
        return Finding(
            "memory", WARN, says, "end other programs, or give the container more: little fits beside a model"
        )
    return Finding("memory", OK, says)


def check_open_files(limit: int) -> Finding:
    if limit != resource.RLIM_INFINITY and limit < MANY_FILES:
        advice = f"raise it (ulimit -n {MANY_FILES}, or LimitNOFILE= of a service): each connection takes one"
        return Finding("open files", WARN, f"{limit} at once", advice)
    return Finding("open files", OK, f"{'any number' if limit == resource.RLIM_INFINITY else limit} at once")


def check_data_dir(data_dir: Path) -> Finding:
    """Whether the folder can be written, or made."""
    folder = _existing(data_dir)
    if not folder.is_dir():
        return Finding("data folder", FAIL, f"{folder} is no folder", "choose another place with --data-dir")
    if not os.access(folder, os.W_OK | os.X_OK):
        advice = f"make it writable for user {os.getuid()}, or choose another place with --data-dir"
        return Finding("data folder", FAIL, f"{folder} cannot be written", advice)
    if folder != data_dir.absolute():
        return Finding("data folder", OK, f"{data_dir.absolute()} will be made")
    return Finding("data folder", OK, f"{data_dir.absolute()} can be written")


def check_disk(data_dir: Path) -> Finding:
    free = shutil.disk_usage(_existing(data_dir)).free
    says = f"{_gb(free)} free for {data_dir.absolute()}"
    if free < NO_DISK:
        return Finding("disk", FAIL, says, "make room: checkpoints and recovery points could not be written")
    if free < LITTLE_DISK:
        return Finding("disk", WARN, says, "make room, or choose a larger disk with --data-dir, before long runs")
    return Finding("disk", OK, says)


def check_database(settings: Settings) -> Iterator[Finding]:
    """Whether it can be reached and written, and whose version it is."""
    if not settings.database_url:
        file = settings.data_dir.absolute() / "tinsmith.db"
        if not file.exists():
            yield Finding("database", OK, f"{file} will be made")
            return
        yield from _check_file_system(file)
    from tinsmith.store.database import Database

    where = mask_password(settings.database_url) or "SQLite in the data folder"
    try:
        database = Database(settings.effective_database_url, patience=3.0)
        try:
            yield from _check_open_database(settings, database, where)
        finally:
            database.close()
    except TinsmithError as error:
        says = f"{where} cannot be used: {mask_password(str(error))}"
        yield Finding("database", FAIL, says, "start it, or correct --database-url (user, password, host, name)")
    except Exception as error:  # the driver's own, whatever it is
        says = f"{where} cannot be used: {type(error).__name__}: {str(error).splitlines()[0]}"
        yield Finding("database", FAIL, says, "see docs/operations.md, or restore the data folder from a copy")


def _check_open_database(settings: Settings, database: "Database", where: str) -> Iterator[Finding]:
    from tinsmith.store import migrations, trying

    level = database.read(migrations.level)
    if level == migrations.NEWER:
        says = f"{where} was changed by a newer version of Tinsmith"
        yield Finding("database", FAIL, says, "use that version, or another --data-dir or --database-url")
        return
    database.write(trying.try_to_write)
    if problem := database.read(trying.damage, _CHECKED_DATABASE):
        says = f"{where} is damaged: {problem}"
        yield Finding("database", FAIL, says, "stop the server and restore the data folder from a copy")
        return
    words = {migrations.EMPTY: "its tables will be made", migrations.OLDER: "it will be migrated at start"}
    yield Finding("database", OK, f"{where} answers and can be written; {words.get(level, 'it is of this version')}")
    if level == migrations.CURRENT:
        yield _check_keys(settings, database)


def _check_file_system(file: Path) -> Iterator[Finding]:
    kind = _file_system(file)
    if kind in _SHARED:
        advice = "put the data folder on a local disk, or use Postgres: SQLite is not safe there"
        yield Finding("database", WARN, f"{file} is on a file system of kind {kind!r}", advice)


def _check_keys(settings: Settings, database: "Database") -> Finding:
    from tinsmith.store.keys import list_keys

    now = time.time()
    active = len(settings.api_keys) + sum(key.state(now) == "active" for key in database.read(list_keys))
    if active or settings.no_auth or is_loopback(settings.host):
        return Finding("access", OK, f"{active} active keys" if active else f"any key, on {settings.host}")
    advice = "make a key (tinsmith keys create NAME), or say --no-auth if the network is trusted"
    return Finding("access", FAIL, f"{settings.host} can be reached from other machines, and there are no keys", advice)


def check_models(settings: Settings, probe: dict[str, Any] | str) -> Iterator[Finding]:
    """Whether each model's files are there and complete, and whether memory holds its weights."""
    gpus = [] if isinstance(probe, str) or settings.device == "cpu" else probe["gpus"]
    free = gpus[0]["free"] if gpus else sizing.free_host_memory()
    try:
        served = choose_served(settings, _registered(settings))
    except TinsmithError as error:
        yield Finding("models", FAIL, str(error), "correct the names; tinsmith models list shows what there is")
        return
    for model in served:
        yield _check_model(model, settings, free, on_gpu=bool(gpus))


def _check_model(model: Served, settings: Settings, free: int, *, on_gpu: bool) -> Finding:
    name = f"model {model.name}"
    is_here = model.base == EMBEDDED or Path(model.folder or model.base).is_absolute()
    folder = Path(model.folder) if model.folder else None if is_here else _cached(model.base)
    if not is_here and folder is None:
        return Finding(
            name,
            WARN,
            "is not on this machine; the start would fetch it from the hub",
            "see to a connection, or fetch it first",
        )
    try:
        files = folder or model_folder(model, lambda progress: None)
        _check_readable(files)
        numbers = count_parameters(files)
    except ConfigError as error:
        return Finding(name, FAIL, str(error), "get its files again, or correct the name")
    dtype = settings.dtype if settings.dtype != "auto" else model.dtype
    dtype = dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"
    wanted = numbers * sizing.ITEM_BYTES[dtype] + sizing.ENGINE_ROOM
    says = f"{numbers / 1e6:.4g} M parameters in {files}, {_gb(wanted)} in {dtype} with the least room to work"
    if wanted > free:
        advice = "use a smaller model, --dtype bfloat16, or a larger device"
        return Finding(name, FAIL, f"{says}, of {_gb(free)} free", advice)
    return Finding(name, OK, says)


def _check_readable(folder: Path) -> None:
    """Raises ConfigError for what is wrong beside the weights."""
    try:
        json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise ConfigError(f"{folder} has no tokenizer (tokenizer.json)")


def _registered(settings: Settings) -> list[Served]:
    """What `tinsmith models add` has noted; nothing where there is no database of this version."""
    from tinsmith.store import migrations, registry
    from tinsmith.store.database import Database

    if not settings.database_url and not (settings.data_dir / "tinsmith.db").exists():
        return []
    try:
        database = Database(settings.effective_database_url, patience=3.0)
        try:
            known = []
            if database.read(migrations.level) == migrations.CURRENT:
                known = database.read(registry.list_registered)
        finally:
            database.close()
    except Exception:  # `check_database` has said what is wrong with it
        return []
    return [Served(m.name, m.base, m.folder, m.dtype, m.max_context, m.trust_remote_code) for m in known]


def _cached(name: str) -> Path | None:
    """A hub model's folder on this machine, if it has been fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def check_port(settings: Settings) -> Finding:
    """Whether the server could listen there, or one already does."""
    where = f"{settings.host} port {settings.port}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.create_server((settings.host, settings.port), family=family):
            return Finding("port", OK, f"{where} is free" if settings.port else "any free one")
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _is_tinsmith(settings):
            return Finding("port", OK, f"a Tinsmith server answers on {where}")
        says = f"cannot listen on {where}: {error.strerror}"
        return Finding(
            "port", FAIL, says, "end what uses it, or choose others with --host and --port (0: any free one)"
        )


def _is_tinsmith(settings: Settings) -> bool:
    host = _EVERY_ADDRESS.get(settings.host, settings.host)
    connection = http.client.HTTPConnection(host, settings.port, timeout=5)
    try:
        connection.request("GET", "/api/v1/healthz")
        return bool(json.loads(connection.getresponse().read()).get("status"))
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def check_proxy(environment: Mapping[str, str]) -> Finding:
    """Clients with a proxy in their environment send it even what is meant for this machine."""
    names = [name for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy") if environment.get(name)]
    exempt = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    if names and "127.0.0.1" not in exempt and exempt != "*":
        advice = "set NO_PROXY=127.0.0.1,localhost where scripts run, or they seem to hang"
        return Finding("proxy", WARN, f"{names[0]} is set, and NO_PROXY does not name 127.0.0.1", advice)
    return Finding("proxy", OK, "in nobody's way")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _file_system(path: Path) -> str:
    """The kind of file system that a path is on; empty if nobody says."""
    mounts = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    above = [(mount, kind) for mount, kind in mounts if path.absolute().is_relative_to(mount)]
    return max(above, key=lambda each: len(each[0]), default=("", ""))[1]


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
