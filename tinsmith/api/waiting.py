"""Requests that wait for jobs to end, woken by the doorbell. Knows ids only; the caller looks up results.

Rings may get lost, so a thread also asks the database now and then which of all that are waited for have ended: one
question for a thousand of them, where each of them asking for itself would keep the server busy with nothing.
"""

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tinsmith.errors import UnavailableError
from tinsmith.store import queue
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell

_WAIT_SECONDS = 1.0
_LOOK_SECONDS = 2.0  # between two looks at the database, for lost rings
_LOOK_AT = 1000  # requests in one question

log = logging.getLogger(__name__)


class Waiters:
    """One thread that listens for finished jobs, and the events that it sets. `start` belongs in the event loop."""

    def __init__(self, doorbell: Doorbell, database: Database) -> None:
        self._doorbell = doorbell
        self._database = database
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._closing = threading.Event()
        self.is_leaving = False  # the process ends: nobody is held any more
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._listen, args=(loop,), name="finished-jobs", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Wakes everybody for good, so that they tell their clients to ask again. Belongs in the event loop."""
        self.is_leaving = True
        for events in self._events.values():
            for event in events:
                event.set()

    def close(self) -> None:
        """Ends the thread, within a second."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def held(self) -> int:
        """How many different results are waited for at this moment."""
        return len(self._events)

    @contextmanager
    def watch(self, request_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job, or (for a sampler's id) any of its jobs, is said to have ended."""
        event = asyncio.Event()
        self._events[request_id].add(event)
        try:
            yield event
        finally:
            self._events[request_id].discard(event)
            if not self._events[request_id]:
                del self._events[request_id]

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        bell = self._doorbell.listen("done")
        look_at = 0.0
        try:
            while not self._closing.is_set():
                request_ids = bell.wait(_WAIT_SECONDS)
                if time.monotonic() >= look_at:
                    request_ids += self._ended()
                    look_at = time.monotonic() + _LOOK_SECONDS
                if request_ids and not loop.is_closed():
                    loop.call_soon_threadsafe(self._wake, request_ids)
        finally:
            bell.close()

    def _ended(self) -> list[str]:
        """Those requests that are waited for, and over."""
        waited_for = list(self._events)
        ended: list[str] = []
        for start in range(0, len(waited_for), _LOOK_AT):
            try:
                ended += self._database.read(queue.are_over, waited_for[start : start + _LOOK_AT])
            except UnavailableError as error:  # the next look may find the database again
                log.info("waiting requests could not be looked at: %s", error)
            except Exception:  # rings wake those who wait all the same, if this thread goes on
                log.exception("waiting requests could not be looked at")
        return ended

    def _wake(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            for key in (request_id, request_id.rpartition(":")[0]):
                for event in self._events.get(key, ()):
                    event.set()


async def wait_for_ring(event: asyncio.Event, seconds: float) -> None:
    """Returns when the event is set, or after so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
