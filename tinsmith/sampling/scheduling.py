"""Who runs in the next step: admission, prefill chunks, preemption. Pure functions, state in and decisions out.

Knows no tensors, no cache and no requests: only sizes, in tokens and in cache blocks. The sampler asks these
functions one after the other (`victims`, `fair_order`, `admissible`, `prefill_shares`, `fork_allowance`) and does
what they say. Nothing here depends on the clock or on chance.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace


@dataclass(frozen=True, slots=True)
class Growing:
    """A running sequence that needs `growth` blocks to go on; preempting it frees at least `private` blocks.

    `key` is its arrival number.
    """

    key: int
    growth: int
    private: int


LEAST_CHUNK = 32
"""Tokens of a prompt that a step runs however long the prompt's past is: fewer are not worth a step."""


@dataclass(frozen=True, slots=True)
class Prefilling:
    """A running sequence with `pending` tokens that have not been through the model yet.

    Each costs as much as `cost` tokens at the beginning of a prompt.
    """

    key: int
    tenant: str
    pending: int
    cost: int = 1


def victims(running: Sequence[Growing], available: int) -> list[int]:
    """Keys of the sequences to preempt, youngest first, so that all others can grow in `available` blocks.

    The oldest is never among them: alone it always fits, because longer requests are refused at the door.
    """
    survivors = sorted(running, key=lambda sequence: sequence.key)
    growth = sum(sequence.growth for sequence in survivors)
    chosen = []
    while growth > available and len(survivors) > 1:
        youngest = survivors.pop()
        chosen.append(youngest.key)
        growth -= youngest.growth
        available += youngest.private
    return chosen


def fair_order(running_tenants: Sequence[str], queues: Mapping[str, Sequence[int]], slots: int) -> list[int]:
    """The next at most `slots` waiting keys: always the tenant with the fewest running, each tenant in its own order.

    `running_tenants` has one entry per running sequence; `queues` maps each tenant to its waiting arrival numbers,
    ascending. Between equal tenants the longest waiting goes first.
    """
    running = Counter(running_tenants)
    heads = [(running[tenant], queue[0], tenant, 0) for tenant, queue in queues.items() if queue]
    heapify(heads)
    chosen: list[int] = []
    while heads and len(chosen) < slots:
        count, key, tenant, position = heads[0]
        chosen.append(key)
        if position + 1 < len(queues[tenant]):
            heapreplace(heads, (count + 1, queues[tenant][position + 1], tenant, position + 1))
        else:
            heappop(heads)
    return chosen


def admissible(costs: Iterable[int], available: int, running: int) -> int:
    """How many of the next sequences, which cost so many blocks each, may start now.

    Each running sequence keeps one block in reserve, so that an admission is not undone by the next step's growth.
    The first that doesn't fit ends it (no further cost is looked at): small requests never overtake a large one.
    """
    admitted = 0
    for cost in costs:
        if cost + running > available:
            break
        available -= cost
        running += 1
        admitted += 1
    return admitted


def prefill_shares(prefilling: Sequence[Prefilling], budget: int) -> dict[int, int]:
    """Tokens of each prefilling sequence to run now; they cost `budget` in all, divided fairly between tenants.

    A tenant gets an equal share or all it needs, whichever is less; within a tenant the oldest goes first. So a
    long prompt delays neither the decoding sequences (by more than `budget`) nor another tenant's short prompt. Only
    the last chunk of a tenant's share may cost more than what is left, if it would be shorter than `LEAST_CHUNK`.
    """
    by_tenant: dict[str, list[Prefilling]] = defaultdict(list)
    for sequence in sorted(prefilling, key=lambda sequence: sequence.key):
        by_tenant[sequence.tenant].append(sequence)
    needs = {tenant: sum(sequence.pending * sequence.cost for sequence in group) for tenant, group in by_tenant.items()}
    shares: dict[int, int] = {}
    poorest_first = sorted(needs, key=lambda tenant: (needs[tenant], by_tenant[tenant][0].key))
    for position, tenant in enumerate(poorest_first):
        share = min(needs[tenant], -(-budget // (len(needs) - position)))
        budget -= share
        for sequence in by_tenant[tenant]:
            if share <= 0:
                break
            shares[sequence.key] = min(sequence.pending, max(share // sequence.cost, min(share, LEAST_CHUNK)))
            share -= shares[sequence.key] * sequence.cost
    return shares


def fork_allowance(
    tenant: str, running_tenants: Sequence[str], waiting_tenants: Iterable[str], slots: int, available: int
) -> int:
    """How many further samples may branch off a prompt of `tenant` at once, of `slots` free places.

    Each takes one of the `available` blocks soon. Alone, a tenant may fill the batch; while others wait, it takes no
    more than its equal part.
    """
    slots = max(0, min(slots, available))
    others = set(waiting_tenants) - {tenant}
    if not others:
        return slots
    tenants = len(others | set(running_tenants) | {tenant})
    part = (len(running_tenants) + slots) // tenants
    return max(0, min(slots, part - Counter(running_tenants)[tenant]))
