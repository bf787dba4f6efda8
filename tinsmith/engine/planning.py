"""What runs next: pure functions from what is waiting to what to do. Knows no clock, no database, no tensors.

A model's operations run strictly in order of seq. Forward and forward_backward requests of all models, whatever their
adapters, ranks and losses, share a batch; every other operation is a barrier of its own model and of no other.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tinsmith.engine.shares import Shares, cost
from tinsmith.wire.jobs import Header

TRIALS = 8  # runs at most, in which the suspects of an engine's death are tried again

Lane = tuple[float, int, Header, Iterator[Header]]
"""What a model has had, its next job's number, that job, and the jobs behind it."""


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
    shares: Shares,
    *,
    budget: int,
    max_models: int,
) -> Plan:
    """The next slice of training work.

    `waiting` maps model → seq → job, and `next_seq` says where each model stands. The owner that has had least of its
    share comes first, and of its models the one that has had least: so a small tenant waits at most one slice behind a
    large one, however many models or requests that has. Barriers and batch cost at most `budget` tokens each, but hold
    at least one job if there is any; a batch belongs to at most `max_models` models.
    """
    barriers: dict[str, list[Lane]] = {}
    batched: dict[str, list[Lane]] = {}
    for model_id, jobs in waiting.items():
        lane = runnable(jobs, next_seq[model_id])
        head = next(lane, None)
        if head is not None:
            lanes = barriers if head.is_barrier else batched
            entry = (shares.of_model(head.owner, model_id), head.number, head, lane)
            lanes.setdefault(head.owner, []).append(entry)
    return Plan(
        tuple(_fill(barriers, shares, budget, len(waiting), one_each=True)),
        tuple(_fill(batched, shares, budget, max_models)),
    )


def _fill(
    lanes: dict[str, list[Lane]], shares: Shares, budget: int, max_models: int, *, one_each: bool = False
) -> list[Header]:
    """Always the next job of the owner, and of its model, that has had least; what does not fit ends its lane.

    Others fill the room that it leaves, if they are no more than a budget ahead of its owner: else small jobs would
    always find room beside large ones, and get more than their share.
    """
    for own in lanes.values():
        heapq.heapify(own)
    owners = [(shares.of_owner(owner), own[0][1], owner) for owner, own in lanes.items()]
    heapq.heapify(owners)
    batch: list[Header] = []
    models: set[str] = set()
    used, left_out = 0, math.inf
    while owners:
        owner_had, _, owner = heapq.heappop(owners)
        if owner_had > left_out + budget / shares.weight(owner):
            continue
        own = lanes[owner]
        had, _, head, lane = heapq.heappop(own)
        crowded = head.subject not in models and len(models) == max_models
        if batch and (crowded or used + cost(head) > budget):
            left_out = min(left_out, owner_had)
        else:
            batch.append(head)
            models.add(head.subject)
            used += cost(head)
            owner_had += cost(head) / shares.weight(owner)
            following = None if one_each else next(lane, None)
            if following is not None and not following.is_barrier:
                heapq.heappush(own, (had + cost(head), following.number, following, lane))
        if own:
            heapq.heappush(owners, (owner_had, own[0][1], owner))
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
