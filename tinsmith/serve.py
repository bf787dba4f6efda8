"""The composition root: the only place that picks store, API, trainer and sampler and puts them together.

`supervise` is the parent process; `run_api` and `run_engine` are its children, started as `python -m tinsmith.serve`.
Imports are inside the functions because each process loads only what it runs: the parent and the API no torch, the
engine no web framework.
"""

import faulthandler
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tinsmith import sizing
from tinsmith.announce import Announcer
from tinsmith.backend import Device, find_device, load_backend
from tinsmith.config import Settings, engine_environment, is_loopback
from tinsmith.data_folder import bring_up_to_date
from tinsmith.errors import ConfigError, TinsmithError
from tinsmith.exclusive import listen, locked
from tinsmith.lost_device import DeviceLostError
from tinsmith.model_files import count_parameters, model_folder
from tinsmith.observe import configure_logging
from tinsmith.served import Served, choose_served, shares_by_name
from tinsmith.supervised import read_first_line, stop_at_end_of_input, tell_progress
from tinsmith.supervisor import EXIT_CONFIG, Child, Supervisor

if TYPE_CHECKING:
    from tinsmith.store.keys import Key
    from tinsmith.store.ledger import Ledger

logger = logging.getLogger("tinsmith.serve")  # not __name__: the children run this module as __main__

API_GRACE = 5.0  # seconds to answer what is under way
ENGINE_GRACE = 60.0  # seconds to finish a slice of work and write what it must
DATABASE_PATIENCE = 60.0  # seconds; the database may be starting at the same time as the server
PROBE_SECONDS = 120.0  # loading torch from a slow disk, and waking a GPU
SWITCH_SECONDS = 0.001  # for how long one of the API's threads may keep the event loop from going on
KEEP_ALIVE = 120  # seconds; longer than clients keep idle connections, so that they never meet a closed one


def supervise(settings: Settings) -> int:
    """Runs a server until it is told to stop; the exit code. Raises ConfigError before anything is started."""
    configure_logging(settings.log, "server", settings.log_format)
    settings = replace(settings, data_dir=settings.data_dir.absolute())
    with (
        locked(settings.data_dir / "server.lock", 0),
        # The children hold this one too: after a kill -9 of their parent they take a moment to end.
        locked(settings.data_dir / "children.lock", ENGINE_GRACE) as lock,
    ):
        served, keys = _look_up(settings)
        with _sole_server(settings, served) as stop_if_lost, listen(settings.host, settings.port) as listener:
            bring_up_to_date(settings.data_dir, partial(_folders_of_models, settings))
            _collect_leftovers(settings)
            settings = replace(settings, port=listener.getsockname()[1])
            announcer = Announcer(settings, served, keys)
            announcer.chosen()
            served = _divide_memory(settings, served)
            supervisor = Supervisor(_children(settings, served, listener.fileno(), lock.fileno()))
            stop_if_lost(supervisor)
            follow = threading.Thread(target=announcer.wait_until_ready, args=(supervisor.stopping,), daemon=True)
            follow.start()
            code = supervisor.run()
            follow.join(timeout=1)
    return code


@contextmanager
def _sole_server(settings: Settings, served: Sequence[Served]) -> Iterator[Callable[[Supervisor], None]]:
    """While it lasts, no other server works on these models in this database; ConfigError if one does already.

    What it gives watches on behalf of a supervisor: if, after the database was away, another server has them, this one
    stops, with a ConfigError.
    """
    from tinsmith.store.occupancy import Occupancy, OccupiedError

    occupancy = Occupancy(settings.effective_database_url, [model.base for model in served])
    lost: list[OccupiedError] = []

    def stop(error: OccupiedError) -> None:
        lost.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    def keep(supervisor: Supervisor) -> None:
        threading.Thread(target=occupancy.keep, args=(supervisor.stopping, stop), daemon=True).start()

    try:
        yield keep
    finally:
        occupancy.close()
    if lost:
        raise lost[0]


def _folders_of_models(settings: Settings) -> dict[str, Path]:
    """In which engine's folder each open model belongs, by the name of the model's own."""
    from tinsmith.engine.checkpoints import folder_name
    from tinsmith.store import records
    from tinsmith.store.database import Database

    database = Database(settings.effective_database_url)
    try:
        bases = database.read(records.bases_of_models)
    finally:
        database.close()
    return {folder_name(id): _engine_folder(settings, Served("", base)) for id, base in bases.items()}


def _collect_leftovers(settings: Settings) -> None:
    """Removes what an API that was killed had not finished of copies; engines see to their own folders."""
    from tinsmith.engine.checkpoints import orphans, remove_folder, sweep
    from tinsmith.store import queue, records
    from tinsmith.store.database import Database

    folder = settings.data_dir / "checkpoints"
    sweep(folder)
    database = Database(settings.effective_database_url)
    try:
        recorded = database.read(records.checkpoint_folders)
        for orphan in orphans(folder, recorded, lambda request_id: bool(database.read(queue.find, request_id))):
            remove_folder(orphan)
    finally:
        database.close()


