"""What an engine tells of itself with every heartbeat, for whoever watches the server: counters and what it holds.

Counters begin at nothing with every engine and only grow. Plain numbers in JSON; no torch, no SQL.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
NUMBERS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)
TOKENS = (64.0, 256.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 65536.0)


@dataclass(slots=True)
class Distribution:
    """How many values were at most each of `bounds` (ascending), and above the one before. The last count: the rest."""

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def over(cls, bounds: Sequence[float]) -> Self:
        """An empty one."""
        return cls(tuple(bounds), [0] * (len(bounds) + 1))

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def to_dict(self) -> dict[str, Any]:
        return {"bounds": self.bounds, "counts": self.counts[:], "total": self.total}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`, also after a way through JSON."""
        return cls(tuple(values["bounds"]), list(values["counts"]), values["total"])


@dataclass(slots=True)
class Statistics:
    """One engine's numbers since it started. Written by one thread, and read by any."""

    jobs: dict[str, dict[str, int]] = field(default_factory=dict)
    """Jobs that ended, by kind, then by how: done, user (its error was the request's), server (the server's)."""
    seconds: dict[str, Distribution] = field(default_factory=dict)
    """From a job's acceptance to its end, by kind."""
    batch_requests: Distribution = field(default_factory=lambda: Distribution.over(NUMBERS))
    batch_tenants: Distribution = field(default_factory=lambda: Distribution.over(NUMBERS))
    batch_tokens: Distribution = field(default_factory=lambda: Distribution.over(TOKENS))
    """Of the batches of training: requests, different sessions, tokens."""
    sampling_requests: Distribution = field(default_factory=lambda: Distribution.over(NUMBERS))
    """Requests inside the sampler, at each of its steps."""
    tokens: dict[str, int] = field(default_factory=lambda: {"trained": 0, "forward": 0})
    """trained, forward (of requests without a gradient), prefilled, sampled."""
    events: dict[str, int] = field(default_factory=lambda: {"store_lost": 0, "not_written": 0})
    """What happened how often beside jobs: see docs/operations.md."""
    held: dict[str, int] = field(default_factory=dict)
    """What is there at this moment, and what can be there at most."""

    def to_dict(self) -> dict[str, Any]:
        """A copy for JSON; each part is copied at once, whatever another thread adds meanwhile."""
        return {
            "jobs": {kind: dict(ends) for kind, ends in self.jobs.copy().items()},
            "seconds": {kind: times.to_dict() for kind, times in self.seconds.copy().items()},
            "batch_requests": self.batch_requests.to_dict(),
            "batch_tenants": self.batch_tenants.to_dict(),
            "batch_tokens": self.batch_tokens.to_dict(),
            "sampling_requests": self.sampling_requests.to_dict(),
            "tokens": dict(self.tokens),
            "events": dict(self.events),
            "held": dict(self.held),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises KeyError or TypeError for what another version has written."""
        return cls(
            jobs=values["jobs"],
            seconds={kind: Distribution.from_dict(times) for kind, times in values["seconds"].items()},
            batch_requests=Distribution.from_dict(values["batch_requests"]),
            batch_tenants=Distribution.from_dict(values["batch_tenants"]),
            batch_tokens=Distribution.from_dict(values["batch_tokens"]),
            sampling_requests=Distribution.from_dict(values["sampling_requests"]),
            tokens=values["tokens"],
            events=values["events"],
            held=values["held"],
        )
