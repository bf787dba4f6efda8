"""The composition root: the only place that picks store, API, trainer and sampler and puts them together.

`supervise` is the parent process; `run_api` and `run_engine` are its children, started as `python -m tinsmith.serve`.
Imports are inside the functions because each process loads only what it runs: the parent and the API no torch, the
engine no web framework.
"""

import faulthandler
import fcntl
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tinsmith.announce import Announcer
from tinsmith.config import EMBEDDED, Settings, engine_environment, is_loopback
from tinsmith.errors import ConfigError, TinsmithError
from tinsmith.observe import configure_logging
from tinsmith.supervisor import EXIT_CONFIG, Child, Supervisor

if TYPE_CHECKING:
    import sqlalchemy as sa
    import torch

    from tinsmith.models.loading import BaseModel
    from tinsmith.protocols import Sampler, Trainer
    from tinsmith.sizing import Budgets, ModelSizes
    from tinsmith.store.ledger import Ledger

logger = logging.getLogger("tinsmith.serve")  # not __name__: the children run this module as __main__

API_GRACE = 5.0  # seconds to answer what is under way
ENGINE_GRACE = 60.0  # seconds to finish a slice of work and write what it must
DATABASE_PATIENCE = 60.0  # seconds; the database may be starting at the same time as the server
KEEP_ALIVE = 120  # seconds; longer than clients keep idle connections, so that they never meet a closed one
CPU_RUNNING, DEVICE_RUNNING = 64, 256  # sequences sampled at once
DETERMINISTIC_TRAIN_TOKENS = {"cpu": 1024, "cuda": 8192}  # of a micro-batch, however much memory is free
_WEIGHT_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def supervise(settings: Settings) -> int:
    """Runs a server until it is told to stop; the exit code. Raises ConfigError before anything is started."""
    configure_logging(settings.log, "server")
    settings = replace(settings, data_dir=settings.data_dir.absolute())
    with (
        _locked(settings.data_dir / "server.lock", 0),
        # The children hold this one too: after a kill -9 of their parent they take a moment to end.
        _locked(settings.data_dir / "children.lock", ENGINE_GRACE) as lock,
    ):
        keys = _count_keys(settings)
        with _listen(settings.host, settings.port) as listener:
            settings = replace(settings, port=listener.getsockname()[1])
            announcer = Announcer(settings, keys)
            announcer.chosen()
            supervisor = Supervisor(_children(settings, listener.fileno(), lock.fileno()))
            follow = threading.Thread(target=announcer.wait_until_ready, args=(supervisor.stopping,), daemon=True)
            follow.start()
            code = supervisor.run()
            follow.join(timeout=1)
    return code


def _count_keys(settings: Settings) -> int | None:
    """How many keys clients may use; None if any will do. Raises ConfigError for an open door to other machines."""
    if settings.no_auth:
        return None
    from tinsmith.store.database import Database
    from tinsmith.store.keys import list_keys

    database = Database(settings.effective_database_url, patience=DATABASE_PATIENCE)
    try:
        database.migrate()
        stored = database.read(list_keys)
    finally:
        database.close()
    active = len(settings.api_keys) + sum(key.state(time.time()) == "active" for key in stored)
    if not (active or is_loopback(settings.host)):
        raise ConfigError(
            f"host {settings.host!r} can be reached from other machines, and there are no API keys; make one "
            "(tinsmith keys create NAME), give --api-key (repeatable), or --no-auth if the network is trusted"
        )
    return active if active or stored else None


def run_api(settings: Settings, listener_fd: int, server_began: float, stop: threading.Event) -> None:
    """Answers HTTP on an inherited listening socket until `stop`. `server_began` is when the supervisor started."""
    import uvicorn

    from tinsmith.api.app import create_app
    from tinsmith.api.connections import BoundedConnection
    from tinsmith.store.database import Database
    from tinsmith.store.doorbell import Doorbell

    database, doorbell = Database(settings.effective_database_url), Doorbell(settings.effective_database_url)
    database.migrate()
    database.write(_retire_engine, settings.served_name, server_began)
    config = uvicorn.Config(
        create_app(settings, database, doorbell),
        http=BoundedConnection,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(API_GRACE) - 3,
    )
    server = uvicorn.Server(config)

    def stop_server() -> None:
        stop.wait()
        server.should_exit = True

    threading.Thread(target=stop_server, daemon=True).start()
    server.run(sockets=[socket.socket(fileno=listener_fd)])
    doorbell.close()
    database.close()


def _retire_engine(conn: "sa.Connection", base: str, before: float) -> None:
    """An engine that was killed with an earlier server left word that it is ready; that is no longer so."""
    from tinsmith.store import records

    engine = records.find_engine(conn, base)
    if engine is not None and engine.beat_at < before:
        records.put_engine(conn, replace(engine, state="stopped", progress=""))


