"""Who runs in the next step: admission, prefill chunks, preemption. Pure functions, state in and decisions out.

Knows no tensors, no cache and no requests: only sizes, in tokens and in cache blocks. The sampler asks these
functions one after the other (`victims`, `tenant_weights`, `fair_order`, `reclaimed`, `admissible`, `prefill_shares`,
`fork_allowance`) and does what they say. Nothing here depends on the clock or on chance.

Every running sequence gets a token with each step, so tenants share tokens by sharing places in the batch, and prompt
tokens by sharing what a step runs of them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from math import ceil


@dataclass(frozen=True, slots=True)
class Growing:
    """A running sequence that needs `growth` blocks to go on; preempting it frees at least `private` blocks.

    `key` is its arrival number.
    """

    key: int
    growth: int
    private: int


@dataclass(frozen=True, slots=True)
class Holding:
    """A running sequence, and how many blocks at least suspending it frees. `key` is its arrival number."""

    key: int
    tenant: str
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


def tenant_weights(owners: Mapping[str, tuple[str, float]]) -> dict[str, float]:
    """Each tenant's part of its owner's weight, which all tenants of one owner have together.

    `owners` maps every tenant that has anything running or waiting to its owner and the owner's weight.
    """
    tenants = Counter(owner for owner, _ in owners.values())
    return {tenant: weight / tenants[owner] for tenant, (owner, weight) in owners.items()}


def fair_order(
    running_tenants: Sequence[str], queues: Mapping[str, Sequence[int]], slots: int, weights: Mapping[str, float]
) -> list[int]:
    """The next at most `slots` waiting keys: always the tenant that with one more running would have the fewest for its
    weight, each tenant in its own order.

    `running_tenants` has one entry per running sequence; `queues` maps each tenant to its waiting arrival numbers,
    ascending. Between equal tenants the longest waiting goes first.
    """
    running = Counter(running_tenants)
    heads = [
        ((running[tenant] + 1) / weights[tenant], queue[0], tenant, 0) for tenant, queue in queues.items() if queue
    ]
    heapify(heads)
    chosen: list[int] = []
    while heads and len(chosen) < slots:
        share, key, tenant, position = heads[0]
        chosen.append(key)
        if position + 1 < len(queues[tenant]):
            following = queues[tenant][position + 1]
            heapreplace(heads, (share + 1 / weights[tenant], following, tenant, position + 1))
        else:
            heappop(heads)
    return chosen


def reclaimed(
    running: Sequence[Holding], tenant: str, weights: Mapping[str, float], *, slots: int, blocks: int
) -> list[int]:
    """Keys of the sequences to suspend so that one of `tenant` finds `slots` more places and `blocks` more blocks.

    Always the youngest of the tenant that has most for its weight, as long as that has no less than `tenant`
    afterwards: so nobody takes back at once what was taken. None at all if they would not suffice.
    """
    counts = Counter(holding.tenant for holding in running)
    least = (counts[tenant] + 1) / weights[tenant]
    youngest_last: dict[str, list[Holding]] = defaultdict(list)
    for holding in sorted(running, key=lambda holding: holding.key):
        youngest_last[holding.tenant].append(holding)
    chosen: list[int] = []
    while slots > 0 or blocks > 0:
        donors = [other for other, count in counts.items() if (count - 1) / weights[other] >= least and other != tenant]
        if not donors:
            return []
        donor = max(donors, key=lambda other: (counts[other] / weights[other], youngest_last[other][-1].key))
        given = youngest_last[donor].pop()
        counts[donor] -= 1
        chosen.append(given.key)
        slots, blocks = slots - 1, blocks - given.private - 1
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


def prefill_shares(prefilling: Sequence[Prefilling], budget: int, weights: Mapping[str, float]) -> dict[int, int]:
    """Tokens of each prefilling sequence to run now; they cost `budget` in all, divided fairly between tenants.

    A tenant gets a share by its weight or all it needs, whichever is less; within a tenant the oldest goes first. So a
    long prompt delays neither the decoding sequences (by more than `budget`) nor another tenant's short prompt. Only
    the last chunk of a tenant's share may cost more than what is left, if it would be shorter than `LEAST_CHUNK`.
    """
    by_tenant: dict[str, list[Prefilling]] = defaultdict(list)
    for sequence in sorted(prefilling, key=lambda sequence: sequence.key):
        by_tenant[sequence.tenant].append(sequence)
    needs = {tenant: sum(sequence.pending * sequence.cost for sequence in group) for tenant, group in by_tenant.items()}
    shares: dict[int, int] = {}
    poorest_first = sorted(needs, key=lambda tenant: (needs[tenant] / weights[tenant], by_tenant[tenant][0].key))
    for position, tenant in enumerate(poorest_first):
        part = weights[tenant] / sum(weights[other] for other in poorest_first[position:])
        share = min(needs[tenant], ceil(budget * part))
        budget -= share
        for sequence in by_tenant[tenant]:
            if share <= 0:
                break
            shares[sequence.key] = min(sequence.pending, max(share // sequence.cost, min(share, LEAST_CHUNK)))
            share -= shares[sequence.key] * sequence.cost
    return shares


def fork_allowance(
    tenant: str,
    running_tenants: Sequence[str],
    waiting_tenants: Iterable[str],
    slots: int,
    available: int,
    weights: Mapping[str, float],
) -> int:
    """How many further samples may branch off a prompt of `tenant` at once, of `slots` free places.

    Each takes one of the `available` blocks soon. Alone, a tenant may fill the batch; while others wait, it takes no
    more than its part by weight.
    """
    slots = max(0, min(slots, available))
    others = set(waiting_tenants) - {tenant}
    if not others:
        return slots
    every = sum(weights[other] for other in others | set(running_tenants) | {tenant})
    part = int((len(running_tenants) + slots) * weights[tenant] / every)
    return max(0, min(slots, part - Counter(running_tenants)[tenant]))


def burst_steps(remaining: Sequence[int], *, prompts_wait: bool, prompts_left: bool, most: int) -> int:
    """How many tokens in a row, at most `most`, sequences may decode that have so many to go at most.

    Those that end earlier run on in vain, which costs less than stopping for each of them. Prompts wait for fewer; and
    for one only, if the pass beside it leaves prompts of every tenant that decodes: the sooner all have begun, the
    fewer steps there are of few rows. Nobody's tokens wait longer for the sake of others' prompts.
    """
    if prompts_left:
        return 1
    return min(max(remaining), max(1, most // 4) if prompts_wait else most)


def worth_going_on(alive: int, rows: int) -> bool:
    """Whether so few rows of a batch have ended that it may run on as it is; they cost as much as others."""
    return alive > 0 and 8 * alive >= 7 * rows
