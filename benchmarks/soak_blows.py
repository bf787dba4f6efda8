"""What the soak does to a server: kill -9 of its processes and restarts of its database, at seeded moments.

A request or a model that two engines in a row died of is taken for the cause and given up, so nothing is hit twice in a
row at the same work: the engine is halted, its own note read, and it is let go on if the blow would be unfair.
"""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil
import sqlalchemy as sa

from benchmarks.soak_scripts import Tenant
from tinsmith.demo.local_server import LocalServer
from tinsmith.engine.trials import PULSE, going_on
from tinsmith.store.database import Database
from tinsmith.store.tables import engines, jobs, results
from tinsmith.supervisor import MAX_CRASHES

ROLES = ("engine", "api", "tree", "engine", "server", "api")
"""What is hit in turn: one process (`server` is the supervisor), all at once (`tree`), or the `database`."""

ANSWERS = 2  # for every tenant, before the next blow that is not one at a recovery
HANGING = 180.0  # seconds without an answer
PAUSE = 1.0  # seconds at most, from the answers to the blow
AGAIN = 0.5  # how likely it is that a recovery of the engine meets another blow
LOADING = 5.0  # seconds: from a death to the blow at an engine that starts


@dataclass(frozen=True)
class Blow:
    """What it hit, and when (seconds since the epoch)."""

    role: str
    at: float
    during: str = ""  # loading or restoring, if it met a recovery


class Striker:
    """Hits `server` in time for every tenant to get on in between, and now and then in the middle of a recovery."""

    def __init__(
        self,
        server: LocalServer,
        database: Database,
        tenants: Sequence[Tenant],
        seed: int,
        roles: Sequence[str],
        restart_database: Callable[[], None],
    ) -> None:
        self.blows: list[Blow] = []
        self.changed: set[int] = set()  # jobs whose result became another one
        self._server = server
        self._database = database
        self._tenants = tenants
        self._random = random.Random(seed)
        self._roles = roles
        self._restart_database = restart_database
        self._turn = 0
        self._hurt: frozenset[int | str] = frozenset()  # what went on when an engine was killed, and may not be over
        self._results: dict[int, str] = {}

    def run(self, count: int, until: float) -> None:
        """`count` blows, or as many as there is time for `until` then (monotonic). Ends when a script has failed."""
        while len(self.blows) < count and time.monotonic() < until and self._progress():
            self._hurt = frozenset(one for one in self._hurt if isinstance(one, int))  # every model is back
            time.sleep(self._random.uniform(0.0, PAUSE))
            self.compare_results()
            role = self._roles[self._turn % len(self._roles)]
            self._turn += 1
            self._strike(role)
            if role == "engine" and len(self.blows) < count and self._random.random() < AGAIN:
                self._strike_again()

    def compare_results(self) -> None:
        """Notes which answers have changed since they were seen last."""
        now = self._database.read(result_digests)
        self.changed |= {number for number, digest in self._results.items() if now.get(number, digest) != digest}
        self._results |= now

    def _progress(self) -> bool:
        """Waits until every tenant has got some answers behind the last blow; false if a script is over or hangs."""
        deadline = time.monotonic() + HANGING
        since = self.blows[-1].at if self.blows else 0.0
        while any(sum(at > since for at, _ in tenant.answers) < ANSWERS for tenant in self._tenants):
            if time.monotonic() > deadline or any(tenant.error or tenant.final for tenant in self._tenants):
                return False
            time.sleep(0.05)
        return True

    def _strike(self, role: str, during: str = "") -> None:
        role = self._bearable(role)
        if role == "database":
            self._note(role, during)
            self._restart_database()
            return
        processes = self._server.processes()
        if role in ("engine", "tree") and "engine" in processes and not self._halt(processes["engine"], during):
            return
        hit = list(processes.values()) if role == "tree" else [processes[role]] if role in processes else []
        if not hit:
            return
        for process in hit:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._note(role, during)
        psutil.wait_procs(hit, 30)
        if role in ("tree", "server"):
            self._server.stop()  # takes note of its end
            self._server.start()

    def _strike_again(self) -> None:
        """The engine once more, while it loads its model, or while it brings a tenant's model back."""
        during = self._random.choice(["loading", "restoring"])
        if during == "loading":
            time.sleep(self._random.uniform(0.0, LOADING))
        while "engine" not in self._server.processes() and not self._was_answered():
            time.sleep(0.02)
        self._strike("engine", during)

    def _note(self, role: str, during: str) -> None:
        self.blows.append(Blow(role, time.time(), during))
        print(f"{len(self.blows):4} {role} {during}".rstrip(), flush=True)

    def _halt(self, engine: psutil.Process, during: str) -> bool:
        """Stops the engine in the middle of something that may be hit; false if nothing of the kind came."""
        deadline = time.monotonic() + HANGING
        with suppress(psutil.NoSuchProcess):
            while time.monotonic() < deadline and not (during and self._was_answered()):
                if self._may_hit(engine, during):
                    engine.suspend()
                    while engine.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                        time.sleep(0.001)
                    if self._may_hit(engine, during):
                        self._hurt |= self._going_on()
                        return True
                    engine.resume()
                time.sleep(0.002)
        return False

    def _may_hit(self, engine: psutil.Process, during: str) -> bool:
        """Whether the engine does something now that it was not killed over before, and what is wanted."""
        if during == "loading":
            return engine.pid in self._database.read(loading_engines)
        current = self._going_on()
        wanted = during != "restoring" or any(isinstance(one, str) for one in current)
        return wanted and not current & self._hurt

    def _was_answered(self) -> bool:
        """Whether a tenant has heard of anything since the last blow."""
        return any(tenant.answers and tenant.answers[-1][0] > self.blows[-1].at for tenant in self._tenants)

    def _going_on(self) -> frozenset[int | str]:
        """Numbers of the jobs that the engine runs, or the id of the model that it brings back."""
        return frozenset().union(*(going_on(pulse.parent.parent) for pulse in self._server.data_dir.rglob(PULSE)))

    def _bearable(self, role: str) -> str:
        """`role`, or everything where the supervisor would take one more crash of it for a reason to give up."""
        crashes = 0
        for blow in reversed(self.blows):
            if blow.role in ("tree", "server"):
                break
            crashes += blow.role == role
        return "tree" if role != "database" and crashes >= MAX_CRASHES else role


def result_digests(conn: sa.Connection) -> dict[int, str]:
    """Every result that there is, by its job's number."""
    rows = conn.execute(sa.select(results.c.number, results.c.body))
    return {number: hashlib.sha256(body).hexdigest() for number, body in rows}


def loading_engines(conn: sa.Connection) -> set[int]:
    """The processes that say that they are loading their model."""
    return set(conn.scalars(sa.select(engines.c.pid).where(engines.c.state == "loading")))


def job_states(conn: sa.Connection) -> dict[str, int]:
    """How many jobs are in each state."""
    return Counter(conn.scalars(sa.select(jobs.c.state)))


def recoveries(conn: sa.Connection, blows: Sequence[Blow], answers: Sequence[float]) -> list[float]:
    """Seconds from each blow to the next answer: made by an engine, and received by a client, after it.

    A blow that another one followed before that counts from there on, too.
    """
    ended = sorted(at for at in conn.scalars(sa.select(jobs.c.finished_at)) if at is not None)
    found = []
    for blow in blows:
        after = [next((at for at in sorted(times) if at > blow.at), blow.at) for times in (ended, answers)]
        found.append(max(after) - blow.at)
    return found