def run_engine(settings: Settings, stop: threading.Event) -> None:
    """Loads the model and works on the queue until `stop`. Raises ConfigError if the model cannot be served."""
    from tinsmith.engine.loop import Engine
    from tinsmith.store.database import Database
    from tinsmith.store.doorbell import Doorbell
    from tinsmith.store.ledger import Ledger, NewCheckpoint

    database, doorbell = Database(settings.effective_database_url), Doorbell(settings.effective_database_url)
    database.migrate()
    ledger = Ledger(database, doorbell, settings.served_name)
    try:
        with _no_collections():
            trainer, sampler = load_backend(settings, partial(_report, ledger, stop))
    except TinsmithError as error:
        ledger.announce("failed", str(error))
        raise
    engine = Engine(
        ledger,
        trainer,
        sampler,
        NewCheckpoint,
        data_dir=settings.data_dir,
        max_models=settings.max_lora_adapters,
        future_seconds=settings.future_hours * 3600,
    )
    engine.run(stop)
    doorbell.close()
    database.close()


@contextmanager
def _no_collections() -> Iterator[None]:
    """Nothing of what imports and loading make is garbage: looking for some would take a seventh of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # later collections need not look at it either
        gc.enable()


def _report(ledger: "Ledger", stop: threading.Event, progress: str) -> None:
    """Says what a starting engine is doing; ends the process if it was told to stop meanwhile."""
    if stop.is_set():
        raise SystemExit(0)
    ledger.announce("loading", progress)


def load_backend(settings: Settings, report: Callable[[str], None]) -> "tuple[Trainer, Sampler]":
    """The trainer and the sampler of the served model, sized to the memory that is free.

    Needs no database: benchmarks and tests use it too. On a GPU, deterministic training needs the variables of
    `engine_environment`. Raises ConfigError.
    """
    report("starting")
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from tinsmith import sizing
    from tinsmith.models.loading import load_base
    from tinsmith.sampling.sampler import TorchSampler
    from tinsmith.training.trainer import TorchTrainer

    disable_progress_bar()  # type: ignore[no-untyped-call]  # `report` says how loading goes
    device, dtype = choose_device(settings.device, settings.dtype)
    folder = model_folder(settings, report)
    model = load_base(folder, dtype=dtype, device=device, on_progress=report)
    if settings.threads or model.parameters < sizing.SMALL_MODEL:
        torch.set_num_threads(settings.threads or 1)
    report("making room for the cache")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    budgets = _budgets(settings, model)
    trainer = TorchTrainer(
        model,
        micro_batch_tokens=budgets.train_tokens,
        micro_batch_datums=settings.train_micro_batch_size,
        gradient_checkpointing={"on": True, "off": False}.get(settings.gradient_checkpointing, budgets.kept_tokens),
        max_adapters=settings.max_lora_adapters,
        max_rank=settings.max_lora_rank,
        deterministic=settings.deterministic,
    )
    sampler = TorchSampler(
        model,
        tokenizer,
        kv_tokens=budgets.kv_tokens,
        max_running=budgets.running,
        snapshot_bytes=budgets.snapshot_bytes,
        deterministic=settings.deterministic and device.type == "cpu",
    )
    logger.info(
        "%s: %s, %.4g M parameters, %s on %s, %d threads; %d adapters of rank %d at most; context %d tokens, "
        "cache %d tokens, training %d tokens at a time",
        settings.model,
        model.architecture,
        model.parameters / 1e6,
        str(dtype).removeprefix("torch."),
        device,
        torch.get_num_threads(),
        settings.max_lora_adapters,
        settings.max_lora_rank,
        model.max_context,
        budgets.kv_tokens,
        budgets.train_tokens,
    )
    return trainer, sampler


def choose_device(device: str, dtype: str) -> "tuple[torch.device, torch.dtype]":
    """The device and dtype that the settings name, or for `auto` the GPU in bfloat16, else the CPU in float32."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device 'cuda' was asked for, but torch finds no GPU; use --device cpu or auto")
    name = ("cuda" if available else "cpu") if device == "auto" else device
    if dtype == "auto":
        dtype = "bfloat16" if name == "cuda" else "float32"
    return torch.device(name), {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def model_folder(settings: Settings, report: Callable[[str], None]) -> Path:
    """The served model's folder on this machine; a hub model is downloaded first. Raises ConfigError."""
    if settings.model == EMBEDDED:
        from tinsmith.demo import tiny_folder

        return tiny_folder()
    folder = Path(settings.served_name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face model")
        return folder
    return _download(settings.model, report)


def _download(name: str, report: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    report(f"fetching {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=_WEIGHT_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{name!r} is no folder here, and could not be fetched from the hub: {reason}") from error


def _budgets(settings: Settings, model: "BaseModel") -> "Budgets":
    """As set, or from free memory; limits the model's context to what can be served. Raises ConfigError."""
    import torch

    from tinsmith import sizing

    sizes = sizing.ModelSizes(
        kv_numbers=model.cache_shape.numbers,
        activation_bytes=model.activation_bytes,
        layers=model.num_layers,
        hidden=model.config.hidden_size,
        max_context=model.max_context,
        item_bytes=model.dtype.itemsize,
    )
    on_cpu = model.device.type == "cpu"
    free = sizing.free_host_memory() if on_cpu else torch.cuda.mem_get_info(model.device)[0]
    model.max_context = _context(settings, sizes, free)
    sizes = replace(sizes, max_context=model.max_context)
    running = sizing.running_sequences(model.state_bytes, free, CPU_RUNNING if on_cpu else DEVICE_RUNNING)
    fixed = DETERMINISTIC_TRAIN_TOKENS[model.device.type] if settings.deterministic else 0
    always = settings.gradient_checkpointing == "on"
    fitting = sizing.train_tokens(sizes, free, on_cpu=on_cpu, checkpointing=always)
    return sizing.Budgets(
        running=running,
        kv_tokens=settings.kv_cache_tokens or sizing.kv_cache_tokens(sizes, free, running, on_cpu=on_cpu),
        train_tokens=settings.train_tokens or fixed or fitting,
        kept_tokens=sizing.trainable_tokens(sizes, free, checkpointing=False),
        snapshot_bytes=int(free * sizing.SNAPSHOT_SHARE),
    )


def _context(settings: Settings, sizes: "ModelSizes", free_bytes: int) -> int:
    """The longest sequence served: as set, or the model's own if memory holds it."""
    from tinsmith import sizing

    made_for = sizes.max_context
    if settings.max_context > made_for:
        raise ConfigError(
            f"max_context is {settings.max_context}, but the model was made for {made_for} tokens at most"
        )
    fitting = sizing.context_tokens(sizes, free_bytes, checkpointing=settings.gradient_checkpointing != "off")
    if fitting < made_for and not settings.max_context:
        logger.warning("memory holds sequences of %d tokens, not of the model's %d", fitting, made_for)
    return settings.max_context or fitting


def _children(settings: Settings, listener_fd: int, lock_fd: int) -> list[Child]:
    """The API first, so that requests are taken while the model loads; they stop in reverse order."""
    # -P: nothing in the user's current folder may shadow an installed package.
    from tinsmith.engine.trials import pulse_file

    command, line = [sys.executable, "-P", "-m", "tinsmith.serve"], settings.to_json()
    api = Child("api", [*command, "api", str(listener_fd), str(time.time())], line, (listener_fd, lock_fd), API_GRACE)
    engine = Child("engine", [*command, "engine"], line, (lock_fd,), ENGINE_GRACE, engine_environment(settings))
    return [api, replace(engine, pulse=pulse_file(settings.data_dir), patience=60 * settings.stuck_minutes)]


def _locked(path: Path, wait_seconds: float) -> IO[str]:
    """An exclusive lock on a file of the data folder. Raises ConfigError if another server keeps it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise ConfigError(f"cannot write to the data folder {path.parent}: {error.strerror}") from error
    deadline = time.monotonic() + wait_seconds
    while not _try_lock(lock):
        if time.monotonic() >= deadline:
            lock.close()
            raise ConfigError(f"another server uses the data folder {path.parent}; give this one its own --data-dir")
        time.sleep(0.2)
    return lock


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = f"cannot listen on {host} port {port}: {error.strerror}"
        raise ConfigError(f"{reason}; choose others with --host and --port (0: any free port)") from error


def _read_first_line() -> str:
    """From standard input, unbuffered: the rest of it must stay readable for `_stop_at_end_of_input`."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)
        if not part:
            raise SystemExit("this process is started by `tinsmith serve`; it needs settings on its standard input")
        line += part
    return line.decode()


def _stop_at_end_of_input(stop: threading.Event, grace: float) -> None:
    while os.read(0, 4096):
        pass
    stop.set()
    time.sleep(grace)
    os._exit(1)  # the parent may be gone, so nobody else would end a process that hangs


def _child_main(role: str, *arguments: str) -> int:
    settings = Settings.from_json(_read_first_line())
    configure_logging(settings.log, role)
    faulthandler.enable()  # a crash, or being ended because it is stuck, shows where each thread stood
    stop = threading.Event()
    grace = API_GRACE if role == "api" else ENGINE_GRACE
    threading.Thread(target=_stop_at_end_of_input, args=(stop, grace), daemon=True).start()
    try:
        if role == "api":
            run_api(settings, int(arguments[0]), float(arguments[1]), stop)
        else:
            run_engine(settings, stop)
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(_child_main(*sys.argv[1:]))
