"""GET /metrics in Prometheus's format, and GET /status for `tinsmith status`: both for operators only.

What this process counts itself stands beside what the engines have written of themselves; when the database cannot be
asked, the former alone, and `tinsmith_database_up` says so.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.responses import Response

from tinsmith import __version__
from tinsmith.api.calls import Call, answer
from tinsmith.api.overview import STATES, EngineView, Overview, read_failures, read_overview, require_operator
from tinsmith.errors import TinsmithError
from tinsmith.wire.statistics import Distribution, Statistics

log = logging.getLogger(__name__)

_ASK_SECONDS = 5.0  # for the database; scrapers give up after ten
_FAILURES = 10

_HELD = {
    "models": ("models_resident", "Models on the device."),
    "models_most": ("models_resident_limit", "Models that may be on the device at once."),
    "snapshots": ("snapshots_resident", "Snapshots on the device, to sample from."),
    "snapshots_most": ("snapshots_resident_limit", "Snapshots that may be on the device at once."),
    "snapshot_bytes": ("snapshot_bytes", "Bytes of the snapshots on the device."),
    "samples_running": ("samples_running", "Sequences that are being sampled."),
    "samples_waiting": ("samples_waiting", "Sequences inside the sampler that wait for room."),
    "kv_tokens": ("kv_cache_tokens", "Tokens that the KV cache holds at most."),
    "kv_tokens_held": ("kv_cache_held_tokens", "Tokens of the KV cache in use by running sequences."),
    "kv_tokens_kept": ("kv_cache_kept_tokens", "Tokens of the KV cache kept for reuse; free for whoever needs them."),
}
_BATCHES = {
    "batch_requests": "Requests in one batch of training.",
    "batch_tenants": "Sessions in one batch of training.",
    "batch_tokens": "Tokens in one batch of training.",
    "sampling_requests": "Requests inside the sampler, at each of its steps.",
}


async def metrics(call: Call) -> Response:
    """GET /metrics."""
    require_operator(call)
    services = call.services
    overview = None
    try:
        async with asyncio.timeout(_ASK_SECONDS):
            overview = await services.database.read_async(read_overview, services.catalog.served)
    except (TinsmithError, TimeoutError) as error:
        log.warning("metrics without the engines' part: %s", error or "the database does not answer")
    encode, content_type = choose_encoder(call.request.headers.get("accept", ""))
    mine = encode(services.registry)
    others = CollectorRegistry(auto_describe=False)
    others.register(_Once(families(overview, services.settings.data_dir, services.waiters.held)))
    return Response(_joined(mine, encode(others)), media_type=None, headers={"content-type": content_type})


async def status(call: Call) -> Response:
    """GET /status."""
    require_operator(call)
    services = call.services
    overview = await services.database.read_async(read_overview, services.catalog.served)
    failures = await services.database.read_async(read_failures, services.catalog.served, _FAILURES)
    return answer(
        {
            "version": __version__,
            "at": time.time(),
            "engines": [_described(engine) for engine in overview.engines],
            "waiting": [
                {name: getattr(part, name) for name in ("model", "state", "kind", "tenant", "jobs", "oldest_seconds")}
                for part in overview.waiting
            ],
            "polls": services.waiters.held,
            "data_dir": str(services.settings.data_dir),
            "free_bytes": _free_bytes(services.settings.data_dir),
            "failures": failures,
        }
    )


def families(overview: Overview | None, data_dir: Path, polls: int) -> Iterator[Metric]:
    """Everything that is not counted by this process, as metric families."""
    yield _gauge("database_up", "Whether the database answers.", [({}, float(overview is not None))])
    yield _gauge("build_info", "The version that runs.", [({"version": __version__}, 1.0)])
    yield _gauge("data_dir_free_bytes", "Free room of the data folder's disk.", [({}, float(_free_bytes(data_dir)))])
    yield _gauge("results_waited_for", "Jobs whose results clients wait for at this moment.", [({}, float(polls))])
    if overview is None:
        return
    waiting = [({"model": p.model, "state": p.state, "kind": p.kind, "tenant": p.tenant}, p) for p in overview.waiting]
    help_text = "Jobs that wait (queued) or are in an engine's hands (running)."
    yield _gauge("queue_jobs", help_text, [(labels, float(part.jobs)) for labels, part in waiting])
    help_text = "Seconds since the oldest of these jobs was accepted."
    yield _gauge("queue_oldest_seconds", help_text, [(labels, part.oldest_seconds) for labels, part in waiting])
    yield from _engine_families(overview.engines)
    told = [(engine.model, engine.statistics) for engine in overview.engines if engine.statistics is not None]
    yield from _counter_families(told)
    yield from _holding_families(told)


def _engine_families(engines: Iterable[EngineView]) -> Iterator[Metric]:
    engines = list(engines)
    states = [({"model": e.model, "state": state}, float(e.state == state)) for e in engines for state in STATES]
    yield _gauge("engine_state", "1 for the state that the engine is in, 0 for the others.", states)
    beats = [({"model": e.model}, e.beat_seconds) for e in engines if e.beat_seconds is not None]
    yield _gauge("engine_beat_age_seconds", "Seconds since the engine was last heard of.", beats)
    for name, help_text in (
        ("starts", "Starts of the engine."),
        ("recoveries", "Starts after an engine that had not stopped in order."),
    ):
        yield _counter(f"engine_{name}", help_text, [({"model": e.model}, getattr(e, name)) for e in engines])


def _counter_families(told: list[tuple[str, Statistics]]) -> Iterator[Metric]:
    jobs = [
        ({"model": model, "kind": kind, "outcome": outcome}, count)
        for model, numbers in told
        for kind, ends in numbers.jobs.items()
        for outcome, count in ends.items()
    ]
    yield _counter("jobs_ended", "Jobs that ended: done, or failed by the user's or the server's fault.", jobs)
    for name, help_text in (
        ("tokens", "Tokens trained, forward (without gradient), prefilled, sampled."),
        ("events", "What happened in the engine beside jobs."),
    ):
        counts = [({"model": m, "what": what}, count) for m, s in told for what, count in getattr(s, name).items()]
        yield _counter(f"engine_{name}", help_text, counts)
    seconds = [({"model": model, "kind": kind}, times) for model, s in told for kind, times in s.seconds.items()]
    yield _histogram("job_seconds", "Seconds from a job's acceptance to its end.", ["model", "kind"], seconds)
    for name, help_text in _BATCHES.items():
        yield _histogram(name, help_text, ["model"], [({"model": model}, getattr(s, name)) for model, s in told])


def _holding_families(told: list[tuple[str, Statistics]]) -> Iterator[Metric]:
    for key, (name, help_text) in _HELD.items():
        yield _gauge(name, help_text, [({"model": model}, float(s.held[key])) for model, s in told if key in s.held])


def _gauge(name: str, help_text: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> Metric:
    family = GaugeMetricFamily(f"tinsmith_{name}", help_text)
    for labels, value in samples:
        family.add_sample(family.name, dict(labels), value)
    return family


def _counter(name: str, help_text: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> Metric:
    family = CounterMetricFamily(f"tinsmith_{name}", help_text)
    for labels, value in samples:
        family.add_sample(f"{family.name}_total", dict(labels), value)
    return family


def _histogram(
    name: str, help_text: str, labels: list[str], samples: Iterable[tuple[Mapping[str, str], Distribution]]
) -> Metric:
    family = HistogramMetricFamily(f"tinsmith_{name}", help_text, labels=labels)
    for values, distribution in samples:
        below, buckets = 0, []
        for bound, count in zip((*distribution.bounds, float("inf")), distribution.counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(below)))
        family.add_metric([values[label] for label in labels], buckets, distribution.total)
    return family


class _Once(Collector):
    """Families that were made beforehand."""

    def __init__(self, made: Iterable[Metric]) -> None:
        self._made = list(made)

    def collect(self) -> Iterable[Metric]:
        return self._made


def _joined(first: bytes, second: bytes) -> bytes:
    """Two answers as one; in OpenMetrics each ends with a line that must be the last."""
    return first.removesuffix(b"# EOF\n") + second


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _described(engine: EngineView) -> dict[str, object]:
    numbers = engine.statistics
    return {
        "model": engine.model,
        "state": engine.state,
        "progress": engine.progress,
        "beat_seconds": engine.beat_seconds,
        "starts": engine.starts,
        "recoveries": engine.recoveries,
        "tokens": numbers.tokens if numbers else None,
        "jobs": numbers.jobs if numbers else None,
        "held": numbers.held if numbers else None,
        "events": numbers.events if numbers else None,
    }
