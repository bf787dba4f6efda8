"""News of samples for those who read along: one thread that listens at the doorbell, and an inbox for each reader.

News may get lost or come twice (see `wire.progress`); what readers make of them is theirs.
"""

import asyncio
import logging
import threading
from collections.abc import Sequence

from tinsmith.store.bell import Bell
from tinsmith.store.doorbell import Doorbell
from tinsmith.wire.progress import Progress

_TOPICS = ("tokens", "done")
_WAIT_SECONDS = 60.0  # closing the bell ends a wait
_MOST_NEWS = 4096  # that an inbox holds for a client that reads slowly; the rest is in the result

log = logging.getLogger(__name__)


class Inbox:
    """What has been told of one request since the last `take`."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._news: list[Progress] = []
        self._ended = False  # whether the request is said to have ended

    def take(self) -> tuple[list[Progress], bool]:
        """The news, and whether the request is said to have ended."""
        news, ended = self._news, self._ended
        self._news, self._ended = [], False
        self._rung.clear()
        return news, ended

    async def wait(self, seconds: float) -> bool:
        """Whether anything was told before the time was over."""
        try:
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        except TimeoutError:
            return False
        return True

    def put(self, news: Progress | None) -> None:
        """None says that the request may have ended."""
        if news is None:
            self._ended = True
        elif len(self._news) < _MOST_NEWS:
            self._news.append(news)
        self._rung.set()


class TokenStreams:
    """The inboxes of one API process. Its thread starts with the first."""

    def __init__(self, doorbell: Doorbell) -> None:
        self._doorbell = doorbell
        self._inboxes: dict[str, Inbox] = {}
        self._starting = asyncio.Lock()
        self._bell: Bell | None = None
        self._thread: threading.Thread | None = None

    async def open(self, request_id: str) -> Inbox:
        """From now on, all news of the request. To be opened before it is submitted, and closed."""
        async with self._starting:
            if self._bell is None:
                self._bell = await asyncio.to_thread(self._doorbell.listen, *_TOPICS)
                loop = asyncio.get_running_loop()
                self._thread = threading.Thread(target=self._listen, args=(loop,), name="sampled-tokens", daemon=True)
                self._thread.start()
        return self._inboxes.setdefault(request_id, Inbox())

    def close(self, request_id: str) -> None:
        self._inboxes.pop(request_id, None)

    @property
    def held(self) -> int:
        """How many requests are read along with."""
        return len(self._inboxes)

    def wake(self) -> None:
        """Has every reader look for itself. Belongs in the event loop."""
        for inbox in self._inboxes.values():
            inbox.put(None)

    def shut(self) -> None:
        """Ends the thread."""
        if self._bell is not None and self._thread is not None:
            bell, self._bell = self._bell, None
            bell.close()
            self._thread.join()

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        while (bell := self._bell) is not None:
            messages = bell.wait(_WAIT_SECONDS)
            if messages and not loop.is_closed():
                loop.call_soon_threadsafe(self._hand_out, messages)

    def _hand_out(self, messages: Sequence[str]) -> None:
        if not set(_TOPICS).isdisjoint(messages):  # rings were lost: every reader looks for itself
            self.wake()
        for message in messages:
            request_id, space, _ = message.partition(" ")
            if request_id in self._inboxes:
                self._inboxes[request_id].put(Progress.from_message(message) if space else None)
