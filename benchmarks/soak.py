"""Scripts that learn while the server's processes are killed, and what they notice of it.

    python -m benchmarks.soak [--kills N] [--postgres-kills N] [--seconds S] [--seed N] [--deterministic]

Tenants run supervised and RL-like loops with the unmodified SDK; meanwhile the engine, the API, the supervisor or all
of them meet kill -9 at seeded moments, some of them while they recover from the last; Postgres (a server of its own,
thrown away afterwards) is restarted at once, too. In the end every script must have finished, every job have ended, and
no result have changed after it was there. With --deterministic the scripts run once more on a server that nobody hurts:
every answer, and the final weights and optimizer states, must be the same bits.

On a quiet machine of two cores 200 blows take about half an hour. --seconds bounds the blows on each database; what was
reached by then is checked and recorded like everything else.
"""

import argparse
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.recording import Row, record
from benchmarks.soak_blows import HANGING, ROLES, Blow, Striker, job_states, recoveries
from benchmarks.soak_scripts import Tenant, final_files, free_port, run_tenants
from tests.throwaway_postgres import throwaway_postgres
from tinsmith.demo.local_server import CLIENT_ENVIRONMENT, LocalServer
from tinsmith.store.database import Database

POSTGRES_ROLES = ("database", *ROLES)


@dataclass(frozen=True)
class Soak:
    """What a run showed; `problems` is empty if nothing was lost."""

    blows: list[Blow]
    requests: int
    recovered: list[float]
    problems: list[str]


def soak(
    folder: Path,
    *,
    kills: int,
    seconds: float = 86400.0,
    seed: int = 0,
    ranks: Sequence[int] = (8, 16, 0),
    roles: Sequence[str] = ROLES,
    deterministic: bool = False,
    database_url: str = "",
    restart_database: Callable[[], None] = lambda: None,
) -> Soak:
    """One tenant for each of `ranks` (0: all weights), every second an RL-like one; `roles` are hit in turn.

    Blows end after `kills` of them, or after `seconds`. Works in the empty `folder`.
    """
    arguments = ["--threads", "1", *(["--deterministic"] if deterministic else [])]
    database_url = database_url or f"sqlite:///{folder}/data/tinsmith.db"
    enough = threading.Event()
    tenants = [Tenant(f"tenant {n}", rank, n % 2 == 1, enough) for n, rank in enumerate(ranks)]
    own = ["--port", str(free_port()), "--database-url", database_url]
    with LocalServer(folder / "data", folder / "log.txt", [*arguments, *own]) as server:
        database = Database(database_url)
        began = time.monotonic()
        threads = run_tenants(tenants, server.base_url)
        striker = Striker(server, database, tenants, seed, roles, restart_database)
        problems = _strike(striker, kills, began + seconds)
        enough.set()
        problems += _wait(threads, tenants, HANGING)
        striker.compare_results()
        problems += [f"the result of job {number} changed" for number in sorted(striker.changed)]
        states = database.read(job_states)
        problems += [f"{states[state]} jobs {state}" for state in states if state != "done"]
        answers = [at for tenant in tenants for at, _ in tenant.answers]
        recovered = database.read(recoveries, striker.blows, answers)
        database.close()
    if deterministic and not problems:
        problems += differences(folder, tenants, arguments, HANGING + time.monotonic() - began)
    return Soak(striker.blows, sum(states.values()), recovered, problems)


def _strike(striker: Striker, kills: int, until: float) -> list[str]:
    """The blows; what ended them too early."""
    try:
        striker.run(kills, until)
    except RuntimeError as error:
        return [f"the server did not come back: {error}"]
    enough = len(striker.blows) >= kills or time.monotonic() >= until
    return [] if enough else [f"{len(striker.blows)} of {kills} blows: a script ended, or heard nothing any more"]


def differences(folder: Path, tenants: Sequence[Tenant], arguments: Sequence[str], seconds: float) -> list[str]:
    """What the same scripts get on a server that nobody hurts, where it is not the same."""
    calm = [Tenant(t.name, t.rank, t.policy, t.enough, steps=t.done) for t in tenants]
    with LocalServer(folder / "calm", folder / "calm.txt", arguments) as server:
        problems = _wait(run_tenants(calm, server.base_url), calm, seconds)
    for hurt, quiet in zip(tenants, calm, strict=True):
        if [digest for _, digest in hurt.answers] != [digest for _, digest in quiet.answers]:
            problems.append(f"{hurt.name}: some answer has other bits")
        elif not problems and final_files(folder / "data", hurt) != final_files(folder / "calm", quiet):
            problems.append(f"{hurt.name}: the final weights or optimizer state have other bits")
    return problems


def _wait(threads: Sequence[threading.Thread], tenants: Sequence[Tenant], seconds: float) -> list[str]:
    """What went wrong in the scripts."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    problems = [f"{tenant.name} failed: {tenant.error!r}" for tenant in tenants if tenant.error]
    return problems + [f"{tenant.name} hangs" for tenant in tenants if not (tenant.error or tenant.final)]


def rows_of(name: str, run: Soak) -> Iterable[Row]:
    """What a run on the database `name` showed, in numbers."""
    hit = Counter(" ".join(["kills:", blow.role, blow.during]).strip() for blow in run.blows)
    yield Row(f"{name}: kills and restarts", len(run.blows), "")
    yield from (Row(f"{name}: {kind}", count, "") for kind, count in sorted(hit.items()))
    yield Row(f"{name}: requests answered", run.requests, "")
    yield Row(f"{name}: problems (scripts, jobs or bits)", len(run.problems), "", goal="0")
    if run.recovered:
        yield Row(f"{name}: from a kill to the next answer, median", round(median(run.recovered), 1), "s")
        yield Row(f"{name}: from a kill to the next answer, max", round(max(run.recovered), 1), "s")


def run_sqlite(folder: Path, options: argparse.Namespace) -> Soak:
    """The blows on a server with its database in the data folder."""
    return soak(
        folder, kills=options.kills, seconds=options.seconds, seed=options.seed, deterministic=options.deterministic
    )


def run_postgres(folder: Path, options: argparse.Namespace) -> Soak:
    """The blows on a server with a Postgres of its own. Raises RuntimeError if that is not installed."""
    with throwaway_postgres() as postgres:
        if postgres is None:
            raise RuntimeError("there is no Postgres on this machine: initdb and pg_ctl were not found")
        with postgres.database() as url:
            return soak(
                folder,
                kills=options.postgres_kills,
                seconds=options.seconds,
                seed=options.seed,
                deterministic=options.deterministic,
                roles=POSTGRES_ROLES,
                database_url=url,
                restart_database=postgres.restart,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--postgres-kills", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=86400.0, help="of blows, on each database")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, which stays")
    options = parser.parse_args()
    os.environ.update({**CLIENT_ENVIRONMENT, "TINKER_TELEMETRY": "0"})
    runs: dict[str, Soak] = {}
    wanted = [("SQLite", run_sqlite, options.kills), ("Postgres", run_postgres, options.postgres_kills)]
    with tempfile.TemporaryDirectory() as temporary:
        for name, run, kills in wanted:
            if kills:
                folder = (options.keep or Path(temporary)).absolute() / name
                folder.mkdir(parents=True)
                runs[name] = run(folder, options)
                record("soak", [row for name, done in runs.items() for row in rows_of(name, done)])
                print(*runs[name].problems, sep="\n")
    raise SystemExit(any(run.problems for run in runs.values()))


if __name__ == "__main__":
    main()
