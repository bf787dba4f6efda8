"""Heartbeats: answered from memory, checked and noted behind the clients' backs.

A heartbeat that waited for the database would be late when the server is busy, which is when clients worry. What is
known of a session is good for a minute, and read again, for all sessions that beat in one query, once it is ten seconds
old: so a session that another process ends is told so with its next heartbeat but one. Nobody asks for a session's last
sign of life more exactly than to the half minute.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from tinsmith.errors import TinsmithError
from tinsmith.store import records
from tinsmith.store.database import Database

EXACT_SECONDS = 30.0  # clients beat every ten
FRESH_SECONDS, TRUSTED_SECONDS = 10.0, 60.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Heard:
    """An open session: when it was read and when it beat, by the clock; `seen_at` is its last noted sign of life."""

    owner: str
    seen_at: float
    read_at: float
    beat_at: float


class Presence:
    """The sessions that beat. Belongs to one event loop."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._writing: dict[str, asyncio.Task[None]] = {}
        self._checking: asyncio.Task[None] | None = None

    async def beat(self, session_id: str, owner: str) -> None:
        """Raises NotFoundError, or GoneError for a session that is over."""
        session, clock = self._heard.get(session_id), self._clock()
        age = clock - session.read_at if session else TRUSTED_SECONDS
        if session is None or session.owner != owner or age >= TRUSTED_SECONDS:
            session = await self._read(session_id, owner)
        elif age >= FRESH_SECONDS and self._checking is None:
            self._checking = asyncio.create_task(self._check())
        session.beat_at, now = clock, time.time()
        if now - session.seen_at >= EXACT_SECONDS and session_id not in self._writing:
            task = asyncio.create_task(self._write(session_id, owner, now))
            self._writing[session_id] = task
            task.add_done_callback(lambda _: self._writing.pop(session_id))

    def forget(self, session_id: str) -> None:
        """The session has ended, or was changed: its next heartbeat looks."""
        self._heard.pop(session_id, None)

    @property
    def known(self) -> int:
        """How many sessions are kept in memory."""
        return len(self._heard)

    async def _read(self, session_id: str, owner: str) -> _Heard:
        began = self._clock()
        record = await self._database.read_async(records.require_beating, session_id, owner)
        session = self._heard[session_id] = _Heard(record.owner, record.seen_at, began, began)
        return session

    async def _check(self) -> None:
        """Reads all that beat again; those that are not open any more are forgotten, as are those silent for long."""
        now = self._clock()
        self._heard = {key: session for key, session in self._heard.items() if now - session.beat_at < TRUSTED_SECONDS}
        asked = list(self._heard)
        try:
            seen = await self._database.read_async(records.signs_of_life, asked)
        except TinsmithError as error:  # a later beat may find the database again
            log.info("sessions could not be looked at: %s", error)
            return
        finally:
            self._checking = None
        for session_id in asked:
            session = self._heard.get(session_id)
            if session is None:
                continue
            if session_id not in seen:
                self.forget(session_id)
            else:
                session.seen_at, session.read_at = max(seen[session_id], session.seen_at), now

    async def _write(self, session_id: str, owner: str, now: float) -> None:
        try:
            await self._database.write_async(records.touch_session, session_id, owner, now)
        except TinsmithError as error:  # it has just ended, or the next beat may find the database again
            log.info("heartbeat of session %s not noted: %s", session_id, error)
            self.forget(session_id)
        else:
            if session := self._heard.get(session_id):
                session.seen_at = now
