"""The doorbell beside SQLite: every listener is a Unix datagram socket, whose file's name says what it listens to.

The folder of these files is private to the user and named after the database, so all processes of a server find each
other without being told. They must agree on the temporary folder.
"""

import errno
import hashlib
import os
import secrets
import socket
import stat
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tinsmith.errors import ConfigError
from tinsmith.store.bell import Bell, Courier, pack, packets, unpack

_PACKET_BYTES = 2_000 if sys.platform == "darwin" else 60_000
_PATH_BYTES = 100  # of a socket's name; kernels take 104 to 108
_LONGEST_NAME = "jobs+done+engine-1234567-12345678"
_FULL = (errno.EAGAIN, errno.ENOBUFS)
_DEAD = (errno.ECONNREFUSED, errno.ECONNRESET)


class SocketRinger:
    """Sends to every socket in the folder that listens to a topic."""

    def __init__(self, database_url: str) -> None:
        """Raises ConfigError if somebody else owns the folder."""
        self._folder = _private_folder(database_url)
        _make_private(self._folder)
        self._socket = _new_socket()
        self._courier = Courier(self._deliver)

    def ring(self, topic: str, messages: list[str]) -> None:
        for path in self._listeners(topic):
            rest = self._deliver(path, messages)
            if rest:
                self._courier.send(path, rest)

    def listen(self, topics: tuple[str, ...]) -> Bell:
        return SocketBell(self._folder, topics)

    def close(self) -> None:
        self._courier.close()
        self._socket.close()
        _remove_if_empty(self._folder)

    def _listeners(self, topic: str) -> list[str]:
        try:
            paths = list(self._folder.iterdir())
        except OSError:  # removed by whoever cleans the temporary folder; listeners will make it again
            return []
        return [str(path) for path in paths if topic in path.name.partition("-")[0].split("+")]

    def _deliver(self, path: str, messages: list[str]) -> list[str]:
        """Sends without blocking; returns the messages that a full listener had no room for."""
        groups = packets(messages, _PACKET_BYTES)
        for sent, group in enumerate(groups):
            try:
                self._socket.sendto(pack(group), path)
            except OSError as error:
                if error.errno in _FULL:
                    return [message for rest in groups[sent:] for message in rest]
                if error.errno in _DEAD:
                    Path(path).unlink(missing_ok=True)
                return []
        return []


class SocketBell(Bell):
    """A socket of its own; its file is removed when it is closed, or by the first ring after its process died."""

    def __init__(self, folder: Path, topics: tuple[str, ...]) -> None:
        super().__init__()
        self._folder = folder
        self._topics = topics
        self._bind()

    def _bind(self) -> None:
        _make_private(self._folder)
        self._path = self._folder / f"{'+'.join(self._topics)}-{os.getpid()}-{secrets.token_hex(4)}"
        self._socket = _new_socket()
        self._socket.bind(str(self._path))

    def _receive(self, until: float) -> list[str]:
        if not self._path.exists():
            return self._start_again()
        while not self._closed:
            messages = self._drain()
            if messages or time.monotonic() >= until:
                return messages
            self._sleep(until, self._socket.fileno())
        return []

    def _start_again(self) -> list[str]:
        """Someone has cleaned the temporary folder: rings have been lost."""
        self._socket.close()
        self._bind()
        return list(self._topics)

    def _drain(self) -> list[str]:
        messages: dict[str, None] = {}
        while True:
            try:
                messages.update(dict.fromkeys(unpack(self._socket.recv(_PACKET_BYTES))))
            except BlockingIOError:
                return list(messages)

    def _hang_up(self) -> None:
        self._path.unlink(missing_ok=True)
        self._socket.close()
        _remove_if_empty(self._folder)


def _new_socket() -> socket.socket:
    created = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    created.setblocking(False)
    return created


def _private_folder(database_url: str) -> Path:
    file = Path(database_url.partition("///")[2].partition("?")[0]).resolve()
    name = f"tinsmith-{os.getuid()}-{hashlib.sha256(bytes(file)).hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir(), name)
    if len(bytes(folder / _LONGEST_NAME)) > _PATH_BYTES:
        folder = Path("/tmp", name)
    return folder


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{folder} must be a folder that only this user can enter (mode 0700); remove it")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # somebody listens still, or was faster
        folder.rmdir()