def _look_up(settings: Settings) -> tuple[tuple[Served, ...], int | None]:
    """What is to be served, and how many keys clients may use (None if any will do). Raises ConfigError."""
    from tinsmith.store.database import Database
    from tinsmith.store.keys import list_keys
    from tinsmith.store.occupancy import migrate_alone
    from tinsmith.store.registry import list_registered

    database = Database(settings.effective_database_url, patience=DATABASE_PATIENCE)
    try:
        migrate_alone(database, settings.effective_database_url)
        keys, models = database.read(list_keys), database.read(list_registered)
    finally:
        database.close()
    registered = [
        Served(model.name, model.base, model.folder, model.dtype, model.max_context, model.trust_remote_code)
        for model in models
    ]
    return choose_served(settings, registered), _count_keys(settings, keys)


def _count_keys(settings: Settings, stored: "Sequence[Key]") -> int | None:
    """How many keys clients may use; None if any will do. Raises ConfigError for an open door to other machines."""
    if settings.no_auth:
        return None
    active = len(settings.api_keys) + sum(key.state(time.time()) == "active" for key in stored)
    if not (active or is_loopback(settings.host)):
        raise ConfigError(
            f"host {settings.host!r} can be reached from other machines, and there are no API keys; make one "
            "(tinsmith keys create NAME), give --api-key (repeatable), or --no-auth if the network is trusted"
        )
    return active if active or stored else None


def _divide_memory(settings: Settings, served: tuple[Served, ...]) -> tuple[Served, ...]:
    """Gives each engine its part of the device's memory; a single one has all of it, unless the settings bound it.

    Raises ConfigError if the models do not fit.
    """
    if len(served) == 1 and not (settings.memory_fraction or settings.memory_shares):
        return served
    device = _probe(settings)
    total = int(device.total_bytes * settings.memory_fraction) or device.free_bytes
    if total > device.free_bytes:
        raise ConfigError(
            f"memory_fraction {settings.memory_fraction:g} of {device.total_bytes / 1e9:.3g} GB is "
            f"{total / 1e9:.3g} GB, but only {device.free_bytes / 1e9:.3g} GB are free"
        )
    weights = {model.name: _weight_bytes(model, device.dtype) for model in served}
    parts = sizing.divide(total, weights, shares_by_name(settings, served))
    return tuple(replace(model, memory_bytes=parts[model.name]) for model in served)


def _weight_bytes(served: Served, dtype: str) -> int:
    numbers = count_parameters(model_folder(served, lambda progress: logger.info("%s", progress)))
    return numbers * sizing.ITEM_BYTES[dtype if served.dtype == "auto" else served.dtype]


def _probe(settings: Settings) -> Device:
    """Asks a process of its own, since this one shall not load torch."""
    command = [sys.executable, "-P", "-m", "tinsmith.serve", "probe"]
    environment, line = engine_environment(settings), _first_line(settings, ()) + "\n"
    try:
        ended = subprocess.run(
            command, input=line, stdout=subprocess.PIPE, text=True, env=environment, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"the device did not say within {PROBE_SECONDS:g} s what it is; is its driver well?"
        ) from error
    if ended.returncode:
        raise ConfigError(f"the device could not be looked at (exit code {ended.returncode})")
    found = json.loads(ended.stdout)
    if "error" in found:
        raise ConfigError(found["error"])
    return Device(**found)


def run_probe(settings: Settings) -> None:
    """Prints what `_probe` asks for."""
    try:
        found = asdict(find_device(settings))
    except ConfigError as error:
        found = {"error": str(error)}
    print(json.dumps(found))


def run_api(
    settings: Settings, served: Sequence[Served], listener_fd: int, server_began: float, stop: threading.Event
) -> None:
    """Answers HTTP on an inherited listening socket until `stop`. `server_began` is when the supervisor started."""
    import uvicorn

    from tinsmith.api.app import create_app
    from tinsmith.api.connections import ACCEPTED_AT_ONCE, BoundedConnection, PatientServer, connection_limit
    from tinsmith.store import records
    from tinsmith.store.database import Database
    from tinsmith.store.doorbell import Doorbell

    database, doorbell = Database(settings.effective_database_url), Doorbell(settings.effective_database_url)
    database.migrate()
    database.write(records.retire_engines, [model.base for model in served], server_began)
    BoundedConnection.limit = connection_limit()
    app = create_app(settings, served, database, doorbell)
    config = uvicorn.Config(
        app,
        http=BoundedConnection,
        access_log=False,
        log_config=None,
        server_header=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(API_GRACE) - 3,
    )
    server = PatientServer(config, app.state.leave)
    sys.setswitchinterval(SWITCH_SECONDS)

    def stop_server() -> None:
        stop.wait()
        server.should_exit = True

    threading.Thread(target=stop_server, daemon=True).start()
    progress = (_api_pulse(settings), lambda: app.state.counts.answered, stop)
    threading.Thread(target=tell_progress, args=progress, daemon=True).start()
    server.run(sockets=[socket.socket(fileno=listener_fd)])
    doorbell.close()
    database.close()


