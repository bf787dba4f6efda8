"""What operators see of the whole server at one moment, for `/metrics` and for `tinsmith status`.

An engine is another process, perhaps on another machine: it writes its numbers into its record with every heartbeat.
The numbers of one that has not been heard of for `SILENT_SECONDS` are shown to nobody: they would be taken for today's.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from tinsmith.api.auth import LOCAL_OWNER
from tinsmith.api.calls import Call
from tinsmith.errors import ForbiddenError
from tinsmith.served import Served
from tinsmith.store import overview, records
from tinsmith.store.overview import Failure, Pending
from tinsmith.wire.statistics import Statistics

SILENT_SECONDS = 20.0  # four heartbeats
STATES = ("starting", "loading", "ready", "silent", "stopped", "failed", "lost")
MOST_TENANTS = 50  # that are shown by name, those with the most jobs; the others are one
OTHERS = "other"


@dataclass(frozen=True, slots=True)
class EngineView:
    """One base model's engine. `state` is one of STATES; `statistics` are there only while it is ready."""

    model: str
    state: str
    progress: str = ""
    beat_seconds: float | None = None  # since it was last heard of
    starts: int = 0
    recoveries: int = 0
    statistics: Statistics | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Jobs of one tenant, model and kind that wait (`queued`) or are in an engine's hands (`running`)."""

    model: str
    state: str
    kind: str
    tenant: str
    jobs: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class Overview:
    """What there is of engines and jobs that have not ended."""

    engines: list[EngineView]
    waiting: list[Waiting]


def require_operator(call: Call) -> None:
    """Raises ForbiddenError unless the caller's key is an admin's, or the server takes any key.

    Where a request comes from counts nothing: behind a proxy, everybody is on this machine.
    """
    if not call.caller.is_admin and call.owner != LOCAL_OWNER:
        raise ForbiddenError("this is for operators: it takes an admin's key (tinsmith keys create NAME --admin)")


def read_overview(conn: sa.Connection, served: Sequence[Served]) -> Overview:
    """The overview of these models. Looks at each unfinished job once."""
    now, names = time.time(), {model.base: model.name for model in served}
    engines = [view_of(model, records.find_engine(conn, model.base), now) for model in served]
    pending = overview.pending(conn, list(names))
    return Overview(engines, by_tenant(pending, names, overview.names_of_owners(conn), now))


def read_failures(conn: sa.Connection, served: Sequence[Served], limit: int) -> list[dict[str, object]]:
    """The latest failures for people, newest first."""
    models = {model.base: model.name for model in served}
    names = overview.names_of_owners(conn)
    return [_shown(failure, models, names) for failure in overview.failures(conn, list(models), limit)]


def view_of(model: Served, engine: records.EngineRecord | None, now: float) -> EngineView:
    """What an engine's record is worth at `now`."""
    if engine is None:
        return EngineView(model.name, "starting", "the engine has not reported yet")
    age = max(0.0, now - engine.beat_at)
    is_silent = engine.state == "ready" and age > SILENT_SECONDS
    return EngineView(
        model=model.name,
        state="silent" if is_silent else engine.state,
        progress=f"nothing was heard of it for {age:.0f} s" if is_silent else engine.progress,
        beat_seconds=age,
        starts=engine.starts,
        recoveries=engine.recoveries,
        statistics=_statistics(engine) if engine.state == "ready" and not is_silent else None,
    )


def _statistics(engine: records.EngineRecord) -> Statistics | None:
    if engine.statistics is None:
        return None
    try:
        return Statistics.from_dict(engine.statistics)
    except (KeyError, TypeError, AttributeError):  # of another version, for as long as both run
        return None


def by_tenant(
    pending: Sequence[Pending], models: Mapping[str, str], names: Mapping[str, str], now: float
) -> list[Waiting]:
    """Adds up what owners have by their keys' names; those with the fewest jobs, beyond MOST_TENANTS, together."""
    totals: defaultdict[str, int] = defaultdict(int)
    for part in pending:
        totals[tenant_of(part.owner, names)] += part.jobs
    shown = set(sorted(totals, key=lambda tenant: (-totals[tenant], tenant))[:MOST_TENANTS])
    sums: dict[tuple[str, str, str, str], tuple[int, float]] = {}
    for part in pending:
        tenant = tenant_of(part.owner, names)
        key = (models[part.base], part.state, part.kind, tenant if tenant in shown else OTHERS)
        jobs, oldest = sums.get(key, (0, 0.0))
        sums[key] = jobs + part.jobs, max(oldest, now - part.oldest_at)
    return [Waiting(*key, jobs, oldest) for key, (jobs, oldest) in sorted(sums.items())]


def tenant_of(owner: str, names: Mapping[str, str]) -> str:
    """What operators call an owner: its key's name, `local` where no key is needed, else its beginning."""
    return names.get(owner, owner if owner == LOCAL_OWNER else f"key-{owner[:8]}")


def _shown(failure: Failure, models: Mapping[str, str], names: Mapping[str, str]) -> dict[str, object]:
    return {
        "at": failure.finished_at,
        "request": failure.request_id,
        "model": models[failure.base],
        "kind": failure.kind,
        "tenant": tenant_of(failure.owner, names),
        "category": failure.category,
        "error": failure.error,
        "trace": failure.trace,
    }
