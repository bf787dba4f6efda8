"""What an engine lets others see of its work: numbers for its heartbeat, and a log line when work begins and ends.

Told by the loop; changes nothing. Costs a job some microseconds. Knows headers and outcomes, not what is in them.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

from tinsmith.engine.residency import Residency
from tinsmith.observe import REQUESTS, note
from tinsmith.protocols import Sampler
from tinsmith.wire.jobs import Header, Outcome
from tinsmith.wire.statistics import SECONDS, Distribution, Statistics


class Watch:
    """One engine's numbers, and the lines that it writes about its jobs. Told by the engine's thread alone."""

    def __init__(self, sampler: Sampler, residency: Residency) -> None:
        self._sampler = sampler
        self._residency = residency
        self._numbers = Statistics()

    def begin(self, headers: Sequence[Header]) -> None:
        """Jobs are about to run together: a batch of training, one operation, or samples that enter the sampler."""
        kind, numbers = headers[0].kind, self._numbers
        if not headers[0].is_barrier:
            numbers.batch_requests.add(len(headers))
            numbers.batch_tenants.add(len({header.session_id for header in headers}))
            numbers.batch_tokens.add(sum(header.tokens for header in headers))
        if REQUESTS.isEnabledFor(logging.INFO):
            traces = [header.trace for header in headers if header.trace]
            note(REQUESTS, logging.INFO, "running", kind=kind, requests=len(headers), traces=traces)

    def step(self, requests: int) -> None:
        """The sampler is about to take a step with so many requests."""
        self._numbers.sampling_requests.add(requests)

    def end(self, header: Header, outcome: Outcome | None) -> None:
        """A job has ended: well if there is no outcome, or one without an error."""
        category = None if outcome is None else outcome.category
        kind, numbers = header.kind, self._numbers
        if kind not in numbers.jobs:
            numbers.jobs[kind] = {"done": 0, "user": 0, "server": 0}
            numbers.seconds[kind] = Distribution.over(SECONDS)
        numbers.jobs[kind][category or "done"] += 1
        seconds = max(0.0, time.time() - header.created_at)
        numbers.seconds[kind].add(seconds)
        if category is None and not header.is_barrier:
            numbers.tokens["forward" if kind == "forward" else "trained"] += header.tokens
        level = logging.WARNING if category == "server" else logging.INFO
        if REQUESTS.isEnabledFor(level):
            _note_end(level, header, seconds, outcome)

    def count(self, event: str) -> None:
        """Something happened that is not the end of a job."""
        self._numbers.events[event] = self._numbers.events.get(event, 0) + 1

    def report(self) -> dict[str, Any]:
        """All numbers, with those of sampler and residency, as `Statistics.from_dict` reads them; from any thread."""
        usage = self._sampler.usage()
        report = self._numbers.to_dict()
        report["events"] |= self._residency.events() | {"preempted": usage.preempted}
        report["tokens"] |= {"prefilled": usage.prefilled, "sampled": usage.sampled}
        report["held"] = self._residency.held() | {
            "snapshot_bytes": usage.snapshot_bytes,
            "samples_running": usage.running,
            "samples_waiting": usage.waiting,
            "kv_tokens": usage.kv_tokens,
            "kv_tokens_held": usage.kv_tokens_held,
            "kv_tokens_kept": usage.kv_tokens_kept,
        }
        return report


def _note_end(level: int, header: Header, seconds: float, outcome: Outcome | None) -> None:
    fields: dict[str, object] = {
        "trace": header.trace,
        "request": header.request_id,
        "kind": header.kind,
        "tokens": header.tokens,
        "seconds": round(seconds, 4),
    }
    if outcome is None or outcome.error is None:
        note(REQUESTS, level, "done", **fields)
    else:
        note(REQUESTS, level, "failed", **fields, category=outcome.category, error=outcome.error)