def run_engine(settings: Settings, served: Served, stop: threading.Event) -> None:
    """Loads the model and works on the queue until `stop`. Raises ConfigError if the model cannot be served."""
    from tinsmith.engine.loop import Engine
    from tinsmith.store.database import Database
    from tinsmith.store.doorbell import Doorbell
    from tinsmith.store.ledger import Ledger, NewCheckpoint

    database, doorbell = Database(settings.effective_database_url), Doorbell(settings.effective_database_url)
    database.migrate()
    ledger = Ledger(database, doorbell, served.base, settings.keep_checkpoints)
    try:
        with _no_collections():
            trainer, sampler = load_backend(settings, served, partial(_report, ledger, stop))
    except TinsmithError as error:
        ledger.announce("failed", str(error))
        raise
    engine = Engine(
        ledger,
        trainer,
        sampler,
        NewCheckpoint,
        data_dir=_engine_folder(settings, served),
        max_models=settings.max_lora_adapters,
        future_seconds=settings.future_hours * 3600,
        snapshot_seconds=settings.snapshot_hours * 3600,
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
        ledger.announce("stopped", "")
        raise SystemExit(0)
    ledger.announce("loading", progress)


def _api_pulse(settings: Settings) -> Path:
    """Where the API says how many requests it has answered."""
    return settings.data_dir / "api" / "answered"


def _engine_folder(settings: Settings, served: Served) -> Path:
    """Where one engine keeps what it writes; no other engine touches anything there."""
    return settings.data_dir / "engines" / served.slug


def _children(settings: Settings, served: tuple[Served, ...], listener_fd: int, lock_fd: int) -> list[Child]:
    """The API first, so that requests are taken while models load; they stop in reverse order."""
    # -P: nothing in the user's current folder may shadow an installed package.
    command, line = [sys.executable, "-P", "-m", "tinsmith.serve"], _first_line(settings, served)
    began, fds = str(time.time()), (listener_fd, lock_fd)
    command_of_api = [*command, "api", str(listener_fd), began]
    api = Child("api", command_of_api, line, fds, API_GRACE, pulse=_api_pulse(settings))
    return [api, *(_engine_child(settings, model, command, lock_fd) for model in served)]


def _engine_child(settings: Settings, served: Served, command: list[str], lock_fd: int) -> Child:
    from tinsmith.engine.trials import pulse_file

    return Child(
        _engine_name(served),
        [*command, "engine", served.name],
        _first_line(settings, (served,)),
        (lock_fd,),
        ENGINE_GRACE,
        engine_environment(settings),
        pulse=pulse_file(_engine_folder(settings, served)),
        patience=60 * settings.stuck_minutes,
        spare=served.neighbours > 0,
        stands_still=partial(_tell_clients, settings, served),
    )


def _tell_clients(settings: Settings, served: Served, reason: str) -> None:
    """Notes that a model's engine stands still, so that requests for it are refused with the reason."""
    from tinsmith.store import records
    from tinsmith.store.database import Database

    database = Database(settings.effective_database_url)
    try:
        database.write(records.fail_engine, served.base, reason)
    except TinsmithError as error:
        logger.error("clients cannot be told that the engine of %s stands still: %s", served.name, error)
    finally:
        database.close()


def _engine_name(served: Served) -> str:
    return f"engine {served.name}" if served.neighbours else "engine"


def _first_line(settings: Settings, served: Sequence[Served]) -> str:
    """What a child is told."""
    return json.dumps({"settings": settings.to_json(), "served": [asdict(model) for model in served]})


def _child_main(role: str, *arguments: str) -> int:
    told = json.loads(read_first_line())
    settings, served = Settings.from_json(told["settings"]), tuple(Served(**model) for model in told["served"])
    configure_logging(settings.log, _engine_name(served[0]) if role == "engine" else role, settings.log_format)
    faulthandler.enable()  # a crash, or being ended because it is stuck, shows where each thread stood
    stop = threading.Event()
    grace = API_GRACE if role == "api" else ENGINE_GRACE
    threading.Thread(target=stop_at_end_of_input, args=(stop, grace), daemon=True).start()
    try:
        if role == "api":
            run_api(settings, served, int(arguments[0]), float(arguments[1]), stop)
        elif role == "engine":
            run_engine(settings, served[0], stop)
        else:
            run_probe(settings)
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_CONFIG
    except DeviceLostError as error:
        logger.critical("%s", error)
        logging.shutdown()
        os._exit(1)  # libraries that tidy up would wait for the device
    return 0


if __name__ == "__main__":
    sys.exit(_child_main(*sys.argv[1:]))
