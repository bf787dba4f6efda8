"""The composition root: the only place that picks store, API, trainer and sampler and puts them together.

`supervise` is the parent process; `run_api` and `run_engine` are its children, started as `python -m tinsmith.serve`.
Imports are inside the functions because each process loads only what it runs: the parent and the API no torch, the
engine no web framework.
"""

import faulthandler
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tinsmith.announce import Announcer
from tinsmith.backend import load_backend
from tinsmith.config import Settings, engine_environment, is_loopback
from tinsmith.errors import ConfigError, TinsmithError
from tinsmith.exclusive import listen, locked
from tinsmith.lost_device import DeviceLostError
from tinsmith.observe import configure_logging
from tinsmith.supervised import read_first_line, stop_at_end_of_input
from tinsmith.supervisor import EXIT_CONFIG, Child, Supervisor

if TYPE_CHECKING:
    import sqlalchemy as sa

    from tinsmith.store.ledger import Ledger

logger = logging.getLogger("tinsmith.serve")  # not __name__: the children run this module as __main__

API_GRACE = 5.0  # seconds to answer what is under way
ENGINE_GRACE = 60.0  # seconds to finish a slice of work and write what it must
DATABASE_PATIENCE = 60.0  # seconds; the database may be starting at the same time as the server
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
        keys = _count_keys(settings)
        with listen(settings.host, settings.port) as listener:
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


def _children(settings: Settings, listener_fd: int, lock_fd: int) -> list[Child]:
    """The API first, so that requests are taken while the model loads; they stop in reverse order."""
    # -P: nothing in the user's current folder may shadow an installed package.
    from tinsmith.engine.trials import pulse_file

    command, line = [sys.executable, "-P", "-m", "tinsmith.serve"], settings.to_json()
    api = Child("api", [*command, "api", str(listener_fd), str(time.time())], line, (listener_fd, lock_fd), API_GRACE)
    engine = Child("engine", [*command, "engine"], line, (lock_fd,), ENGINE_GRACE, engine_environment(settings))
    return [api, replace(engine, pulse=pulse_file(settings.data_dir), patience=60 * settings.stuck_minutes)]


def _child_main(role: str, *arguments: str) -> int:
    settings = Settings.from_json(read_first_line())
    configure_logging(settings.log, role, settings.log_format)
    faulthandler.enable()  # a crash, or being ended because it is stuck, shows where each thread stood
    stop = threading.Event()
    grace = API_GRACE if role == "api" else ENGINE_GRACE
    threading.Thread(target=stop_at_end_of_input, args=(stop, grace), daemon=True).start()
    try:
        if role == "api":
            run_api(settings, int(arguments[0]), float(arguments[1]), stop)
        else:
            run_engine(settings, stop)
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
