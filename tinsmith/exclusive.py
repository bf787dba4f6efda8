"""What only one server at a time can have: a data folder and a port."""

import fcntl
import socket
import time
from pathlib import Path
from typing import IO

from tinsmith.errors import ConfigError


def locked(path: Path, wait_seconds: float) -> IO[str]:
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


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = f"cannot listen on {host} port {port}: {error.strerror}"
        raise ConfigError(f"{reason}; choose others with --host and --port (0: any free port)") from error
