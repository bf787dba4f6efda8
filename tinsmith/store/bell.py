"""What the two kinds of doorbell share: waiting without polling, delivering in the background, packing messages.

Knows neither sockets' names nor Postgres.
"""

import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import ceil

_FIRST_RETRY_SECONDS = 0.005
_LAST_RETRY_SECONDS = 0.5
_UNDELIVERABLE_SECONDS = 30.0


class Bell(ABC):
    """One listener's end. One thread waits; any thread may close it."""

    def __init__(self) -> None:
        self._closer, self._closing = socket.socketpair()
        self._in_use = threading.Lock()
        self._closed = False

    def wait(self, timeout: float) -> list[str]:
        """Messages rung since the last call; empty after `timeout` seconds. Several rings may come as one.

        A ring without messages, and one that may have been lost, reads as its topic's name: look at the database.
        Uses no CPU while it waits. Returns at once when the bell is closed.
        """
        with self._in_use:
            return [] if self._closed else self._receive(time.monotonic() + timeout)

    def close(self) -> None:
        """Stops listening; a `wait` in another thread returns."""
        self._closed = True
        self._closer.close()
        with self._in_use:
            if self._closing.fileno() != -1:
                self._closing.close()
                self._hang_up()

    def _sleep(self, until: float, *descriptors: int) -> None:
        """Waits for one of `descriptors` to be readable, for `until` (monotonic seconds), or for `close`."""
        poll = select.poll()
        for descriptor in (self._closing.fileno(), *descriptors):
            poll.register(descriptor, select.POLLIN)
        poll.poll(max(0, ceil((until - time.monotonic()) * 1000)))

    @abstractmethod
    def _receive(self, until: float) -> list[str]:
        """Messages, as soon as there are any; an empty list at `until` (monotonic seconds) or when closed."""

    @abstractmethod
    def _hang_up(self) -> None:
        """Frees what the listener holds."""


class Courier:
    """Delivers, in a thread of its own, what cannot or must not be delivered at once.

    `deliver` takes an address and messages and returns those that are still to be delivered; they are tried again for
    30 seconds. The same message to the same address waits only once.
    """

    def __init__(self, deliver: Callable[[str, list[str]], list[str]]) -> None:
        self._deliver = deliver
        self._bag: dict[str, dict[str, None]] = {}
        self._failing_since: dict[str, float] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def send(self, address: str, messages: list[str]) -> None:
        """Takes messages to be delivered; after `close` nothing happens."""
        with self._changed:
            if self._closed:
                return
            self._bag.setdefault(address, {}).update(dict.fromkeys(messages))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tinsmith-doorbell", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Tries to deliver what waits, once, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        pause = _FIRST_RETRY_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._bag or self._closed)
                bag, self._bag = self._bag, {}
                closed = self._closed
            undelivered = self._deliver_all(bag)
            if closed:
                return
            pause = min(2 * pause, _LAST_RETRY_SECONDS) if undelivered else _FIRST_RETRY_SECONDS
            for address, messages in undelivered.items():
                self.send(address, messages)
            if undelivered:
                time.sleep(pause)

    def _deliver_all(self, bag: dict[str, dict[str, None]]) -> dict[str, list[str]]:
        """Delivers; returns what is to be tried again."""
        undelivered = {}
        now = time.monotonic()
        for address, messages in bag.items():
            rest = self._deliver(address, list(messages))
            if not rest:
                self._failing_since.pop(address, None)
            elif now - self._failing_since.setdefault(address, now) < _UNDELIVERABLE_SECONDS:
                undelivered[address] = rest
        return undelivered


def packets(messages: list[str], limit: int) -> list[list[str]]:
    """Messages in groups that `pack` to at most `limit` bytes; longer ones, and those with a NUL, are left out."""
    groups: list[list[str]] = []
    room = 0
    for message in messages:
        size = len(message.encode("utf-8", "replace")) + 1
        if size > limit or "\0" in message:
            continue
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(message)
        room -= size
    return groups


def pack(messages: list[str]) -> bytes:
    """One packet."""
    return "\n".join(messages).encode("utf-8", "replace")


def unpack(packet: bytes) -> list[str]:
    """The messages of a packet."""
    return packet.decode("utf-8", "replace").split("\n")
