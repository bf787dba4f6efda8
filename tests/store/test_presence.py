"""Heartbeats on a real database: what is answered from memory, for how long, and what another process changes."""

import asyncio
import time

import pytest
import sqlalchemy as sa

from tests.store import makers
from tinsmith.api.presence import EXACT_SECONDS, FRESH_SECONDS, TRUSTED_SECONDS, Presence
from tinsmith.errors import GoneError, NotFoundError
from tinsmith.store import records
from tinsmith.store.database import Database
from tinsmith.store.tables import sessions


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def create(database: Database, session_id: str = "s") -> None:
    database.write(records.create_session, makers.session(session_id, created_at=time.time()))


def remove(conn: sa.Connection) -> None:
    conn.execute(sa.delete(sessions))


async def settle() -> None:
    """Returns when what the last heartbeats have begun is over."""
    await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))


def test_a_session_that_is_known_beats_without_the_database_for_a_minute(database: Database) -> None:
    create(database)

    async def run() -> None:
        clock = Clock()
        heart = Presence(database, clock)
        await heart.beat("s", "alice")
        database.write(remove)
        clock.now += FRESH_SECONDS - 1
        await heart.beat("s", "alice")
        clock.now += TRUSTED_SECONDS
        with pytest.raises(NotFoundError):
            await heart.beat("s", "alice")

    asyncio.run(run())


def test_a_session_that_another_process_ends_hears_of_it_with_its_next_beat_but_one(database: Database) -> None:
    create(database)
    create(database, "other")

    async def run() -> None:
        clock = Clock()
        heart = Presence(database, clock)
        for session_id in ("s", "other"):
            await heart.beat(session_id, "alice")
        database.write(records.finish_session, "s", "alice", "done")
        clock.now += FRESH_SECONDS
        await heart.beat("s", "alice")
        await settle()
        with pytest.raises(GoneError):
            await heart.beat("s", "alice")
        await heart.beat("other", "alice")

    asyncio.run(run())


def test_a_session_that_this_process_ends_hears_of_it_at_once(database: Database) -> None:
    create(database)

    async def run() -> None:
        heart = Presence(database)
        await heart.beat("s", "alice")
        database.write(records.finish_session, "s", "alice", "done")
        heart.forget("s")
        with pytest.raises(GoneError):
            await heart.beat("s", "alice")

    asyncio.run(run())


def test_nobody_beats_for_somebody_elses_session(database: Database) -> None:
    create(database)

    async def run() -> None:
        heart = Presence(database)
        await heart.beat("s", "alice")
        with pytest.raises(NotFoundError):
            await heart.beat("s", "ben")

    asyncio.run(run())


def test_beats_are_noted_to_the_half_minute_also_of_sessions_in_memory(database: Database) -> None:
    create(database)
    old = time.time() - 2 * EXACT_SECONDS
    database.write(lambda conn: conn.execute(sa.update(sessions).values(seen_at=old)))

    async def run() -> None:
        heart = Presence(database)
        await heart.beat("s", "alice")
        await settle()
        noted = database.read(records.signs_of_life, ["s"])["s"]
        assert noted > old + EXACT_SECONDS
        await heart.beat("s", "alice")
        await settle()
        assert database.read(records.signs_of_life, ["s"]) == {"s": noted}

    asyncio.run(run())


def test_sessions_that_have_stopped_beating_are_not_kept_in_memory(database: Database) -> None:
    for session_id in ("s", "other"):
        create(database, session_id)

    async def run() -> None:
        clock = Clock()
        heart = Presence(database, clock)
        await heart.beat("other", "alice")
        for _ in range(int(TRUSTED_SECONDS // FRESH_SECONDS) + 1):
            clock.now += FRESH_SECONDS
            await heart.beat("s", "alice")
            await settle()
        assert heart.known == 1

    asyncio.run(run())
