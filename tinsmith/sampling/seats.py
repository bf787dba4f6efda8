"""Who runs and who waits, and the cache blocks that running samples hold.

Carries out what `scheduling` decides: admission, preemption, sharing of prefixes, copies on write. Knows samples and
blocks; neither the model nor tokens.
"""

from bisect import insort
from collections import defaultdict
from collections.abc import Sequence

from tinsmith.sampling import scheduling
from tinsmith.sampling.kv_cache import BlockPool, KVCache, chain_digests
from tinsmith.sampling.recurrent import StateStore
from tinsmith.sampling.requests import Request, Sample


class Seats:
    """The samples of all requests under way. `running` and `waiting` are by key, which is the order of arrival."""

    def __init__(
        self, pool: BlockPool, cache: KVCache, states: StateStore, *, max_running: int, is_recurrent: bool
    ) -> None:
        """The states of a recurrent model are not in the blocks, so that no prefix of it can be shared."""
        self.pool = pool
        self.running: dict[int, Sample] = {}
        self.waiting: dict[int, Sample] = {}
        self.prefilled = self.preempted = 0
        self._cache, self._states = cache, states
        self._block_size = cache.block_size
        self._most = max_running
        self._recurrent = is_recurrent
        self._queues: dict[str, list[int]] = defaultdict(list)  # by tenant, the keys of `waiting` in order

    def check(self, max_context: int) -> None:
        """Raises AssertionError unless cache and samples agree."""
        self.pool.check(sample.blocks for sample in self.running.values())
        assert all(not sample.blocks and not sample.computed for sample in self.waiting.values())
        assert sorted(self.waiting) == sorted(key for queue in self._queues.values() for key in queue)
        assert len(self.running) <= self._most
        begun = [key for key, sample in self.running.items() if sample.computed]
        self._states.check(begun if self._recurrent else [])
        for sample in self.running.values():
            assert sample.computed < sample.length <= max_context
            assert sample.computed <= len(sample.blocks) * self._block_size

    def enqueue(self, sample: Sample) -> None:
        """Makes a sample wait in its tenant's queue, at the place of its arrival."""
        self.waiting[sample.key] = sample
        insort(self._queues[sample.tenant], sample.key)

    def dequeue(self, sample: Sample) -> None:
        del self.waiting[sample.key]
        queue = self._queues[sample.tenant]
        queue.remove(sample.key)
        if not queue:
            del self._queues[sample.tenant]

    def growth(self, sample: Sample, rows: int = 1) -> int:
        """Blocks that the sample needs before its next rows: new ones, and its own copy of a shared one."""
        first, last = (row // self._block_size for row in (sample.computed, sample.computed + rows - 1))
        shared = first < len(sample.blocks) and self.pool.references(sample.blocks[first]) > 1
        return max(0, last + 1 - len(sample.blocks)) + int(shared)

    def _private(self, sample: Sample) -> int:
        """Blocks that nobody else holds."""
        return sum(self.pool.references(block) == 1 for block in sample.blocks)

    def weights(self) -> dict[str, float]:
        """Of the tenants that run or wait."""
        waiting = (self.waiting[queue[0]] for queue in self._queues.values())
        calls = (sample.request.call for sample in (*self.running.values(), *waiting))
        return scheduling.tenant_weights({call.tenant: (call.owner or call.tenant, call.weight) for call in calls})

    def preempt(self) -> None:
        """Suspends as many samples as it takes for the others to go on."""
        growth = {key: self.growth(sample) for key, sample in self.running.items()}
        if sum(growth.values()) <= self.pool.available:
            return
        growing = [scheduling.Growing(key, growth[key], self._private(sample)) for key, sample in self.running.items()]
        for key in scheduling.victims(growing, self.pool.available):
            self.suspend(self.running[key])

    def suspend(self, sample: Sample) -> None:
        """Makes a running sample wait again; what it has computed remains only as far as the cache keeps it."""
        self.preempted += 1
        del self.running[sample.key]
        self.release(sample)
        self.enqueue(sample)

    def admit(self) -> None:
        """Lets those run who fit, in the tenants' turn."""
        if not self.waiting:
            return
        weights = self.weights()
        tenants = [sample.tenant for sample in self.running.values()]
        slots = max(1, self._most - len(self.running))
        candidates = [self.waiting[key] for key in scheduling.fair_order(tenants, self._queues, slots, weights)]
        self._reclaim(candidates[0], weights)
        candidates = candidates[: self._most - len(self.running)]
        growth = sum(self.growth(sample) for sample in self.running.values())
        costs = (self._cost(sample) for sample in candidates)
        admitted = scheduling.admissible(costs, self.pool.available - growth, len(self.running))
        for sample in candidates[:admitted]:
            self.dequeue(sample)
            self._start(sample)

    def _reclaim(self, sample: Sample, weights: dict[str, float]) -> None:
        """Makes room for a sample that has none, if tenants that have more than its tenant can give it."""
        growth = sum(self.growth(other) for other in self.running.values())
        blocks = self._cost(sample) + len(self.running) + growth - self.pool.available
        slots = 1 + len(self.running) - self._most
        if blocks <= 0 and slots <= 0:
            return
        held = [scheduling.Holding(key, other.tenant, self._private(other)) for key, other in self.running.items()]
        for key in scheduling.reclaimed(held, sample.tenant, weights, slots=slots, blocks=blocks):
            self.suspend(self.running[key])

    def _start(self, sample: Sample) -> None:
        blocks = self._reusable(sample)
        sample.blocks = self.pool.allocate(self._blocks_for(sample) - len(blocks), blocks)
        sample.computed = len(blocks) * self._block_size
        sample.digests = sample.known_digests[: len(blocks)]
        if sample.request.cache_hit_tokens is None:
            sample.request.cache_hit_tokens = sample.computed
        self.running[sample.key] = sample

    def _cost(self, sample: Sample) -> int:
        """What `_start` takes out of the available blocks."""
        shared = self._reusable(sample)
        return self.pool.cost(self._blocks_for(sample) - len(shared), shared)

    def _blocks_for(self, sample: Sample) -> int:
        return -(-sample.length // self._block_size)

    def _reusable(self, sample: Sample) -> list[int]:
        """Cached blocks of the sample's beginning; its last token, and prompt rows to be scored, must run again.

        A recurrent model must run all of it: its states are not in the blocks.
        """
        if self._recurrent:
            return []
        limit = min(sample.length - 1, sample.request.scores.next_row) // self._block_size
        return self.pool.match(sample.known_digests[:limit])

    def release(self, sample: Sample, *, forget: bool = False) -> None:
        """Gives a sample's blocks back."""
        self.pool.release(sample.blocks, forget=forget)
        self._states.drop(sample.key)
        sample.blocks, sample.computed = [], 0

    def drop(self, request: Request, *, forget: bool) -> None:
        """Takes all of a request's samples out."""
        for sample in request.samples:
            if self.running.pop(sample.key, None):
                self.release(sample, forget=forget)
            elif sample.key in self.waiting:
                self.dequeue(sample)

    def make_room(self, samples: Sequence[Sample], rows: int) -> None:
        """Gives every sample blocks of its own for its next rows."""
        sources, targets = [], []
        for sample in (sample for sample in samples if self.growth(sample, rows)):
            index = sample.computed // self._block_size
            if index < len(sample.blocks) and self.pool.references(sample.blocks[index]) > 1:
                block = self.pool.allocate(1)[0]
                sources.append(sample.blocks[index])
                targets.append(block)
                self.pool.release([sample.blocks[index]])
                sample.blocks[index] = block
            sample.blocks += self.pool.allocate(self.growth(sample, rows))
        if sources:
            self._cache.copy_blocks(sources, targets)

    def advance(self, sample: Sample, rows: int) -> None:
        """Counts rows as computed, and makes the blocks that they filled known for reuse."""
        if (left := len(sample.request.prompt) - sample.computed) > 0:
            self.prefilled += min(rows, left)
        sample.computed += rows
        for index in range(len(sample.digests), sample.computed // self._block_size):
            parent = sample.digests[-1] if index else sample.request.root
            tokens = sample.slice(index * self._block_size, (index + 1) * self._block_size)
            sample.digests += chain_digests(parent, tokens, self._block_size)
            self.pool.register(sample.blocks[index], sample.digests[index])

    def fork(self, leader: Sample) -> list[Sample]:
        """The samples that go on from the prompt that `leader` has just run, sharing its blocks; the others wait."""
        request = leader.request
        if request.forked:
            return []
        request.forked = True
        waiting = request.samples[1:]
        if not waiting:
            return []
        tenants = [sample.tenant for sample in self.running.values()]
        growth = sum(self.growth(sample) for sample in self.running.values())
        allowed = scheduling.fork_allowance(
            leader.tenant,
            tenants,
            self._queues,
            self._most - len(self.running),
            self.pool.available - growth - len(self.running),
            self.weights(),
        )
        for sample in waiting[:allowed]:
            sample.blocks = self.pool.allocate(0, leader.blocks)
            sample.digests, sample.computed = leader.digests.copy(), leader.computed
            self._states.fork(leader.key, sample.key)
            self.running[sample.key] = sample
        for sample in waiting[allowed:]:
            self.enqueue(sample)
        return waiting[:allowed]
