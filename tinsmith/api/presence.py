"""Heartbeats: answered from what is known, and noted behind the clients' backs.

A heartbeat that waited for its turn to write would be late when the server is busy, which is when clients worry. Nobody
asks for a session's last sign of life more exactly than to the half minute.
"""

import asyncio
import logging
import time

from tinsmith.errors import TinsmithError
from tinsmith.store import records
from tinsmith.store.database import Database

EXACT_SECONDS = 30.0  # clients beat every ten

log = logging.getLogger(__name__)


class Presence:
    """Which sessions' signs of life are being written. Belongs to one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._writing: dict[str, asyncio.Task[None]] = {}

    async def beat(self, session_id: str, owner: str) -> None:
        """Raises NotFoundError, or GoneError for a session that is over."""
        session = await self._database.read_async(records.require_beating, session_id, owner)
        now = time.time()
        if now - session.seen_at >= EXACT_SECONDS and session_id not in self._writing:
            task = asyncio.create_task(self._write(session_id, owner, now))
            self._writing[session_id] = task
            task.add_done_callback(lambda _: self._writing.pop(session_id))

    async def _write(self, session_id: str, owner: str, now: float) -> None:
        try:
            await self._database.write_async(records.touch_session, session_id, owner, now)
        except TinsmithError as error:  # it has just ended, or the next beat may find the database again
            log.info("heartbeat of session %s not noted: %s", session_id, error)
