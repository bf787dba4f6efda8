"""Hundreds of outstanding futures of many tenants, over HTTP: nothing fails, nobody is left out, heartbeats pass.

What is measured is no matter here, but for the last test's benchmark running at all.
"""

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from benchmarks import load
from benchmarks.load import Crowd, Seen
from tests.contract.api_fixtures import Api, running_api
from tinsmith.api.connections import connection_limit
from tinsmith.demo.local_server import LocalServer
from tinsmith.store.tables import sessions

pytestmark = pytest.mark.timeout(300)

OUTSTANDING, CROWD = 256, Crowd(tenants=8, samplers=24)  # the benchmark itself has eight times that


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("api"), poll_seconds=40.0) as api:
        yield api


async def hold_everything(api: Api) -> tuple[Seen, int, list[bool]]:
    """All requests at once while the engine stands still, beats of all sessions meanwhile, then their results."""
    seen = Seen()
    async with load.tenants_of(api.base_url, CROWD) as tenants:
        with api.engine.working:
            burst = asyncio.create_task(load.burst(tenants, OUTSTANDING, seen))
            while api.waiters.held < OUTSTANDING and not seen.errors:
                await asyncio.sleep(0.05)
            held = api.waiters.held
            await asyncio.gather(*(tenants.beat(session) for session in tenants.sessions))
        await burst
        asked = {header.subject for header, _ in api.engine.jobs}
    return seen, held, [subject in asked for subject in (*tenants.samplers, *tenants.models)]


@pytest.mark.skipif(connection_limit() < 2 * OUTSTANDING, reason="this process may not open enough connections")
def test_hundreds_of_futures_of_many_tenants_are_held_at_once_and_answered(api: Api) -> None:
    seen, held, served = asyncio.run(hold_everything(api))
    assert seen.errors == [] and seen.refused == 0
    assert held == OUTSTANDING
    assert len(seen.requests) == OUTSTANDING
    assert all(served)


def test_a_heartbeat_is_answered_while_another_process_writes_and_noted_afterwards(api: Api) -> None:
    session = api.session()
    api.database.write(age, session)
    path = str(Path(api.settings.effective_database_url.removeprefix("sqlite:///")))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    answered = [api.post("/session_heartbeat", session_id=session).status_code for _ in range(3)]
    other.execute("ROLLBACK")
    other.close()
    assert answered == [200] * 3
    while api.database.read(seen_at, session) < time.time() - 600:
        time.sleep(0.01)


def age(conn: sa.Connection, session: str) -> None:
    conn.execute(sa.update(sessions).where(sessions.c.id == session).values(seen_at=time.time() - 3600))


def seen_at(conn: sa.Connection, session: str) -> float:
    return conn.execute(sa.select(sessions.c.seen_at).where(sessions.c.id == session)).scalar_one()


@pytest.mark.xdist_group("server")
def test_the_benchmark_of_load_runs(server: LocalServer) -> None:
    rows = asyncio.run(load.measure(server, Crowd(tenants=4, samplers=10), [8.0], seconds=1.0, outstanding=48, flood=8))
    values = {row.name: row.value for row in rows}
    assert values["8 requests/s offered: errors"] == values["48 outstanding at once: errors"] == 0
    assert values["48 outstanding at once: memory of API and engine, peak"] > 0
    assert values["beside 8 times its load / alone: p50"] > 0
