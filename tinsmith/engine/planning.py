"""What runs next: pure functions from what is waiting to what to do. Knows no clock, no database, no tensors.

A model's operations run strictly in order of seq. Forward and forward_backward requests of all models, whatever their
adapters, ranks and losses, share a batch; every other operation is a barrier of its own model and of no other.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tinsmith.wire.jobs import Header

TRIALS = 8  # runs at most, in which the suspects of an engine's death are tried again
BATCHED = frozenset({"forward", "forward_backward"})


@dataclass(frozen=True, slots=True)
class Plan:
    """`barriers` run one after the other (at most one per model), `batch` as one call to the trainer."""

    barriers: tuple[Header, ...] = ()
    batch: tuple[Header, ...] = ()


def runnable(waiting: Mapping[int, Header], next_seq: int) -> Iterator[Header]:
    """A model's jobs from `next_seq` on, up to the first one that has not arrived."""
    while (header := waiting.get(next_seq)) is not None:
        yield header
        next_seq += 1


def plan(
    waiting: Mapping[str, Mapping[int, Header]],
    next_seq: Mapping[str, int],
    served: Mapping[str, float],
    *,
    budget: int,
    max_models: int,
) -> Plan:
    """The next slice of training work.

    `waiting` maps model → seq → job, `next_seq` says where each model stands, and `served` how many tokens each has
    had: whoever had least comes first (start-time fair queueing), so that a small tenant waits at most one batch
    behind a large one. The batch holds at least one request, and further ones while they fit `budget` tokens and
    belong to at most `max_models` models.
    """
    barriers: list[Header] = []
    lanes: list[tuple[float, int, Header, Iterator[Header]]] = []
    for model_id, jobs in waiting.items():
        lane = runnable(jobs, next_seq[model_id])
        head = next(lane, None)
        if head is None:
            continue
        if head.kind in BATCHED:
            lanes.append((served.get(model_id, 0.0), head.number, head, lane))
        else:
            barriers.append(head)
    barriers.sort(key=lambda header: header.number)
    return Plan(tuple(barriers), tuple(_fill(lanes, budget, max_models)))


def _fill(lanes: list[tuple[float, int, Header, Iterator[Header]]], budget: int, max_models: int) -> list[Header]:
    heapq.heapify(lanes)
    batch: list[Header] = []
    models: set[str] = set()
    used = 0
    while lanes:
        had, _, head, lane = heapq.heappop(lanes)
        crowded = head.subject not in models and len(models) == max_models
        if batch and (crowded or used + head.tokens > budget):
            continue
        batch.append(head)
        models.add(head.subject)
        used += head.tokens
        following = next(lane, None)
        if following is not None and following.kind in BATCHED:
            heapq.heappush(lanes, (had + head.tokens, following.number, following, lane))
    return batch


def apart(batch: Sequence[Header], suspects: Mapping[int, int]) -> tuple[Header, ...]:
    """What of `batch` may run together now: suspects of an engine's death (number → how many) without anybody else.

    Those that have seen most deaths come first, one by one; more than TRIALS of them in that many groups. No job comes
    before another one of its subject that stands before it.
    """
    if not any(header.number in suspects for header in batch):
        return tuple(batch)
    heads = {header.subject: suspects.get(header.number, 0) for header in reversed(batch)}
    worst = max(heads.values())
    alike = sum(deaths == worst for deaths in suspects.values())
    limit = -(-alike // TRIALS) if worst else len(batch)
    chosen: list[Header] = []
    passed: set[str] = set()
    for header in batch:
        fits = len(chosen) < limit and suspects.get(header.number, 0) == worst
        if fits and header.subject not in passed:
            chosen.append(header)
        else:
            passed.add(header.subject)
    return tuple(chosen)


def gaps(waiting: Mapping[str, Mapping[int, Header]], next_seq: Mapping[str, int]) -> list[str]:
    """Models whose next operation has not arrived although later ones have."""
    return [model_id for model_id, jobs in waiting.items() if jobs and next_seq[model_id] not in jobs]


def rejoin(model_id: str, served: Mapping[str, float], active: Iterable[str]) -> float:
    """What a model that comes (back) is taken to have had: its own count, or as little as anybody active if more.

    Otherwise it would be owed everything that others were served while it was away.
    """
    least = min((served[other] for other in active if other != model_id), default=0.0)
    return max(served.get(model_id, 0.0), least)
